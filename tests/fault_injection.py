"""Faults as they happen: processes killed, generations interrupted, disks that fill up; and what must be there afterwards."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import processes
import sostenuto
from conftest import build_tiny
from sostenuto import FORA, DBCache, EBCache, TaylorSeer, TeaCache, cli
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable

# 24 images by a method, in batches of 2.
_WORDS = ["generate", "--method", "fora", "--num-inference-steps", "2", "--num-images", "24", "--batch-size", "2"]
_STEPS = 6
C, _, _, B = StepState
_METHODS = {
    "branches": lambda: FORA(3),
    "forecast": lambda: TaylorSeer(2, 2, 3),
    "stack": lambda: EBCache(CacheTable((C, B, B, C, B, C), forecast_order=1, fill="stack")),
    "run-time decision": lambda: TeaCache(threshold=1.0),
    "run-time decision, forecast": lambda: DBCache(1, 1, 1.0, warmup=2, forecast_order=1, max_accumulated=1.5),
}


def kills(count: int, seed: int) -> dict[str, Any]:
    """Workers that make images together are killed (SIGKILL) at random times and started again, until the images are there.

    Counted as lost: an image that differs from one process's; a batch that was noted as done and is made again.
    """
    rng, found = random.Random(seed), Counter[str](kills=0, runs=0, lost=0)
    with _scratch() as folder, tqdm(total=count, unit="kill", desc="kills", mininterval=10) as bar:
        expected = _made_by_one(folder)
        while found["kills"] < count:
            output = folder / "several"
            while len(records := _records(output)) < 12:
                workers = processes.start(_generate, 2, output)
                time.sleep(rng.uniform(0.0, 1.2))
                for victim in rng.sample(workers, rng.choice([1, 2])):
                    if victim.is_alive():
                        os.kill(victim.pid, signal.SIGKILL)
                        found["kills"] += 1
                        bar.update()
                for worker in workers:
                    worker.join()
                found["lost"] += not _records(output).items() >= records.items()
            processes.run(_generate, 1, output)
            found["runs"] += 1
            left = [path for path in output.rglob("*") if path.name.startswith(".partial") or path.suffix == ".lock"]
            found["lost"] += len(left) + _differing(output, expected)
            shutil.rmtree(output)
    return {"seed": seed, **found}


def interrupts(count: int, seed: int) -> dict[str, Any]:
    """Generations are interrupted by a signal at a random moment, whatever runs then; the next one must be as after none.

    Counted as differences: another output than an uninterrupted generation's, a refusal, something left after disabling.
    """
    rng, found = random.Random(seed), Counter[str](interrupts=0, differences=0)
    network = build_tiny(num_layers=3)
    clean = {name: dict(vars(module)) for name, module in network.named_modules()}
    with tqdm(total=count, unit="interrupt", desc="interrupts", mininterval=10) as bar:
        while found["interrupts"] < count:
            scheduler = _scheduler()
            handle = sostenuto.enable(network, rng.choice(list(_METHODS.values()))(), scheduler=scheduler)
            _run(network, scheduler)
            began = time.perf_counter()
            expected = _run(network, scheduler)
            seconds = time.perf_counter() - began
            for _ in range(20):
                if _interrupted(lambda: _run(network, scheduler), rng.uniform(0.0, seconds)):  # noqa: B023
                    found["interrupts"] += 1
                    bar.update()
                try:
                    found["differences"] += not torch.equal(_run(network, scheduler), expected)
                except sostenuto.SostenutoError as error:
                    found["differences"] += 1
                    tqdm.write(f"after an interrupt: {error}")
            handle.disable()
            after = {name: dict(vars(module)) for name, module in network.named_modules()}
            found["differences"] += after != clean
    return {"seed": seed, **found}


def full_disks(count: int, seed: int) -> dict[str, Any]:
    """Images and tables are written to a disk that fills up in the midst of it; then it has room again.

    Counted as lost: a file that was there before and isn't whole; one that is half written; another result in the end.
    Needs the right to mount a disk of a few pages.
    """
    rng, found = random.Random(seed), Counter[str](full_disks=0, not_full=0, lost=0)
    table = CacheTable((C, B, B, C, B, C) * 20, method="eb")
    other = CacheTable((C, C, B, B, B, C) * 20, method="eb")
    with _scratch() as folder, tqdm(total=count, unit="disk", desc="full disks", mininterval=10) as bar:
        expected, one_file = _made_by_one(folder), folder / "one.npz"
        assert _main([*_WORDS, "--output", str(one_file)]) == 0
        while found["full_disks"] < count:
            with _small_disk(folder / "disk", rng.randint(3, 60)) as disk:
                kept, output = disk / "table.json", disk / rng.choice(["several", "one.npz"])
                if rng.random() < 0.5:
                    table.save(kept)
                full = _main([*_WORDS, "--output", str(output)]) != 0
                try:
                    other.save(kept)
                except OSError:
                    full = True
                    found["lost"] += kept.exists() and CacheTable.load(kept) != table
                found["full_disks" if full else "not_full"] += 1
                bar.update(full)
                if output.suffix != ".npz":
                    found["lost"] += _differing(output, expected, whole=False)
                subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
                other.save(kept)
                found["lost"] += CacheTable.load(kept) != other
                found["lost"] += _main([*_WORDS, "--output", str(output)]) != 0
                if output.suffix == ".npz":
                    found["lost"] += output.read_bytes() != one_file.read_bytes()
                else:
                    found["lost"] += _differing(output, expected)
                found["lost"] += len([path for path in disk.rglob("*") if path.name.startswith(".partial")])
    return {"seed": seed, **found}


# --- images ----------------------------------------------------------------------------------------------------------


def _main(words: list[str]) -> int:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return cli.main(words)


def _generate(output: Path) -> None:
    assert _main([*_WORDS, "--output", str(output)]) == 0


def _made_by_one(folder: Path) -> dict[str, bytes]:
    torch.set_num_threads(1)
    _generate(folder / "one")
    return {path.name: path.read_bytes() for path in (folder / "one").glob("*.png")}


def _records(output: Path) -> dict[str, int]:
    """Which batches are noted as done, and when."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "batches").glob("0*.json")}


def _differing(output: Path, expected: dict[str, bytes], whole: bool = True) -> int:
    made = {path.name: path.read_bytes() for path in output.glob("*.png")}
    names = expected.keys() | made.keys() if whole else made.keys()
    return sum(made.get(name) != expected.get(name) for name in names)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextlib.contextmanager
def _small_disk(folder: Path, pages: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        raise PermissionError("a small disk can't be mounted: run the part as root, or leave it out")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- generations -----------------------------------------------------------------------------------------------------


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler()


@torch.no_grad()
def _run(network: Any, scheduler: Any) -> torch.Tensor:
    """One generation with guidance in two passes; the latents at its end."""
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 2, 8, 8, generator=noise)
    scheduler.set_timesteps(_STEPS)
    for timestep in scheduler.timesteps:
        halves = []
        for label in (1, 10):
            halves.append(network(latents, timestep.expand(2), torch.full((2,), label)).sample[:, :2])
        latents = scheduler.step(2 * halves[0] - halves[1], timestep, latents).prev_sample
    return latents


def _interrupted(call: Any, after: float) -> bool:
    """Whether SIGALRM, which raises KeyboardInterrupt as SIGINT does, came before the end."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(after, 1e-6))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGALRM, before)
    return False
