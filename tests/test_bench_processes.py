"""A benchmark by several processes: machines share the rows, and no two rows are timed on one machine's cores at once."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest

import processes
from fake_peer import DIT, QUICK
from sostenuto import InputError
from sostenuto.bench import runner, session, sharing
from sostenuto.bench.cases import Case, key_of
from sostenuto.bench.rows import read_results
from sostenuto.cli import main
from sostenuto.distributed import joined

CASES = [
    Case(f"{method} {steps}", method, DIT, steps) for method in ("none", "fora:interval=2") for steps in range(2, 7)
]
KEYS = [key_of(case, QUICK) for case in CASES]


def benched(folder, machines, seconds=0.05, stop=None, retry=False):
    """A run whose rows take a while; who measures what is noted. With ``machines`` every process is on one of its own."""

    def measure(case, settings, _):
        with (folder / "begun").open("a") as log:
            log.write(f"{case.name},{os.getpid()},{time.monotonic()}\n")
        time.sleep(seconds)
        failed = "it fell over" if case.name == stop else None
        return replace(runner.begun(case, settings), macs=case.num_inference_steps * 1000, error=failed)

    session.measure = measure
    if machines:
        os.environ["LOCAL_RANK"] = "0"
    with joined() as world:
        outcome = session.run(CASES, QUICK, folder, isolate=False, retry=retry, show=False)
        assert (outcome is None) == (not world.is_main)
        if outcome is not None:
            assert [row.name for row in outcome.rows] == [case.name for case in CASES]


def begun(folder):
    lines = (folder / "begun").read_text().splitlines() if (folder / "begun").exists() else []
    return [line.split(",") for line in lines]


def records(folder):
    return {path.name: path.read_bytes() for path in (folder / "rows").glob("[!.]*.json")}


def test_machines_share_the_rows_and_write_what_one_would(tmp_path):
    (tmp_path / "one").mkdir()
    processes.run(benched, 1, tmp_path / "one", False)
    (tmp_path / "two").mkdir()
    processes.run(benched, 2, tmp_path / "two", True)
    made = begun(tmp_path / "two")
    assert sorted(name for name, *_ in made) == sorted(case.name for case in CASES)
    assert len({pid for _, pid, _ in made}) == 2
    rows = [{row.key: row for row in read_results(tmp_path / name / session.RESULTS)[1]} for name in ("one", "two")]
    assert rows[0] == rows[1]
    assert rows[0].keys() == set(KEYS)


def test_on_the_cores_of_one_machine_one_process_measures_and_says_so(tmp_path, capfd):
    processes.run(benched, 2, tmp_path, False, 0.01)
    assert len({pid for _, pid, _ in begun(tmp_path)}) == 1
    assert "1 of the 2 processes measure nothing; one process a machine is enough" in capfd.readouterr().err
    assert len(read_results(tmp_path / session.RESULTS)[1]) == len(CASES)


def test_a_machine_that_dies_loses_the_row_it_was_at_and_failed_rows_can_be_tried_again(tmp_path):
    workers = processes.start(benched, 2, tmp_path, True, 0.2)
    while len(begun(tmp_path)) < 5:
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    done = records(tmp_path)
    assert 1 <= len(done) < len(CASES)
    processes.run(benched, 2, tmp_path, True, 0.01, CASES[-1].name)
    assert records(tmp_path).items() >= done.items()
    before = len(begun(tmp_path))
    rows = {row.name: row for row in read_results(tmp_path / session.RESULTS)[1]}
    assert {row.name for row in rows.values() if row.error} == {CASES[-1].name}
    processes.run(benched, 2, tmp_path, True, 0.01, None, True)
    assert [name for name, *_ in begun(tmp_path)[before:]] == [CASES[-1].name]
    assert not any(row.error for row in read_results(tmp_path / session.RESULTS)[1])


def on_machines_of_two_kinds(folder):
    os.environ["LOCAL_RANK"] = "0"
    with joined() as world:
        machine = {"processor": "old" if world.rank == 0 else "new"}
        try:
            sharing.measure_shared(folder, machine, QUICK, list, lambda key: None)
        except InputError as error:
            (folder / f"{world.rank}").write_text(str(error))


def test_machines_of_two_kinds_are_refused(tmp_path):
    processes.run(on_machines_of_two_kinds, 2, tmp_path)
    assert "process 1 would measure with processor = 'new', the first one with 'old'" in (tmp_path / "1").read_text()


def test_a_row_of_a_launch_runs_in_a_process_that_knows_of_none(monkeypatch):
    assert sharing.environment_of_a_row() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with joined():
        environment = sharing.environment_of_a_row()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]


def command(folder):
    words = ["bench", "--methods", "fora:interval=2", "--models", DIT, "--num-inference-steps", "2", "--repeats", "1"]
    words += ["--no-isolate", "--fresh", "--output", str(folder), "--json", str(folder / "rows.json")]
    assert main(words) == 0


@pytest.mark.slow
def test_the_command_runs_under_a_launch_and_begins_anew_when_told_to(tmp_path):
    for _ in range(2):
        processes.run(command, 2, tmp_path)
        content = json.loads((tmp_path / "rows.json").read_text())
        assert [row["name"] for row in content["rows"]] == ["uncached", "fora:interval=2"]
        assert (tmp_path / "bench.html").exists()
        assert len(read_results(tmp_path / session.RESULTS)[1]) == 2
