"""The instruments of ``sostenuto analyze``, each against a computation of its own."""

import json
import math
import os
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

import sostenuto
from conftest import sample, sample_loop, sampler_of_lists
from sostenuto import FORA, EBCache, EpsilonScaling, InputError, MethodError, NoCache, TableError
from sostenuto.analysis import analyze as analyzing
from sostenuto.analysis import noise_norm_curves, probe_chain, probe_variance, record
from sostenuto.analysis.analyze import INSTRUMENTS
from sostenuto.analysis.bias_curves import measure as exposure_bias
from sostenuto.analysis.components import measure as components
from sostenuto.analysis.consecutive import changes, finding, residuals
from sostenuto.analysis.feature_error import FEATURE_ERROR, features, listening, relative_error
from sostenuto.analysis.feature_error import measure as feature_error
from sostenuto.analysis.frequency import low_and_high
from sostenuto.analysis.similarity import SIMILARITY, cosine
from sostenuto.analysis.similarity import measure as similarity
from sostenuto.analysis.snr import SNR, decoded_signal_to_noise, signal_to_noise
from sostenuto.analysis.subject import Subject
from sostenuto.analysis.token_importance import TOKENS, path_errors
from sostenuto.plan import Action
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.zoo import TINY_MODELS
from sostenuto.zoo.sampling import flow_sampler
from tiny_pixart import build_pixart, sample_pixart

STEPS = 6


@pytest.fixture
def subject(model):
    return Subject(model, sample, model.scheduler_for_test, num_inference_steps=STEPS, num_samples=4)


# --- the path ----------------------------------------------------------------------------------------------------


def test_a_path_is_what_the_network_was_given_and_said_and_ends_where_the_sampler_ends(model):
    scheduler = model.scheduler_for_test
    scheduler.register_to_config(clip_sample=False)
    method = FORA(2) | EpsilonScaling(1.25)
    ends = []

    def kept(model, generator, num_inference_steps):
        ends.append(sample_loop(model, scheduler, num_inference_steps, seed=7))

    path = record(model, kept, method, num_inference_steps=STEPS, num_samples=3, scheduler=scheduler, count=True)
    final, outputs = ends[0]
    assert path.rows == (2, 2)
    assert path.latents.shape == (STEPS, 4, 2, 8, 8)
    torch.testing.assert_close(path.clean[:2], final)
    for step, output in enumerate(outputs):
        torch.testing.assert_close(path.noise[step][:2], output)
        torch.testing.assert_close(path.predictions[step][:2], 1.25 * output)
    assert path.reused == (False, False, True, False, True, False)
    share = scheduler.alphas_cumprod[int(path.timesteps[2])]
    estimate = (path.latents[2] - (1 - share).sqrt() * path.noise[2]) / share.sqrt()
    torch.testing.assert_close(path.clean_estimates(2), estimate)
    with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
        sample_loop(model, scheduler, STEPS)
        assert path.macs_uncached / path.macs == pytest.approx(handle.stats.ideal_speedup)


