"""Many images: each depends on its own seed and label alone, whoever makes it, and whatever is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import processes
import sostenuto
from sostenuto import CacheTable, Config, EBCache, InputError, StepState
from sostenuto.cli import main
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.sampling import Images, sample_images
from sostenuto.seeds import noise_seed

FEW = Images(10, (3, 1, 4), num_inference_steps=3, seed=5, batch_size=4)
WORDS = ["--method", "fora", "--num-inference-steps", "3", "--seed", "5", "--labels", "3", "1", "4",
         "--num-images", "10", "--batch-size", "4"]  # fmt: skip


def generate(*words):
    assert main(["generate", *WORDS, *words]) == 0


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The images of one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("one") / "images"
    generate("--output", str(folder), "--json", str(folder.parent / "numbers.json"))
    return folder


def test_every_image_has_the_noise_and_the_label_of_its_number(made):
    pipe = load_demo_pipeline()
    indices = range(4, 8)
    generators = [torch.Generator().manual_seed(noise_seed(5, i)) for i in indices]
    with sostenuto.enable(pipe, "fora"):
        expected = pipe([(3, 1, 4)[i % 3] for i in indices], 3, generator=generators, output_type="pil").images
    for index, image in zip(indices, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(made / f"{index:08d}.png")), np.asarray(image))
    assert len(bytes_in(made)) == 10
    numbers = json.loads((made.parent / "numbers.json").read_text())
    assert numbers["num_images"] == 10
    assert numbers["num_batches"] == 3
    assert numbers["ideal_speedup"] == pytest.approx(1.5, rel=0.05)  # FORA(2) computes two of three steps


def test_no_two_images_of_a_run_share_their_noise():
    seeds = [noise_seed(0, index) for index in range(100_000)]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    torch_knows = [torch.rand(1, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7 + 2**32)]
    assert torch_knows[0] == torch_knows[1]  # why the last 32 bits must differ
    starts = sorted(noise_seed(seed, 0) for seed in range(10))
    assert min(b - a for a, b in pairwise(starts)) > 1_000_000


@pytest.mark.slow
def test_four_processes_make_the_same_bytes(made, tmp_path):
    processes.run(generate, 4, "--output", str(tmp_path / "images"))
    assert bytes_in(tmp_path / "images") == bytes_in(made)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {*bytes_in(made), "batches"}


def test_an_npz_is_what_numpy_would_write_and_the_same_by_two_processes(made, tmp_path):
    generate("--output", str(tmp_path / "one.npz"))
    processes.run(generate, 2, "--output", str(tmp_path / "two.npz"))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as file:
        assert file["arr_0"].shape == (10, 28, 28, 1)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [3, 1, 4, 3, 1, 4, 3, 1, 4, 3]
        for index in (0, 9):
            assert np.array_equal(file["arr_0"][index, ..., 0], np.asarray(Image.open(made / f"{index:08d}.png")))
        np.savez(tmp_path / "numpy.npz", file["arr_0"], file["arr_1"])
    with np.load(tmp_path / "numpy.npz") as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
    assert not list((tmp_path / "one.npz.batches").glob("*.npy"))
    (tmp_path / "other.npz").write_bytes(b"")
    assert main(["generate", *WORDS, "--output", str(tmp_path / "other.npz")]) == 1


def test_a_run_goes_on_with_what_is_missing_and_refuses_other_settings(made, tmp_path, capsys):
    folder = tmp_path / "images"
    generate("--output", str(folder))
    kept, lost = folder / "00000000.png", folder / "00000009.png"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    (folder / ".partial-elsewhere-1-00000009.png").write_bytes(b"of a process that was killed")
    generate("--output", str(folder))
    assert bytes_in(folder) == bytes_in(made)
    assert kept.stat().st_mtime_ns == stamp
    assert not list(folder.glob(".partial*"))
    for words in (["--seed", "6"], ["--batch-size", "5"], ["--method", "none"], ["--num-images", "11"]):
        capsys.readouterr()
        assert main(["generate", *WORDS, *words, "--output", str(folder)]) == 1
        assert f"another {words[0].strip('-').replace('-', '_')}" in capsys.readouterr().err
    assert bytes_in(folder) == bytes_in(made)


@pytest.mark.parametrize("how", ["config", "method"])
def test_images_of_another_table_of_the_same_name_are_refused(tmp_path, capsys, how):
    table, config = tmp_path / "table.json", tmp_path / "caching.json"
    CacheTable((StepState.COMPUTE, StepState.REUSE_BOTH, StepState.COMPUTE)).save(table)
    Config(EBCache(table)).save(config)
    words = ["--config", str(config)] if how == "config" else ["--method", f"eb:table='{table}'"]
    words = ["generate", "--num-inference-steps", "3", "--num-images", "2", *words, "--output", str(tmp_path / "made")]
    assert main(words) == 0
    CacheTable((StepState.COMPUTE, StepState.COMPUTE, StepState.REUSE_BOTH)).save(table)
    assert main(words) == 1
    assert "holds images of a run with another table" in capsys.readouterr().err


def test_a_limit_of_kept_bytes_holds_for_many_images_too(tmp_path, capsys):
    config = tmp_path / "fora.json"
    config.write_text('{"method": "fora", "max_cache_bytes": 1}')
    words = [*WORDS, "--config", str(config), "--output", str(tmp_path / "images")]
    assert main(["generate", *words, "--json", str(tmp_path / "numbers.json")]) == 0
    assert json.loads((tmp_path / "numbers.json").read_text())["ideal_speedup"] == 1  # nothing fits
    config.write_text('{"method": "fora"}')
    assert main(["generate", *words]) == 1
    assert "another max_cache_bytes" in capsys.readouterr().err


def test_prompts_go_to_pipelines_that_take_them(tmp_path, capsys):
    class Painter(type(load_demo_pipeline())):
        """Draws the length of a prompt."""

        def __call__(self, prompt, **kwargs):
            return super().__call__([len(words) for words in prompt], **kwargs)

    pipe = load_demo_pipeline()
    painter = Painter(pipe.transformer, pipe.scheduler)
    images = Images(3, ("ab", "abc"), num_inference_steps=2, batch_size=3)
    painter.set_progress_bar_config(disable=True)
    result = sample_images(painter, sostenuto.NoCache(), images, tmp_path / "a", show_progress=False)
    assert result["num_images"] == 3
    sample_images(pipe, sostenuto.NoCache(), Images(3, (2, 3), 2, batch_size=3), tmp_path / "b", show_progress=False)
    assert bytes_in(tmp_path / "a") == bytes_in(tmp_path / "b")
    with pytest.raises(InputError, match="takes no prompts"):
        sample_images(pipe, sostenuto.NoCache(), images, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["generate", *WORDS, "--prompts", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "d")]) == 1
    assert "a prompt in each line, none of them empty" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"batch_size": 0}, {"conditions": ()}, {"seed": -1}])
def test_images_without_meaning_are_refused(wrong):
    with pytest.raises(InputError, match="or more"):
        Images(**{"num_images": 1, "conditions": (1,), **wrong})


def launched(*launcher, output, images=64):
    words = [*WORDS[:8], "1", "--num-images", str(images), "--batch-size", "2", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "sostenuto", "generate", *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_a_worker_that_is_killed_is_started_again_and_the_run_ends_with_the_same_bytes(tmp_path, launcher):
    words = [*WORDS[:8], "1", "--num-images", "64", "--batch-size", "2"]
    assert main(["generate", *words, "--output", str(tmp_path / "one")]) == 0
    output = tmp_path / "two"
    launch = launched(*launcher, "--max_restarts=3", output=output)
    records = output / "batches"
    deadline = time.monotonic() + 200
    while not 2 <= len(list(records.glob("0*.json"))) < 30:
        assert time.monotonic() < deadline
        assert launch.poll() is None, launch.stderr.read()
        time.sleep(0.01)
    victim = psutil.Process(launch.pid).children()[-1]
    done = {path.name: path.stat().st_mtime_ns for path in records.glob("0*.json")}
    os.kill(victim.pid, signal.SIGKILL)
    errors = launch.communicate(timeout=250)[1]
    assert launch.returncode == 0, errors
    assert "Signal 9" in errors or "exitcode: -9" in errors or "SIGKILL" in errors
    assert len(done) < 32
    assert {path.name: path.stat().st_mtime_ns for path in records.glob("0*.json")}.items() >= done.items()
    assert bytes_in(output) == bytes_in(tmp_path / "one")
    assert not [path for path in Path(output).rglob("*") if path.name.startswith(".partial") or path.suffix == ".lock"]
