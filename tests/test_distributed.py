"""Processes of a launch share work and end with what one process would have made."""

import json
import os
import signal
import time

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

import processes
import sostenuto
from conftest import build_tiny, sample
from sostenuto import EBCalibration, InputError, MagCacheCalibration, SmoothCacheCalibration, distributed
from sostenuto.cli import COMMANDS, main
from sostenuto.distributed.folder import complete
from sostenuto.files import publish


def test_a_process_is_alone_unless_it_joins_a_launch(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert distributed.world() == distributed.World(0, 1)
    with distributed.joined() as world:
        assert (world.rank, world.size, world.is_main) == (1, 3, False)
        assert distributed.share([10, 11, 12, 13, 14]) == [11, 14]
        with distributed.apart():
            assert distributed.spread(lambda x: x + 1, [1, 2]) == [2, 3]
    assert distributed.world().size == 1


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_variables_that_describe_no_launch_are_refused(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=f"RANK={rank}, WORLD_SIZE={size}"), distributed.joined():
        pass


def test_a_command_that_is_not_shared_is_run_by_the_first_process_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(["methods", "--json", str(tmp_path / f"{rank}.json")]) == 0
    assert not (tmp_path / "1.json").exists()
    assert json.loads((tmp_path / "0.json").read_text())
    assert {name for name, command in COMMANDS.items() if getattr(command, "shared", False)} >= {
        "generate",
        "calibrate",
    }


# --- results are merged exactly --------------------------------------------------------------------------------------


def collectives(folder):
    made = []

    def call(index):
        made.append(index)
        return index * index

    with distributed.joined() as world:
        found = {
            "spread": distributed.spread(lambda x: (x, world.rank), list(range(5))),
            "until": distributed.until(lambda results: sum(results) >= 10, call),
            "made": made,
            "on_main": distributed.on_main(lambda: f"of {world.rank}"),
            "gather": distributed.gather(world.rank),
            "tables": [repr(table) for table in calibrated(folder)],
            "again": [repr(table.eps_scale) + table.strip() for table in calibrated(folder) if hasattr(table, "strip")],
        }
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


def calibrated(folder=None):
    """Calibrations of several generations each, and a search."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    model = build_tiny(2)
    model.scheduler_for_test = scheduler
    search = EBCalibration(target_fraction=0.7, eps_scale_grid=(0.98, 1.0, 1.02))
    for options in (search, SmoothCacheCalibration(target_fraction=0.7), MagCacheCalibration()):
        extra = {"score": lambda images: abs(images.std().item() - 1)} if options is search else {}
        yield sostenuto.calibrate(
            model,
            options,
            sample,
            num_inference_steps=5,
            num_samples=5,  # of two rows each: three generations
            scheduler=scheduler,
            generator=torch.Generator().manual_seed(4),
            folder=folder / "kept" if folder and options is search else None,
            **extra,
        )


def test_what_two_processes_gather_and_calibrate_is_what_one_does(tmp_path):
    processes.run(collectives, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["spread"] == second["spread"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert first["until"] == second["until"] == [0, 1, 4, 9]  # as short as is enough for the sum of 10
    assert [first["made"], second["made"]] == [[0, 2], [1, 3]]
    assert first["on_main"] == second["on_main"] == "of 0"
    assert first["gather"] == second["gather"] == [0, 1]
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert {"b-0.98.json", "b-1.0.json", "b-1.02.json", "calibration.json"} < set(kept)
    assert first["again"] == second["again"]
    assert all(again.split(")")[0] in table for again, table in zip(first["again"], first["tables"], strict=False))
    alone = [repr(table) for table in calibrated()]
    assert first["tables"] == second["tables"] == alone
    assert "'scores': {'0.98'" in alone[0]
    assert all("'num_samples': 6" in table for table in alone)


# --- work in one folder ----------------------------------------------------------------------------------------------

PIECES = [f"{number:04d}" for number in range(12)]


def slow_work(folder, seconds):
    """Pieces of work; who begins one notes it."""

    def do(name):
        with (folder / "begun").open("a") as log:
            log.write(f"{name} {os.getpid()}\n")
        time.sleep(seconds)
        with publish(folder / "results" / name) as partial:
            partial.write_text(name)
        return {"square": int(name) ** 2}

    with distributed.joined():
        records = complete(folder / "records", PIECES, do, "work", show_progress=False)
    assert records == [{"square": int(name) ** 2} for name in PIECES]


def begun(folder):
    lines = (folder / "begun").read_text().splitlines() if (folder / "begun").exists() else []
    return [line.split() for line in lines]


def test_two_launches_in_one_folder_do_every_piece_once(tmp_path):
    launches = [processes.start(slow_work, 2, tmp_path, 0.02) for _ in range(2)]
    for process in (process for launch in launches for process in launch):
        process.join(100)
        assert process.exitcode == 0
    assert sorted(name for name, _ in begun(tmp_path)) == PIECES
    left = {path.name for path in (tmp_path / "records").iterdir()}
    assert left == {f"{name}.json" for name in PIECES}  # no lock, nothing half written


def test_a_killed_process_loses_the_piece_it_was_at_and_another_takes_it_over(tmp_path):
    workers = processes.start(slow_work, 2, tmp_path, 0.2)
    victim = workers[1]
    while not (held := [name for name, pid in begun(tmp_path) if int(pid) == victim.pid][1:]):
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    workers[0].join(100)
    assert workers[0].exitcode == 0
    names = [name for name, _ in begun(tmp_path)]
    assert sorted(names) == sorted([*PIECES, held[0]])  # the one piece was begun twice
    assert {path.name: path.read_text() for path in (tmp_path / "results").iterdir()} == {name: name for name in PIECES}


def fill_the_disk(path):
    with publish(path) as partial:
        partial.write_text("ne")
        raise OSError(28, "No space left on device")


def test_a_file_is_put_in_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with publish(path) as partial:
        partial.write_text("old")
    with pytest.raises(OSError, match="No space"):
        fill_the_disk(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_may_be_read_by_whom_the_process_lets_read_its_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        with publish(tmp_path / "weights.safetensors") as partial:
            save_file({"a": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
