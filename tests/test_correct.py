"""Scaling of the noise in whatever a network predicts, against diffusers' own conversions and formulas written out."""

import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import gaussian
import sostenuto
from conftest import build_tiny
from sostenuto import FORA, EpsilonScaling, MethodError
from sostenuto.correct import scale_noise
from sostenuto.prediction import Conversion, conversions, keep_variance, predicted_noise, without_variance
from sostenuto.schedulers import noise_levels

LEVELS = [(math.cos(a), math.sin(a)) for a in (0.05, 0.7, 1.4, 1.55)]


def draw(seed, *shape):
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predict(kind, x0, noise, alpha, sigma):
    """What a perfect network of this kind would say."""
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "reverse-flow": x0 - noise,
    }[kind]


def levels_of(kind):
    return [(1 - s, s) for s in (0.1, 0.5, 0.9, 0.99)] if "flow" in kind else LEVELS


KINDS = ["epsilon", "v_prediction", "sample", "flow", "reverse-flow"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_in_a_prediction_is_found_and_put_back(kind):
    x0, noise = draw(0), draw(1)
    for alpha, sigma in levels_of(kind):
        latents, prediction = alpha * x0 + sigma * noise, predict(kind, x0, noise, alpha, sigma)
        conversion = Conversion.of(kind, alpha, sigma)
        torch.testing.assert_close(conversion.read(prediction, latents), noise)
        torch.testing.assert_close(conversion.write(noise, latents), prediction)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.97, 1.02])
def test_the_scaled_prediction_holds_the_scaled_noise_and_a_rebuilt_x0(kind, factor):
    x0, noise = draw(0), draw(1)
    for alpha, sigma in levels_of(kind):
        latents = alpha * x0 + sigma * noise
        rebuilt = (latents - sigma * factor * noise) / alpha
        expected = predict(kind, rebuilt, factor * noise, alpha, sigma)
        got = scale_noise(predict(kind, x0, noise, alpha, sigma), factor, latents, Conversion.of(kind, alpha, sigma))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_one_returns_the_very_same_tensor(kind):
    prediction = draw(0)
    assert scale_noise(prediction, 1.0, draw(1), Conversion.of(kind, 0.6, 0.8)) is prediction


def test_the_noise_itself_is_scaled_bit_for_bit_as_by_a_plain_product():
    prediction, latents = draw(0, 2, 6, 4, 4).float(), draw(1, 2, 3, 4, 4).float()
    assert torch.equal(scale_noise(latents, 0.97, latents), latents * 0.97)
    expected = torch.cat([prediction[:, :3] * 0.97, prediction[:, 3:]], dim=1)
    assert torch.equal(scale_noise(prediction, 0.97, latents), expected)


@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_where_the_latents_are_pure_noise_the_prediction_is_left_alone(kind):
    prediction, latents = draw(0), draw(1)
    assert torch.equal(scale_noise(prediction, 0.9, latents, Conversion.of(kind, 0.0, 1.0)), prediction)