def test_a_large_path_lies_in_a_file_that_nobody_sees_and_is_the_same(model, monkeypatch, tmp_path):
    def recorded(num_samples):
        options = {"num_inference_steps": STEPS, "num_samples": num_samples, "scheduler": model.scheduler_for_test}
        return record(model, sample, FORA(2), **options)

    in_memory = [recorded(1), recorded(5)]
    monkeypatch.setattr("sostenuto.analysis.room._LARGE", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for wanted, path in zip(in_memory, [recorded(1), recorded(5)], strict=True):
        assert path.rows == wanted.rows
        for name in ("latents", "noise", "predictions", "clean"):
            assert torch.equal(getattr(path, name), getattr(wanted, name))
    assert os.name == "nt" or not list(tmp_path.iterdir())  # there what is mapped keeps its name
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr("numpy.memmap", None)  # no room on the disk: not called
    assert torch.equal(recorded(1).latents, in_memory[0].latents)


def test_a_generation_cut_short_is_refused_and_leaves_nothing_behind(model):
    with pytest.raises(InputError, match="3 of 6 steps"):
        record(
            model,
            lambda *a, **k: _cut_short(model),
            num_inference_steps=STEPS,
            scheduler=model.scheduler_for_test,
        )
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


def _cut_short(model):
    with pytest.raises(KeyboardInterrupt):
        sample_loop(model, model.scheduler_for_test, STEPS, stop_at=3)


# --- signal to noise ---------------------------------------------------------------------------------------------


def test_signal_to_noise_of_exactly_noised_samples_is_that_of_the_forward_process(subject):
    path = subject.uncached
    clean = torch.randn(path.clean.shape, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(path.clean.shape, generator=torch.Generator().manual_seed(2))
    latents = torch.stack([alpha * clean + sigma * noise for alpha, sigma in path.levels])
    ratios, intensities = signal_to_noise(replace(path, latents=latents, told=replace(path.told, clean=clean)))
    for (alpha, sigma), ratio, intensity in zip(path.levels, ratios, intensities, strict=True):
        power = (clean**2).mean() / (noise**2).mean()
        assert ratio == pytest.approx(10 * math.log10(alpha**2 / sigma**2 * power), abs=1e-3)
        assert intensity == pytest.approx(noise.square().mean().sqrt().item(), rel=1e-4)


def test_decoded_signal_to_noise_is_that_of_the_images_by_hand_and_of_the_latents_where_the_decoder_scales(subject):
    path, steps = subject.uncached, [0, 2, 5]
    scaled = decoded_signal_to_noise(path, lambda latents: 3 * latents, steps)
    assert scaled == pytest.approx([signal_to_noise(path)[0][step] for step in steps], abs=1e-4)
    squared = decoded_signal_to_noise(path, torch.square, steps)
    for step, ratio in zip(steps, squared, strict=True):
        clean = np.square(path.levels[step][0] * path.clean.double().numpy())
        noise = np.square(path.latents[step].double().numpy()) - clean
        assert ratio == pytest.approx(10 * math.log10(np.mean(clean**2) / np.mean(noise**2)), abs=1e-3)


def test_the_figure_of_signal_to_noise_says_by_which_estimator_and_shows_decoded_images_too(subject):
    subject.table = CacheTable((StepState.COMPUTE,) * STEPS)
    plain = SNR.measure(subject)
    subject.decode = torch.square
    decoded = SNR.measure(subject)
    for data, rows in ((plain, 1), (decoded, 2)):
        labels = [axes.get_ylabel() for axes in SNR.draw(data).axes if axes.axison]
        assert "SNR (dB), α²·mean(x₀²) / mean((x − αx₀)²)" in labels
        assert ("SNR (dB), mean(D(αx₀)²) / mean((D(x) − D(αx₀))²)" in labels) == (rows == 2)
        assert len(labels) == 1 + 2 * rows
        assert ("Of decoded images: every 2" in SNR.finding(data)) == (rows == 2)
    assert decoded["decoded_steps"] == list(range(STEPS))


def test_where_images_can_not_be_decoded_the_ratio_of_the_latents_stays(subject):
    subject.table = CacheTable((StepState.COMPUTE,) * STEPS)
    subject.decode = lambda latents: latents.flatten(2)
    data = SNR.measure(subject)
    assert "lie on no grid" in data["left_out"]["decoded"]
    assert "decoded" not in SNR.finding(data)
    assert len(data["curves"]["uncached"]["snr_db"]) == STEPS


# --- frequencies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0.1, 0.25, 0.6])
def test_the_split_of_frequencies_is_that_of_a_transform_by_hand(cut):
    images = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    low, high = low_and_high(images, cut)
    height, width = 6, 5
    expected = np.zeros((2, 2))
    for u in range(height):
        for v in range(width):
            wave = np.exp(-2j * np.pi * (u * np.arange(height)[:, None] / height + v * np.arange(width)[None] / width))
            power = np.abs((images.double().numpy() * wave).sum((-2, -1)) / math.sqrt(height * width)) ** 2
            down, across = min(u, height - u) / height, min(v, width - v) / width
            expected[0 if 2 * math.hypot(down, across) <= cut else 1] += power.sum(1)
    np.testing.assert_allclose(low.numpy() ** 2, expected[0], rtol=1e-6)
    np.testing.assert_allclose(high.numpy() ** 2, expected[1], rtol=1e-6)
    torch.testing.assert_close(low**2 + high**2, images.double().square().sum((1, 2, 3)))


def test_a_constant_picture_is_low_and_a_chequered_one_high():
    constant = torch.ones(1, 1, 8, 8)
    chequered = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert [value.item() for value in low_and_high(constant, 0.25)] == pytest.approx([8.0, 0.0], abs=1e-6)
    assert [value.item() for value in low_and_high(chequered, 0.25)] == pytest.approx([0.0, 8.0], abs=1e-6)


# --- similarity --------------------------------------------------------------------------------------------------


def test_the_cosine_is_that_of_whole_rows_over_all_streams():
    one = (torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]), torch.tensor([[2.0], [0.0]]))
    other = (torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]), torch.tensor([[2.0], [0.0]]))
    assert cosine(one, other).tolist() == pytest.approx([4 / 5, 1.0])


