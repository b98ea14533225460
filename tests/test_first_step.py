"""A generation that begins in the middle of the schedule counts its steps from where it begins."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from conftest import build_tiny
from sostenuto import FORA, PAB, DBCache, DeltaDiT, DuCa, MagCache, TeaCache, ToCa
from sostenuto.methods.base import Facts

FIRST, STEPS = 5, 17
EVENLY = {"selection": "random", "threshold_weight": 0.0, "middle_interval": None, "ratio_schedule": "constant"}


@pytest.mark.parametrize(
    "method",
    [
        FORA(3, anchor="start"),
        FORA(3),
        PAB(3, 3, 3, (0, 1000)),
        DeltaDiT(3, switch_step=1.0, num_cached_blocks=1),
        MagCache((1.0,) * 4, threshold=0.1, max_consecutive=2, retention=0.3),
        ToCa(4, anchor="start", first_full_steps=3, **EVENLY),
        DuCa(4, anchor="last-full", first_full_steps=3, **EVENLY),
    ],
)
def test_what_is_left_of_the_schedule_is_planned_as_a_schedule_of_its_own(method):
    denoiser, scheduler = build_tiny(), DDPMScheduler()
    timesteps = tuple(torch.linspace(999, 1, STEPS).tolist())
    sites = method.prepare(denoiser, scheduler).sites(denoiser)

    def actions(timesteps, first_step):
        return method.plan(Facts(sites, timesteps, denoiser, scheduler, first_step)).actions[first_step:]

    assert actions(timesteps, FIRST) == actions(timesteps[FIRST:], 0)


@pytest.mark.parametrize("method", [DBCache(1, 0, 1.0, warmup=3), TeaCache(threshold=9.0, first_steps=3)])
def test_what_decides_as_it_goes_warms_up_from_there(method):
    facts = Facts([], tuple(range(STEPS, 0, -1)), build_tiny(), DDPMScheduler(), FIRST)
    policy = method.policy(facts)
    skips = [policy.skips(step, STEPS, torch.ones(1, 2, 3), (step - 1,)) for step in range(FIRST, STEPS - 1)]
    assert skips == [False] * 3 + [True] * (STEPS - 1 - FIRST - 3)
