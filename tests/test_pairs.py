"""The comparison's speeds: of pairs that one process timed, also where an interrupted run goes on in another one."""

from __future__ import annotations

import pytest
import torch

from sostenuto import FORA, NoCache
from sostenuto.demo import batches
from sostenuto.demo.batches import batch_file, read_batch
from sostenuto.demo.network import build_denoiser, build_scheduler
from sostenuto.demo.pipeline import DemoPipeline
from sostenuto.demo.rows import Entry, Settings
from sostenuto.demo.run import run_entries

BASE, ROW, OTHER = Entry("uncached", NoCache(), 4), Entry("row", FORA(2), 4), Entry("other", FORA(3), 4)


@pytest.fixture(scope="module")
def pipe():
    pipe = DemoPipeline(build_denoiser(num_layers=1, num_heads=1).eval(), build_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def run(pipe, tmp_path, monkeypatch):
    """Runs in ``tmp_path`` that pretend to be another process each, on a machine that is so many times slower."""

    def run(process, rows, num_images, slower=1.0, timed=True):
        monkeypatch.setattr(batches, "PROCESS", process)
        ticks = iter(range(10**6))
        monkeypatch.setattr("sostenuto.demo.run.time.perf_counter", lambda: slower * next(ticks))
        results = run_entries(tmp_path, [BASE, *rows], Settings(num_images, 4, timed=timed), show=False, pipe=pipe)
        return {row["name"]: row["speedup"] for row in results["rows"]}

    return run


def stored(folder, entry, start=0):
    return read_batch(batch_file(folder, entry.key, 0, start, 4))


def test_a_row_that_joins_later_is_timed_beside_the_first_one_again(run, tmp_path):
    """Its batches on a machine ten times slower would make it ten times slower than it is."""
    run("first", [OTHER], 4)
    before = stored(tmp_path, BASE)
    assert run("second", [ROW, OTHER], 4, slower=10) == {"uncached": 1, "row": 1, "other": 1}
    assert {stored(tmp_path, entry).process for entry in (BASE, ROW, OTHER)} == {"second"}
    assert torch.equal(stored(tmp_path, BASE).images, before.images)


def test_pairs_of_one_process_are_kept_and_others_dont_count(run, tmp_path):
    run("first", [ROW], 4)
    assert run("second", [ROW], 8, slower=10) == {"uncached": 1, "row": 1}
    assert [stored(tmp_path, ROW, start).process for start in (0, 4)] == ["first", "second"]
    path = batch_file(tmp_path, BASE.key, 0, 4, 4)
    path.unlink()
    assert run("third", [ROW], 8, slower=100) == {"uncached": 1, "row": 1}
    assert [stored(tmp_path, entry, 4).process for entry in (BASE, ROW)] == ["third", "second"]


def test_what_was_timed_beside_the_first_rows_other_batches_stays(run, tmp_path):
    """Only as many batches as give some pairs are sampled again."""
    run("first", [OTHER], 20)
    run("second", [OTHER, ROW], 20)
    starts = range(0, 20, 4)
    assert [stored(tmp_path, BASE, start).process for start in starts] == ["second"] * 3 + ["first"] * 2
    assert [stored(tmp_path, OTHER, start).process for start in starts] == ["first"] * 5
    assert run("third", [OTHER, ROW], 20) == {"uncached": 1, "other": 1, "row": 1}
    assert [stored(tmp_path, ROW, start).process for start in starts] == ["second"] * 5


def test_without_times_nothing_is_sampled_again_and_there_is_no_speed_up(run, tmp_path):
    run("first", [OTHER], 4)
    assert run("second", [ROW, OTHER], 4, timed=False) == {"uncached": None, "row": None, "other": None}
    assert [stored(tmp_path, entry).process for entry in (BASE, ROW, OTHER)] == ["first", "second", "first"]
