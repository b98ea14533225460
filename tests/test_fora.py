"""FORA's published settings: what they compute is what the published costs say."""

from dataclasses import replace

import pytest
import torch

from sostenuto import FORA, Site, SiteKind
from sostenuto.methods.base import Facts
from sostenuto.plan import Action


def computed_steps(method, num_steps):
    sites = [Site("blocks.0.ff", SiteKind.MLP, 0, None, 0)]
    plan = method.plan(Facts(sites, tuple(range(num_steps, 0, -1)), torch.nn.Identity(), None))
    return [step for step, row in enumerate(plan.actions) if row[0] is Action.COMPUTE]


@pytest.mark.parametrize(
    ("method", "num_steps", "steps"),
    [
        (FORA.dit_xl_2(), 50, [0, *range(1, 50, 3)]),  # descending index a multiple of 3, and the first
        (FORA.pixart_alpha(), 20, [0, *range(1, 20, 3)]),
        (FORA.flux_dev(), 50, [0, *range(1, 50, 3)]),
        (FORA.hunyuan_video(), 50, list(range(0, 50, 5))),
        (FORA.qwen_image(), 50, list(range(0, 50, 4))),
    ],
)
def test_presets_compute_the_steps_that_were_published(method, num_steps, steps):
    assert computed_steps(method, num_steps) == steps


@pytest.mark.parametrize(
    ("method", "speedup"),
    [
        (FORA.dit_xl_2(), 2.77),
        (replace(FORA.flux_dev(), interval=6), 4.99),  # that of N = 3, 2.82, is between 17 and 18 computed steps
        (FORA.hunyuan_video(), 5.00),
        (FORA.qwen_image(), 3.84),
    ],
)
def test_the_published_speedup_in_flops_follows_from_the_computed_steps(method, speedup):
    ideal = 50 / len(computed_steps(method, 50))
    assert speedup - 0.01 < ideal < speedup * 1.05  # a reused step is not quite free
