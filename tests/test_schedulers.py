"""Every scheduler of diffusers: the noise scaled in any kind of prediction, and every call of its sampling loop placed."""

import inspect
import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sostenuto
from conftest import build_tiny
from scheduler_cases import (
    PAGE,
    cases,
    diffusers_schedulers,
    given_to_network,
    levels,
    network,
    prediction,
    rows,
    scheduler_class,
)
from sostenuto import EpsilonScaling, MethodError
from sostenuto.clock import Clock
from sostenuto.correct import Conversion, conversions, scale_noise
from sostenuto.schedulers import noise_levels

pytestmark = pytest.mark.filterwarnings("ignore")
FACTOR = 0.97
PURE_NOISE = 1e-3
STEPPED_BY_HAND = ("RePaintScheduler", "DDPMWuerstchenScheduler")  # ``step`` needs more than a prediction


def ids(value):
    return getattr(value, "id", value)


def listed(scheduler):
    return [float(t) for t in scheduler.timesteps]


def draw(seed, *shape):
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(scheduler, output, timestep, x):
    """The scheduler's own step; random noise, where it adds any, is the same for everyone."""
    known = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(9)} if "generator" in known else {}
    if "old_pred_original_sample" in known:  # CogVideoX's, first order
        extra["old_pred_original_sample"] = extra["timestep_back"] = None
        return scheduler.step(output, None, timestep, None, x, generator=extra["generator"], return_dict=False)[0]
    return scheduler.step(output, timestep, x, return_dict=False, **extra)[0]


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_names_every_scheduler_of_diffusers():
    unnamed = {name for name in diffusers_schedulers() if f"`{name}`" not in PAGE.read_text()}
    if diffusers.__version__.startswith("0.42."):
        assert not unnamed


@pytest.mark.parametrize(("row", "kind"), cases("–"), ids=ids)
def test_a_dash_means_that_the_scheduler_itself_takes_no_such_prediction(row, kind):
    parameters = inspect.signature(scheduler_class(row.name).__init__).parameters
    if "prediction_type" not in parameters:
        return

    def begin():
        scheduler = row.build(kind)
        step(scheduler, draw(0), scheduler.timesteps[0], draw(0))

    with pytest.raises((ValueError, NotImplementedError)):
        begin()


@pytest.mark.parametrize(("row", "kind"), cases("refused"), ids=ids)
def test_what_the_page_calls_refused_is_refused_in_one_sentence(row, kind):
    scheduler = row.build(kind)
    with pytest.raises(MethodError, match=r"eps_scale=1 \(no scaling\)$") as error:
        conversions(scheduler, listed(scheduler))
    assert row.name in str(error.value)


REFUSED = sorted(
    name
    for line in PAGE.read_text().split("## Refused altogether")[1].splitlines()
    if line.startswith("| `")
    for name in line.split("|")[1].replace("`", "").replace(" ", "").split(",")
)


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_with_other_laws_are_refused(name):
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"this diffusers has no {name}")
    cls = scheduler_class(name)
    scheduler = cls.__new__(cls)  # some need arguments, others a stage before they list timesteps
    parameters = inspect.signature(cls.__init__).parameters.items()
    config = {key: p.default for key, p in parameters if p.default is not p.empty}
    if name == "DPMSolverSDEScheduler":
        config["prediction_type"] = "v_prediction"
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(config)
    scheduler.sigmas = torch.tensor([0.9, 0.5, 0.0])
    with pytest.raises(MethodError, match="eps_scale=1"):
        conversions(scheduler, [900.0, 500.0])


# --- scaling -----------------------------------------------------------------------------------------------------


class Twin:
    """The same sampler for a network that says the noise itself, which diffusers' formulas then turn into a step."""

    def __init__(self, row):
        self.scheduler = row.build("epsilon")

    def step(self, place, timestep, x, noise, level):
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(x, self.scheduler.timesteps[place])
        return step(self.scheduler, noise, self.scheduler.timesteps[place], x)


