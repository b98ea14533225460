"""What ``sostenuto demo`` shows: a table in the terminal, a PNG and a self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sostenuto.demo.batches import batch_file, read_batch
from sostenuto.demo.network import CLASS_NAMES
from sostenuto.report.figures import headline_figure, png, poster
from sostenuto.report.page import render

GRID_COLUMNS = 20
HEADLINE = ("uncached", "EB-Cache 1.5×", "EB-Cache 2.5×", "AB-Cache 4.5×", "FORA N=3")
_HEADINGS = ("row", "steps", "speed-up", "ideal", "distance", "score", "accuracy", "precision", "recall", "PSNR")


def terminal_table(results: dict[str, Any]) -> str:
    """The rows as text."""
    headings = tuple(f"distance ({results['floor']:.3f})" if h == "distance" else h for h in _HEADINGS)
    lines: list[tuple[str, ...]] = [headings]
    for row in results["rows"]:
        lines.append(
            (
                row["name"],
                str(row["num_inference_steps"]),
                "–" if row["speedup"] is None else f"{row['speedup']:.2f}×",
                f"{row['ideal_speedup']:.2f}×",
                f"{row['frechet_distance']:.3f}",
                f"{row['inception_score']:.2f}",
                f"{row['class_accuracy']:.3f}",
                f"{row['precision']:.3f}",
                f"{row['recall']:.3f}",
                "–" if row["psnr"] is None else f"{row['psnr']:.1f} dB",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADINGS))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("─" * w for w in widths))
    seeds = results["seeds"]
    of_seeds = f"for each of the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"of seed {results['seed']}"
    together = len(seeds) if results.get("pooled") else 1
    machine = results["machine"]
    text += [
        "",
        f"{results['n']} images a row {of_seeds}{', judged together' if together > 1 else ''}. Distance: Fréchet, to the "
        f"training set, in the judge's features (in brackets that of {results['n'] * together} real test images).",
        f"{machine['processor']}, {machine['threads']} threads, {machine['dtype']}, torch {machine['torch']}, "
        f"diffusers {machine['diffusers']}",
    ]
    return "\n".join(text)


def write_pictures(folder: Path, results: dict[str, Any]) -> tuple[Path, Path]:
    """Write ``demo.png``, ``demo.html`` and ``same-noise.png`` into the folder of a finished comparison."""
    names = [row["name"] for row in results["rows"]]
    images = torch.stack([_first_images(folder, row["key"], results) for row in results["rows"]])
    columns: Sequence[str] = [CLASS_NAMES[i % len(CLASS_NAMES)].split("/")[0] for i in range(images.shape[1])]
    picture, page = folder / "demo.png", folder / "demo.html"
    picture.write_bytes(png(poster(results, images, names, columns)))
    first = [names.index(name) for name in HEADLINE]
    headline = headline_figure(
        [results["rows"][i] for i in first], images[first, : len(CLASS_NAMES)], columns[: len(CLASS_NAMES)]
    )
    (folder / "same-noise.png").write_bytes(png(headline))
    page.write_text(render(results, images, names, columns), encoding="utf-8")
    return picture, page


def _first_images(folder: Path, key: str, results: dict[str, Any]) -> torch.Tensor:
    count = min(results["batch_size"], results["n"])
    images = read_batch(batch_file(folder, key, results["seed"], 0, count)).images.float() / 255
    return images[:GRID_COLUMNS]