def test_identical_steps_have_a_map_of_ones_and_shares_are_counted(model):
    scheduler = FlowMatchEulerDiscreteScheduler()

    def still(model, generator, num_inference_steps):  # the same input whatever the step
        scheduler.set_timesteps(num_inference_steps)
        for t in scheduler.timesteps:
            model(torch.ones(2, 2, 8, 8), t.expand(2), torch.tensor([1, 2]))

    for parameter in model.transformer_blocks[0].norm1.emb.parameters():
        parameter.zero_()  # the time has no effect on the first block, and a little on the others
    data = similarity(Subject(model, still, scheduler, num_inference_steps=4, num_samples=2))
    assert [len(entry["sites"]) for entry in data["maps"].values()] == [3, 3]
    first = data["maps"]["attention"]["cosine"][0]
    assert first == pytest.approx([1.0] * 3, abs=1e-5)
    rows = data["maps"]["MLP"]["cosine"]
    for column, share in enumerate(data["maps"]["MLP"]["share_above"]):
        assert share == sum(row[column] > 0.8 for row in rows) / 3


def test_the_map_of_a_path_is_the_cosine_of_the_modules_own_outputs(model, subject):
    outputs = []
    hook = model.transformer_blocks[1].ff.register_forward_hook(lambda *a: outputs.append(a[-1].flatten(1)))
    subject.num_samples = 2
    data = similarity(subject)
    hook.remove()
    expected = [
        torch.nn.functional.cosine_similarity(a, b).mean().item()
        for a, b in zip(outputs[1:STEPS], outputs, strict=False)
    ]
    assert data["maps"]["MLP"]["cosine"][1] == pytest.approx(expected, abs=1e-5)


# --- features ----------------------------------------------------------------------------------------------------


def test_errors_are_none_where_nothing_was_reused_yet_and_of_reused_features_those_by_hand(model, subject):
    fresh, cached = features(subject, NoCache()), features(subject, FORA(3))
    errors = relative_error(fresh, cached)
    assert errors[0, 0] == 0
    assert errors[0, 1] > 0  # reused from step 0, where it was the same
    assert set(errors) == {(site, step) for site in range(6) for step in range(STEPS)}
    by_hand = [(fresh[0, 0, g] - fresh[0, 1, g]).abs().sum() for g in (0, 1)]
    size = [fresh[0, 1, g].abs().sum() for g in (0, 1)]
    assert errors[0, 1] == pytest.approx((sum(by_hand) / sum(size)).item(), rel=1e-5)
    with sostenuto.enable(model, "none", scheduler=model.scheduler_for_test):
        assert not any(module._forward_hooks for module in model.modules())


def test_a_table_that_keeps_the_stack_is_looked_at_branch_by_branch(subject):
    both, compute = StepState.REUSE_BOTH, StepState.COMPUTE
    subject.table = CacheTable(
        (compute, both, compute, both, compute, compute), fill="stack", eps_scale=(0.99,) * STEPS
    )
    data = feature_error(subject)
    assert set(data["errors"]) == {"every 3", "EB-Cache"}
    rows = data["errors"]["EB-Cache"]["MLP"]
    assert all(value is not None for row in rows for value in row)
    assert isinstance(subject.eb(), EBCache)
    assert subject.noise_scale == pytest.approx(0.99)


