"""Processes that share a denoiser's tokens decide alike, and make what one process makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers.hooks.context_parallel")

pytestmark = pytest.mark.slow  # two processes with a network each, for over half a minute


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found: for each case the gap to one process, and the decisions of one and of both."""
    store, here = tmp_path_factory.mktemp("parallel") / "store", Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "parallel.py")]
    processes = [subprocess.Popen([*command, str(rank), str(store)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=280) for process in processes] == [0, 0]
    return [json.loads(Path(f"{store}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", ["fora", "teacache", "dbcache"])
@pytest.mark.parametrize("network", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_context_parallelism_set_up_before_or_after_changes_no_decision_and_no_output(found, network, method, order):
    for rank in range(2):
        gap, plan, own_plan, size, own_size = found[rank][f"{network} {method} {order}"]
        assert gap < 1e-5
        assert own_plan == plan
        assert "reuse" in plan
        assert own_size == size / 2  # each keeps the features of its own tokens


@pytest.mark.parametrize("method", ["teacache", "dbcache"])
def test_a_network_sharded_by_other_means_decides_alike_within_sharded_over(found, method):
    alone = []
    for rank in range(2):
        gap, plan, own_plan, without = found[rank][f"own {method}"]
        assert gap < 1e-5
        assert own_plan == plan
        alone.append(without)
    assert alone[0] != alone[1]  # the parts by themselves would have disagreed


@pytest.mark.parametrize("method", ["eb", "dbcache", "toca"])
def test_weights_split_over_processes_change_no_decision_and_no_output(found, method):
    for rank in range(2):
        gap, (plan, size, share), (own_plan, own_size, own_share), collectives = found[rank][f"weights {method}"]
        assert gap < 1e-4
        assert own_plan == plan
        assert ("partial" if method == "toca" else "reuse") in {action for row in plan for action in row}
        assert own_size == size  # what a branch adds is whole on every process
        assert own_share == pytest.approx(share, abs=0.1)  # of this process's multiply-accumulates
        if method != "dbcache":
            assert collectives == 1  # at the start of the generation; a plan that is known needs no more


@pytest.mark.parametrize("case", ["differ", "differ in tokens", "differ at run time"])
def test_processes_that_would_do_different_things_are_told_before_the_first_step(found, case):
    for rank in range(2):
        kind, words = found[rank]["refusals"][case]
        assert kind == "EngineError"
        assert "the 2 processes that make this generation together disagree, they have different plans" in words


def test_a_process_that_refuses_lets_the_others_know(found):
    assert found[1]["refusals"]["one refuses"] == ["MethodError", "process 1 has reasons of its own"]
    kind, words = found[0]["refusals"]["one refuses"]
    assert kind == "EngineError"
    assert "one of them refused" in words


def test_choices_among_tokens_that_processes_would_make_differently_are_refused(found):
    for rank in range(2):
        refusals = found[rank]["refusals"]
        assert refusals["scored tokens"][0] == refusals["split tokens"][0] == "MethodError"
        assert 'selection="random"' in refusals["scored tokens"][1]
        assert "sees only its part under context parallelism: use fresh_ratio=0" in refusals["split tokens"][1]
        assert refusals["no tokens"][0] == ""
