"""A compiled denoiser with a plan attached: no graph break, one graph for each distinct mode, the same outputs."""

import pytest
import torch
from torch._dynamo.utils import counters

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import CacheTable, EBCache, EngineError, StepState

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
    [("in-place", 0), ("wrapper", 0), ("in-place", 1), pytest.param("wrapper", 1, marks=pytest.mark.slow)],
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


def test_compiling_after_enabling_is_refused_not_silently_wrong(scheduler):
    model = build_tiny(num_layers=1)
    with sostenuto.enable(model, "none", scheduler=scheduler):
        model.compile(fullgraph=True, backend="eager")
        with pytest.raises((EngineError, torch._dynamo.exc.TorchDynamoException), match="enable"):
            sample_loop(model, scheduler, 2)
    wrapped = build_tiny(num_layers=1)
    with sostenuto.enable(wrapped, "none", scheduler=scheduler):
        compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
        with pytest.raises((EngineError, torch._dynamo.exc.TorchDynamoException), match="enable"):
            sample_loop(compiled, scheduler, 2)
