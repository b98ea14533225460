"""AB-Cache against a naive loop that calls the stock network at computed steps and extrapolates by other formulas."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)

import oracle
import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import ABCache, EpsilonScaling, MethodError
from sostenuto.compat import diffusers_name
from sostenuto.methods.ab import abscissae
from sostenuto.methods.base import Facts

PUBLISHED = [0, 1, 2, 3, 4, 6, 12, 18, 24, 30, 36, 42, 48]


def computed(method, num_steps, first_step=0):
    facts = Facts([None], tuple(range(num_steps, 0, -1)), None, DDIMScheduler(), first_step)
    return [p for p, (action,) in enumerate(method.plan(facts).actions) if action.value == "compute"]


@torch.no_grad()
def loop(model, scheduler, num_steps, seed=0, fused_guidance=None):
    """A sampler's own loop for any scheduler: scaled input, one prediction per listed timestep, ``step`` as usual."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 2, 8, 8, generator=generator)
    labels = torch.tensor([1, 4])
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        if fused_guidance is None:
            noise = model(inputs, timestep.expand(2), labels).sample
        else:
            both = torch.cat([labels, torch.full_like(labels, 10)])
            cond, uncond = model(torch.cat([inputs, inputs]), timestep.expand(4), both).sample.chunk(2)
            noise = uncond + fused_guidance * (cond - uncond)
            if isinstance(model, Naive):
                noise = model.guided(noise)
        latents = scheduler.step(noise[:, :2], timestep, latents, return_dict=False)[0]
    return latents


class Naive(torch.nn.Module):
    """The stock network; at a skipped call the polynomial through what it returned before, at the given places."""

    def __init__(self, model, steps, places, order, guidance=False):
        super().__init__()
        self.model, self.steps, self.places, self.order = model, steps, places, order
        self.past, self.call, self.guidance = [], -1, guidance

    def forward(self, *args):
        self.call += 1
        if self.call in self.steps or self.guidance:
            output = self.model(*args).sample
            if not self.guidance:
                self.past.insert(0, (self.places[self.call], output))
        else:
            output = oracle.extrapolate(self.past[: self.order], self.places[self.call])
        return type("Out", (), {"sample": output})

    def guided(self, noise):
        if self.call in self.steps:
            self.past.insert(0, (self.places[self.call], noise))
            return noise
        return oracle.extrapolate(self.past[: self.order], self.places[self.call])


def test_the_published_steps_are_13_of_50(tiny, scheduler):
    assert computed(ABCache.flux_dev(), 50) == computed(ABCache(), 50) == PUBLISHED
    assert computed(ABCache(compute_last=True), 50) == [*PUBLISHED, 49]
    assert [p for p in computed(ABCache(), 20, first_step=8) if p >= 8] == [8, 9, 10, 11, 12, 14]
    with sostenuto.enable(tiny, "ab", scheduler=scheduler) as handle:
        sample_loop(tiny, scheduler, 50)
        stats = handle.stats
    assert [p for p, row in enumerate(stats.plan) if row == ["compute"]] == PUBLISHED
    assert stats.macs * 50 == stats.macs_uncached * 13
    assert stats.cache_bytes_peak == 2 * 2 * 2 * 8 * 8 * 4  # the outputs of two steps, [2, 2, 8, 8]


@pytest.mark.parametrize(
    ("build", "kind", "place"),
    [
        (lambda: DDIMScheduler(), "step", lambda s, p: p),
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), "sigma", lambda s, p: float(s.timesteps[p]) / 1000),
        (
            lambda: DPMSolverMultistepScheduler(),
            "lambda",  # from the training grid, not from the solver's own sigmas
            lambda s, p: 0.5 * math.log(float(a := s.alphas_cumprod.double()[int(s.timesteps[p])]) / (1 - float(a))),
        ),
        (
            lambda: UniPCMultistepScheduler(),
            "lambda",
            lambda s, p: 0.5 * math.log(float(a := s.alphas_cumprod.double()[int(s.timesteps[p])]) / (1 - float(a))),
        ),
        (lambda: HeunDiscreteScheduler(), "step", lambda s, p: p),
        (
            lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True),
            "sigma",
            lambda s, p: 1 - float(s.timesteps[p]) / 1000,
        ),
        (lambda: EDMDPMSolverMultistepScheduler(), "lambda", lambda s, p: -4 * float(s.timesteps[p])),
        (lambda: EDMEulerScheduler(), "step", lambda s, p: p),
    ],
    ids=["ddim", "flow-euler", "dpm-solver++", "unipc", "heun", "rising-flow", "edm-dpm-solver++", "edm-euler"],
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_lagrange_is_the_naive_extrapolation_with_every_scheduler(tiny, build, kind, place, order):
    """Heun lists every timestep but the first twice and steps twice through it: calls are counted, not timesteps."""
    method, scheduler = ABCache(order, warmup=2, interval=3), build()
    num_steps = 6 if kind == "step" else 9
    scheduler.set_timesteps(num_steps)
    calls = len(scheduler.timesteps)
    places = [place(scheduler, p) for p in range(calls)]
    got_places = abscissae("auto", scheduler, scheduler.timesteps.tolist())
    assert got_places == pytest.approx(places, rel=1e-4)
    steps = [p for p in range(calls) if p < 2 or p % 3 == 0]
    expected = loop(Naive(build_tiny(), steps, places, order), build(), num_steps)
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        got = loop(tiny, scheduler, num_steps)
        plan = [row[0] for row in handle.stats.plan]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert len(plan) == calls
    assert [p for p, action in enumerate(plan) if action == "compute"] == steps