class Formula:
    """The step of samplers that have no such twin, from x₀ and ε."""

    def __init__(self, row, path):
        self.row, self.path, self.past, self.slope = row, path, [], None

    def step(self, place, timestep, x, noise, level):
        alpha, sigma = level
        x0 = (x - sigma * noise) / alpha
        name, last = self.row.name, place == len(self.path) - 1
        after = (1.0, 0.0) if last else self.path[place + 1]
        if name == "FlowMatchHeunDiscreteScheduler":
            return self.heun(place, x, noise - x0, sigma, after[1])
        if name == "FlowMatchLCMScheduler":  # noise of its own
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
        if name == "IPNDMScheduler":  # Adams-Bashforth over the noise
            self.past.append(noise)
            weights = {1: [1], 2: [-1 / 2, 3 / 2], 3: [5 / 12, -16 / 12, 23 / 12]}
            weights = weights.get(len(self.past), [-9 / 24, 37 / 24, -59 / 24, 55 / 24])
            noise = sum(w * e for w, e in zip(weights, self.past[-len(weights) :], strict=True))
            x0 = (x - sigma * noise) / alpha
        if name.startswith("Cosine"):  # the mean of SDE-DPM-Solver++'s first-order step
            ratio = after[1] / sigma
            return ratio**2 * x + (1 - ratio**2) * x0
        return after[0] * x0 + after[1] * noise

    def heun(self, place, x, slope, sigma, after):
        if place % 2 == 0:
            self.start, self.slope, self.width = x, slope, after - sigma
            return x + self.width * slope
        return self.start + self.width * (self.slope + slope) / 2


WITHOUT_TWIN = ("FlowMatch", "EDM", "Cosine", "IPNDM", "LTX", "MiniMax")


@pytest.mark.parametrize(
    ("row", "kind"), [case for case in cases("yes") if case[0].name not in STEPPED_BY_HAND], ids=ids
)
def test_a_whole_step_with_the_scaled_prediction_is_the_step_with_the_scaled_noise(row, kind):
    scheduler = row.build(kind)
    path, steps = levels(row, scheduler), conversions(scheduler, listed(scheduler))
    expected = Formula(row, path) if row.name.startswith(WITHOUT_TWIN) else Twin(row)
    x = draw(3) * math.hypot(*path[0]) if path[0][0] == 1.0 else draw(3)
    x = mine = x.to(torch.float32).double()
    calls = (
        1 if row.name == "PNDMScheduler" and kind != "epsilon" else len(path)
    )  # it adds velocities of several levels up
    first = next(place for place, (alpha, sigma) in enumerate(path) if alpha / math.hypot(alpha, sigma) > PURE_NOISE)
    if first > 0:  # where there is no x₀ to rebuild
        first += row.name == "FlowMatchHeunDiscreteScheduler"  # to the next of its pairs
        for sampler in (scheduler, getattr(expected, "scheduler", None)):
            getattr(sampler, "set_begin_index", int)(first)
    for place, timestep in list(enumerate(scheduler.timesteps))[first:calls]:
        alpha, sigma = path[place]
        given = given_to_network(row, x, alpha, sigma)
        z = scheduler.scale_model_input(mine, timestep) if hasattr(scheduler, "scale_model_input") else mine
        torch.testing.assert_close(z.double(), given, rtol=2e-3, atol=2e-3)
        noise = network(given)
        output = prediction(row, kind, x, noise, alpha, sigma)
        before = x
        x = expected.step(place, timestep, x, FACTOR * noise, (alpha, sigma)).double()
        mine = step(scheduler, scale_noise(output, FACTOR, z, steps[place]), timestep, mine).double()
        assert torch.isfinite(mine).all()
        scale = max(1.0, float(x.abs().max()), float(before.abs().max()))
        torch.testing.assert_close(mine / scale, x / scale, rtol=1e-3, atol=1e-3)
        x = mine  # errors of one step don't add up: each is compared by itself


@pytest.mark.parametrize("name", STEPPED_BY_HAND)
def test_samplers_of_noise_that_name_no_prediction_have_their_noise_scaled(name):
    row = next(row for row in rows() if row.name == name)
    scheduler = row.build("epsilon")
    assert set(conversions(scheduler, listed(scheduler))) == {Conversion()}


