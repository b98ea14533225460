"""The record of a comparison: short plans that say what ran, standard errors where there are images enough."""

import pytest
import torch

from sostenuto.demo.batches import batch_file, write_batch
from sostenuto.demo.judge import Judge
from sostenuto.demo.record import concise, record
from sostenuto.demo.rows import Entry, Settings
from sostenuto.methods import FORA, NoCache
from sostenuto.quality import spread


def test_a_plan_is_a_word_a_step_with_a_letter_a_site():
    plan = [
        ["compute", "compute"],
        ["reuse", "reuse"],
        ["forecast", "compute"],
        ["skip", "skip"],
        ["partial", "window"],
    ]
    assert concise(plan) == "c r fc r p?"


def images(seed, n):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [100, 300])
def test_differences_are_paired_by_the_noise_and_few_images_have_no_error(tmp_path, n):
    entries = [Entry("uncached", NoCache()), Entry("same", FORA(2)), Entry("another", FORA(3))]
    settings = Settings(num_images=n, batch_size=n)
    for entry, seed in zip(entries, (0, 0, 1), strict=True):
        write_batch(batch_file(tmp_path, entry.key, 0, 0, n), images(seed, n), 1.0, {"macs": 1})
    scale = [0.98] * 50
    rows = [{"name": entry.name, "plan": [["compute"]], "eps_scale": scale} for entry in entries]
    found = record(tmp_path, entries, settings, {"rows": rows, "n": n})
    first, _, another = found["rows"]
    assert found["n"] == n
    assert (first["plan"], first["eps_scale"]) == ("c", 0.98)
    if n == 100:
        assert another["frechet_distance_error"] is found["difference_errors"] is None
        return
    judge = Judge()
    seen = judge.network.extract((images(1, n) * 255).round().to(torch.uint8)).features
    alone = spread.of_frechet_distance(seen, judge.training_set)
    assert another["frechet_distance_error"] == pytest.approx(alone)
    errors = found["difference_errors"]
    assert errors[0][1] == errors[1][0] == 0
    assert errors[0][2] == errors[2][1] > alone  # nothing in common: the noise of both
