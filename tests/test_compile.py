"""A compiled denoiser with a plan attached: no graph break, one graph for each distinct mode, the same outputs."""

import threading

import pytest
import torch
from torch._dynamo.utils import counters

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import CacheTable, EBCache, EngineError, StepState, TeaCache, compat

C, A, M, B = StepState
STATES = (C, B, A, C, B, M, B, C, C)
# Modes: store all, reuse both, reuse attention storing MLP …, lowered by liveness.


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("form", "order"),
    [
        pytest.param("in-place", 0, marks=pytest.mark.slow),
        ("wrapper", 0),
        pytest.param("in-place", 1, marks=pytest.mark.slow),
        pytest.param("wrapper", 1, marks=pytest.mark.slow),
    ],
)
def test_one_graph_per_mode_without_a_break(scheduler, form, order):
    model = build_tiny(num_layers=2)
    with sostenuto.enable(model, EBCache(CacheTable(STATES, forecast_order=order)), scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, len(STATES))
    if form == "in-place":
        model.compile(fullgraph=True, backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sostenuto.enable(compiled, EBCache(CacheTable(STATES, forecast_order=order)), scheduler=scheduler) as handle:
        got, _ = sample_loop(compiled, scheduler, len(STATES))
        modes = {ops for _, _, _, ops in handle._record.calls}
        after_one = counters["stats"]["unique_graphs"]
        sample_loop(compiled, scheduler, len(STATES), seed=3)
        assert counters["stats"]["unique_graphs"] == after_one == len(modes)
        assert not counters["graph_break"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    restored, _ = sample_loop(compiled, scheduler, 3)
    torch._dynamo.reset()
    fresh = torch.compile(build_tiny(num_layers=2), fullgraph=True, backend="aot_eager")
    stock, _ = sample_loop(fresh, scheduler, 3)
    assert torch.equal(restored, stock)


@pytest.mark.parametrize("after_a_generation", [pytest.param(value, marks=pytest.mark.slow) for value in (False, True)])
def test_compiling_in_place_after_enabling_is_as_before_it(scheduler, after_a_generation):
    model, method = build_tiny(num_layers=2), EBCache(CacheTable(STATES))
    with sostenuto.enable(model, method, scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, len(STATES))
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        if after_a_generation:
            sample_loop(model, scheduler, len(STATES))
        model.compile(fullgraph=True, backend="aot_eager")
        got, _ = sample_loop(model, scheduler, len(STATES))
        modes = {ops for _, _, _, ops in handle._record.calls}
        assert counters["stats"]["unique_graphs"] == len(modes)
        assert not counters["graph_break"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert compat.is_compiled(model)
    assert "compile" not in vars(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_compiling_in_place_is_refused_where_the_method_looks_into_the_network_which_stays_as_it_was(scheduler):
    model = build_tiny(num_layers=2)
    with sostenuto.enable(model, TeaCache(threshold=1.0), scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, 3)
        with pytest.raises(sostenuto.MethodError, match="compiled denoiser can't"):
            model.compile(backend="eager")
        assert torch.equal(sample_loop(model, scheduler, 3)[0], expected)


def test_a_wrapper_that_compiles_around_an_enabled_network_is_refused_not_silently_wrong(scheduler):
    wrapped = build_tiny(num_layers=1)
    with sostenuto.enable(wrapped, "none", scheduler=scheduler):
        compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
        with pytest.raises((EngineError, torch._dynamo.exc.TorchDynamoException), match="enable"):
            sample_loop(compiled, scheduler, 2)


def test_a_network_runs_while_another_thread_compiles_one(scheduler):
    """``torch.compiler.is_compiling`` is one flag for all threads."""
    model = build_tiny(num_layers=2)
    with sostenuto.enable(model, TeaCache((1.0, 0.0), threshold=5.0), scheduler=scheduler) as handle:
        expected, _ = sample_loop(model, scheduler, 4)
        stats = handle.stats.as_dict()
        during = []

        def backend(graph, _):
            if not during:
                sampling = threading.Thread(target=lambda: during.append(sample_loop(model, scheduler, 4)[0]))
                sampling.start()
                sampling.join()
            return graph

        other = torch.compile(torch.nn.Linear(2, 2), backend=backend)
        other(torch.zeros(1, 2))
        assert torch.equal(during[0], expected)
        assert handle.stats.as_dict() == stats