def test_a_flow_on_levels_beyond_one_is_refused():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True
    )
    scheduler.set_timesteps(4)
    with pytest.raises(MethodError, match="not known"):
        conversions(scheduler, listed(scheduler))


def test_stochastic_steps_on_a_rising_flow_are_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, stochastic_sampling=True)
    scheduler.set_timesteps(4)
    with pytest.raises(MethodError, match="not known"):
        conversions(scheduler, listed(scheduler))


class Predictor(torch.nn.Module):
    """Predicts from all of its input's five channels for the first three."""

    def __init__(self, sign):
        super().__init__()
        block = torch.nn.Module()
        block.ff = torch.nn.Tanh()
        self.sign, self.blocks = sign, torch.nn.ModuleList([block])

    def forward(self, latents, timestep):
        return self.sign * self.blocks[0].ff(1.3 * latents[:, :3] + latents[:, 3:].sum(1, keepdim=True))


class Negative(Predictor):
    """One whose pipelines negate what it returns."""


LISTS = (sostenuto.BlockList("blocks", (sostenuto.Branch(sostenuto.SiteKind.MLP, "ff"),)),)
sostenuto.register_anatomy(Predictor, sostenuto.Anatomy(LISTS))
sostenuto.register_anatomy(Negative, sostenuto.Anatomy(LISTS, negated_prediction=True))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("FlowMatchEulerDiscreteScheduler", "flow"),
        ("MiniMaxH3Scheduler", "flow"),
        ("EulerDiscreteScheduler", "v_prediction"),
        ("EulerDiscreteScheduler", "epsilon"),
        ("EDMEulerScheduler", "epsilon"),
        ("DDIMScheduler", "sample"),
    ],
)
@torch.no_grad()
def test_a_network_with_more_channels_that_its_pipeline_negates_is_scaled_alike(name, kind):
    """Against the update rule written out: for these solvers ``x' = α'·x₀ + σ'·ε``."""
    row = next(row for row in rows() if row.name == name)
    results = []
    for cls, sign in ((Predictor, 1), (Negative, -1)):
        scheduler, stock, denoiser = row.build(kind), cls(sign), cls(sign)
        x, condition = draw(3), draw(4, 2, 2, 4, 4)
        path = levels(row, scheduler)
        with sostenuto.enable(denoiser, EpsilonScaling(1 / FACTOR), scheduler=scheduler):
            for place, t in enumerate(scheduler.timesteps):
                z = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                given = torch.cat([z, condition], dim=1)
                raw, output = sign * stock(given, t), sign * denoiser(given, timestep=t)
                alpha, sigma = path[place]
                if alpha > PURE_NOISE:  # solve the prediction for the noise: it is affine in it
                    flat, slope = (prediction(row, kind, x, torch.full_like(x, e), alpha, sigma) for e in (0.0, 1.0))
                    noise = (raw - flat) / (slope - flat)
                    wanted = prediction(row, kind, x, FACTOR * noise, alpha, sigma)
                    torch.testing.assert_close(output.double(), wanted, rtol=2e-3, atol=2e-3)
                else:
                    assert torch.equal(output, raw)
                x = scheduler.step(output, t, x).prev_sample.double()
        results.append(x)
    torch.testing.assert_close(*results)


def test_a_factor_near_1_is_not_lost_to_rounding_more_than_once():
    prediction, latents = draw(1).bfloat16(), draw(2).bfloat16()
    conversion = Conversion.of("flow", 0.6, 0.4)
    exact = scale_noise(prediction.double(), 0.995, latents.double(), conversion)
    assert torch.equal(scale_noise(prediction, 0.995, latents, conversion), exact.bfloat16())


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_noise_levels_are_those_of_what_the_network_is_given(name):
    row = next(row for row in rows() if row.name == name)
    scheduler = row.build("epsilon")
    for (alpha, sigma), (mine, other) in zip(
        levels(row, scheduler), noise_levels(scheduler, listed(scheduler)), strict=True
    ):
        one = given_to_network(row, torch.tensor(1.0), alpha, sigma).item()
        assert (mine, other) == pytest.approx((alpha * one, sigma * one), rel=1e-3, abs=1e-6)


