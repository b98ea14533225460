"""The commands, on a network of one block as ``demo.train`` would leave it."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import sostenuto
from sostenuto import TuneOptions
from sostenuto.cli import main
from sostenuto.cli.tune import Tune
from sostenuto.demo.network import build_denoiser
from sostenuto.demo.pipeline import load_trained_pipeline
from sostenuto.errors import InputError
from sostenuto.table import CacheTable
from sostenuto.tuning.published import PUBLISHED
from test_tuned import tuned_by_hand


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
    with pytest.warns(UserWarning, match=r"FID of 8 says little, it wants 128; 8 real images get [\d.]+, compare"):
        assert main(words) == 0
    captured = capsys.readouterr()
    assert "uncached generations" in captured.err
    assert "minutes on this machine" in captured.err
    expected = re.search(r"about (\d+) uncached", captured.err)[1]
    assert re.search(rf"\d+/{expected} \[", captured.err)  # the bar counts to the estimate
    assert re.search(r"100%.* (\d+)/\1 \[", captured.err)  # and ends at what was done
    assert "FID of 8 says little" in captured.out
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert content["uncached_score"] is not None
    for row in content["frontier"]:
        for target in row["answers"]:
            table = CacheTable.load(tmp_path / f"tuned-{target:g}x.json")
            assert 1 / table.macs_fraction == pytest.approx(row["ideal_speedup"])
        assert f"{row['plan']}  {row['origin']}" in captured.out
    assert sorted(target for row in content["frontier"] for target in row["answers"]) == [1.3, 1.5]
    assert f"left out of the frontier: 2, beyond the limit of {content['limit']:.2f} times" in captured.out
    for name in ("frontier.png", "frontier.pdf", "plans.png", "plans.pdf"):
        assert (tmp_path / name).stat().st_size > 1000
    trials = (tmp_path / "trials.json").read_text()
    with pytest.warns(UserWarning, match="says little"):
        assert main(words) == 0
    assert (tmp_path / "trials.json").read_text() == trials


def test_what_may_compete_is_what_the_library_knows():
    assert Tune().published == TuneOptions().published == PUBLISHED


def test_numbers_are_written_before_figures_that_may_fail(trained, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(sostenuto, "tune", lambda *_, **__: tuned_by_hand())
    monkeypatch.setattr("sostenuto.report.frontier.save_figures", fail)
    words = ["tune", "--model", str(trained), "--score-images", "128", "--output", str(tmp_path)]
    assert main([*words, "--json", str(tmp_path / "numbers.json")]) == 1
    assert json.loads((tmp_path / "numbers.json").read_text())["frontier"]
    err = capsys.readouterr().err
    assert "no fonts" in err
    assert "says little" not in err  # 128 images are as many as there are features


def test_a_speedup_of_one_is_refused_in_a_line(trained, tmp_path, capsys):
    words = ["tune", "--model", str(trained), "--speedup", "1", "--output", str(tmp_path / "none")]
    assert main(words) == 1
    assert "above 1, not 1.0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_advise_prints_and_writes(trained, tmp_path, capsys):
    path = tmp_path / "advice.json"
    words = ["advise", "--model", str(trained), "--num-inference-steps"]
    table = tmp_path / "table.json"
    assert main([*words, "10", "--json", str(path), "--output", str(table)]) == 0
    content = json.loads(path.read_text())
    told = capsys.readouterr()
    assert content["worth"]
    assert "worth it" in told.out
    assert content["num_inference_steps"] == 10
    assert CacheTable.load(table).strip() == content["plan"]
    assert "10/10" in told.err  # the bar over the steps
    assert main([*words, "2", "--output", str(tmp_path / "none.json")]) == 0
    assert "no plan is advised" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
