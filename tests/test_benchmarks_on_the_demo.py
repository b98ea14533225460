"""The comparisons on the demo model: their rows, what they keep and measure, and each once in a tiny setting."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

import sostenuto
from sostenuto import FORA, L2C, DuCa, EBCache, EpsilonScaling, FEBCache, NoCache
from sostenuto.demo.network import build_denoiser
from sostenuto.demo.pipeline import load_demo_pipeline, load_trained_pipeline
from sostenuto.demo.rows import Entry, Settings
from sostenuto.demo.run import run_entries
from sostenuto.methods.base import parts
from sostenuto.methods.feb import noise_scale_curve
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
import papers  # noqa: E402
import tune  # noqa: E402
from claims import CLAIMS, EQUAL  # noqa: E402
from lab import Lab  # noqa: E402
from quality_tables import quality, reproduced, tuned  # noqa: E402

REUSE = StepState.REUSE_BOTH


def trained(folder, **shape):
    """A folder as ``demo.train`` leaves it, with random weights."""
    torch.manual_seed(0)
    weights = build_denoiser(num_heads=1, **shape).state_dict()
    noisy = {name: value + 0.02 * torch.randn_like(value) for name, value in weights.items()}
    save_file(noisy, folder / "ema.safetensors")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("small"), num_layers=1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """As many blocks as the demo's, for settings that count them."""
    return trained(tmp_path_factory.mktemp("deep"))


def table(num_steps, **options):
    return CacheTable((StepState.COMPUTE, *(REUSE,) * (num_steps - 1)), **options)


# --- what was sampled is what is shown ---------------------------------------------------------------------------