def test_rows_of_heat_maps_are_branches_of_which_a_block_may_have_several():
    scheduler = DDIMScheduler()

    def sampled(network, generator, num_inference_steps):
        return sample_pixart(network, scheduler, num_inference_steps)

    subject = Subject(build_pixart(num_layers=2), sampled, scheduler, num_inference_steps=4, num_samples=1)
    subject.table = CacheTable((StepState.COMPUTE,) * 4)
    error, alike = feature_error(subject), similarity(subject)
    attention = [site for block in range(2) for site in (f"transformer_blocks.{block}.attn{k}" for k in (1, 2))]
    assert error["sites"]["attention"] == alike["maps"]["attention"]["sites"] == attention
    for figure in (FEATURE_ERROR.draw(error), SIMILARITY.draw(alike)):
        maps = [axes for axes in figure.axes if axes.get_title().endswith(("attention", "MLP"))]
        assert {axes.get_ylabel() for axes in maps} == {"branch, in running order"}


# --- consecutive outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_the_residual_of_a_polynomial_of_lower_degree_is_nothing(order):
    generator = torch.Generator().manual_seed(order)
    powers = torch.arange(9, dtype=torch.float64)[:, None] ** torch.arange(order)
    outputs = torch.einsum("sd,drc->src", powers, 5 + torch.rand(order, 2, 7, generator=generator, dtype=torch.float64))
    found = residuals(outputs, order)
    assert found[:order] == [None] * order
    assert max(found[order:]) < 1e-9
    if order > 1:
        assert min(residuals(outputs, order - 1)[order:]) > 1e-9


def test_changes_are_relative_l1_distances_and_cosines():
    outputs = torch.tensor([[[3.0, 4.0]], [[3.0, -4.0]], [[6.0, -8.0]]])
    distance, cosines = changes(outputs)
    assert distance == pytest.approx([8 / 7, 1.0])
    assert cosines == pytest.approx([-7 / 25, 1.0])


def test_of_long_features_entries_of_all_channels_are_compared():
    """4096 tokens of 64 channels: every 128th entry would be of one channel alone."""
    module = torch.nn.Identity()
    with listening(torch.nn.Sequential(module), ["0"]) as heard:
        module(torch.arange(64.0).expand(1, 4096, 64))
        first = heard[0].clone()
        module(torch.arange(64.0).expand(1, 4096, 64) + 1)
    assert first.shape == (1, 2048)
    assert first.unique().numel() == 64
    assert torch.equal(heard[0], first + 1)  # the same entries at every call


def test_a_networks_own_error_costs_one_instrument_and_what_is_done_is_on_disk(model, tmp_path):
    def broken(latents):
        raise RuntimeError("out of memory")

    analysis = sostenuto.analyze(
        model,
        sample,
        only=("error-images", "consecutive-outputs"),
        num_inference_steps=STEPS,
        num_samples=2,
        scheduler=model.scheduler_for_test,
        decode=broken,
        folder=tmp_path,
    )
    assert analysis.observations["error-images"].error == "RuntimeError: out of memory"
    assert json.loads((tmp_path / "consecutive-outputs.json").read_text())["data"] == analysis["consecutive-outputs"]


def test_blocks_with_attention_and_mlp_in_one_are_neither(model, subject):
    assert list(subject.places) == ["attention", "MLP"]
    flux = SimpleNamespace(sites=sostenuto.inspect(TINY_MODELS["FluxTransformer2DModel"].build()))
    places = Subject.places.fget(flux)
    kinds = {kind: {flux.sites[place].kind.value for place in own} for kind, own in places.items()}
    assert kinds == {"attention": {"joint-attention"}, "MLP": {"mlp"}, "both in one": {"fused"}}


