"""A whole benchmark: the results file survives crashes and full disks, peers that fail become rows, suites are sound."""

import json
import re
import sys
import time

import pytest

import sostenuto
from fake_peer import DIT, QUICK, FakePeer, fake_peers  # noqa: F401 (a fixture)
from sostenuto.bench import isolation, rows, runner, sides
from sostenuto.bench.cases import Case, Settings, key_of
from sostenuto.bench.networks import NETWORKS, network_of
from sostenuto.bench.published import DIT_XL, LARGE
from sostenuto.bench.rows import ResultsFile, Row, read_results
from sostenuto.bench.runner import measure
from sostenuto.bench.session import RESULTS, run
from sostenuto.bench.suites import SUITES, cases_of
from sostenuto.cli import main
from sostenuto.report.bench_table import terminal_table

# --- the file -----------------------------------------------------------------------------------------------------------

MACHINE = {"processor": "p", "threads": 1}


def row_of(name, **values):
    return Row(key=name, name=name, method="none", model="demo", num_inference_steps=3, **values)


def test_a_results_file_goes_on_and_a_torn_line_costs_only_its_row(tmp_path):
    path = tmp_path / "r.jsonl"
    file = ResultsFile(path, MACHINE)
    file.append(row_of("a", wall_s=float("nan")))
    file.append(row_of("b"))
    path.write_bytes(path.read_bytes()[:-7])  # the process died while it wrote the second row
    again = ResultsFile(path, MACHINE)
    assert list(again.rows) == ["a"]
    again.append(row_of("b", speedup=2.0))
    header, kept = read_results(path)
    assert (header["format"], header["version"]) == ("sostenuto-bench", 2)
    assert [row.name for row in kept] == ["a", "b"]
    assert kept[0].wall_s is None
    assert kept[1].speedup == 2.0


