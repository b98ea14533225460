"""The record of a comparison: short plans that say what ran, standard errors where there are images enough."""

from statistics import fmean, stdev

import pytest
import torch

from sostenuto.demo.batches import batch_file, write_batch
from sostenuto.demo.judge import Judge
from sostenuto.demo.record import record
from sostenuto.demo.rows import Entry, Settings
from sostenuto.errors import InputError
from sostenuto.methods import FORA, NoCache
from sostenuto.plan import concise
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


def test_seeds_that_are_judged_together_have_the_distance_of_all_and_the_spread_of_a_jackknife(tmp_path):
    entries, n, seeds = [Entry("uncached", NoCache()), Entry("another", FORA(3))], 100, (0, 1, 2, 3)
    settings = Settings(num_images=n, batch_size=n, seeds=seeds)
    made = {entry.name: [images(10 * i + seed, n) for seed in seeds] for i, entry in enumerate(entries)}
    for entry in entries:
        for seed, own in zip(seeds, made[entry.name], strict=True):
            write_batch(batch_file(tmp_path, entry.key, seed, 0, n), own, 1.0, {"macs": 1})
    rows = [{"name": entry.name, "plan": [["compute"]], "eps_scale": [1.0], "speedup": 2.0} for entry in entries]
    found = record(tmp_path, entries, settings, {"rows": rows, "n": n, "floor": 0.0}, pooled=True)
    judge = Judge()
    assert (found["pooled"], found["n"], found["floor"]) == (True, n, judge.floor(len(seeds) * n))
    for entry, row in zip(entries, found["rows"], strict=True):
        sets = [(own * 255).round() / 255 for own in made[entry.name]]
        whole = judge.distance(torch.cat(sets))
        assert row["speedup"] == 2.0
        assert row["frechet_distance"] == pytest.approx(whole)
        assert fmean(row["frechet_distance_per_seed"]) == pytest.approx(whole)
        without = [judge.distance(torch.cat(sets[:i] + sets[i + 1 :])) for i in range(len(seeds))]
        knife = [
            len(seeds) * whole - (len(seeds) - 1) * other for other in without
        ]  # Tukey's, with the bias taken away
        assert stdev(row["frechet_distance_per_seed"]) == pytest.approx(stdev(knife), rel=0.25)


def test_too_few_images_for_an_interval_over_seeds_are_refused(tmp_path):
    entry, settings = Entry("uncached", NoCache()), Settings(num_images=20, batch_size=20, seeds=(0, 1))
    for seed in settings.seeds:
        write_batch(batch_file(tmp_path, entry.key, seed, 0, 20), images(seed, 20), 1.0, {"macs": 1})
    results = {"rows": [{"name": "uncached", "plan": [], "eps_scale": [1.0]}], "n": 20, "floor": 0.0}
    with pytest.raises(InputError, match="40 images in all are too few"):
        record(tmp_path, [entry], settings, results, pooled=True)
