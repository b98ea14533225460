"""The demo's comparison: every row on the same noise and labels, batch by batch in turn so that drift of the machine cancels.

Each batch of each row is one file in the run's folder: an interrupted run goes on where it stopped, more images or seeds add
to what is there, and several processes can share the work (``shard``).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch

import sostenuto
from sostenuto.calibrations import EBCalibration, calibrate
from sostenuto.compat import diffusers_name, diffusers_version
from sostenuto.correct import check_noise_scale
from sostenuto.demo.assets import asset
from sostenuto.demo.batches import batch_file, read_batch, write_batch
from sostenuto.demo.judge import Judge
from sostenuto.demo.network import NUM_CLASSES
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline
from sostenuto.errors import InputError
from sostenuto.files import publish_json
from sostenuto.measured import read_json, table_file
from sostenuto.methods import FORA, EBCache, EpsilonScaling, NoCache
from sostenuto.methods.base import Method, parts
from sostenuto.progress import progress
from sostenuto.quality.metrics import paired_psnr
from sostenuto.table import CacheTable, StepState

NUM_STEPS = 50
SEARCH_SEED = 900_001  # of calibrations and searches: none of the noise that rows are judged on
_MOST_AT_ONCE = 4  # batches of one row before the next row's, in a long run
_PAIRS = 3
_Batch = tuple[int, int, torch.Tensor]  # seed, number of its first image, labels


@dataclass(frozen=True)
class Settings:
    """What a comparison is made of."""

    num_images: int = 96
    batch_size: int = 32
    seeds: tuple[int, ...] = (0,)
    search_images: int = 100
    """Images per value when the noise scale b is searched; 0 takes the shipped tables instead of calibrating."""
    shard: tuple[int, int] = (0, 1)
    """This process's part of the batches and the number of parts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's matrix products, of every row alike; the latents stay float32."""

    def __post_init__(self) -> None:
        if self.num_images < 4 or self.batch_size < 1 or not self.seeds or self.search_images < 0:
            raise InputError(
                "a comparison needs at least 4 images, a batch of 1 and a seed, not "
                f"{self.num_images}, {self.batch_size}, {list(self.seeds)} ({self.search_images} to search)"
            )
        if not 0 <= self.shard[0] < self.shard[1]:
            raise InputError(f"shard must be (part, parts) with 0 <= part < parts, not {self.shard}")


@dataclass(frozen=True)
class Entry:
    """One row: a sampler and a method.

    Attributes:
        name: shown in table and pictures.
        method: what is enabled.
        num_inference_steps: steps of the sampler.
        solver: ``"ddpm"``, ``"ddim"`` or ``"dpm-solver++"``.
        reference: name of the uncached row that runs on the same noise, for PSNR; ``None`` where none does.
    """

    name: str
    method: Method
    num_inference_steps: int = NUM_STEPS
    solver: str = "ddpm"
    reference: str | None = "uncached"

    @cached_property
    def key(self) -> str:
        """What the row's batches are kept by: all that is sampled, so that rows that sample the same share them."""
        names = "+".join(part.name for part in parts(self.method))
        return f"{names}-{digest(self.solver, self.num_inference_steps, self.method)}"