# --- the clock ---------------------------------------------------------------------------------------------------

CASTS = {
    "as it is": (lambda t: t, None),
    "a number": (lambda t: t.item(), None),
    "bfloat16": (lambda t: t.bfloat16(), None),
    "float16": (lambda t: t.half(), None),
    "int64": (lambda t: t.long(), None),
    "t / 1000": (lambda t: t / 1000, None),
    "bfloat16 / 1000": (lambda t: t.bfloat16() / 1000, None),
    "(t / 1000) in float16": (lambda t: (t / 1000).half(), None),
    "1 - t / 1000": (lambda t: 1 - t / 1000, lambda value: 1000 * (1 - value)),
    "1 - t / 1000 in bfloat16": (lambda t: 1 - t.bfloat16() / 1000, lambda value: 1000 * (1 - value)),
}
SMALL = ("EDM", "Cosine", "MiniMax", "IPNDM")  # their timesteps lie around 0 to 1: given as they are


def clocked(scheduler, cast, first=0, passes=1, calls=None):
    """Run a sampler's loop with one pixel; the ticks of all its calls."""
    convert, from_timestep = CASTS[cast]
    clock = Clock(lambda: scheduler, from_timestep)
    x, ticks = draw(0, 1, 1, 2, 2).float(), []
    for t in scheduler.timesteps[first:][:calls]:
        z = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        ticks += [clock.tick(convert(t), z, [torch.tensor(which)]) for which in range(passes)]
        x = step(scheduler, torch.tanh(z), t, x).float()
    return ticks


def check(ticks, num_steps, first=0, passes=1):
    expected = [(p, q, p == first and q == 0) for p in range(first, num_steps) for q in range(passes)]
    assert [(tick.step, tick.pass_index, tick.new_generation) for tick in ticks] == expected


def plain(row):
    """The kind that this scheduler has for certain."""
    return next((kind for kind, word in row.cells.items() if word == "yes"), "flow")


STEPPED = [row for row in rows() if row.name not in STEPPED_BY_HAND]


FEWEST = {"PNDMScheduler": 4, "KDPM2AncestralDiscreteScheduler": 3}  # below, they have no schedule


@pytest.mark.parametrize("row", STEPPED, ids=ids)
def test_every_call_of_a_loop_is_placed(row):
    scheduler = row.build(plain(row))
    small = row.name.startswith(SMALL) or "timestep_type" in row.options
    for num_steps in (2, 7, 40):
        for cast in ("as it is", "a number", "bfloat16", "float16") if small or num_steps == 40 else CASTS:
            row.restart(scheduler, max(num_steps, FEWEST.get(row.name, 0)))
            check(clocked(scheduler, cast, passes=2), len(scheduler.timesteps), passes=2)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_single_step_is_a_generation_every_time(name):
    row = next(row for row in rows() if row.name == name)
    for cast in CASTS:
        check(clocked(row.build(plain(row), 1), cast, passes=2), 1, passes=2)


@pytest.mark.parametrize(
    ("name", "cast"),
    [
        ("DDIMScheduler", "bfloat16"),
        ("HeunDiscreteScheduler", "float16"),
        ("EDMEulerScheduler", "bfloat16"),
        ("FlowMatchEulerDiscreteScheduler", "bfloat16 / 1000"),
        ("FlowMatchEulerDiscreteScheduler", "t / 1000"),
        ("FlowMatchEulerDiscreteScheduler", "int64"),
        ("SASolverScheduler", "1 - t / 1000 in bfloat16"),
    ],
)
def test_a_thousand_steps_are_told_apart_though_their_rounded_timesteps_are_not(name, cast):
    row = next(row for row in rows() if row.name == name)
    if name.startswith("FlowMatch"):
        row.options["shift"] = 12.0
    scheduler = row.build(plain(row), 1000)
    check(clocked(scheduler, cast), len(scheduler.timesteps))


