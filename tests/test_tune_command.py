"""The commands, on a network of one block as ``demo.train`` would leave it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sostenuto import TuneOptions
from sostenuto.cli import main
from sostenuto.cli.tune import Tune
from sostenuto.demo.network import build_denoiser
from sostenuto.demo.pipeline import load_trained_pipeline
from sostenuto.errors import InputError
from sostenuto.table import CacheTable
from sostenuto.tuning.published import PUBLISHED


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    weights = build_denoiser(num_layers=1, num_heads=1).state_dict()
    noisy = {name: (value + 0.02 * torch.randn_like(value)).half() for name, value in weights.items()}
    save_file(noisy, folder / "ema.safetensors")
    return folder


def test_a_trained_network_of_another_shape_is_loaded(trained, tmp_path):
    pipe = load_trained_pipeline(trained)
    assert len(pipe.transformer.transformer_blocks) == 1
    assert pipe.transformer.inner_dim == 48
    with pytest.raises(InputError, match=r"demo\.train"):
        load_trained_pipeline(tmp_path)


def test_tune_saves_tables_and_figures_and_goes_on_where_it_was(trained, tmp_path, capsys):
    words = [
        "tune",
        "--model",
        str(trained),
        "--num-inference-steps",
        "8",
        "--speedup",
        "1.5",
        "--speedups",
        "1.3",
        "2",
    ]
    words += [
        "--num-samples",
        "8",
        "--trial-samples",
        "4",
        "--refinements",
        "1",
        "--kinds",
        "stack",
        "--score-images",
        "8",
    ]
    words += ["--output", str(tmp_path), "--json", str(tmp_path / "numbers.json")]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "uncached generations" in captured.err
    assert "minutes on this machine" in captured.err
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert content["uncached_score"] is not None
    for row in content["frontier"]:
        table = CacheTable.load(tmp_path / f"tuned-{row['target']:g}x.json")
        assert 1 / table.macs_fraction == pytest.approx(row["ideal_speedup"])
        assert f"{row['plan']}  {row['origin']}" in captured.out
    for name in ("frontier.png", "frontier.pdf", "plans.png", "plans.pdf"):
        assert (tmp_path / name).stat().st_size > 1000
    trials = (tmp_path / "trials.json").read_text()
    assert main(words) == 0
    assert (tmp_path / "trials.json").read_text() == trials


def test_what_may_compete_is_what_the_library_knows():
    assert Tune().published == TuneOptions().published == PUBLISHED


def test_a_speedup_of_one_is_refused_in_a_line(trained, tmp_path, capsys):
    words = ["tune", "--model", str(trained), "--speedup", "1", "--output", str(tmp_path / "none")]
    assert main(words) == 1
    assert "above 1, not 1.0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_advise_prints_and_writes(trained, tmp_path, capsys):
    path = tmp_path / "advice.json"
    assert main(["advise", "--model", str(trained), "--num-inference-steps", "10", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert ("worth it" if content["worth"] else "not worth it") in capsys.readouterr().out
    assert content["num_inference_steps"] == 10