def digest(*parts: Any) -> str:
    """A short name for settings that print all that they are: another one, another name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@dataclass
class Row:
    """A row of the results; the public field names of ``sostenuto demo --json``."""

    name: str
    key: str
    method: str
    num_inference_steps: int
    solver: str
    wall_s: float
    speedup: float
    ideal_speedup: float
    efficiency: float
    frechet_distance: float
    inception_score: float
    class_accuracy: float
    precision: float
    recall: float
    psnr: float | None
    macs: int
    cache_bytes_peak: int
    frechet_distance_per_seed: list[float] = field(default_factory=list)
    plan: list[list[str]] = field(default_factory=list)
    site_kinds: list[str] = field(default_factory=list)
    eps_scale: list[float] = field(default_factory=list)


def labels_of(num_images: int) -> torch.Tensor:
    """Balanced labels ``[n]``: 0 … 9 over and over."""
    return torch.arange(num_images) % NUM_CLASSES


def demo_sample(num_images: int) -> Callable[..., torch.Tensor]:
    """A ``sample`` for calibration: images ``[n, 1, 28, 28]`` in ``[0, 1]`` with balanced labels, no guidance."""

    def sample(pipe: DemoPipeline, generator: torch.Generator, num_inference_steps: int = NUM_STEPS) -> torch.Tensor:
        parts = labels_of(num_images).split(32)
        made = [pipe(p.tolist(), num_inference_steps, generator=generator, output_type="pt").images for p in parts]
        return torch.cat(made)

    return sample


def make_tables(pipe: DemoPipeline, judge: Judge, search_images: int, show: bool) -> tuple[CacheTable, CacheTable]:
    """The tables for about 1.5x and 2.5x: calibrated here, b chosen by the distance of a small set of images."""
    light, strong = (
        calibrate(
            pipe,
            options,
            demo_sample(8),
            num_inference_steps=NUM_STEPS,
            score=judge.distance,
            score_sample=demo_sample(search_images),
            generator=torch.Generator().manual_seed(SEARCH_SEED),
            show_progress=show,
        )
        for options in CALIBRATIONS
    )
    return light, strong


# With one tensor for the whole stack a step that reuses everything costs next to nothing, so that the measured speed-up is
# close to that by multiply-accumulates. The strong table stays at 1/2.5: below that the distance rises steeply. It does best
# when it reuses whole steps early and computes the end: single branches reused late cost texture.
CALIBRATIONS = (
    EBCalibration(
        target_fraction=0.64,
        max_consecutive_reuse=2,
        fill="stack",
        candidates=(StepState.REUSE_BOTH,),
        kappa_start=0.6,
        eps_scale_grid=(0.975, 0.985, 1.01),
    ),
    EBCalibration(
        target_fraction=0.4,
        fill="stack",
        max_consecutive_reuse=3,
        candidates=(StepState.REUSE_BOTH,),
        last_computed=7,
        kappa_start=2.5,
        eps_scale_grid=(0.975, 0.985, 1.01),
    ),
)


def entries(light: CacheTable, strong: CacheTable) -> list[Entry]:
    """The rows of the comparison; the first is the uncached sampler."""
    b = fmean(light.eps_scale)
    return [
        Entry("uncached", NoCache()),
        Entry("33 steps", NoCache(), 33, reference=None),
        Entry("20 steps", NoCache(), 20, reference=None),
        Entry("FORA N=2", FORA(2)),
        Entry("FORA N=3", FORA(3)),
        Entry("ε-scaling alone", EpsilonScaling(1 / b)),
        Entry("1.5× table alone", EBCache(light, eps_scale=1.0)),
        Entry("2.5× table alone", EBCache(strong, eps_scale=1.0)),
        Entry("EB-Cache 1.5×", EBCache(light)),
        Entry("EB-Cache 2.5×", EBCache(strong)),
        Entry("DPM-Solver++ 20", NoCache(), 20, "dpm-solver++", reference=None),
        Entry("DPM-Solver++ 13", NoCache(), 13, "dpm-solver++", reference=None),
        Entry("DPM-Solver++ 20, cached", CACHED_SOLVER, 20, "dpm-solver++", reference="DPM-Solver++ 20"),
    ]


# On an ODE solver the gap wants a forecast and no scaling.
CACHED_SOLVER = FORA(2, forecast_order=1)


def compare(folder: Path, settings: Settings, show: bool = True) -> dict[str, Any]:
    """Run what is missing of the comparison and return its results.

    Args:
        folder: where batches, tables and results lie; made if need be.
        settings: sizes and seeds.
        show: progress bars.

    Returns:
        The content of ``--json``: ``rows``, ``n``, ``seed``, ``machine`` and more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe, judge = load_demo_pipeline(), Judge()
    return run_entries(folder, entries(*_tables(folder, pipe, judge, settings, show)), settings, show)


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
    batches = list(_batches(settings))
    own = batches[settings.shard[0] :: settings.shard[1]]
    at_once = min(_MOST_AT_ONCE, 1 + len(own) // 20)  # rows are timed as pairs: near each other, where there are few
    with (
        progress(total=len(own) * len(todo), desc="sample", show=show) as bar,
        torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"),
    ):
        for first in range(0, len(own), at_once):
            for entry in todo:
                turn = own[first : first + at_once]
                absent = [batch for batch in turn if not _file(folder, entry, batch).exists()]
                bar.update(len(turn) - len(absent))
                for _ in _generate(pipe, entry, absent, folder):
                    bar.update()
        missing = sum(not _file(folder, entry, batch).exists() for batch in batches for entry in todo)
        if missing:
            return {"rows": [], "missing": missing}
        _time_in_pairs(pipe, todo, batches, folder)
    return _results(folder, todo, settings, judge)


def _tables(
    folder: Path, pipe: DemoPipeline, judge: Judge, settings: Settings, show: bool
) -> tuple[CacheTable, CacheTable]:
    paths = [folder / "table-1.5x.json", folder / "table-2.5x.json"]
    if not all(path.exists() for path in paths):
        if settings.search_images:
            tables = make_tables(pipe, judge, settings.search_images, show)
        else:
            tables = tuple(CacheTable.load(SHIPPED / path.name.replace("table", "demo-ddpm50")) for path in paths)
        for path, table in zip(paths, tables, strict=True):
            table.save(path)
    return CacheTable.load(paths[0]), CacheTable.load(paths[1])


SHIPPED = Path(sostenuto.__file__).parent / "tables"


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


def _batches(settings: Settings) -> Iterator[_Batch]:
    labels = labels_of(settings.num_images)
    for seed in settings.seeds:
        for start in range(0, settings.num_images, settings.batch_size):
            yield seed, start, labels[start : start + settings.batch_size]


def _file(folder: Path, entry: Entry, batch: _Batch) -> Path:
    seed, start, labels = batch
    return batch_file(folder, entry.key, seed, start, len(labels))


_SOLVERS: dict[str, str] = {"ddim": "DDIMScheduler", "dpm-solver++": "DPMSolverMultistepScheduler"}


@contextlib.contextmanager
def with_solver(pipe: DemoPipeline, solver: str) -> Iterator[None]:
    """The pipeline with another solver (``"ddpm"``: its own) for a while."""
    base = pipe.scheduler
    if solver != "ddpm":
        pipe.scheduler = diffusers_name(_SOLVERS[solver]).from_config(base.config)
    try:
        yield
    finally:
        pipe.scheduler = base


def _generate(pipe: DemoPipeline, entry: Entry, batches: Sequence[_Batch], folder: Path) -> Iterator[None]:
    """Sample batches of a row, one at a time: under one handle, which counts what its calls cost once for all of them."""
    if not batches:
        return
    with with_solver(pipe, entry.solver), sostenuto.enable(pipe, entry.method) as handle:
        for batch in batches:
            seed, start, labels = batch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
            began = time.perf_counter()
            images = pipe(labels.tolist(), entry.num_inference_steps, generator=generator, output_type="pt").images
            write_batch(_file(folder, entry, batch), images, time.perf_counter() - began, handle.stats.as_dict())
            yield


def _time_in_pairs(pipe: DemoPipeline, todo: Sequence[Entry], batches: Sequence[_Batch], folder: Path) -> None:
    """Sample some batches again, with the first row's, of rows that no process has sampled beside it."""
    base, *others = [[read_batch(_file(folder, entry, batch)).process for batch in batches] for entry in todo]

    def lone(first: int) -> list[Entry]:
        own = zip(todo[1:], others, strict=True)
        return [entry for entry, processes in own if not any(map(operator.eq, processes[first:], base[first:]))]

    if lone(0):
        again = lone(_PAIRS)  # the first row's other batches stay, with what was timed beside them
        for batch in batches[:_PAIRS]:
            for entry in (todo[0], *again):
                list(_generate(pipe, entry, [batch], folder))


@dataclass
class _Sampled:
    """All batches of one row: images ``[seeds, n, 1, 28, 28]``, seconds per batch and who timed it, statistics of a batch."""

    images: torch.Tensor
    seconds: list[float]
    processes: list[str]
    stats: dict[str, Any]
    macs: int


def _read(folder: Path, entry: Entry, settings: Settings) -> _Sampled:
    parts = [read_batch(_file(folder, entry, batch)) for batch in _batches(settings)]
    images = torch.cat([part.images for part in parts]).float() / 255
    return _Sampled(
        images.view(len(settings.seeds), settings.num_images, *images.shape[1:]),
        [part.seconds for part in parts],
        [part.process for part in parts],
        parts[-1].stats,
        sum(part.stats["macs"] for part in parts),
    )


def images_of(folder: Path, entry: Entry, settings: Settings) -> torch.Tensor:
    """The images of a row of a finished comparison ``[seeds, n, 1, 28, 28]`` in ``[0, 1]``."""
    return _read(folder, entry, settings).images


def _results(folder: Path, todo: Sequence[Entry], settings: Settings, judge: Judge) -> dict[str, Any]:
    labels = labels_of(settings.num_images)
    sampled = {entry.name: _read(folder, entry, settings) for entry in todo}
    base = sampled[todo[0].name]
    rows = []
    for entry in todo:
        own = sampled[entry.name]
        verdicts = [judge.judge(images, labels) for images in own.images]
        speedup = _speedup(base, own)
        ideal = base.macs / own.macs
        reference = sampled[entry.reference].images if entry.reference and entry.reference != entry.name else None
        psnr = None
        if reference is not None:
            psnr = paired_psnr(own.images.flatten(0, 1), reference.flatten(0, 1))
        mean = {name: fmean(getattr(v, name) for v in verdicts) for name in asdict(verdicts[0])}
        rows.append(
            Row(
                name=entry.name,
                key=entry.key,
                method=entry.method.name,
                num_inference_steps=entry.num_inference_steps,
                solver=entry.solver,
                wall_s=median(own.seconds),
                speedup=speedup,
                ideal_speedup=ideal,
                efficiency=speedup / ideal,
                psnr=psnr if psnr is not None and math.isfinite(psnr) else None,  # identical images have none
                macs=own.macs,
                cache_bytes_peak=own.stats["cache_bytes_peak"],
                frechet_distance_per_seed=[v.frechet_distance for v in verdicts],
                plan=own.stats["plan"],
                site_kinds=own.stats["site_kinds"],
                eps_scale=list(_noise_scale(entry)),
                **mean,
            )
        )
    return {
        "rows": [asdict(row) for row in rows],
        "n": settings.num_images,
        "seed": settings.seeds[0],
        "seeds": list(settings.seeds),
        "batch_size": settings.batch_size,
        "floor": judge.floor(settings.num_images),
        "machine": machine() | {"dtype": settings.dtype},
    }


def _speedup(base: _Sampled, own: _Sampled) -> float:
    """Median of pairs of batches that one process timed."""
    times = zip(base.seconds, own.seconds, base.processes, own.processes, strict=True)
    return median(before / after for before, after, one, other in times if one == other)


def _noise_scale(entry: Entry) -> Sequence[float]:
    if isinstance(entry.method, EpsilonScaling):
        return [1 / float(entry.method.scale)] * entry.num_inference_steps  # type: ignore[arg-type]
    if isinstance(entry.method, EBCache) and isinstance(entry.method.table, CacheTable):
        fixed = entry.method.eps_scale
        return entry.method.table.eps_scale if fixed is None else check_noise_scale(fixed, entry.num_inference_steps)
    return [1.0] * entry.num_inference_steps


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cuda: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers_version(),
        "sostenuto": sostenuto.__version__,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
