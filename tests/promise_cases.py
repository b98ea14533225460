"""One example of every method for the promise matrix: on a tiny network, with a setting that skips and one that doesn't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DDPMScheduler
from torch import nn

from conftest import build_tiny
from sostenuto import FORA, Action, CacheTable, DiTFastAttn, EBCache, EpsilonScaling, NoCache, StepState
from sostenuto.methods.base import Method

C, A, M, B = StepState
ALL_COMPUTED = CacheTable((C,) * 6)
TABLE = CacheTable((C, B, A, C, B, C), eps_scale=(0.98,) * 6)


def _attention(letters: str) -> CacheTable:
    """All three self-attentions of the tiny network compute, reuse or run over a window together."""
    actions = {"C": Action.COMPUTE, "R": Action.REUSE, "W": Action.WINDOW}
    return CacheTable(
        tuple({f"transformer_blocks.{block}.attn1": actions[letter] for block in range(3)} for letter in letters)
    )


@dataclass(frozen=True)
class Case:
    """A method under test."""

    name: str
    method: Callable[[], Method]
    neutral: Callable[[], Method] | None
    """The same with nothing skipped or changed."""
    build: Callable[[], nn.Module] = build_tiny
    skips: bool = True
    inner: str = "transformer_blocks.1.ff"
    """A module deep inside."""

    def inner_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.inner)


CASES = [
    Case("none", NoCache, NoCache, skips=False),
    Case("eb", lambda: EBCache(TABLE), lambda: EBCache(ALL_COMPUTED)),
    Case("fora", lambda: FORA(2), lambda: FORA(1)),
    Case("ditfastattn", lambda: DiTFastAttn(_attention("CWRWCR"), 3), lambda: DiTFastAttn(_attention("CCCCCC"), 3)),
    Case("epsilon-scaling", EpsilonScaling, lambda: EpsilonScaling(1.0), skips=False),
    Case("fora | epsilon-scaling", lambda: FORA(2) | EpsilonScaling(1.01), lambda: FORA(1) | EpsilonScaling(1.0)),
]


def build(case: Case) -> nn.Module:
    return case.build()


def new_scheduler(case: Case) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