def test_a_row_of_the_same_name_with_other_contents_is_sampled_anew(small, tmp_path):
    pipe, settings = load_trained_pipeline(small), Settings(4, 4)
    one = Entry("row", EBCache(table(4)), 4)
    others = [
        replace(one, solver="ddim"),
        replace(one, num_inference_steps=5, method=EBCache(table(5))),
        replace(one, method=EBCache(table(4, eps_scale=(0.9,) * 4))),
        replace(one, method=EBCache(table(4), eps_scale=0.9)),
    ]
    assert len({entry.key for entry in (one, *others)}) == 5
    base = Entry("uncached", NoCache(), 4)
    macs = {}
    for steps, row in ((4, one), (5, others[1])):
        results = run_entries(tmp_path, [base, row], settings, show=False, pipe=pipe)
        macs[steps] = results["rows"][1]["macs"]
    assert macs[5] > macs[4]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    run_entries(tmp_path, [base, one], settings, show=False, pipe=pipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_what_is_made_by_another_recipe_or_for_another_sampler_is_made_anew(small, tmp_path):
    lab, made = Lab(load_trained_pipeline(small), tmp_path), []

    def make():
        made.append(len(made))
        return table(4, eps_scale=(1 + len(made),) * 4)

    first = lab.kept("eb", ("time",), make)
    again = lab.kept("eb", ("time",), make)
    assert first == again
    assert made == [0]
    lab.kept("eb", ("macs",), make)
    for change in ({"solver": "ddim"}, {"num_inference_steps": 20}, {"dtype": "bfloat16"}):
        replace(lab, **change).kept("eb", ("time",), make)
    with torch.no_grad():
        next(lab.pipe.transformer.parameters()).add_(1)
    lab.kept("eb", ("time",), make)
    assert made == [0, 1, 2, 3, 4, 5]


# --- the papers' tables ------------------------------------------------------------------------------------------


class Paper(Lab):
    """Calibrates nothing."""

    def calibrated(self, name, calibration, result=CacheTable, num_samples=8):
        last_values = getattr(calibration, "forecast_order", 0) == 0
        scale = (0.9 if last_values else 0.8,) * self.num_inference_steps
        states = (StepState.COMPUTE, *(REUSE,) * (self.num_inference_steps - 2), StepState.COMPUTE)
        return CacheTable(states, eps_scale=scale, calibration={"options": repr(calibration)})


def paper_rows(name):
    make, solver, steps = papers.TABLES[name]
    return make(Paper(None, Path("nowhere"), solver, steps))


@pytest.mark.parametrize("name", papers.TABLES)
def test_the_rows_of_a_paper_s_table(name):
    rows = paper_rows(name)
    names = [row.name for row in rows]
    assert names[0] == "uncached"
    assert len(set(names)) == len(names)
    assert len({row.key for row in rows}) == len(rows)
    assert {row.reference for row in rows} - {None} <= set(names)
    wanted = {side for _, *sides in CLAIMS[name] for side in sides}
    assert wanted <= set(names)
    assert any(
        isinstance(row.method, NoCache) and row.num_inference_steps < rows[0].num_inference_steps for row in rows
    )


def test_every_paper_s_table_has_claims():
    assert set(papers.TABLES) == set(CLAIMS)


def test_rows_named_after_a_paper_fill_with_last_values_and_recommended_ones_say_so():
    for name in ("table1", "table1-250", "table2", "eb", "feb"):
        for row in paper_rows(name):
            for part in parts(row.method):
                if isinstance(part, EBCache) and "recommended" not in row.name:
                    assert set(part.table.eps_scale) <= {0.9}  # the mark of a calibration with last values, above


def test_the_separation_of_stages_is_the_only_difference():
    lab = SimpleNamespace(
        calibrated=lambda name, options: asked.append(options) or table(4), row=Paper(None, Path()).row
    )
    asked = []
    papers.stages(lab, "uncached", "")
    on, off = asked
    assert vars(on) == vars(off)
    assert StepState.REUSE_BOTH not in on.candidates
    assert [options.candidates_at(0.9) for options in asked] == [on.candidates[:1], on.candidates]
    assert [options.candidates_at(0.1) for options in asked] == [on.candidates[1:], on.candidates]


# --- rivals at equal cost ----------------------------------------------------------------------------------------


class Timed(tune.Rivals):
    """Every method is as fast as its share says, but for what each adds."""

    def _speed(self, method):
        if isinstance(method, EBCache) and method.table.macs_fraction:
            return 1 / (method.table.macs_fraction + 0.1)
        if isinstance(method, sostenuto.L2C):
            return 1.36
        return None if isinstance(method, sostenuto.ABCache) else 2.0


def shares(asked):
    def calibrated(name, calibration):
        asked.append((name, calibration.target_fraction))
        method = getattr(type(calibration), "method", "")
        return table(50, macs_fraction=calibration.target_fraction if method == "eb" else None)

    return SimpleNamespace(calibrated=calibrated, scales=(0.98, 1.0), num_inference_steps=50)


def test_a_calibrated_method_is_calibrated_until_its_speed_is_the_target_s():
    asked = []
    list(Timed(shares(asked), "time", 1, None).calibrated(2.0))
    eb = [share for name, share in asked if name == "eb-2"]
    assert eb[0] == 0.5  # as fast as 1 / 0.6
    assert len(eb) == 2
    assert 1 / (eb[1] + 0.1) == pytest.approx(2.0, rel=0.05)
    assert [share for name, share in asked if name == "smoothcache-2"] == [0.5]


def test_rivals_that_do_not_get_to_a_speed_are_named():
    shipped = tune.SHIPPED / "demo-ddim50-l2c.safetensors"
    there, absent = Timed(shares([]), "time", 1, shipped).of(2.0)
    assert {"EB", "EB, linear", "FEB", "SmoothCache", "FORA"} <= {name for name, _ in there}
    refused = ["AB, clean sample: refused by this model", "AB: refused by this model"]
    assert sorted(absent) == [*refused, "L2C: at most 1.36×"]
    _, absent = Timed(shares([]), "time", 1, None).of(2.0)
    assert "L2C: no router for this model and so many steps" in absent
    _, absent = Timed(shares([]), "time", 1, shipped).of(3.0)
    assert "FORA: at most 2.00×" in absent
    asked = []
    there, absent = Timed(shares(asked), "time", 1, shipped, ["EB, linear", "AB"]).of(2.0)
    assert [name for name, _ in there] == ["EB, linear"]
    assert absent == ["AB: refused by this model"]
    assert {name for name, _ in asked} == {"eb-linear-2"}
    rivals = Timed(shares([]), "time", 1, shipped)
    names = {name for name, _ in [*rivals.calibrated(2.0), *tune.intervals()]} | {"L2C"}
    assert names == set(tune.NAMES)
    assert tune.extent([1.2, 2.0], 2.0) == "at most 2.00×"
    assert tune.extent([2.0, 3.0], 2.0) == "2.00× at least"
    assert tune.extent([1.2, 2.0, 3.0], 2.0) == "2.00× is the nearest"


@pytest.mark.parametrize("steps", [20, 50])
def test_the_second_model_that_lies_here_runs_its_own_routers(steps):
    folder = ROOT / "benchmarks" / "second-model"
    pipe = load_trained_pipeline(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with sostenuto.enable(pipe, L2C(folder / f"ddim{steps}-l2c.safetensors")) as handle:
        images = pipe([3], steps, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.std() > 0.1  # a picture, not the mean
    assert 1.2 < handle.stats.ideal_speedup < 1.4
    with pytest.raises(sostenuto.SostenutoError, match="the router was made for"):
        sostenuto.enable(load_demo_pipeline(), L2C(folder / f"ddim{steps}-l2c.safetensors"))


@pytest.mark.parametrize("cost", ["macs", "time"])
def test_a_speed_is_measured_once_for_each_unit_and_sampler(small, tmp_path, monkeypatch, cost):
    lab = Lab(load_trained_pipeline(small), tmp_path, num_inference_steps=4)
    first = lab.speed(FORA(2), cost, 1)
    assert first > 0
    if cost == "macs":
        assert first == pytest.approx(1.5, abs=0.2)
    monkeypatch.setattr(Lab, "_measured", lambda *_: -1.0)
    assert lab.speed(FORA(2), cost, 1) == first
    assert replace(lab, solver="ddim").speed(FORA(2), cost, 1) == -1
    assert lab.speed(FORA(2), "macs" if cost == "time" else "time", 1) == -1


# --- the tables on the pages -------------------------------------------------------------------------------------


def results(distances, errors=None, speeds=None, names=None, **facts):
    """Results with the distances of each row for each seed."""
    rows = [
        {
            "name": names[i] if names else f"row {i}",
            "frechet_distance": sum(own) / len(own),
            "frechet_distance_per_seed": own,
            "speedup": speeds[i][0] if speeds else 1.0,
            "ideal_speedup": speeds[i][1] if speeds else 1.0,
            "psnr": 30.0 - i,
        }
        | dict.fromkeys(("inception_score", "class_accuracy", "precision", "recall"), 0.5)
        for i, own in enumerate(distances)
    ]
    error = None if errors is None else [[errors] * len(rows)] * len(rows)
    machine = {"dtype": "float32", "processor": "cpu", "torch": "2"}
    made = {"rows": rows, "difference_errors": error, "floor": 1.0, "n": 8, "seeds": [*range(len(distances[0]))]}
    return made | {"machine": machine} | facts


def test_an_interval_is_over_seeds_where_there_are_several_else_by_the_delta_method():
    several = quality(results([[2.0, 3.0, 4.0], [1.0, 2.5, 2.5]], errors=0.1))
    half = (
        4.302653 * math.sqrt(1 / 4) / math.sqrt(3)
    )  # differences −1, −0.5, −1.5; Student's t of two degrees of freedom
    assert f"-1.000 ± {half:.3f} |" in several
    assert "Student's t" in several
    assert "-1.000 ± 0.196 |" in quality(results([[2.0], [1.0]], errors=0.1))
    assert "| 1.000 | – |" in quality(results([[2.0], [1.0]]))


def test_seeds_that_were_judged_together_and_rows_without_times_are_said():
    made = results([[2.0, 3.0, 4.0], [1.0, 2.5, 2.5]], speeds=[(None, 1.0), (None, 1.52)], pooled=True)
    page = quality(made)
    assert "n = 3 × 8 judged together, seeds 0, 1, 2" in page
    assert "| row 1 | – | 1.52× | 2.000 | -1.000 ± " in page


def test_a_table_shows_both_speeds_and_names_what_is_not_in_it():
    page = quality(results([[2.0], [1.0]], speeds=[(1.0, 1.0), (1.41, 1.52)], absent=["2×: L2C: at most 1.36×"]))
    assert "| row 1 | 1.41× | 1.52× |" in page
    assert "\n- 2×: L2C: at most 1.36×" in page


@pytest.mark.parametrize(
    ("distances", "speeds", "cost", "words"),
    [
        ((1.0, 2.0), (2.0, 2.0), "macs", "true"),
        ((2.0, 1.0), (2.0, 2.0), "macs", "the other way"),
        ((1.0, 1.1), (2.0, 2.0), "macs", "no difference beyond the noise"),
        ((1.0, 2.0), (1.6, 2.0), "macs", "true, at 25% more work"),
        ((1.0, 2.0), (1.6, 2.0), "time", "true"),
        ((2.0, 1.0), (2.0, 1.6), "macs", "the other way, at 25% more work"),
        ((1.0, 2.0), (2.0, 1.6), "macs", "true"),
    ],
)
def test_a_verdict_takes_the_interval_and_the_cost_into_account(distances, speeds, cost, words, monkeypatch):
    monkeypatch.setitem(CLAIMS, "eb", (("claim", "row 1", "row 2"), ("another", "row 1", "gone")))
    made = results(
        [[1.5], *([d] for d in distances)],
        errors=0.1,
        speeds=[(1.0, 1.0), *((1.7, speed) for speed in speeds)],
        table="eb",
        cost=cost,
    )
    page = reproduced(made)
    assert page.splitlines()[-2].endswith(f"| {words} |")
    assert page.endswith("| another | – | not measured |")


def test_a_claim_of_likeness_is_true_where_nothing_shows(monkeypatch):
    claims = tuple((EQUAL + "alike", f"row {one}", f"row {other}") for one, other in ((1, 2), (1, 3), (3, 1)))
    monkeypatch.setitem(CLAIMS, "duca", claims)
    distances = [[1.5], [1.0], [1.1], [2.0]]
    page = reproduced(results(distances, errors=0.1, table="duca")).splitlines()[-3:]
    assert [line.split("|")[-2].strip() for line in page] == [
        "true: no difference beyond the noise",
        "no: the first is better",
        "no: the second is better",
    ]
    assert all(line.startswith("| alike |") for line in page)
    assert "not known: one seed" in reproduced(results(distances, table="duca"))


def test_aggressive_steps_alone_skip_the_stack_between_the_same_full_steps():
    kinds = papers.OnlyAggressive(4).kinds(50)
    assert [kind.value == "F" for kind in kinds] == [kind.value == "F" for kind in DuCa(4).kinds(50)]
    assert {kind.value for kind in kinds} == {"F", "A"}


def test_a_batch_keeps_the_noise_scale_that_ran_whatever_the_method(small, tmp_path):
    pipe = load_trained_pipeline(small)
    method = FORA(2) | EpsilonScaling(1.25)
    made = CacheTable((StepState.COMPUTE, REUSE, StepState.COMPUTE), method="feb")
    rows = [Entry("uncached", NoCache(), 3), Entry("scaled", method, 3), Entry("feb", FEBCache(made), 3)]
    found = run_entries(tmp_path, rows, Settings(4, 4), show=False, pipe=pipe)["rows"]
    assert found[0]["eps_scale"] == [1.0] * 3
    assert found[1]["eps_scale"] == pytest.approx([0.8] * 3)
    assert found[2]["eps_scale"] == pytest.approx(noise_scale_curve((1.0, 0.5, 0.0)))


def test_tuned_plans_stand_beside_the_best_of_those_that_cost_no_more():
    names = ["uncached", "2x: tuned by score", "2x: tuned by nearness", "2x: slow", "2x: FORA"]
    speeds = [(1.0, 1.0), (2.0, 2.0), (2.0, 2.0), (1.7, 1.75), (2.0, 1.95)]
    page = tuned(results([[3.0], [2.0], [2.5], [1.0], [2.6]], errors=0.1, speeds=speeds, names=names, absent=[]))
    assert "| 2× | 2.000 (2.00×) | 2.600, FORA (1.95×) | true | 28.0 (2.00×) | 26.0, FORA (1.95×) |" in page


# --- each script, once -------------------------------------------------------------------------------------------


def run(monkeypatch, tmp_path, name, *words, model=None):
    """A script in a tiny setting; what it wrote."""
    script = importlib.import_module(name)
    if model is not None:
        monkeypatch.setattr(script, "load_demo_pipeline", lambda: load_trained_pipeline(model))
    found = tmp_path / "found.json"
    options = [
        "--steps",
        "4",
        "--num-images",
        "4",
        "--batch-size",
        "4",
        "--output",
        str(tmp_path),
        "--json",
        str(found),
    ]
    monkeypatch.setattr(sys, "argv", [name, *words, *options])
    script.main()
    return json.loads(found.read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no threshold brings the cost")
@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_table_of_the_papers_runs(monkeypatch, tmp_path, deep, name):
    found = run(monkeypatch, tmp_path, "papers", name, "--search-images", "4", model=deep)
    assert quality(found) in reproduced(found)
    assert found["absent"] == papers.ABSENT.get(name, [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cost", ["macs", "time"])
def test_the_comparison_with_tuned_plans_runs_and_goes_on(monkeypatch, tmp_path, small, cost):
    words = ("--model", str(small), "--speedups", "1.3", "--cost", cost, "--pairs", "1")
    words += ("--search-images", "4", "--score-images", "4", "--seeds", "0", "1")
    found = run(monkeypatch, tmp_path, "tune", *words)
    assert any("L2C" in line for line in found["absent"])
    assert found["cost"] == cost
    assert "| 1.3× |" in tuned(found)
    monkeypatch.setattr(sostenuto, "calibrate", None)
    monkeypatch.setattr(sostenuto, "tune", None)
    monkeypatch.setattr(Lab, "_measured", None)
    assert run(monkeypatch, tmp_path, "tune", *words) == found


@pytest.mark.slow
def test_the_comparison_of_noise_scales_runs(monkeypatch, tmp_path):
    script = importlib.import_module("exposure_bias")
    monkeypatch.setattr(script.data, "of_labels", lambda part, labels, folder: torch.zeros(len(labels), 1, 28, 28))
    found = run(monkeypatch, tmp_path, "exposure_bias", "--num-samples", "10")
    assert set(found["factors"]) == {f"{speed}: by {match}" for speed in script.SPEEDS for match in script.MATCHES}
    assert quality(found)


@pytest.mark.slow
def test_the_comparison_of_clean_samples_runs(monkeypatch, tmp_path, small):
    found = run(monkeypatch, tmp_path, "clean_sample", model=small)
    speeds = {row["name"]: row["ideal_speedup"] for row in found["rows"]}
    assert speeds["clean sample, N=2"] == pytest.approx(4 / 3)  # steps 0, 1 and 2 of four
    assert quality(found)
