"""TaylorSeer against the naive oracle, on branches and on the hidden states alone."""

import pytest
import torch
from torch._dynamo.utils import counters

import oracle
import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import MethodError, TaylorSeer
from sostenuto.methods.base import Facts
from test_engine import run_oracle
from test_forecast import official_taylor


def computed(method, num_steps, first_step=0, num_sites=1):
    facts = Facts([None] * num_sites, tuple(range(num_steps, 0, -1)), None, None, first_step)
    return [p for p, row in enumerate(method.plan(facts).actions) if row[0].value == "compute"]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (TaylorSeer.dit_xl_2(), [0, 1, *range(4, 50, 3)]),
        (TaylorSeer.flux_dev(), [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),
        (TaylorSeer.hunyuan_video(), list(range(0, 50, 5))),
        (TaylorSeer.hidream(), list(range(0, 50, 4))),
        (TaylorSeer.qwen_image(3), [0, 1, *range(2, 50, 3)]),
        (TaylorSeer(interval=6, first_enhance=3, compute_last=True), [0, 1, 2, 8, 14, 20, 26, 32, 38, 44, 49]),
        (TaylorSeer(interval=1), list(range(50))),
    ],
)
def test_computed_steps(method, expected):
    assert computed(method, 50) == expected


def test_a_generation_that_begins_later_counts_its_steps_from_there():
    assert [p for p in computed(TaylorSeer(interval=4, first_enhance=2), 20, first_step=7) if p >= 7] == [7, 8, 12, 16]


@pytest.mark.parametrize("differences", ["divided", "last-gap"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_branches_are_what_the_naive_oracle_forecasts(tiny, scheduler, monkeypatch, differences, order):
    """With uneven spacing: 0, 1, 4, 7, 9. The oracle keeps the whole history and, for last-gap, runs the official recursion."""
    method = TaylorSeer(3, order, first_enhance=2, compute_last=True, differences=differences)
    steps = computed(method, 10)
    assert steps == [0, 1, 4, 7, 9]
    depth = order
    if differences == "last-gap":
        depth = 98  # hands the whole history to:

        def recursion(past, step):
            points = [(at, value.double()) for at, value in reversed(past)]
            return official_taylor(points, step, order).float()

        monkeypatch.setattr(oracle, "extrapolate", recursion)
    expected, _ = run_oracle(tiny, scheduler, lambda site, step: step not in steps, 10, depth)
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(tiny, scheduler, 10)
        plan = handle.stats.plan
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert [p for p, row in enumerate(plan) if set(row) == {"compute"}] == steps
    assert all("compute" not in row for p, row in enumerate(plan) if p not in steps)


class NaiveHead(torch.nn.Module):
    """The stock network whose blocks are cut out by hand: their last output comes from a list."""

    def __init__(self, model, scheduler, steps, order):
        super().__init__()
        self.model, self.scheduler, self.steps, self.order, self.past = model, scheduler, steps, order, []

    def forward(self, latents, timestep, labels):
        step = [float(t) for t in self.scheduler.timesteps].index(float(timestep[0]))
        last, hidden = self.model.transformer_blocks[-1], {}
        if step in self.steps:
            hook = last.register_forward_hook(lambda *args: hidden.update(out=args[2].clone()))
        else:
            hidden["out"] = oracle.extrapolate(self.past[: self.order + 1], step)
            hook = last.register_forward_hook(lambda *_: hidden["out"])
        output = self.model(latents, timestep, labels)
        hook.remove()
        if step in self.steps:
            self.past.insert(0, (step, hidden["out"]))
        return output


@pytest.mark.parametrize("order", [0, 1, 2])
def test_lite_forecasts_the_last_hidden_states_alone(tiny, scheduler, order):
    method = TaylorSeer(3, order, first_enhance=2, lite=True)
    expected, _ = sample_loop(NaiveHead(build_tiny(), scheduler, [0, 1, 4, 7], order), scheduler, 10)
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(tiny, scheduler, 10)
        stats = handle.stats
        assert stats.cache_bytes_peak == (order + 1) * 2 * 16 * 32 * 4  # tensors of [2, 16, 32] in all
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [row[0] != "compute" for row in stats.plan] == [p not in (0, 1, 4, 7) for p in range(10)]


@pytest.mark.parametrize("lite", [False, True])
def test_interval_1_is_bit_identical_to_the_stock_model(tiny, scheduler, lite):
    stock, _ = sample_loop(tiny, scheduler)
    with sostenuto.enable(tiny, TaylorSeer(interval=1, lite=lite), scheduler=scheduler) as handle:
        cached, _ = sample_loop(tiny, scheduler)
        assert handle.stats.ideal_speedup == 1
    assert torch.equal(stock, cached)


def test_counted_macs_fall_by_the_skipped_branches(tiny, scheduler):
    with sostenuto.enable(tiny, TaylorSeer(3, 2, first_enhance=2), scheduler=scheduler) as handle:
        sample_loop(tiny, scheduler, 10)
        cost, stats = handle._dry_runs.cost(0), handle.stats
    assert stats.macs_uncached == 10 * cost.macs
    assert stats.macs == 10 * cost.macs - 6 * sum(cost.site_macs)
    assert stats.cache_bytes_peak == 6 * 3 * 2 * 16 * 32 * 4  # branches, outputs of each, [2, 16, 32]


def test_an_interrupted_generation_leaves_nothing_to_the_next(tiny, scheduler):
    method = TaylorSeer(3, 2, first_enhance=1)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        expected, _ = sample_loop(tiny, scheduler, 8, seed=5)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(tiny, scheduler, 8, seed=1, stop_at=5)
        got, _ = sample_loop(tiny, scheduler, 8, seed=5)
    assert torch.equal(expected, got)


@pytest.mark.parametrize(("lite", "order"), [(False, 1), pytest.param(True, 2, marks=pytest.mark.slow)])
def test_a_compiled_denoiser_has_one_graph_per_mode(scheduler, lite, order):
    torch._dynamo.reset()
    counters.clear()
    method = TaylorSeer(3, order, first_enhance=2, lite=lite)
    model = build_tiny(num_layers=1)
    with sostenuto.enable(model, method, scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, 9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with sostenuto.enable(compiled, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(compiled, scheduler, 9)
        weights = {len(read) for rows in handle._passes[0].program.history for read in rows if len(read) > 1}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 + len(weights)  # store; forecast from two, from three
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(interval=0), "interval must be a whole number of 1 or more, not 0"),
        (dict(order=5), "order must be a whole number from 0 to 4, not 5"),
        (dict(first_enhance=0), "first_enhance must be a whole number of 1 or more"),
        (dict(lite="false"), "lite is true or false, not 'false'"),
        (dict(compute_last=1), "compute_last is true or false, not 1"),
        (dict(differences="newton"), "differences must be one of divided, last-gap, not 'newton'"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        TaylorSeer(**wrong)
