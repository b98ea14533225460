"""Every scheduler of diffusers: the noise scaled in any kind of prediction, as docs/schedulers.md says."""

import inspect
import math

import diffusers
import pytest
import torch

import sostenuto
from scheduler_cases import (
    PAGE,
    STEPPED_BY_HAND,
    cases,
    diffusers_schedulers,
    draw,
    given_to_network,
    levels,
    listed,
    network,
    prediction,
    rows,
    scheduler_class,
    step,
)
from sostenuto import EpsilonScaling, MethodError
from sostenuto.correct import scale_noise
from sostenuto.prediction import Conversion, conversions
from sostenuto.schedulers import noise_levels

pytestmark = pytest.mark.filterwarnings("ignore")
FACTOR = 0.97
PURE_NOISE = 1e-3


def ids(value):
    return getattr(value, "id", value)


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