def test_other_abscissae_on_request():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    timesteps = scheduler.timesteps.tolist()
    alphas = [float(scheduler.alphas_cumprod.double()[t]) for t in timesteps]
    sigma = [math.sqrt((1 - a) / a) for a in alphas]
    assert abscissae("sigma", scheduler, timesteps) == pytest.approx(sigma)
    assert abscissae("lambda", scheduler, timesteps) == pytest.approx([-math.log(s) for s in sigma])
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(5)
    assert abscissae("step", flow, flow.timesteps.tolist()) == [0, 1, 2, 3, 4]


def test_abscissae_of_edm_of_midpoints_and_of_a_time_that_rises():
    edm = EDMEulerScheduler()
    edm.set_timesteps(6)
    sigmas = edm.sigmas[:-1].double()
    assert abscissae("sigma", edm, edm.timesteps.tolist()) == pytest.approx(sigmas.tolist())
    assert abscissae("lambda", edm, edm.timesteps.tolist()) == pytest.approx((-sigmas.log()).tolist())
    rising = diffusers_name("MiniMaxH3Scheduler")()
    rising.set_timesteps(6)
    times = rising.timesteps.tolist()
    assert abscissae("auto", rising, times) == pytest.approx([1 - t for t in times])
    midpoints = KDPM2DiscreteScheduler()
    midpoints.set_timesteps(4)
    places = abscissae("lambda", midpoints, midpoints.timesteps.tolist())
    assert places[1] == pytest.approx((places[0] + places[2]) / 2)  # its midpoints are geometric means of σ


@pytest.mark.parametrize(
    ("build", "kind"),
    [(HeunDiscreteScheduler, "sigma"), (FlowMatchEulerDiscreteScheduler, "lambda"), (object, "sigma")],
)
def test_an_abscissa_that_does_not_tell_the_steps_apart_is_refused(build, kind):
    scheduler = build()
    timesteps = [1000.0, 500.0]
    if build is not object:
        scheduler.set_timesteps(4)
        timesteps = scheduler.timesteps.tolist()
    with pytest.raises(MethodError, match="use abscissa='step'"):
        abscissae(kind, scheduler, timesteps)
    assert len(abscissae("auto", scheduler, timesteps)) == len(timesteps)


