"""Random sequences of what users do, every generation compared with a naive sampler; benchmarks/reliability.py runs longer."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from recipes import BRANCHES, Recipe
from sampling_machine import COUNTS, SCHEDULERS, Generation, SamplingMachine, Setup
from sostenuto import Action, CacheTable, EBCache

ONE_GENERATION = Generation(
    steps=3,
    guidance="none",
    interval=(0, 0),
    swapped=frozenset(),
    batch=1,
    size=8,
    first=0,
    stop=None,
    fails=None,
    retries=False,
    second=True,
    thread=False,
    fitting=False,
    reads_statistics=False,
    switches_offloading=False,
)


def test_random_sequences_of_what_users_do_agree_with_a_naive_sampler():
    COUNTS.clear()
    quick = settings(
        max_examples=10,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(SamplingMachine, settings=quick)
    assert COUNTS["denoiser calls compared"] > 50


def two_steps() -> Recipe:
    rows = (dict.fromkeys(BRANCHES, Action.COMPUTE),) * 2
    return Recipe("table", EBCache(CacheTable(rows, method="eb")), lambda *_: [{}] * 2, 1, steps=2)


def test_a_repeated_call_may_be_refused_for_another_reason():
    """Two pipelines have both set their timesteps; the call is repeated, with other steps than the table has."""
    setup = Setup()
    setup.enable(two_steps())
    setup.generate(replace(ONE_GENERATION, fitting=True))
    for pipe in setup.pipes:
        pipe.scheduler = SCHEDULERS["ddpm"]()
    before = COUNTS["calls refused"]
    setup.generate(ONE_GENERATION)
    assert COUNTS["calls refused"] == before + 2
    setup.disable()


def test_an_offloaded_network_is_copied_without_its_hooks():
    """Those of accelerate can't be pickled, whether or not something is enabled."""
    machine = SamplingMachine()
    machine.begin()
    for _ in range(2):
        machine.setup.switch_offloading()
        before = COUNTS["copies"]
        machine.copy(pickled=True)
        assert COUNTS["copies"] == before + 1
        assert not machine.enabled
        machine.setup.enable(two_steps())
    machine.teardown()
