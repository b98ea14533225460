"""The rows of a benchmark as a table in the terminal: of its columns those in which something stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sostenuto.bench.rows import Row

Column = tuple[str, Callable[[Row], str]]


def terminal_table(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """The rows as text, errors below, and what they were measured on."""
    good = [row for row in rows if row.error is None]
    parts = [_aligned(good)] if good else []
    failed = [f"{row.name}: {row.error}" for row in rows if row.error is not None]
    if failed:
        parts.append("\n".join(["not measured:", *(f"  {line}" for line in failed)]))
    facts = ("processor", "device", "threads", "dtype", "malloc", "attention", "torch", "diffusers")
    parts.append(", ".join(f"{name} {machine[name]}" for name in facts if name in machine))
    return "\n\n".join(parts)


def _aligned(rows: Sequence[Row]) -> str:
    columns = [(title, [show(row) for row in rows]) for title, show in _COLUMNS]
    columns = [
        (title, cells) for index, (title, cells) in enumerate(columns) if index == 0 or any(c != "" for c in cells)
    ]
    widths = [max(map(len, [title, *cells])) for title, cells in columns]
    lines = [
        "  ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        for texts in zip(
            *([title, "─" * width, *cells] for (title, cells), width in zip(columns, widths, strict=True)), strict=True
        )
    ]
    return "\n".join(line.rstrip() for line in lines)


def _value(name: str, text: str, scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = getattr(row, name)
        return "" if value is None else text.format(value * scale)

    return show


def _range(name: str, text: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value, low, high = (getattr(row, name + end) for end in ("", "_min", "_max"))
        return "" if None in (value, low, high) else f"{text.format(value)} ({text.format(low)} … {text.format(high)})"

    return show


def _bytes(row: Row) -> str:
    return "" if row.cache_bytes_peak is None else f"{row.cache_bytes_peak / 2**20:.2f} MiB"


def _macs(row: Row) -> str:
    """Of one row of the batch, as papers print them: one image, one half of the guidance."""
    return "" if row.macs is None else f"{row.macs / (row.batch_size or 1) / 1e12:.4g}"


def _printed(row: Row) -> str:
    return "" if "macs" not in row.printed else f"{row.printed['macs'] / 1e12:.4g}"


def _printed_speedup(row: Row) -> str:
    return "" if "speedup" not in row.printed else f"{row.printed['speedup']:.2f}×"


def _graphs(row: Row) -> str:
    return "" if row.graphs is None else f"{row.graphs}/{row.graph_breaks}/{row.recompiles}"


_COLUMNS: tuple[Column, ...] = (
    ("row", lambda row: row.name),
    ("seconds", _range("wall_s", "{:.3f}")),
    ("speed-up", _range("speedup", "{:.2f}")),
    ("ideal", _value("ideal_speedup", "{:.3f}×")),
    ("efficiency", _value("efficiency", "{:.3f}")),
    ("computed step", _value("computed_step_overhead", "{:+.2f} %", 100)),
    ("skipped step", _value("skipped_step_share", "{:.2f} %", 100)),
    ("T-MACs/row", _macs),
    ("printed", _printed),
    ("printed ×", _printed_speedup),
    ("state", _bytes),
    ("graphs/breaks/recompiles", _graphs),
    ("distance", _value("frechet_distance", "{:.3f}")),
    ("score", _value("inception_score", "{:.2f}")),
    ("accuracy", _value("class_accuracy", "{:.3f}")),
    ("precision", _value("precision", "{:.3f}")),
    ("recall", _value("recall", "{:.3f}")),
    ("PSNR", _value("psnr", "{:.1f} dB")),
    ("SSIM", _value("ssim", "{:.3f}")),
    ("rel. error", _value("relative_error", "{:.2e}")),
    ("library", lambda row: row.peer or ""),
)