def test_the_last_timestep_of_a_flow_is_not_taken_for_its_first_over_1000():
    """t = 1000 is given as 1.0, which is also the last timestep on the list."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    assert listed(scheduler)[-1] == pytest.approx(1.0)
    check(clocked(scheduler, "t / 1000"), 5)
    scheduler.set_timesteps(5)
    check(clocked(scheduler, "as it is"), 5)


@pytest.mark.parametrize(
    "row", [row for row in STEPPED if hasattr(scheduler_class(row.name), "set_begin_index")], ids=ids
)
def test_a_schedule_that_begins_in_the_middle(row):
    scheduler = row.build(plain(row), 8)
    first = 4  # of second-order schedulers a place where a pair begins
    for cast in ("as it is", "bfloat16"):
        row.restart(scheduler, 8).set_begin_index(first)
        check(clocked(scheduler, cast, first), len(scheduler.timesteps), first)


def test_timesteps_and_sigmas_of_the_user_and_dynamic_shifting():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for mu in (0.5, 1.15, 3.0):
        flow.set_timesteps(sigmas=[1.0, 0.9, 0.9, 0.4, 0.39, 0.01], mu=mu)
        check(clocked(flow, "bfloat16 / 1000"), 6)
    lcm = diffusers.LCMScheduler()
    lcm.set_timesteps(timesteps=[999, 759, 499, 259])
    check(clocked(lcm, "bfloat16"), 4)
    euler = diffusers.EulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[14.6, 6.0, 5.999, 1.0, 0.0])
    check(clocked(euler, "float16"), 4)
    heun = diffusers.HeunDiscreteScheduler()
    heun.set_timesteps(timesteps=[901, 900, 300, 0])
    check(clocked(heun, "bfloat16"), 7)


def test_repaint_goes_back_and_forth_within_one_generation():
    scheduler = diffusers.RePaintScheduler()
    scheduler.set_timesteps(20, jump_length=3, jump_n_sample=3)
    assert (scheduler.timesteps.diff() > 0).any()
    for convert in (lambda t: t, lambda t: t.bfloat16()):
        clock = Clock(lambda: scheduler)
        ticks = [clock.tick(convert(t), draw(p, 1, 1, 2, 2)) for p, t in enumerate(scheduler.timesteps)]
        check(ticks, len(scheduler.timesteps))


@given(
    sigmas=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30, unique_by=lambda s: round(s, 5)),
    cast=st.sampled_from([cast for cast in CASTS if cast != "int64"]),
    first=st.integers(0, 29),
    passes=st.integers(1, 3),
    stop=st.integers(1, 30),
    rising=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_flow_schedule_in_any_precision_interrupted_and_begun_anew(sigmas, cast, first, passes, stop, rising):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=rising)
    first = min(first, len(sigmas) - 1)
    for calls in (stop, None):
        scheduler.set_timesteps(sigmas=sorted(sigmas, reverse=True))
        scheduler.set_begin_index(first)
        ticks = clocked(scheduler, cast, first, passes, calls)
        end = len(sigmas) if calls is None else min(first + calls, len(sigmas))
        check(ticks, end, first, passes)
        assert all(tick.num_steps == len(sigmas) for tick in ticks)


@pytest.mark.parametrize("row", STEPPED, ids=ids)
@torch.no_grad()
def test_the_tiny_network_runs_its_plan_under_every_scheduler(row):
    scheduler, model = row.build(plain(row)), build_tiny(num_layers=1)
    x, labels = draw(1, 1, 2, 8, 8).float(), torch.tensor([1])
    with sostenuto.enable(model, sostenuto.FORA(2, anchor="start"), scheduler=scheduler) as handle:
        for t in scheduler.timesteps:
            z = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = step(scheduler, 0.1 * model(z, t[None], labels).sample, t, x).float()
        plan = handle.stats.plan
    assert [row[0] for row in plan] == [("compute", "reuse")[p % 2] for p in range(len(scheduler.timesteps))]