def test_uniform_caching_stands_beside_eb_at_the_cost_that_is_nearest(subject):
    compute = StepState.COMPUTE
    subject.table = CacheTable((compute, StepState.REUSE_BOTH, *(compute,) * (STEPS - 2)), macs_fraction=0.55)
    data = feature_error(subject)
    assert set(data["errors"]) == {"every 2", "EB-Cache"}
    assert "its table costs 55% of the uncached work" in FEATURE_ERROR.finding(data)


def test_what_an_instrument_left_out_is_said(model, monkeypatch):
    monkeypatch.setattr(Subject, "eb_table", None)
    analysis = sostenuto.analyze(
        model,
        sample,
        only=("snr",),
        num_inference_steps=STEPS,
        num_samples=2,
        scheduler=model.scheduler_for_test,
    )
    assert "Left out: EB-Cache (EB-Cache can't be calibrated on this model)" in analysis.observations["snr"].finding


def test_the_words_judge_scaling_by_the_forward_process():
    """Caching raised the ratio from 2 to 3 dB, training has 1, and b brings it to 1.2: farther from uncached, but right."""
    curve = {"uncached": 2.0, "every 2": 3.0, "every 2, b": 1.2}
    data = {
        "curves": {name: {"snr_db": [value, None]} for name, value in curve.items()},
        "decoded_steps": [],
        "forward_process_db": [1.0, None],
        "b": 0.98,
        "intervals": [2],
    }
    assert "nearer to the forward process of training (+2.00 to +0.20 dB from it)" in SNR.finding(data)


def test_the_words_tell_a_u_from_none():
    u = {"relative_l1": [None, 3.0, 2.0, 1.0, 2.0, 3.0], "residual": {}}
    falling = {"relative_l1": [None, 3.0, 2.5, 2.0, 1.5, 1.0], "residual": {}}
    u["residual"] = falling["residual"] = {"1": [None] + [1.0] * 5}
    assert "the U of the paper" in finding(u)
    assert "no U" in finding(falling)


# --- networks that don't tell everything ---------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [noise_norm_curves, probe_variance])
def test_noised_latents_that_are_a_list_are_refused(measure):
    network, sample, scheduler = sampler_of_lists()
    with pytest.raises(MethodError, match="the latents are a list of tensors"):
        measure(network, sample, torch.zeros(2, 4, 1, 8, 8), num_inference_steps=2, scheduler=scheduler)


def test_a_path_of_lists_is_that_of_their_samples():
    network, sample, scheduler = sampler_of_lists()
    heard = []

    def heard_of(network, generator, num_inference_steps):
        handle = network.register_forward_pre_hook(lambda _, args, kwargs: heard.append(kwargs["x"]), with_kwargs=True)
        heard.append(sample(network, generator, num_inference_steps))
        handle.remove()

    path = record(network, heard_of, num_inference_steps=4, num_samples=2, scheduler=scheduler)
    assert path.rows == (2,)
    for latents, given in zip((*path.latents, path.clean), heard, strict=True):
        torch.testing.assert_close(latents, torch.stack(given))


def test_instruments_that_need_no_noise_measure_where_it_is_not_told(capsys):
    network, sample, scheduler = flow_sampler(TINY_MODELS["PRXTransformer2DModel"])
    network.register_to_config(bottleneck_size=8)  # what it predicts its pipeline turns into something else
    only = ("snr", "similarity", "feature-error", "consecutive-outputs", "components", "tokens", "error-images")
    analysis = sostenuto.analyze(
        network, sample, only=only, num_inference_steps=STEPS, num_samples=2, scheduler=scheduler, show_progress=True
    )
    errors = {name: observation.error for name, observation in analysis.observations.items() if observation.error}
    assert errors.keys() == {"snr", "tokens", "error-images"}
    assert all("turns into something else" in error for error in errors.values())


