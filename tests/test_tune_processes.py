"""Tuning by several processes: they share the work, and find what one would."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

import processes
from sostenuto.cli import main
from sostenuto.demo.network import build_denoiser
from sostenuto.tuning import lab

WORDS = ["tune", "--num-inference-steps", "8", "--speedup", "1.5", "--speedups", "1.3", "2", "--num-samples", "8",
         "--trial-samples", "4", "--refinements", "2", "--kinds", "stack", "mlp", "--score-images", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    weights = build_denoiser(num_layers=1, num_heads=1).state_dict()
    save_file(
        {name: (v + 0.02 * torch.randn_like(v)).half() for name, v in weights.items()}, folder / "ema.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    tuned(trained, folder)
    return folder


def tuned(trained, folder, begun=None):
    """Tune; who generates notes it."""
    original = lab.generate

    def noted(*args, **kwargs):
        if begun is not None:
            with begun.open("a") as log:
                log.write(f"{os.getpid()}\n")
        return original(*args, **kwargs)

    lab.generate = noted
    try:
        assert main([*WORDS, "--model", str(trained), "--output", str(folder)]) == 0
    finally:
        lab.generate = original


def found(folder):
    """All that was found but times."""
    frontier = json.loads((folder / "frontier.json").read_text())
    for point in frontier["frontier"]:
        del point["time_speedup"], point["measured_speedup"]
    tables = {path.name: path.read_bytes() for path in folder.glob("tuned-*.json")}
    return frontier, tables


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_find_what_one_finds_and_share_the_generations(trained, alone, tmp_path, size):
    processes.run(tuned, size, trained, tmp_path / "several", tmp_path / "begun")
    assert found(tmp_path / "several") == found(alone)
    made = (tmp_path / "begun").read_text().split()
    shares = sorted(made.count(pid) for pid in set(made))
    assert len(shares) == size
    assert shares[-1] < 0.65 * len(made)


@pytest.mark.slow
def test_a_launch_that_is_killed_goes_on_and_ends_the_same(trained, alone, tmp_path):
    workers = processes.start(tuned, 2, trained, tmp_path / "several", tmp_path / "begun")
    response = tmp_path / "several" / "response.json"
    while not (response.exists() and len(json.loads(response.read_text())) >= 4):
        assert all(worker.is_alive() for worker in workers)
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    known = json.loads(response.read_text())
    processes.run(tuned, 2, trained, tmp_path / "several", tmp_path / "begun")
    assert json.loads(response.read_text()).items() >= known.items()
    assert found(tmp_path / "several") == found(alone)
    assert not list((tmp_path / "several").glob(".partial*"))
