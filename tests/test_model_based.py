"""Random sequences of what users do, every generation compared with a naive sampler; benchmarks/reliability.py runs longer."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from sampling_machine import COUNTS, SamplingMachine


def test_random_sequences_of_what_users_do_agree_with_a_naive_sampler():
    COUNTS.clear()
    quick = settings(
        max_examples=30,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(SamplingMachine, settings=quick)
    assert COUNTS["denoiser calls compared"] > 50