@pytest.mark.parametrize(
    "only",
    [
        ("snr", "exposure-bias", "similarity", "consecutive-outputs", "components"),
        pytest.param((), id="all", marks=pytest.mark.slow),
    ],
)
def test_every_instrument_but_one_measures_latents_that_are_a_list(only):
    network, sample, scheduler = sampler_of_lists()
    analysis = sostenuto.analyze(
        network, sample, only=only, num_inference_steps=STEPS, num_samples=2, scheduler=scheduler
    )
    errors = {name: observation.error for name, observation in analysis.observations.items() if observation.error}
    assert errors.keys() == {"exposure-bias"}
    assert "the latents are a list of tensors" in errors["exposure-bias"]


# --- tokens and components ---------------------------------------------------------------------------------------


def test_errors_of_samples_are_relative_norms():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert path_errors(torch.tensor([[3.0, 3.0], [0.0, 2.0]]), reference) == pytest.approx([1 / 5, 0.0])


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ([1.0], "by one sample not to be told from random"),
        ([1.0, 5.0], "no different from random"),
        ([1.0, 1.1], "worse than random"),
    ],
)
def test_tokens_are_better_or_worse_by_two_standard_errors_which_one_sample_does_not_have(errors, words):
    def entry(values):
        return {"errors": values, "mean": fmean(values), "macs_share": None}

    necessity = dict.fromkeys(("no tokens", "at every second step", "at every step"), entry(errors))
    selections = {"attention": {"0.1": entry(errors)}, "random": {"0.1": entry([0.0] * len(errors))}}
    found = TOKENS.finding({"selections": selections, "necessity": necessity})
    assert f"tokens by attention are {words} tokens at 10%" in found


def test_shares_of_the_work_are_those_of_the_modules(model, subject):
    data = components(subject)
    assert sum(data["share_of_macs"].values()) == pytest.approx(1)
    tokens, width, rows = 16, 32, 2
    attention = rows * tokens * (4 * width**2 + 2 * tokens * width) * 3  # by hand: projections and two products of maps
    assert data["macs"] * data["share_of_macs"]["attention"] == pytest.approx(attention)
    assert data["macs"] * data["share_of_macs"]["MLP"] == pytest.approx(rows * tokens * 8 * width**2 * 3)
    assert data["share_of_time"]["other"] >= 0
    assert data["repeats"] == 7


# --- all together ------------------------------------------------------------------------------------------------


def test_everything_is_saved_as_data_as_figures_and_on_one_page(model, tmp_path):
    chosen = ("consecutive-outputs", "similarity")
    analysis = sostenuto.analyze(
        model, sample, only=chosen, num_inference_steps=STEPS, num_samples=2, scheduler=model.scheduler_for_test
    )
    page = analysis.save(tmp_path / "out").read_text()
    for name in chosen:
        saved = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert saved["data"] == json.loads(json.dumps(analysis[name]))
        assert saved["this_model_shows"]
        assert saved["paper_claims"] == INSTRUMENTS[name].claim
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<?xml")
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert saved["title"] in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert 'src="http' not in page
    assert 'href="http' not in page
    again = sostenuto.analyze(
        model, sample, only=chosen[:1], num_inference_steps=STEPS, num_samples=2, scheduler=model.scheduler_for_test
    )
    assert again[chosen[0]] == analysis[chosen[0]]


def test_without_a_table_one_is_calibrated_and_told_of(model, subject):
    told = []
    subject.tell = told.append
    assert subject.eb_table.num_inference_steps == STEPS
    assert "calibrate EB-Cache" in told
    assert subject.noise_scale == pytest.approx(0.98)
    with sostenuto.enable(model, subject.eb(), scheduler=model.scheduler_for_test):
        sample_loop(model, model.scheduler_for_test, STEPS)


def test_what_a_model_is_not_made_for_is_said_and_the_rest_goes_on(model):
    def tokens_on_no_grid(latents):
        return latents.flatten(2)

    analysis = sostenuto.analyze(
        model,
        sample,
        only=("frequency", "error-images", "consecutive-outputs"),
        num_inference_steps=STEPS,
        num_samples=2,
        scheduler=model.scheduler_for_test,
        decode=tokens_on_no_grid,
    )
    assert "lie on no grid" in analysis.observations["frequency"].error
    assert "lie on no grid" in analysis.observations["error-images"].error
    assert analysis.observations["consecutive-outputs"].error == ""


