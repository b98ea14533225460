"""Every calibration measures networks whose blocks and attentions return two streams, an image's and a text's."""

from __future__ import annotations

import itertools

import pytest
import torch

import sostenuto
from sostenuto import calibrations
from sostenuto.sites import blocks_of, inspect
from sostenuto.zoo import TINY_MODELS
from sostenuto.zoo.sampling import flow_sampler

STEPS = 6
FLUX = "FluxTransformer2DModel"


def calibrated(name, calibration):
    network, sample, scheduler = flow_sampler(TINY_MODELS[name])
    made = sostenuto.calibrate(
        network, calibration, sample, num_inference_steps=STEPS, num_samples=2, scheduler=scheduler
    )
    return network, sample, scheduler, made


@pytest.mark.parametrize(
    "name",
    [
        FLUX,
        *(
            pytest.param(f"{name}Model", marks=pytest.mark.slow)
            for name in ("SD3Transformer2D", "HunyuanVideoTransformer3D")
        ),
    ],
)
@pytest.mark.parametrize(
    ("calibration", "method"),
    [
        (calibrations.EBCalibration(target_fraction=0.7), sostenuto.EBCache),
        pytest.param(calibrations.FEBCalibration(target_fraction=0.7), sostenuto.FEBCache, marks=pytest.mark.slow),
        (calibrations.SmoothCacheCalibration(alpha=10.0), sostenuto.SmoothCache),
        (calibrations.MagCacheCalibration(target_skipped=0.4), sostenuto.MagCache),
        (calibrations.TeaCacheCalibration(degree=1), sostenuto.TeaCache),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, calibrations.Calibration) else "",
)
def test_what_is_calibrated_runs(name, calibration, method):
    network, sample, scheduler, made = calibrated(name, calibration)
    with sostenuto.enable(network, method(made), scheduler=scheduler) as handle:
        assert torch.isfinite(sample(network, torch.Generator().manual_seed(1), STEPS)).all()
        assert handle.stats.ideal_speedup > 1.1


def watched(network, sample, module, read):
    """What plain hooks see of a module at every step of an uncached run."""
    seen = []
    hook = network.get_submodule(module).register_forward_hook(
        lambda _, args, kwargs, out: seen.append(read(args, kwargs, out)), with_kwargs=True
    )
    sample(network, torch.Generator().manual_seed(0), STEPS)
    hook.remove()
    return seen


def test_the_ratios_are_those_of_the_images_stream():
    network, sample, _, made = calibrated(FLUX, calibrations.MagCacheCalibration())
    first, last = (blocks_of(network)[index].path for index in (0, -1))
    entered = watched(network, sample, first, lambda args, kwargs, _: kwargs["hidden_states"].clone())
    left = watched(network, sample, last, lambda args, kwargs, out: out[1].clone())  # text, image
    sizes = [(b - a).norm(dim=-1) for a, b in zip(entered, left, strict=True)]
    expected = [1.0] + [(new / old).mean().item() for old, new in itertools.pairwise(sizes)]
    assert made.ratios == pytest.approx(expected, rel=1e-4)


def test_the_error_of_joint_attention_is_that_of_both_streams():
    network, sample, _, made = calibrated(FLUX, calibrations.SmoothCacheCalibration(alpha=0.1))
    joint = next(site.id for site in inspect(network) if site.kind is sostenuto.SiteKind.JOINT_ATTENTION)
    seen = watched(network, sample, joint, lambda args, kwargs, out: torch.cat([part.flatten(1) for part in out], 1))
    expected = [((a - b).abs().sum(1) / b.abs().sum(1)).mean().item() for a, b in itertools.pairwise(seen)]
    assert made.calibration["errors"][joint][0] == pytest.approx(expected, rel=1e-4)


def with_a_pass_that_skips(sample, from_step=0):
    """Stable Diffusion 3 with ``skip_guidance_layers``: from some step on a second pass leaves out a block."""

    def skipping(network, generator, num_inference_steps):
        calls = iter(range(num_inference_steps))

        def twice(**given):
            output = network(**given)
            if next(calls) >= from_step:
                network(**given, skip_layers=[1])
            return output

        return sample(twice, generator, num_inference_steps)

    return skipping


def test_the_errors_of_a_block_that_one_pass_leaves_out_are_those_of_the_others():
    network, sample, scheduler = flow_sampler(TINY_MODELS["SD3Transformer2DModel"])

    def errors(sample):
        given = {"num_inference_steps": STEPS, "num_samples": 2, "scheduler": scheduler}
        made = sostenuto.calibrate(network, calibrations.SmoothCacheCalibration(), sample, **given)
        return made.calibration["errors"]

    alone, beside = errors(sample), errors(with_a_pass_that_skips(sample))
    differs = {name for name in alone if alone[name] != beside[name]}
    assert set(alone) == set(beside) == {site.id for site in inspect(network)}
    assert differs  # what comes after it hears that it is missing
    assert {name.split(".")[1] for name in differs} == {"2"}
