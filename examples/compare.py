"""What the examples share: the command line, a run without and one with caching, and the pictures side by side."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sostenuto

Sample = Callable[..., list[Image.Image]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` did."""

    pipe: Any
    method: Any
    sample: Sample
    stats: Any
    seconds: tuple[float, float]
    files: list[Path]


def arguments(
    about: str | None,
    argv: Sequence[str] | None,
    *,
    model: str,
    method: Any,
    steps: int,
    size: tuple[int, ...] = (),
    tiny_size: tuple[int, ...] = (),
    prompt: str = "",
) -> argparse.Namespace:
    """The command line: what it leaves out is as the example says."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default=model, help="a diffusers folder or a hub id (%(default)s)")
    parser.add_argument(
        "--method",
        type=_method,
        default=method,
        help="a name from `sostenuto methods`, or one of its presets such as fora.flux_dev (by default what fits the model)",
    )
    parser.add_argument("--steps", type=int, default=steps, help="%(default)s by default")
    if prompt:
        parser.add_argument("--prompt", default=prompt, help="%(default)s")
    else:
        parser.add_argument("--labels", type=int, nargs="+", default=[207, 360, 387, 974], help="classes of ImageNet")
    if size:
        names = ("HEIGHT", "WIDTH", "FRAMES")[: len(size)]
        parser.add_argument("--size", type=int, nargs=len(size), metavar=names, help=f"{size} by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(f"{_name(model)}.png"), help="%(default)s")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random pipeline in place of the model: no downloads"
    )
    args = parser.parse_args(argv)
    if size:
        args.size = args.size or (tiny_size if args.tiny else size)
    return args


def _name(model: str) -> str:
    return model.rpartition("/")[2].lower()


def _method(text: str) -> Any:
    name, _, preset = text.partition(".")
    known = sostenuto.available_methods()
    if name not in known or not hasattr(known[name], preset or "name"):
        raise argparse.ArgumentTypeError(f"no method or preset {text!r}; the methods are {', '.join(known)}")
    return getattr(known[name], preset)() if preset else known[name]()


def calibrated(args: argparse.Namespace, pipe: Any, calibration: Any, sample: Sample, num_samples: int) -> Path:
    """What the calibration measures on this model with so many steps, kept in a file beside the pictures."""
    path = args.output.with_name(f"{args.output.stem}-{calibration.method}-{args.steps}.json")
    if not path.exists():
        print(f"calibrating once, for {path}")
        pipe.set_progress_bar_config(disable=True)
        table = sostenuto.calibrate(
            pipe, calibration, sample, num_inference_steps=args.steps, num_samples=num_samples, show_progress=True
        )
        table.save(path)
    return path


def compare(pipe: Any, method: Any, sample: Sample, args: argparse.Namespace) -> Comparison:
    """Generate from the same noise without and with the method, print time and work, save both side by side.

    ``sample(pipe, generator, num_inference_steps)`` returns pictures: the images of a batch or the frames of a video.
    """
    pipe.set_progress_bar_config(disable=args.tiny)

    def timed(steps: int) -> tuple[list[Image.Image], float]:
        began = time.perf_counter()
        pictures = sample(pipe, torch.Generator().manual_seed(args.seed), num_inference_steps=steps)
        return pictures, time.perf_counter() - began  # pictures are on the CPU: nothing is still running

    timed(2)  # what is done only once is done now
    uncached, seconds_uncached = timed(args.steps)
    with sostenuto.enable(pipe, method) as handle:
        cached, seconds = timed(args.steps)
        stats = handle.stats
    print(f"{type(pipe).__name__}, {args.steps} steps, {method}")
    print(f"uncached  {seconds_uncached:8.2f} s  {stats.macs_uncached / 1e12:10.4g} T multiply-accumulates")
    print(f"cached    {seconds:8.2f} s  {stats.macs / 1e12:10.4g} T multiply-accumulates")
    print(f"speed-up  {seconds_uncached / seconds:8.2f} ×  {stats.ideal_speedup:10.2f} × by multiply-accumulates")
    files = _save(uncached, cached, args.output)
    print(f"{files[0]}{f' … {files[-1]}' if files[1:] else ''}: uncached left, cached right")
    return Comparison(pipe, method, sample, stats, (seconds_uncached, seconds), files)


def _save(uncached: list[Image.Image], cached: list[Image.Image], output: Path) -> list[Path]:
    """One file per picture."""
    files = []
    for index, (left, right) in enumerate(zip(uncached, cached, strict=True)):
        sheet = Image.new("RGB", (left.width + right.width, left.height))
        sheet.paste(left, (0, 0))
        sheet.paste(right, (left.width, 0))
        files.append(output if len(cached) == 1 else output.with_stem(f"{output.stem}-{index:03}"))
        sheet.save(files[-1])
    return files
