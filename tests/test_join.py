"""Results of one comparison that was sampled in parts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sostenuto import InputError, SostenutoError
from sostenuto.demo.join import joined, read_results


def _row(name: str, distances: list[float], speedup: float, psnr: float | None = None, **others: Any) -> dict[str, Any]:
    row = {"name": name, "num_inference_steps": 50, "solver": "ddpm", "plan": [["compute"]], "eps_scale": [1.0]}
    quality = {
        "frechet_distance": sum(distances) / len(distances),
        "frechet_distance_per_seed": distances,
        "psnr": psnr,
    }
    scores = {"inception_score": 6.0, "class_accuracy": 0.9, "precision": 0.8, "recall": 0.7}
    work = {
        "speedup": speedup,
        "ideal_speedup": 2.0,
        "efficiency": speedup / 2,
        "macs": 10 * len(distances),
        "wall_s": 1.0,
    }
    return row | quality | scores | work | others


def _run(seeds: list[int], rows: list[dict[str, Any]], processor: str = "A", **others: Any) -> dict[str, Any]:
    machine = {"processor": processor, "dtype": "float32"}
    return {"rows": rows, "n": 100, "batch_size": 10, "seed": seeds[0], "seeds": seeds, "machine": machine} | others


FIRST = _run([0], [_row("uncached", [1.0], 1.0), _row("cached", [2.0], 1.5, psnr=30.0)])
REST = _run([1, 2], [_row("uncached", [4.0, 7.0], 1.0), _row("cached", [5.0, 8.0], 1.8, psnr=33.0)], "B")


def test_every_seed_counts_the_same():
    """The mean is over seeds, not over files; distances stand in the order of the seeds, whichever run is one's own."""
    for own, other in ((REST, FIRST), (FIRST, REST)):
        both = joined(own, [other])
        assert both["seeds"] == [0, 1, 2]
        assert both["seed"] == own["seed"]
        uncached, cached = both["rows"]
        assert uncached["frechet_distance"] == pytest.approx(4)
        assert uncached["frechet_distance_per_seed"] == [1, 4, 7]
        assert uncached["psnr"] is None
        assert cached["psnr"] == pytest.approx(32)
        assert cached["speedup"] == pytest.approx(1.7)
        assert cached["efficiency"] == pytest.approx(0.85)
        assert cached["macs"] == 30
        assert cached["wall_s"] == own["rows"][1]["wall_s"]


def test_what_each_machine_measured_is_kept_through_further_joins():
    both = joined(_run([2], REST["rows"][:0], "C"), [joined(_run([1], [], "B"), [_run([0], [], "A")])])
    assert [(part["seeds"], part["machine"]["processor"]) for part in both["parts"]] == [
        ([0], "A"),
        ([1], "B"),
        ([2], "C"),
    ]
    parts = joined(REST, [FIRST])["parts"]
    assert [part["speedups"]["cached"] for part in parts] == [1.5, 1.8]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (_run([2], FIRST["rows"]), "seed 2 is in two"),
        (_run([0], FIRST["rows"], n=200), "another n "),
        (_run([0], FIRST["rows"], batch_size=20), "another batch_size"),
        (_run([0], FIRST["rows"], machine={"dtype": "bfloat16"}), "another dtype"),
        (_run([0], FIRST["rows"][:1]), "another rows"),
        (_run([0], [FIRST["rows"][0], FIRST["rows"][1] | {"eps_scale": [0.98]}]), "another rows"),
    ],
)
def test_other_comparisons_are_refused(other: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        joined(REST, [other])


@pytest.mark.parametrize("content", ["[]", '{"rows": []}', "{", ""])
def test_a_file_with_something_else_is_named(tmp_path, content: str):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(SostenutoError, match=r"results\.json"):
        read_results(path)
    path.write_text(json.dumps(FIRST))
    assert read_results(path) == FIRST
