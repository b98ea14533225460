"""Sampling a comparison: all rows on the same noise and labels, batch by batch in turn so that drift of the machine cancels.

Each batch of each row is one file in the run's folder: an interrupted run goes on where it stopped, more images or seeds add
to what is there, and several processes can share the work (``shard``).
"""

from __future__ import annotations

import hashlib
import operator
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import sostenuto
from sostenuto.demo.assets import asset
from sostenuto.demo.batches import read_batch, write_batch
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline
from sostenuto.demo.results import judged
from sostenuto.demo.rows import Entry, Settings, Turn, batches_of, file_of, share_of, with_solver
from sostenuto.engine import Handle
from sostenuto.errors import InputError
from sostenuto.files import publish_json
from sostenuto.measured import read_json, table_file
from sostenuto.progress import progress

_MOST_AT_ONCE = 4  # batches of one row before the next row's, in a long run
_PAIRS = 3


def run_entries(
    folder: Path, todo: Sequence[Entry], settings: Settings, show: bool = True, pipe: DemoPipeline | None = None
) -> dict[str, Any]:
    """Sample what is missing of the given rows, the first of which is the one that speed is measured against.

    Args:
        folder: where batches and results lie; made if need be.
        todo: the rows.
        settings: sizes and seeds.
        show: a progress bar.
        pipe: a pipeline with other weights than the demo's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, settings, pipe)
    pipe, judge = pipe or load_demo_pipeline(), Judge()
    batches = list(batches_of(settings))
    own = share_of(settings)
    at_once = min(_MOST_AT_ONCE, 1 + len(own) // 20)  # rows are timed as pairs: near each other, where there are few
    with (
        progress(total=len(own) * len(todo), desc="sample", show=show) as bar,
        torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"),
    ):
        for first in range(0, len(own), at_once):
            for entry in todo:
                turn = own[first : first + at_once]
                absent = [batch for batch in turn if not file_of(folder, entry, batch).exists()]
                bar.update(len(turn) - len(absent))
                for _ in _generate(pipe, entry, absent, folder):
                    bar.update()
        missing = sum(not file_of(folder, entry, batch).exists() for batch in batches for entry in todo)
        if missing:
            return {"rows": [], "missing": missing}
        if settings.timed:
            _time_in_pairs(pipe, todo, batches, folder)
    return judged(folder, todo, settings, judge)


def _check_folder(folder: Path, settings: Settings, pipe: DemoPipeline | None = None) -> None:
    """Refuse batches of other weights. What a row samples is in its :attr:`Entry.key`, a batch's size in its file's name."""
    made_with = {
        "denoiser": _digest(asset("denoiser.safetensors")) if pipe is None else weights_digest(pipe),
        "search_images": settings.search_images,  # the tables in the folder were made with
        "dtype": settings.dtype,
        "torch": torch.__version__,
    }
    path = folder / "run.json"
    if path.exists() and (known := read_json(table_file(path, "run"), "run")) != made_with:
        odd = next((k for k, v in made_with.items() if not isinstance(known, dict) or known.get(k) != v), "setting")
        raise InputError(f"{folder} holds a run with another {odd}: use another --output, or --fresh to delete it")
    publish_json(path, made_with, indent=1)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_digest(pipe: DemoPipeline) -> str:
    """sha256 of the denoiser's weights."""
    found = hashlib.sha256()
    for name, value in sorted(pipe.transformer.state_dict().items()):
        found.update(name.encode() + value.float().numpy().tobytes())
    return found.hexdigest()


def _generate(pipe: DemoPipeline, entry: Entry, batches: Sequence[Turn], folder: Path) -> Iterator[None]:
    """Sample batches of a row, one at a time: under one handle, which counts what its calls cost once for all of them."""
    if not batches:
        return
    with with_solver(pipe, entry.solver), sostenuto.enable(pipe, entry.method) as handle:
        for batch in batches:
            seed, start, labels = batch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
            began = time.perf_counter()
            images = pipe(labels.tolist(), entry.num_inference_steps, generator=generator, output_type="pt").images
            seconds = time.perf_counter() - began
            stats = handle.stats.as_dict()
            stats["eps_scale"] = _noise_scale(handle, stats["plan"])
            write_batch(file_of(folder, entry, batch), images, seconds, stats)
            yield


def _noise_scale(handle: Handle, plan: Sequence[Sequence[str]]) -> list[float]:
    """The factor of the predicted noise at every step of the last generation."""
    scale = handle.noise_scale
    return [1.0 if scale is None else scale.at(step, set(row) != {"compute"}) for step, row in enumerate(plan)]


def _time_in_pairs(pipe: DemoPipeline, todo: Sequence[Entry], batches: Sequence[Turn], folder: Path) -> None:
    """Sample some batches again, with the first row's, of rows that no process has sampled beside it."""
    base, *others = [[read_batch(file_of(folder, entry, batch)).process for batch in batches] for entry in todo]

    def lone(first: int) -> list[Entry]:
        own = zip(todo[1:], others, strict=True)
        return [entry for entry, processes in own if not any(map(operator.eq, processes[first:], base[first:]))]

    if lone(0):
        again = lone(_PAIRS)  # the first row's other batches stay, with what was timed beside them
        for batch in batches[:_PAIRS]:
            for entry in (todo[0], *again):
                list(_generate(pipe, entry, [batch], folder))
