"""Tables of the benchmark: speed and state of methods and other libraries, and which networks each gets right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

Show = Callable[[dict[str, Any]], str]


def _number(name: str, text: str, scale: float = 1.0) -> Show:
    """A column's value, or a dash."""
    return lambda row: "–" if row.get(name) is None else text.format(row[name] * scale)


def _range(name: str, digits: int) -> Show:
    ends = [_number(name + end, f"{{:.{digits}f}}") for end in ("", "_min", "_max")]
    return lambda row: "–" if row.get(name) is None else "{} ({} … {})".format(*(end(row) for end in ends))


def _graphs(row: dict[str, Any]) -> str:
    if row.get("graphs") is None:
        return "–"
    return f"{row['graphs']} / {row['graph_breaks']} / {row['recompiles']}"


def step_ms(row: dict[str, Any], seconds: str, macs: str, which: Callable[[Sequence[int]], int]) -> float:
    """Milliseconds of the steps with the most or the fewest multiply-accumulates."""
    return 1e3 * median(s for s, n in zip(row[seconds], row[macs], strict=True) if n == which(row[macs]))


def _step(seconds: str, macs: str, which: Callable[[Sequence[int]], int]) -> Show:
    return lambda row: f"{step_ms(row, seconds, macs, which):.1f}"


def _per_row(name: str) -> Show:
    """10¹² multiply-accumulates of one row of the batch, as papers print them: one image, one half of the guidance."""
    return lambda row: f"{row[name] / row['batch_size'] / 1e12:.2f}"


def _printed(name: str, scale: float = 1.0) -> Show:
    return lambda row: "–" if name not in row["printed"] else f"{row['printed'][name] * scale:.2f}"


_NAME: dict[str, Show] = {"row": lambda row: row["name"]}
_SPEED: dict[str, Show] = {
    "speed-up (min … max)": _range("speedup", 3),
    "by MACs": _number("ideal_speedup", "{:.3f}"),
    "efficiency": _number("efficiency", "{:.3f}"),
}
_STEPS: dict[str, Show] = {
    "computed step": _number("computed_step_overhead", "{:+.2f} %", 100),
    "in µs": _number("computed_step_overhead_s", "{:+.0f}", 1e6),
    "skipped step": _number("skipped_step_share", "{:.2f} %", 100),
}
_STATE: dict[str, Show] = {"MiB kept": _number("cache_bytes_peak", "{:.2f}", 2**-20)}
_ERROR: dict[str, Show] = {"relative error": _number("relative_error", "{:.1e}")}


def bench(
    columns: dict[str, Show], counted: dict[str, Show] | None = None, quality: dict[str, Show] | None = None
) -> Callable[[dict[str, Any]], str]:
    """What makes the tables of a suite of ``sostenuto bench``: measured rows, counted ones, and why there are no others.

    Args:
        columns: of rows that were measured, by their heads.
        counted: of rows that were only counted.
        quality: of the measured ones, where any row has one.
    """

    def table(rows: Sequence[dict[str, Any]], columns: dict[str, Show]) -> str:
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        return "\n".join([*lines, *(f"| {' | '.join(show(row) for show in columns.values())} |" for row in rows)])

    def tables(results: dict[str, Any]) -> str:
        good = [row for row in results["rows"] if row.get("error") is None]
        measured = [row for row in good if row.get("speedup") is not None]
        others = [row for row in good if row.get("speedup") is None]
        judged = {name: show for name, show in (quality or {}).items() if any(show(row) != "–" for row in measured)}
        parts = [table(measured, columns | judged)] if measured else []
        parts += [table(others, counted)] if others and counted else []
        failed = [
            f"- {row['name']}: {row['error'].removeprefix('MethodError: ')}"
            for row in results["rows"]
            if row.get("error") is not None
        ]
        parts += ["Not measured:\n\n" + "\n".join(failed)] if failed else []
        machine = results["machine"]
        facts = [
            machine["processor"],
            f"threads: {machine['threads']}",
            f"torch {machine['torch']}",
            f"diffusers {machine['diffusers']}",
        ]
        facts += [f"{name}: {machine[name]}" for name in ("device", "dtype", "malloc") if name in machine]
        return "\n\n".join([*parts, f"({', '.join(facts)})"])

    return tables