def test_every_instrument_measures_and_is_drawn(model):
    scheduler, both, compute = model.scheduler_for_test, StepState.REUSE_BOTH, StepState.COMPUTE
    table = CacheTable((compute, both, compute, both, compute, compute))
    analysis = sostenuto.analyze(
        model, sample, num_inference_steps=STEPS, num_samples=2, scheduler=scheduler, table=table
    )
    assert {name: observation.error for name, observation in analysis.observations.items()} == dict.fromkeys(
        INSTRUMENTS, ""
    )
    json.dumps(analysis.as_dict(), allow_nan=False)
    for observation in analysis.observations.values():
        assert observation.finding.endswith(".")
        assert observation.figure(("png",))["png"].startswith(b"\x89PNG")
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


def test_exposure_bias_shows_the_variance_that_the_chains_gain(model, subject):
    data = exposure_bias(subject)["chain_variance"]
    given = {"num_inference_steps": STEPS, "scheduler": model.scheduler_for_test}
    for name, method in {"uncached": NoCache(), "every 2": FORA(2)}.items():
        chain = probe_chain(
            model, sample, subject.real_batches(), method=method, generator=subject.generator(), **given
        )
        assert data["delta"][name] == pytest.approx(chain.delta)
        assert data["expected"] == pytest.approx(chain.expected)
    assert data["delta"]["every 2, b"] != data["delta"]["every 2"]


@pytest.mark.parametrize(
    "options",
    [
        {"only": ("snr", "sound")},
        {"num_inference_steps": 3},
        {"num_samples": 0},
        {"real_latents": torch.zeros(1, 2, 8, 8)},
    ],
)
def test_a_wrong_choice_is_refused_or_said(model, options):
    arguments = {"only": ("exposure-bias",), "num_inference_steps": STEPS, "num_samples": 2, **options}
    if "real_latents" in options:
        analysis = sostenuto.analyze(model, sample, scheduler=model.scheduler_for_test, **arguments)
        assert "has 1 rows, the samples have 2" in analysis.observations["exposure-bias"].error
        return
    with pytest.raises(InputError):
        sostenuto.analyze(model, sample, scheduler=model.scheduler_for_test, **arguments)


def test_a_bare_denoiser_without_its_scheduler_is_refused_as_everywhere(model, tmp_path):
    calls = []
    for run in (
        lambda: sostenuto.enable(model, "none"),
        lambda: sostenuto.analyze(model, lambda *_, **__: calls.append(1), num_inference_steps=STEPS),
        lambda: sostenuto.tune(model, lambda *_, **__: calls.append(1), folder=tmp_path / "tuned"),
    ):
        with pytest.raises(MethodError, match="a bare denoiser needs its scheduler"):
            run()
    assert not calls
    assert not (tmp_path / "tuned").exists()


def test_caching_one_kind_reuses_that_kind_alone(model, subject):
    with sostenuto.enable(
        model, subject.kinds_cached(StepState.REUSE_MLP), scheduler=model.scheduler_for_test
    ) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        plan, kinds = handle.stats.plan, handle.stats.site_kinds
    for step, row in enumerate(plan):
        for action, kind in zip(row, kinds, strict=True):
            assert (action == Action.REUSE.value) == (kind == "mlp" and step % 3 != 0)


