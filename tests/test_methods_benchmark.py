"""The comparison of all methods at equal cost chooses its rows by what they cost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DDIMScheduler

from sostenuto import FORA, L2C, available_methods
from sostenuto.demo.network import build_denoiser
from sostenuto.demo.pipeline import DemoPipeline
from sostenuto.methods.base import parts

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import methods as script
from lab import SEARCH_SEED, Lab


def test_of_each_method_the_setting_nearest_to_each_target_is_taken():
    grid = {"FORA": [FORA(2), FORA(3), FORA(4)], "L2C": [L2C(threshold=0.1), L2C(threshold=0.9)]}
    speedups = {FORA(2): 1.9, FORA(3): 2.2, FORA(4): 3.3, L2C(threshold=0.1): 1.2, L2C(threshold=0.9): 1.3}
    assert script.chosen(grid, speedups.get, [2.0, 3.0]) == [
        (None, "L2C", L2C(threshold=0.9)),  # gets to neither
        (2.0, "FORA", FORA(2)),
        (3.0, "FORA", FORA(4)),
    ]


def test_every_method_for_transformers_is_in_the_grid(tmp_path, monkeypatch):
    asked = []

    monkeypatch.setattr(Lab, "calibrated", lambda self, name, *_: asked.append(name) or tmp_path / f"{name}.json")
    grid = script.settings_of_every_method(Lab(None, tmp_path))
    tried = {part.name for methods in grid.values() for method in methods for part in parts(method)}
    known = {name for name, method in available_methods().items() if method.denoisers != "U-Net"}
    assert known - tried == {
        "none",
        "epsilon-scaling",
        "time-shift",
    }  # the first is the base; λ joins later; t is no cost
    assert {name.partition("-")[0] for name in asked} == {"eb", "feb", "smoothcache", "mag", "tea", "ditfastattn"}


def test_the_noise_scale_of_the_smallest_distance_is_taken_and_kept_and_sees_none_of_the_judged_noise(
    tmp_path, monkeypatch
):
    given, lab = [], Lab(DemoPipeline(build_denoiser(num_layers=1), DDIMScheduler()), tmp_path, "ddim", search_images=7)

    def sample(num_images):
        return lambda pipe, generator: given.append((num_images, generator.initial_seed()))

    distances = dict(zip(script.SCALES, (3.0, 4.0, 1.0, 2.0, 5.0, 6.0), strict=True))
    monkeypatch.setattr(script, "demo_sample", sample)
    left = iter(distances.values())
    monkeypatch.setattr(script, "Judge", lambda: SimpleNamespace(distance=lambda _: next(left)))
    assert script.best_scale(lab, FORA(2)) == 0.98
    assert given == [(7, SEARCH_SEED)] * 6
    assert script.best_scale(lab, FORA(2)) == 0.98
    assert len(given) == 6  # kept
    assert SEARCH_SEED not in range(900_000)  # a row's batches begin at their seed × 1 000 003 + the first image


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    arguments = [
        "methods.py",
        "--cost",
        "macs",
        "--num-images",
        "4",
        "--batch-size",
        "4",
        "--search-images",
        "4",
        "--only",
        "FORA",
        "L2C",
    ]
    arguments += ["--output", str(tmp_path), "--json", str(tmp_path / "found.json"), "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    first = (tmp_path / "found.json").read_text()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    script.main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == made
    names = [row["name"] for row in json.loads(first)["rows"]]
    assert names[0] == "uncached"
    assert "2x: FORA | ε-scaling" in names
    assert any("L2C" in name for name in names)