def test_what_a_prediction_or_its_input_holds_besides_is_left_out_in_any_dimension():
    conversion = Conversion.of("v_prediction", 0.6, 0.8)
    frames, tokens = draw(0, 2, 5, 8, 4, 4), draw(1, 2, 7, 6)
    variance = scale_noise(frames, 0.9, draw(2, 2, 5, 4, 4, 4), conversion)  # [batch, frames, channels, …]
    assert torch.equal(variance[:, :, 4:], frames[:, :, 4:])
    assert not torch.equal(variance[:, :, :4], frames[:, :, :4])
    condition = draw(3, 2, 7, 9)  # a condition appended to the latents' channels
    expected = 0.9 * tokens - 0.1 * (0.8 / 0.6) * condition[:, :, :6]
    torch.testing.assert_close(scale_noise(tokens, 0.9, condition, conversion), expected)
    torch.testing.assert_close(predicted_noise(tokens, condition, conversion), 0.6 * tokens + 0.8 * condition[..., :6])
    before = draw(3, 2, 9, 6)  # a condition before the sample's tokens
    expected = 0.9 * tokens - 0.1 * (0.8 / 0.6) * before[:, 2:]
    torch.testing.assert_close(scale_noise(tokens, 0.9, before, conversion, noisy_last=True), expected)
    torch.testing.assert_close(predicted_noise(tokens, before, conversion, True), 0.6 * tokens + 0.8 * before[:, 2:])
    with_text = torch.cat(
        [draw(4, 2, 3, 6), before[:, :2], tokens], dim=1
    )  # a prediction with text and condition in it
    scaled = scale_noise(with_text, 0.9, before, conversion, noisy_last=True)
    torch.testing.assert_close(scaled[:, -7:], expected)
    assert torch.equal(scaled[:, :3], with_text[:, :3])
    assert torch.equal(keep_variance(0 * with_text, with_text, tokens, True)[:, :5], with_text[:, :5])
    assert without_variance(draw(0, 2, 8, 4, 4), draw(0, 2, 4, 4, 4)).shape == (2, 4, 4, 4)
    with pytest.raises(MethodError, match="neither be scaled nor told its clean sample: use eps_scale=1"):
        scale_noise(draw(0, 2, 3, 4, 4), 0.9, draw(0, 2, 3, 5, 6), conversion)