def test_literal_repeats_the_binomial_forecast_within_a_gap(tiny, scheduler):
    with sostenuto.enable(tiny, ABCache(3, warmup=3, interval=4, mode="literal"), scheduler=scheduler):
        _, outputs = sample_loop(tiny, scheduler, 8)
    f = [output.double() for output in outputs]
    torch.testing.assert_close(f[3], 3 * f[2] - 3 * f[1] + f[0], rtol=1e-4, atol=1e-5)
    for p in (5, 6, 7):
        torch.testing.assert_close(f[p], 3 * f[4] - 3 * f[2] + f[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_recursive_is_the_true_recurrence(tiny, scheduler, order):
    method = ABCache(order, warmup=3, interval=6, mode="recursive")
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        _, outputs = sample_loop(tiny, scheduler, 9)
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes
    f = [output.double() for output in outputs]
    coefficients = {1: [1], 2: [2, -1], 3: [3, -3, 1]}[order]
    for p in (3, 4, 5, 7, 8):
        recurrence = sum(c * f[p - 1 - j] for j, c in enumerate(coefficients))
        torch.testing.assert_close(f[p], recurrence, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["lagrange", "literal", "recursive"])
def test_the_order_falls_to_what_the_queue_holds(tiny, scheduler, mode):
    with sostenuto.enable(tiny, ABCache(5, warmup=1, interval=2, mode=mode), scheduler=scheduler) as handle:
        _, outputs = sample_loop(tiny, scheduler, 5)
        assert [row[0] for row in handle.stats.plan][:2] == ["compute", "reuse" if mode != "recursive" else "forecast"]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[2], outputs[3])


def test_halves_extrapolated_apart_are_the_guided_output_extrapolated(tiny):
    steps, places = [0, 1, 3, 6], list(range(8))
    naive = Naive(build_tiny(), steps, places, 2, guidance=True)
    expected = loop(naive, DDIMScheduler(), 8, fused_guidance=3.0)
    scheduler = DDIMScheduler()
    with sostenuto.enable(tiny, ABCache(2, warmup=2, interval=3), scheduler=scheduler):
        got = loop(tiny, scheduler, 8, fused_guidance=3.0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_separate_passes_keep_queues_of_their_own(tiny, scheduler):
    with sostenuto.enable(tiny, ABCache(2, warmup=2, interval=3), scheduler=scheduler) as handle:
        _, outputs = sample_loop(tiny, scheduler, 6, separate_guidance=True)
        assert handle.stats.num_passes == 2
    for which in (0, 1):
        f = outputs[which::2]
        torch.testing.assert_close(f[2], 2 * f[1] - f[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(f[5], f[3] + 2 / 2 * (f[3] - f[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["lagrange", "recursive"])
def test_a_learned_variance_is_not_extrapolated(scheduler, mode):
    model = build_tiny(out_channels=4)
    with sostenuto.enable(model, ABCache(2, warmup=2, interval=4, mode=mode), scheduler=scheduler):
        _, outputs = sample_loop(model, scheduler, 4)
    for p, steps_ahead in ((2, 1), (3, 2)):
        torch.testing.assert_close(outputs[p][:, 2:], outputs[1][:, 2:])
        noise = [output[:, :2] for output in outputs]
        expected = noise[1] + steps_ahead * (noise[1] - noise[0])
        torch.testing.assert_close(noise[p], expected, rtol=1e-4, atol=1e-5)


def test_interval_1_is_bit_identical_to_the_stock_model(tiny, scheduler):
    stock, _ = sample_loop(tiny, scheduler)
    with sostenuto.enable(tiny, ABCache(interval=1), scheduler=scheduler) as handle:
        cached, _ = sample_loop(tiny, scheduler)
        assert handle.stats.ideal_speedup == 1
    assert torch.equal(stock, cached)


def test_a_generation_that_leaves_out_the_noisiest_steps_warms_up_where_it_begins(tiny, scheduler):
    scheduler.set_timesteps(12)
    latents, labels = torch.randn(1, 2, 8, 8), torch.tensor([1])
    with torch.no_grad(), sostenuto.enable(tiny, ABCache(2, warmup=3, interval=4), scheduler=scheduler) as handle:
        for t in scheduler.timesteps[3:]:
            tiny(latents, t[None], labels)
        assert [p for p, row in enumerate(handle.stats.plan) if row == ["compute"]] == [0, 1, 2, 4, 8]


def test_a_noise_scale_applies_once_to_computed_and_extrapolated_outputs(tiny, scheduler):
    scheduler.set_timesteps(4)
    latents, labels = torch.randn(1, 2, 8, 8), torch.tensor([1])
    outputs = []
    for method in (ABCache(2, warmup=2), ABCache(2, warmup=2) | EpsilonScaling(1 / 0.9)):
        with torch.no_grad(), sostenuto.enable(tiny, method, scheduler=scheduler):
            outputs.append([tiny(latents, t[None], labels).sample for t in scheduler.timesteps])
    for plain, scaled in zip(*outputs, strict=True):
        torch.testing.assert_close(scaled, 0.9 * plain)


def test_an_interrupted_generation_leaves_nothing_to_the_next(tiny, scheduler):
    method = ABCache(3, warmup=3, interval=4, mode="recursive")
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        expected, _ = sample_loop(tiny, scheduler, 8, seed=5)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(tiny, scheduler, 8, seed=1, stop_at=6)
        got, _ = sample_loop(tiny, scheduler, 8, seed=5)
    assert torch.equal(expected, got)


@pytest.mark.slow
def test_a_compiled_denoiser_is_called_at_computed_steps_alone(scheduler):
    torch._dynamo.reset()
    model, method = build_tiny(num_layers=1), ABCache(3, warmup=3, interval=4)
    with sostenuto.enable(model, method, scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with sostenuto.enable(compiled, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(compiled, scheduler, 8)
        assert [row[0] for row in handle.stats.plan].count("compute") == 4
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(order=0), "order must be a whole number from 1 to 5, not 0"),
        (dict(order=6), "order must be a whole number from 1 to 5, not 6"),
        (dict(warmup=0), "warmup must be a whole number of 1 or more"),
        (dict(interval=True), "interval must be a whole number of 1 or more, not True"),
        (dict(compute_last="no"), "compute_last is true or false, not 'no'"),
        (dict(mode="newton"), "mode must be one of lagrange, literal, recursive"),
        (dict(abscissa="time"), "abscissa must be one of auto, step, sigma, lambda"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        ABCache(**wrong)