def test_the_command_runs_on_a_tiny_network(tmp_path, capsys):
    from sostenuto.cli import main

    target = tmp_path / "numbers.json"
    words = ["--model", "tiny:FluxTransformer2DModel", "--only", "similarity", "components", "frequency"]
    words += ["--num-samples", "2", "--num-inference-steps", "4", "--output", str(tmp_path / "page")]
    assert main(["analyze", *words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())["instruments"]
    assert found["similarity"]["data"]["maps"]["attention"]["sites"]
    assert "grid" in found["frequency"]["error"]  # packed tokens
    assert "page:" in capsys.readouterr().out


def test_the_time_is_told_before_a_long_analysis_and_the_bar_counts_its_work(model, capsys):
    chosen = ("snr", "consecutive-outputs")
    sostenuto.analyze(
        model,
        sample,
        only=chosen,
        num_inference_steps=STEPS,
        num_samples=1,
        scheduler=model.scheduler_for_test,
        show_progress=True,
    )
    told = capsys.readouterr().err
    assert "analyze: about 1 minute on this machine" in told
    assert "4/4" in told  # of the two instruments' 3.5 and 0.5


def test_numbers_are_written_before_anything_is_drawn_and_a_figure_costs_itself_alone(tmp_path, monkeypatch):
    from sostenuto.cli import main

    def failing(data):
        raise ZeroDivisionError("no axis")

    monkeypatch.setitem(INSTRUMENTS, "similarity", replace(INSTRUMENTS["similarity"], draw=failing))
    words = ["--model", "tiny:DiTTransformer2DModel", "--only", "similarity", "components", "--num-samples", "2"]
    words += ["--num-inference-steps", "4", "--output", str(tmp_path)]
    with pytest.warns(UserWarning, match="figure of similarity can't be drawn: ZeroDivisionError: no axis"):
        assert main(["analyze", *words]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "could not be drawn: ZeroDivisionError: no axis" in page
    assert (tmp_path / "components.svg").exists()

    monkeypatch.setattr(analyzing.Analysis, "save", failing)
    assert main(["analyze", *words, "--json", str(tmp_path / "all.json")]) == 1
    assert json.loads((tmp_path / "all.json").read_text())["instruments"]["similarity"]["error"] == ""


def test_the_command_fails_where_nothing_could_be_measured(tmp_path, monkeypatch, capsys):
    from sostenuto.cli import main

    def failing(subject):
        raise ZeroDivisionError("no number")

    monkeypatch.setitem(INSTRUMENTS, "components", replace(INSTRUMENTS["components"], measure=failing))
    words = ["--model", "tiny:DiTTransformer2DModel", "--num-samples", "2", "--num-inference-steps", "4"]
    assert main(["analyze", *words, "--output", str(tmp_path), "--only", "components"]) == 1
    assert "no instrument could measure anything on this model" in capsys.readouterr().err
    assert main(["analyze", *words, "--output", str(tmp_path), "--data", str(tmp_path)]) == 1
    assert "--data is of the demo model" in capsys.readouterr().err


def test_a_table_that_does_not_fit_is_refused_before_the_instruments(model):
    table = CacheTable((StepState.COMPUTE, StepState.REUSE_BOTH) * STEPS)
    with pytest.raises(TableError, match=f"the cache table has {2 * STEPS} steps, the sampler runs {STEPS}"):
        sostenuto.analyze(
            model,
            sample,
            num_inference_steps=STEPS,
            num_samples=1,
            scheduler=model.scheduler_for_test,
            table=table,
        )


def test_a_clean_sample_is_clipped_only_where_the_solver_itself_clips(model):
    """diffusers carries over what another class was set up with."""
    clipping, largest = model.scheduler_for_test, []
    clipping.register_to_config(clip_sample=True, clip_sample_range=0.1)
    for scheduler in (clipping, DPMSolverMultistepScheduler.from_config(clipping.config)):

        def one(model, generator, num_inference_steps, scheduler=scheduler):
            sample_loop(model, scheduler, num_inference_steps, seed=7)

        path = record(model, one, "none", num_inference_steps=STEPS, num_samples=2, scheduler=scheduler)
        largest.append(path.clean.abs().max().item())
    assert largest[0] == pytest.approx(0.1)
    assert largest[1] > 0.2


@pytest.mark.parametrize("frames_first", [False, True])
def test_frames_are_told_from_channels_by_what_the_network_takes(frames_first):
    video = torch.arange(2 * 4 * 3 * 5 * 5.0).reshape(2, 4, 3, 5, 5)  # two rows of four channels and three frames
    subject = SimpleNamespace(decode=None, denoiser=SimpleNamespace(config={"in_channels": 4}))
    made = Subject.images(subject, video.transpose(1, 2) if frames_first else video)
    assert made.shape == (6, 4, 5, 5)
    assert torch.equal(made[1], video[0, :, 1])