@pytest.mark.parametrize(("text", "match"), [
    ("not json\n", "no results file"),
    ('{"format": "other"}\n', "no results file"),
    (b"\xff\xfe\x00", "no results file"),
    ('{"format": "sostenuto-bench", "version": 3, "machine": {}}\n', "version 3, this sostenuto writes 2"),
    ('{"format": "sostenuto-bench", "version": 2, "machine": {"processor": "p", "threads": 2}}\n', r"threads = 2, not 1"),
    ('{"format": "sostenuto-bench", "version": 2, "machine": {"processor": "p", "threads": 1}}\n{"x": 1}\n', "line 2"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused_and_left_as_it_was(tmp_path, text, match):
    path = tmp_path / "r.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    with pytest.raises(sostenuto.InputError, match=match):
        ResultsFile(path, MACHINE)
    assert path.read_bytes() == before


def test_a_full_disk_keeps_the_file_whole_and_the_row_for_the_next_try(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    file = ResultsFile(path, MACHINE)
    file.append(row_of("a"))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "fsync", full)
    assert "1 row(s) not written" in file.append(row_of("b"))
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert file.append(row_of("c")) is None
    assert [row.name for row in read_results(path)[1]] == ["a", "b", "c"]


def test_what_could_not_be_written_is_printed_all_the_same_and_the_command_fails(tmp_path, monkeypatch, capsys):
    def full(path, line, append=rows._append):
        if "error" in line:
            raise OSError(28, "No space left on device")
        append(path, line)

    monkeypatch.setattr(rows, "_append", full)
    words = ["--methods", "none", "--models", DIT, "--num-inference-steps", "2", "--repeats", "1", "--no-isolate"]
    assert main(["bench", *words, "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert re.search(r"^none +\d", said.out, re.M)
    assert "2 row(s) not written" in said.err
    assert "No space left on device" in said.err


# --- a whole run --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    cases = [Case("a", "none", DIT, 2), Case("b", "fora:interval=2", DIT, 2)]
    measured = []

    def counting(case, settings, folder):
        measured.append(case.name)
        if case.name == "b" and measured.count("b") == 1:
            raise KeyboardInterrupt
        return runner.begun(case, settings)

    monkeypatch.setattr("sostenuto.bench.session.measure", counting)
    with pytest.raises(KeyboardInterrupt):
        run(cases, QUICK, tmp_path, isolate=False, show=False)
    outcome = run(cases, QUICK, tmp_path, isolate=False, show=False)
    assert measured == ["a", "b", "b"]
    assert [row.name for row in outcome.rows] == ["a", "b"]
    run(cases, Settings(repeats=1, warmup=0), tmp_path, isolate=False, show=False)
    assert measured == ["a", "b", "b", "a", "b"]  # other settings are other rows


def test_a_failed_row_says_so_the_run_goes_on_and_it_can_be_tried_again(tmp_path, peers):
    cases = [Case("unknown", "peer:nonsense", DIT, 2), Case("ours", "none", DIT, 2)]
    outcome = run(cases, QUICK, tmp_path, isolate=False, show=False)
    assert "no peer 'nonsense'" in outcome.rows[0].error
    assert outcome.rows[1].error is None
    assert "not measured:\n  unknown: InputError: there is no peer" in terminal_table(outcome.rows, outcome.machine)
    peers["nonsense"] = FakePeer()
    assert run(cases, QUICK, tmp_path, isolate=False, show=False).rows[0].error
    retried = run(cases, QUICK, tmp_path, isolate=False, show=False, retry=True)
    assert retried.rows[0].error is None
    assert len(read_results(tmp_path / RESULTS)[1]) == 2


def test_a_peer_that_does_not_fit_or_raises_is_a_row_with_its_reason(peers, monkeypatch):
    monkeypatch.setattr(FakePeer, "problem", lambda self, pipe: "fakelib is not installed")
    assert "fake can't run here: fakelib is not installed" in measure(Case("p", "peer:fake", DIT, 2), QUICK).error
    monkeypatch.undo()

    def broken(self, pipe, num_inference_steps):
        raise ZeroDivisionError("inside of it")

    peers.clear()
    monkeypatch.setattr(FakePeer, "attached", broken)
    monkeypatch.setattr(sides, "peer", lambda name: FakePeer())
    assert measure(Case("p", "peer:fake", DIT, 2), QUICK).error == "ZeroDivisionError: inside of it"


def worker(source):
    """A process in place of the one that measures."""
    return (sys.executable, "-c", source)


def test_a_process_that_crashes_or_hangs_becomes_a_row():
    case = Case("p", "peer:fake", DIT, 2)
    crashed = isolation.measure_isolated(case, QUICK, None, 60, worker("import os; os.abort()"))
    assert "crashed (killed by SIGABRT)" in crashed.error
    failed = isolation.measure_isolated(case, QUICK, None, 60, worker("raise SystemExit('no such thing')"))
    assert failed.error == "its process crashed (exit status 1): no such thing"
    began = time.monotonic()
    # What it has started hangs with it.
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    late = isolation.measure_isolated(case, QUICK, None, 1.5, worker(hangs))
    assert late.error == "no result within 1.5 s: ended"
    assert time.monotonic() - began < 30
    assert late.key == crashed.key == key_of(case, QUICK)


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_same_row(monkeypatch):
    case = Case("f", "fora:interval=2", DIT, 3)
    alone = isolation.measure_isolated(case, QUICK, None, 280)
    here = measure(case, QUICK)
    assert alone.error is None
    assert (alone.key, alone.step_macs, alone.relative_error) == (here.key, here.step_macs, here.relative_error)


# --- suites -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_row_of_every_suite_is_spelt_right_and_has_a_name_of_its_own(device):
    for name in SUITES:
        cases = cases_of([name], device)
        assert len({case.name for case in cases}) == len(cases) > 0
        for case in cases:
            runner.check(case)
            assert case.suite == name
            assert network_of(case.model) is not None or case.model == "demo"
    assert {"overhead", "demo-quality", "dit-xl", "flux-like", "peers", "growth"} <= SUITES.keys()


def test_large_models_are_counted_on_a_cpu_and_measured_on_a_gpu():
    for device, kind in (("cpu", "count"), ("cuda", "measure")):
        printed = [case for case in cases_of(["dit-xl", "flux-like"], device) if case.printed]
        assert len(printed) == len(DIT_XL) + len(LARGE)
        assert {case.kind for case in printed} == {kind}
        assert {case.model for case in printed} == NETWORKS.keys() - {"dit", "flux", "dit-xs"}


def test_an_unknown_suite_or_nothing_to_do_is_refused(tmp_path, capsys):
    assert main(["bench", "--suite", "overheads", "--output", str(tmp_path)]) == 1
    assert "no suite 'overheads'; did you mean overhead?" in capsys.readouterr().err
    assert main(["bench", "--suite", "growth", "--only", "no such row", "--output", str(tmp_path)]) == 1
    assert "nothing to measure" in capsys.readouterr().err
    assert not (tmp_path / RESULTS).exists()


def test_the_command_writes_results_table_and_numbers(tmp_path, capsys):
    numbers = tmp_path / "b.json"
    words = ["--methods", "fora:interval=2", "peer:nonsense", "--models", DIT, "--num-inference-steps", "3"]
    words += ["--repeats", "1", "--no-isolate", "--output", str(tmp_path), "--json", str(numbers)]
    assert main(["bench", *words]) == 0
    content = json.loads(numbers.read_text())
    assert [row["name"] for row in content["rows"]] == ["uncached", "fora:interval=2", "peer:nonsense"]
    assert {"threads", "malloc", "attention", "torch", "processor"} <= content["machine"].keys()
    assert content["rows"] == [row.as_dict() for row in read_results(tmp_path / RESULTS)[1]]
    printed = capsys.readouterr().out
    assert re.search(r"^fora:interval=2 .*×", printed, re.M)
    assert "no peer 'nonsense'" in printed
    assert main(["bench", "--methods", "peer:nonsense", "--models", "nonsense",
                 "--no-isolate", "--output", str(tmp_path / "x")]) == 1  # fmt: skip
    assert "no row could be measured" in capsys.readouterr().err
