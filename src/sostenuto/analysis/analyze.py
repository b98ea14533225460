"""Run the instruments on a model, and write what they found: data, figures and one page."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sostenuto.analysis.bias_curves import EXPOSURE_BIAS
from sostenuto.analysis.components import COMPONENTS
from sostenuto.analysis.consecutive import CONSECUTIVE
from sostenuto.analysis.error_images import ERROR_IMAGES
from sostenuto.analysis.feature_error import FEATURE_ERROR
from sostenuto.analysis.frequency import FREQUENCY
from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.similarity import SIMILARITY
from sostenuto.analysis.snr import SNR
from sostenuto.analysis.subject import Subject
from sostenuto.analysis.token_importance import TOKENS
from sostenuto.compat import extra
from sostenuto.errors import AlreadyEnabledError, DependencyError, InputError, SostenutoError
from sostenuto.progress import progress
from sostenuto.table import CacheTable

INSTRUMENTS: dict[str, Instrument] = {
    instrument.name: instrument
    for instrument in (
        SNR,
        EXPOSURE_BIAS,
        FREQUENCY,
        SIMILARITY,
        FEATURE_ERROR,
        ERROR_IMAGES,
        CONSECUTIVE,
        TOKENS,
        COMPONENTS,
    )
}
"""All instruments by name, in the order of the page."""

_WORTH_AN_ESTIMATE = 3.0  # uncached generations

FORMATS = ("svg", "pdf", "png")


@dataclass(frozen=True)
class Observation:
    """What one instrument found on a model.

    Attributes:
        instrument: which.
        data: the numbers, plain data; empty where it couldn't measure.
        finding: what this model shows, in words made from the numbers.
        error: why it couldn't measure, or empty.
        seconds: how long it took.
    """

    instrument: Instrument
    data: Data
    finding: str
    error: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        known = self.instrument
        return {
            "name": known.name,
            "title": known.title,
            "source": known.source,
            "paper_claims": known.claim,
            "method": known.method,
            "this_model_shows": self.finding,
            "error": self.error,
            "seconds": self.seconds,
            "data": self.data,
        }

    def figure(self, formats: Sequence[str] = FORMATS) -> dict[str, bytes]:
        """The figure in these formats; drawing needs matplotlib."""
        from sostenuto.analysis.style import styled

        files: dict[str, bytes] = {}
        with styled():
            drawn = self.instrument.draw(self.data)
            for kind in formats:
                buffer = io.BytesIO()
                stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
                drawn.savefig(buffer, format=kind, dpi=200, facecolor="white", metadata=stamp)
                files[kind] = buffer.getvalue()
        return files


@dataclass(frozen=True)
class Analysis:
    """What all instruments found on a model.

    Attributes:
        model: what was analysed: the class, the scheduler, steps, samples and seed.
        observations: by the instrument's name.
    """

    model: dict[str, Any]
    observations: dict[str, Observation]

    def __getitem__(self, name: str) -> Data:
        """The numbers of one instrument."""
        return self.observations[name].data

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "model": self.model,
            "instruments": {name: observation.as_dict() for name, observation in self.observations.items()},
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``NAME.json`` and ``NAME.svg``, ``.pdf`` and ``.png`` of every instrument, and ``index.html`` with all.

        A figure that can't be drawn leaves the others alone; the page says why, and there is a warning.

        Returns:
            The page, which needs no file beside it and no network.

        Raises:
            DependencyError: what draws is not installed; the numbers are written. It comes with ``sostenuto[report]``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures, undrawn = {}, {}
        for name, observation in self.observations.items():  # the numbers first: they took the time
            _write_json(folder / f"{name}.json", observation.as_dict())
        for name, observation in self.observations.items():
            if observation.error:
                continue
            try:
                with extra("report"):
                    files = observation.figure()
            except DependencyError:
                raise
            except Exception as error:
                undrawn[name] = f"{type(error).__name__}: {error}"
                warnings.warn(f"the figure of {name} can't be drawn: {undrawn[name]}", stacklevel=2)
                continue
            for kind, content in files.items():
                (folder / f"{name}.{kind}").write_bytes(content)
            pictures[name] = "data:image/svg+xml;base64," + base64.b64encode(files["svg"]).decode()
        page = folder / "index.html"
        page.write_text(self._page(pictures, undrawn), encoding="utf-8")
        return page

    def _page(self, pictures: dict[str, str], undrawn: dict[str, str]) -> str:
        with extra("report"):
            import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("sostenuto.analysis", "."),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("page.html.jinja").render(
            model=self.model,
            observations=[observation.as_dict() for observation in self.observations.values()],
            pictures=pictures,
            undrawn=undrawn,
            data=json.dumps(self.as_dict(), allow_nan=False).replace("<", "\\u003c"),
        )


def analyze(
    target: Any,
    sample: Callable[..., Any],
    *,
    only: Sequence[str] = (),
    num_inference_steps: int = 50,
    num_samples: int = 16,
    seed: int = 0,
    scheduler: Any = None,
    real_latents: torch.Tensor | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    table: CacheTable | str | Path | None = None,
    folder: str | Path | None = None,
    show_progress: bool = False,
) -> Analysis:
    """Look inside a model with the instruments behind the papers' figures.

    An instrument that the model is not made for (pictures of latents that lie on no grid, a branch that it lacks) says why
    and leaves the others alone.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``; best without
            guidance, since every row of a guided call counts by itself.
        only: names of :data:`INSTRUMENTS`; all by default.
        num_inference_steps: steps of the sampler, 4 or more.
        num_samples: rows of the denoiser's batch that every instrument looks at; ``sample`` is called until there are so many.
        seed: of every generation.
        scheduler: for a bare denoiser.
        real_latents: real data ``[rows, …]`` as the denoiser takes it, row i of the label or prompt of sample i, for exposure
            bias; by default what the uncached sampler makes.
        decode: turns latents into images ``[rows, channels, height, width]`` about ``[−1, 1]``, as
            :func:`~sostenuto.analysis.image_decoder` does for a pipeline; by default the latents are looked at themselves.
        table: EB-Cache's cache table, or its file; by default one that ships, or is calibrated now.
        folder: where each instrument's ``NAME.json`` is written as soon as it is done, so that an interruption loses one.
        show_progress: show a progress bar.

    Raises:
        InputError: a name is unknown, or a number makes no sense.
        MethodError: a bare denoiser comes without its scheduler.
        TableError: the table can't be read, or is of another model, sampler or number of steps.
        AlreadyEnabledError: a method is enabled on the model.
    """
    unknown = [name for name in only if name not in INSTRUMENTS]
    if unknown:
        raise InputError(f"there is no instrument {unknown[0]!r}; there are {', '.join(INSTRUMENTS)}")
    chosen = [instrument for name, instrument in INSTRUMENTS.items() if not only or name in only]
    if isinstance(table, (str, Path)):
        table = CacheTable.load(table)
    subject = Subject(target, sample, scheduler, num_inference_steps, num_samples, seed, real_latents, decode, table)
    denoiser = subject.denoiser
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    observations: dict[str, Observation] = {}
    total, done = sum(instrument.work for instrument in chosen), 0.0
    if show_progress and total > _WORTH_AN_ESTIMATE:
        _tell_the_time(subject, total)
    if table is not None:  # what doesn't fit is refused now, not left out by one instrument after the other
        table.check(denoiser, subject.sampler)
        table.check_steps(subject.uncached.timesteps)
    with progress(round(total), "analyze (uncached generations)", show_progress) as bar:
        for instrument in chosen:
            subject.tell = _teller(bar, instrument.name)
            found = observations[instrument.name] = _observe(instrument, subject)
            if folder is not None:
                _write_json(Path(folder) / f"{instrument.name}.json", found.as_dict())
            bar.update(round(done + instrument.work) - round(done))
            done += instrument.work
    model = {
        "class": type(denoiser).__name__,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "scheduler": type(subject.sampler).__name__,
        "num_inference_steps": num_inference_steps,
        "num_samples": num_samples,
        "seed": seed,
        "torch": torch.__version__,
        "seconds": sum(observation.seconds for observation in observations.values()),
    }
    return Analysis(model, observations)


def _tell_the_time(subject: Subject, work: float) -> None:
    """Say how long it will take, by the uncached path, which most instruments look at."""
    began = time.perf_counter()
    try:
        _ = subject.uncached
    except Exception:  # the instruments say themselves what they can't look at
        return
    minutes = max(1, round((time.perf_counter() - began) * work / 60))
    print(f"analyze: about {minutes} minute{'s' * (minutes > 1)} on this machine", file=sys.stderr)


def _observe(instrument: Instrument, subject: Subject) -> Observation:
    began = time.perf_counter()
    try:
        data = dict(_finite(instrument.measure(subject)))
        missing = "".join(f" Left out: {name} ({reason})." for name, reason in data.get("left_out", {}).items())
        return Observation(instrument, data, instrument.finding(data) + missing, "", time.perf_counter() - began)
    except AlreadyEnabledError:
        raise
    except SostenutoError as error:
        return Observation(instrument, {}, "", str(error), time.perf_counter() - began)
    except Exception as error:  # of a network, a decoder or a GPU: what the other instruments find isn't lost with it
        return Observation(instrument, {}, "", f"{type(error).__name__}: {error}", time.perf_counter() - began)


def _teller(bar: Any, name: str) -> Callable[[str], Any]:
    def tell(what: str) -> None:
        if hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str(f"{name}: {what}")

    return tell


def _finite(value: Any) -> Any:
    """Plain data with ``None`` where a number is not finite, as JSON knows none such."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