SOLVERS = [
    (DDIMScheduler, {"clip_sample": False}),
    (DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_small"}),
    (EulerDiscreteScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    (UniPCMultistepScheduler, {}),
    (HeunDiscreteScheduler, {}),
]


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_solver_goes_the_same_way_with_the_scaled_noise_in_either_form(solver, options, kind):
    """One noise predictor, told as ε to one scheduler and as v or x₀ to another: diffusers converts, we scale."""

    def run(prediction_type):
        scheduler = solver(prediction_type=prediction_type, **options)
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        x = draw(5) * scheduler.init_noise_sigma
        steps = conversions(scheduler, [float(t) for t in scheduler.timesteps])
        extra = {"generator": generator} if solver is DDPMScheduler else {}
        for step, t in enumerate(scheduler.timesteps):
            latents = scheduler.scale_model_input(x, t)
            noise = torch.tanh(latents) + 0.1
            prediction = steps[step].write(noise, latents)
            x = scheduler.step(scale_noise(prediction, 0.98, latents, steps[step]), t, x, **extra).prev_sample
        return x

    torch.testing.assert_close(run(kind), run("epsilon"), rtol=1e-4, atol=1e-4)


def test_a_flow_solver_sees_the_scaled_noise_and_the_rebuilt_x0():
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    )
    scheduler.set_timesteps(5)
    steps = conversions(scheduler, [float(t) for t in scheduler.timesteps])
    x, velocity, step = draw(5), draw(6), 2
    sigma = float(scheduler.sigmas[step])
    scheduler._step_index = step
    scaled = scale_noise(velocity, 0.95, x, steps[step])
    x0 = scheduler.convert_model_output(scaled, sample=x)
    noise = x + (1 - sigma) * velocity
    torch.testing.assert_close(x0, (x - sigma * 0.95 * noise) / (1 - sigma))


def test_noise_levels_of_a_flow_are_its_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler, [float(t) for t in scheduler.timesteps])
    assert levels[0] == (0.0, 1.0)
    for (alpha, sigma), t in zip(levels, scheduler.timesteps.tolist(), strict=True):
        assert sigma == pytest.approx(t / 1000)
        assert alpha + sigma == pytest.approx(1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_the_noise_is_found_behind_edms_preconditioning(solver, kind):
    """The scheduler's own input and output scalings, around a sample whose x₀ and ε are known."""
    scheduler = solver(prediction_type=kind, sigma_data=0.7)
    scheduler.set_timesteps(5)
    x0, noise = draw(0), draw(1)
    steps = conversions(scheduler, [float(t) for t in scheduler.timesteps])
    for conversion, sigma in zip(steps, scheduler.sigmas[:-1].double(), strict=True):
        x = x0 + sigma * noise
        c_skip, c_out = (scheduler.precondition_outputs(*one, sigma) for one in ((1.0, 0.0), (0.0, 1.0)))
        latents, prediction = scheduler.precondition_inputs(x, sigma), (x0 - c_skip * x) / c_out
        torch.testing.assert_close(conversion.read(prediction, latents), noise, rtol=1e-5, atol=1e-5)
        scaled = scale_noise(prediction, 0.95, latents, conversion)
        torch.testing.assert_close(
            scheduler.precondition_outputs(x, scaled, sigma), x - 0.95 * sigma * noise, rtol=1e-5, atol=1e-4
        )


def test_a_rising_flow_counts_the_share_of_data():
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert noise_levels(scheduler, scheduler.timesteps.tolist()) == ((0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25))
    steps = conversions(scheduler, scheduler.timesteps.tolist())
    x0, noise = draw(0), draw(1)
    for share, conversion in zip((0.25, 0.5, 0.75), steps[1:], strict=True):
        latents = share * x0 + (1 - share) * noise
        torch.testing.assert_close(conversion.read(x0 - noise, latents), noise)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMInverseScheduler(prediction_type="v_prediction"),
        FlowMatchLCMScheduler(invert_sigmas=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        UniPCMultistepScheduler(prediction_type="v_prediction", use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_whose_levels_are_not_known_are_refused(scheduler):
    scheduler.set_timesteps(4)
    with pytest.raises(MethodError, match="not known"):
        conversions(scheduler, [float(t) for t in scheduler.timesteps])


class Velocity(torch.nn.Module):
    """The tiny DiT told as a velocity."""

    def __init__(self, model, scheduler):
        super().__init__()
        self.model, self.scheduler = model, scheduler

    def forward(self, latents, timestep, labels):
        noise = self.model(latents, timestep, labels).sample
        share = self.scheduler.alphas_cumprod[int(timestep[0])]
        x0 = (latents - (1 - share).sqrt() * noise) / share.sqrt()
        return share.sqrt() * noise - (1 - share).sqrt() * x0


@torch.no_grad()
def ddim(model, scheduler, guidance=3.0):
    scheduler.set_timesteps(6)
    x = draw(7, 2, 2, 8, 8).float()
    for t in scheduler.timesteps:
        labels = torch.tensor([1, 4, 10, 10])
        output = model(torch.cat([x, x]), t.expand(4), labels)
        conditional, unconditional = getattr(output, "sample", output).chunk(2)
        x = scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
    return x


def test_scaling_a_velocity_model_equals_scaling_the_same_noise_model_under_guided_ddim():
    tiny = build_tiny()
    noise_scheduler = DDIMScheduler(clip_sample=False)
    velocity_scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    branches = (
        sostenuto.Branch(sostenuto.SiteKind.SELF_ATTENTION, "attn1", front=("norm1",)),
        sostenuto.Branch(sostenuto.SiteKind.MLP, "ff", front=("norm3",)),
    )
    sostenuto.register_anatomy(
        Velocity, sostenuto.Anatomy((sostenuto.BlockList("model.transformer_blocks", branches),))
    )
    velocity = Velocity(tiny, velocity_scheduler)
    for method in (EpsilonScaling((1.0, 1.01, 1.02, 0.99, 1.03, 1.01)), EpsilonScaling(1.02) | FORA(2)):
        with sostenuto.enable(tiny, method, scheduler=noise_scheduler):
            expected = ddim(tiny, noise_scheduler)
        with sostenuto.enable(velocity, method, scheduler=velocity_scheduler):
            got = ddim(velocity, velocity_scheduler)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(expected, ddim(tiny, noise_scheduler), rtol=1e-2, atol=1e-2)


# --- the noise in x₀ alone ---------------------------------------------------------------------------------------

X0_ONLY = {
    "ddim": lambda: DDIMScheduler(clip_sample=False, beta_schedule="linear", timestep_spacing="trailing"),
    "ddim-v": lambda: DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1
    ),
    "euler": lambda: EulerDiscreteScheduler(use_karras_sigmas=True),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
LAMBDAS = (1.0, 1.03, 0.98, 1.02, 1.01, 0.97, 1.04)


def generate(model, scheduler, step):
    """Seven steps; ``step(index, timestep, output, given, x)`` makes the next x."""
    scheduler.set_timesteps(7)
    x = draw(3, 2, 4, 16, 16) * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, t in enumerate(scheduler.timesteps):
        given = x / (scheduler.sigmas[index] ** 2 + 1).sqrt() if isinstance(scheduler, EulerDiscreteScheduler) else x
        x = step(index, t, model(given, t.expand(2)), given, x)
    return x


@pytest.mark.parametrize("name", X0_ONLY)
def test_scaling_x0_alone_leaves_the_noise_in_the_direction_as_predicted(name):
    scheduler = X0_ONLY[name]()
    model = gaussian.GaussianDenoiser(scheduler)

    def written_out(index, t, output, given, x):
        if name.startswith("ddim"):
            share = scheduler.alphas_cumprod[int(t)].double()
            later = int(t) - 1000 // 7
            share_next = (scheduler.alphas_cumprod[later] if later >= 0 else scheduler.final_alpha_cumprod).double()
            alpha, sigma = share.sqrt(), (1 - share).sqrt()
            alpha_next, sigma_next = share_next.sqrt(), (1 - share_next).sqrt()
            noise = output if name == "ddim" else alpha * output + sigma * given
        elif name == "euler":  # keeps x₀ + σ·ε
            alpha, alpha_next, noise = 1.0, 1.0, output
            sigma, sigma_next = scheduler.sigmas.double()[index : index + 2]
        else:
            sigma, sigma_next = scheduler.sigmas.double()[index : index + 2]
            alpha, alpha_next = 1 - sigma, 1 - sigma_next
            noise = x + alpha * output
        if alpha == 0:
            return x + (sigma_next - sigma) * output
        return alpha_next * (x - sigma * noise / LAMBDAS[index]) / alpha + sigma_next * noise

    def stock(index, t, output, given, x):
        return scheduler.step(output, t, x).prev_sample

    expected = generate(model, scheduler, written_out)
    with sostenuto.enable(model, EpsilonScaling(LAMBDAS, apply_to="x0_only"), scheduler=scheduler):
        got = generate(model, scheduler, stock)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    with sostenuto.enable(model, EpsilonScaling(LAMBDAS), scheduler=scheduler):
        assert not torch.allclose(generate(model, scheduler, stock).double(), expected, rtol=1e-3, atol=1e-3)


def test_for_ddpm_all_of_the_update_is_in_x0():
    scheduler = gaussian.SAMPLERS["ddpm"]()
    model, found = gaussian.GaussianDenoiser(scheduler), []
    for apply_to in ("all", "x0_only"):
        with sostenuto.enable(model, EpsilonScaling(1.02, 1.01, apply_to), scheduler=scheduler):
            found.append(gaussian.sample(model, torch.Generator().manual_seed(0), 6, rows=2))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DPMSolverMultistepScheduler(), "can't be split"),
        (HeunDiscreteScheduler(), "can't be split"),
        (EDMEulerScheduler(), "can't be split"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "can't be split"),
        (DDIMScheduler(), "clips x₀"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_x0_alone_is_refused_where_the_update_has_no_such_place(scheduler, words):
    with pytest.raises(MethodError, match=words):
        sostenuto.enable(build_tiny(), EpsilonScaling(1.01, apply_to="x0_only"), scheduler=scheduler)


def test_x0_alone_is_refused_for_calibrated_scales_and_where_lambda_outruns_the_step():
    with pytest.raises(MethodError, match="measured on all of the update"):
        EpsilonScaling("scales.json", apply_to="x0_only")
    with pytest.raises(MethodError, match="apply_to"):
        EpsilonScaling(1.01, apply_to="x0")
    scheduler = X0_ONLY["ddim"]()
    model = gaussian.GaussianDenoiser(scheduler)
    with (
        sostenuto.enable(model, EpsilonScaling(5.0, apply_to="x0_only"), scheduler=scheduler),
        pytest.raises(MethodError, match=r"further than the step itself goes \(to λ = \d"),
    ):
        gaussian.sample(model, torch.Generator().manual_seed(0), 50, rows=1)
