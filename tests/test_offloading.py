"""Weights that are loaded layer by layer: what a model is known by, where it runs, and that everything works on it."""

import pytest
import torch
from accelerate import cpu_offload

import sostenuto
from conftest import build_tiny, sample, sample_loop
from sostenuto import FORA, EBCalibration, compat
from sostenuto.calibrations.base import Settings
from sostenuto.calibrations.claims import measured_with
from sostenuto.sampling import _weights


@pytest.fixture
def offloaded(scheduler):
    """A network whose weights lie on ``meta`` between its layers' calls, as ``enable_sequential_cpu_offload`` leaves it."""
    network = cpu_offload(build_tiny(), torch.device("cpu"))
    network.scheduler_for_test = scheduler
    assert any(parameter.is_meta for parameter in network.parameters())
    return network


def test_a_model_is_known_by_its_weights_wherever_they_lie(offloaded, scheduler):
    settings = [Settings(network, sample, 6, 2, scheduler=scheduler) for network in (build_tiny(), offloaded)]
    plain, hooked = map(measured_with, settings)
    assert hooked == plain
    assert _weights(offloaded) == _weights(build_tiny())
    assert [name for name, _ in compat.weights_of(offloaded)] == [name for name, _ in offloaded.named_parameters()]


def test_it_runs_where_its_hooks_say(offloaded):
    assert compat.execution_device(offloaded) == torch.device("cpu")
    bare = torch.nn.Linear(2, 2, device="meta")
    assert compat.execution_device(bare) == torch.device("meta")


def test_it_is_cached_and_calibrated_like_any_other(offloaded, scheduler, tmp_path):
    with sostenuto.enable(build_tiny(), FORA(2), scheduler=scheduler) as handle:
        wanted, _ = sample_loop(handle._denoiser, scheduler, 6)
    with sostenuto.enable(offloaded, FORA(2), scheduler=scheduler):
        made, _ = sample_loop(offloaded, scheduler, 6)
    assert torch.equal(made, wanted)
    options = EBCalibration(target_fraction=0.7)
    given = dict(num_inference_steps=6, num_samples=2, scheduler=scheduler, folder=tmp_path)
    table = sostenuto.calibrate(offloaded, options, sample, **given)
    assert table.macs_fraction < 1
