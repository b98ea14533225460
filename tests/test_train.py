"""The training commands on a handful of images of their own: they run, resume, and write what the package loads."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sostenuto.demo import train as training
from sostenuto.demo import train_classifier
from sostenuto.demo.data import NoDataError, load, read_idx
from sostenuto.demo.network import build_denoiser


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for prefix, count, zipped in (("train", 64, True), ("t10k", 32, False)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = (
                b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            )
            path = tmp_path / f"{prefix}-{kind}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return tmp_path


def test_images_are_read_in_range_and_order(data):
    images, labels = load("train", data)
    assert images.shape == (64, 1, 28, 28)
    assert images.min() >= -1
    assert images.max() <= 1
    raw = read_idx(data / "train-images-idx3-ubyte.gz")
    torch.testing.assert_close(images[5, 0], torch.from_numpy(raw[5].copy()).float() / 127.5 - 1)
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(load("test", data)[0]) == 32


def test_a_missing_folder_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sostenuto.demo.data.DEBIAN_FOLDER", tmp_path / "nowhere")
    with pytest.raises(NoDataError, match="dataset-fashion-mnist"):
        load("train", tmp_path / "nothing")


def test_a_resumed_run_ends_where_an_unbroken_one_does(data, tmp_path):
    def run(folder, *images):
        for count in images:
            config = training.TrainConfig(
                output=tmp_path / folder, data=data, images=count, batch_size=8, warmup_steps=100, checkpoint_every=1
            )
            path = training.train(config)
        return load_file(path)

    unbroken, resumed = run("one", 32), run("two", 16, 32)
    assert set(unbroken) == set(build_denoiser().state_dict())
    for name, value in unbroken.items():
        assert value.dtype is torch.float16
        torch.testing.assert_close(value, resumed[name], rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "two" / "curve.json").read_text())["images"] == 32


def test_the_precision_of_training_can_be_chosen(data, tmp_path):
    def trained(dtype):
        common = dict(data=data, images=16, batch_size=8, num_layers=1, checkpoint_every=1)
        return load_file(training.train(training.TrainConfig(tmp_path / dtype, dtype=dtype, **common)))

    rough, exact = trained("bfloat16"), trained("float32")
    name = "proj_out_2.weight"  # the blocks begin closed, and learn nothing in two steps
    assert not torch.equal(rough[name], exact[name])
    torch.testing.assert_close(rough[name], exact[name], rtol=0.2, atol=1e-2)


def test_weights_that_make_no_garments_are_named(data, tmp_path, monkeypatch, capsys):
    words = ["train", "--output", tmp_path, "--data", data, "--images", 8, "--batch-size", 8, "--num-layers", 1]
    monkeypatch.setattr("sys.argv", [*map(str, words), "--num-heads", "1"])
    training.main()
    said = capsys.readouterr().out
    assert "class accuracy of 200 generated images: 0." in said
    assert "below 0.85: train on more images" in said


def test_timesteps_are_uniform_and_stratified():
    generator = torch.Generator().manual_seed(0)
    timesteps = training.stratified_timesteps(100, generator)
    assert sorted(t // 10 for t in timesteps.tolist()) == list(range(100))


def test_the_rate_warms_up_and_falls_on_a_cosine():
    config = training.TrainConfig(warmup_steps=10, learning_rate=1.0)
    rates = [training.learning_rate(config, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.01 + 0.99 * 0.5)
    assert rates[-1] < 0.012


def test_the_classifier_command_writes_weights_and_reference(data, tmp_path):
    config = train_classifier.ClassifierConfig(output=tmp_path / "judge", data=data, epochs=1, batch_size=16)
    assert 0 <= train_classifier.train(config) <= 1
    reference = load_file(tmp_path / "judge" / "reference.safetensors")
    assert reference["train_cov"].shape == (128, 128)
    assert reference["test_features"].shape == (32, 128)
