"""The Time-Shift Sampler: what timestep the network sees, and that everything else keeps the nominal one."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import FORA, MethodError, TimeShift
from sostenuto.methods.time_shift import VarianceMatch


def watch(model):
    """What timesteps the network is given, call by call, and with what latents."""
    seen = []
    model.pos_embed.register_forward_pre_hook(lambda _, inputs: seen.append([inputs[0].clone()]))
    original = model.transformer_blocks[0].norm1.emb.forward

    def forward(timestep, *args, **kwargs):
        seen[-1].append(timestep.clone())
        return original(timestep, *args, **kwargs)

    model.transformer_blocks[0].norm1.emb.forward = forward
    return seen


def search(alphas, latents, nominal, reach, data_variance):
    """By brute force, one sample at a time in float64."""
    best = []
    for sample in latents.double():
        own = float(((sample - sample.mean()) ** 2).sum() / (sample.numel() - 1))
        window = range(max(0, nominal - reach), min(len(alphas) - 1, nominal + reach) + 1)
        best.append(min(window, key=lambda t: abs(1 - alphas[t] + alphas[t] * data_variance - own)))
    return best


@pytest.mark.parametrize(("halve", "reach"), [(True, 7), (False, 15)])
@pytest.mark.parametrize("data_variance", [0.0, 0.3])
def test_the_network_sees_the_timestep_of_nearest_variance(tiny, scheduler, halve, reach, data_variance):
    seen = watch(tiny)
    method = TimeShift(window=15, cutoff=350, halve_window=halve, data_variance=data_variance)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        sample_loop(tiny, scheduler, 6, batch=3)
    alphas = scheduler.alphas_cumprod.double().tolist()
    assert scheduler.timesteps.tolist() == [830, 664, 498, 332, 166, 0]
    for nominal, (latents, given, *_) in zip(scheduler.timesteps.tolist(), seen, strict=True):
        if nominal in (830, 332, 166, 0):  # the first, and those at or below the cutoff
            assert given.tolist() == [nominal] * 3
        else:
            assert given.tolist() == search(alphas, latents, nominal, reach, data_variance)
    assert any(len(set(given.tolist())) > 1 or given[0] != 498 for _, given, *_ in seen[1:3])


def test_an_exact_match_is_found_and_the_window_ends_with_the_grid():
    variances = torch.linspace(0, 1, 101)
    match = VarianceMatch(variances, reach=10, cutoff=0, first=100.0)
    base = torch.randn(1, 400)
    base = (base - base.mean()) / base.std()
    latents = torch.cat([base * variances[t].sqrt() for t in (47, 50, 59, 90, 10)])
    assert match.shift(52.0, latents).tolist() == [47, 50, 59, 62, 42]
    assert match.shift(97.0, latents[:4]).tolist() == [87, 87, 87, 90]
    assert match.shift(3.0, latents[3:]).tolist() == [13, 10]
    assert match.shift(49.6, latents[:1]).tolist() == [47]
    assert match.shift(100.0, latents) is None
    assert VarianceMatch(variances, 10, 52, 100.0).shift(52.0, latents) is None
    picture = base.view(1, 4, 10, 10) * variances[47].sqrt()
    edited = torch.cat([picture, 3 * torch.ones_like(picture)], dim=1)  # an image to be edited stands behind the sample
    assert VarianceMatch(variances, 10, 0, 100.0, channels=4).shift(52.0, edited).tolist() == [47]


def test_above_every_cutoff_it_is_bit_identical_to_the_stock_model(tiny, scheduler):
    stock, _ = sample_loop(tiny, scheduler, separate_guidance=True)
    with sostenuto.enable(tiny, TimeShift(cutoff=1000), scheduler=scheduler) as handle:
        same, _ = sample_loop(tiny, scheduler, separate_guidance=True)
        assert handle.stats.ideal_speedup == 1
    with sostenuto.enable(tiny, "time-shift", scheduler=scheduler):
        shifted, _ = sample_loop(tiny, scheduler, separate_guidance=True)
    assert torch.equal(stock, same)
    assert not torch.equal(stock, shifted)
    again, _ = sample_loop(tiny, scheduler, separate_guidance=True)
    assert torch.equal(stock, again)


@pytest.mark.parametrize("build", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_latents_of_the_right_variance_are_shifted_to_their_own_timestep(tiny, build):
    """Whatever the scheduler's own scale, the network's input is variance preserving, and that is what is measured."""
    scheduler = build()
    scheduler.set_timesteps(5)
    seen, labels = watch(tiny), torch.tensor([1, 2])
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean((1, 2, 3), True)) / noise.std((1, 2, 3), keepdim=True)
    with torch.no_grad(), sostenuto.enable(tiny, TimeShift(window=40, cutoff=100), scheduler=scheduler):
        for t in scheduler.timesteps[:3]:
            nominal = round(float(t))
            levels = 1 - scheduler.alphas_cumprod[[min(999, nominal + 9), max(0, nominal - 7)]]
            tiny(noise * levels.sqrt()[:, None, None, None], t.expand(2), labels)
    assert [given.tolist() for _, given, *_ in seen[1:]] == [
        [round(float(t)) + 9, round(float(t)) - 7] for t in scheduler.timesteps[1:3]
    ]


def test_caching_goes_by_the_nominal_step(tiny, scheduler):
    with sostenuto.enable(
        tiny, FORA(2, anchor="start") | TimeShift(window=60, cutoff=100), scheduler=scheduler
    ) as handle:
        both, _ = sample_loop(tiny, scheduler, 6)
        assert [row[0] for row in handle.stats.plan] == ["compute", "reuse"] * 3
    with sostenuto.enable(tiny, FORA(2, anchor="start"), scheduler=scheduler) as handle:
        plain, _ = sample_loop(tiny, scheduler, 6)
        assert handle.stats.macs == 3 * handle._dry_runs.cost(0).macs + 3 * (
            handle._dry_runs.cost(0).macs - sum(handle._dry_runs.cost(0).site_macs)
        )
    assert not torch.equal(both, plain)
    with pytest.raises(MethodError, match="shifts the timestep"):
        TimeShift() | FORA(2) | TimeShift()


def test_a_compiled_denoiser_takes_shifted_timesteps(scheduler):
    torch._dynamo.reset()
    model, method = build_tiny(num_layers=1), TimeShift(window=30, cutoff=400)
    with sostenuto.enable(model, method, scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with sostenuto.enable(compiled, method, scheduler=scheduler):
        got, _ = sample_loop(compiled, scheduler, 4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_flow_matching_is_refused(tiny):
    for scheduler in (FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)):
        with pytest.raises(MethodError, match="TimeShift needs the noise levels of a training grid"):
            sostenuto.enable(tiny, TimeShift(), scheduler=scheduler)


def test_timesteps_that_are_none_of_the_training_grids_are_refused(tiny):
    """They are a quarter of log σ, all below the cut-off: nothing would ever be shifted."""
    scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(MethodError, match="use timestep_type='discrete'"):
        sostenuto.enable(tiny, TimeShift(), scheduler=scheduler)


def test_published_settings():
    assert TimeShift.f_pndm_cifar10() == TimeShift(window=5, cutoff=550)
    assert TimeShift.dpm_solver_cifar10() == TimeShift(window=30, cutoff=300)
    assert TimeShift.deis_cifar10() == TimeShift(window=10, cutoff=900, halve_window=False)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(window=0), "window must be a whole number of 1 or more, not 0"),
        (dict(halve_window=2), "halve_window is true or false, not 2"),
        (dict(cutoff=-1), "cutoff must be a whole number of 0 or more, not -1"),
        (dict(data_variance=-0.1), "data_variance must be a number of 0 or more"),
        (dict(data_variance=float("nan")), "data_variance must be a number of 0 or more"),
        (dict(data_variance=1.0), "can't tell noise levels apart"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        TimeShift(**wrong)