_COUNTED: dict[str, Show] = {
    **_NAME,
    "T-MACs, counted": _per_row("macs"),
    "printed": _printed("macs", 1e-12),
    "speed-up by MACs, counted": _number("ideal_speedup", "{:.2f}×"),
    "speed-up, printed": _printed("speedup"),
    "seconds, printed": _printed("wall_s"),
    "GiB kept": _number("cache_bytes_peak", "{:.2f}", 2**-30),
}
_GROWTH: dict[str, Show] = {
    **_NAME,
    "ms of a step uncached": _step("baseline_step_s", "baseline_step_macs", max),
    "ms computed": _step("step_s", "step_macs", max),
    "ms skipped": _step("step_s", "step_macs", min),
    **_STATE,
}


_LIBRARIES = {
    "diffusers-first-block-cache": "diffusers FirstBlockCache",
    "diffusers-magcache": "diffusers MagCache",
    "diffusers-taylorseer": "diffusers TaylorSeer",
    "diffusers-pab": "diffusers PAB",
    "diffusers-fastercache": "diffusers FasterCache, attention alone",
    "diffusers-seacache": "diffusers SeaCache",
    "cache-dit": "cache-dit",
    "cache-dit-taylorseer": "cache-dit, TaylorSeer",
    "dit-smoothcache": "dit-smoothcache",
    "para-attn": "ParaAttention",
}


def support(results: dict[str, Any]) -> str:
    """On how many networks each library's cache reproduces the output for identical inputs."""
    lines = [
        "| | version | right | another output | fails in its first calls | refused | skips nothing |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, version in results["versions"].items():
        name, _, options = setting.partition(":")
        told = [network[setting]["result"] for network in results["networks"].values()]
        which = _LIBRARIES[name] + (", told its modules" if "modules=" in options else "")
        counts = " | ".join(
            str(told.count(result)) for result in ("works", "wrong", "fails", "refused", "skips nothing")
        )
        lines.append(f"| {which} | {version} | {counts} |")
    return "\n".join(lines)


def _of(model: str, tables: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """The rows of one model that were measured."""

    def chosen(results: dict[str, Any]) -> str:
        rows = [row for row in results["rows"] if row["name"].startswith(f"{model}: ") and row.get("error") is None]
        return tables(results | {"rows": rows})

    return chosen


_PEERS = bench(
    {
        **_NAME,
        "library": lambda row: row["peer"] or "sostenuto",
        **_SPEED,
        "computed step": _STEPS["computed step"],
        "skipped step": _STEPS["skipped step"],
    },
    quality={"Fréchet distance": _number("frechet_distance", "{:.3f}"), "PSNR": _number("psnr", "{:.1f}")},
)
SUITES: dict[str, Callable[[dict[str, Any]], str]] = {
    "overhead.json": bench({**_NAME, **_STEPS, **_STATE, "graphs / breaks / recompiles": _graphs}),
    "efficiency.json": bench({**_NAME, **_SPEED}),
    "peers.json": _PEERS,
    "peers.json dit": _of("dit", _PEERS),
    "dit-xl.json": bench({**_NAME, "seconds": _range("wall_s", 2), "T-MACs, counted": _per_row("macs")}, _COUNTED),
    "flux-like.json": bench({**_NAME, **_SPEED, **_STEPS, **_STATE, **_ERROR}, _COUNTED),
    "partial.json": bench({**_NAME, **_SPEED}),
    "growth.json": bench(_GROWTH),
    "peer-support.json": support,
}
