"""A row of a benchmark, and the file of rows: one a line, written as soon as it is measured, so that a run can go on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sostenuto.errors import InputError
from sostenuto.measured import is_number, parse_json

FORMAT, VERSION = "sostenuto-bench", 2  # 1 had noise that tunings with the same seed look at


_NO_MEASUREMENTS = ("scheduler", "batch_size", "peer", "axis", "value", "n", "samples", "error")


@dataclass(frozen=True)
class Row:
    """What was measured of one method on one model; ``None`` where a value doesn't exist, with the reason in ``missing``.

    Attributes:
        key: tells the row from all others, see :func:`~sostenuto.bench.cases.key_of`.
        name, suite, model, method, num_inference_steps, scheduler, mode, batch_size: what ran.
        parameters: of the method, or what the peer was set to.
        peer: library and version, for peers.
        baseline: what the other side of every pair was.
        axis, value: the size of a growth curve that was varied, and its value.
        n: images that quality is about. seed: from which their noise follows. repeats: pairs measured.
        wall_s, wall_s_min, wall_s_max: seconds of one generation: median, least and most.
        baseline_wall_s: the same of the other side, median.
        speedup, speedup_min, speedup_max: of the pairs, the other side's seconds over this one's.
        macs, baseline_macs: multiply-accumulates that one generation executed, counted while it ran.
        ideal_speedup: ``baseline_macs / macs``.
        efficiency: ``speedup / ideal_speedup``.
        step_s, baseline_step_s: seconds of every step, medians over repeats.
        step_macs, baseline_step_macs: multiply-accumulates of every step.
        computed_step_overhead: of the steps that compute all that the other side's do, the extra time as a share (0.01: 1 %);
            computed_step_overhead_s in seconds.
        skipped_step_share: of the steps with the fewest multiply-accumulates, the time as a share of the other side's same
            step.
        plan: what was carried out, as :func:`~sostenuto.plan.concise` writes it.
        cache_bytes_peak: most bytes of kept features at one time.
        device_bytes_peak, baseline_device_bytes_peak: most bytes that torch held on a GPU during a generation.
        graphs, graph_breaks: of the compiler. recompiles: graphs compiled after the warm-up.
        frechet_distance, inception_score, class_accuracy, precision, recall: of the images, where the model is trained.
        psnr, ssim, lpips: to the other side's images from the same noise.
        relative_error: of the final latents to the other side's, ‖x − x₀‖ / ‖x₀‖.
        printed: what a paper prints for this row.
        samples: file with the first images, beside the results.
        error: why there is no measurement.
        missing: for each column without a value the reason; for ``macs`` also what they are without.
    """

    key: str
    name: str
    method: str
    model: str
    num_inference_steps: int
    suite: str = ""
    scheduler: str | None = None
    mode: str = "eager"
    batch_size: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    peer: str | None = None
    baseline: str = ""
    axis: str | None = None
    value: float | None = None
    n: int | None = None
    seed: int = 0
    repeats: int = 0
    wall_s: float | None = None
    wall_s_min: float | None = None
    wall_s_max: float | None = None
    baseline_wall_s: float | None = None
    speedup: float | None = None
    speedup_min: float | None = None
    speedup_max: float | None = None
    macs: int | None = None
    baseline_macs: int | None = None
    ideal_speedup: float | None = None
    efficiency: float | None = None
    step_s: list[float] = field(default_factory=list)
    baseline_step_s: list[float] = field(default_factory=list)
    step_macs: list[int] = field(default_factory=list)
    baseline_step_macs: list[int] = field(default_factory=list)
    computed_step_overhead: float | None = None
    computed_step_overhead_s: float | None = None
    skipped_step_share: float | None = None
    plan: str | None = None
    cache_bytes_peak: int | None = None
    device_bytes_peak: int | None = None
    baseline_device_bytes_peak: int | None = None
    graphs: int | None = None
    graph_breaks: int | None = None
    recompiles: int | None = None
    frechet_distance: float | None = None
    inception_score: float | None = None
    class_accuracy: float | None = None
    precision: float | None = None
    recall: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    relative_error: float | None = None
    printed: Mapping[str, float] = field(default_factory=dict)
    samples: str | None = None
    error: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def blank(self) -> list[str]:
        """The columns of measurements that hold none."""
        return [name for name, value in vars(self).items() if value is None and name not in _NO_MEASUREMENTS]

    def as_dict(self) -> dict[str, Any]:
        """The row as plain JSON data; what is no finite number is null."""
        return {name: _finite(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Any) -> Row:
        """The row of plain data.

        Raises:
            InputError: a column is unknown or missing, or its value is of another kind.
        """
        kinds = {column.name: str(column.type) for column in fields(cls)}
        needed = {column.name for column in fields(cls) if column.default is column.default_factory is MISSING}
        if not isinstance(content, Mapping) or not needed <= content.keys() <= kinds.keys():
            raise InputError(f"this is no row of a benchmark: {str(content)[:80]}")
        odd = next((name for name, value in content.items() if not _is_of(kinds[name], value)), None)
        if odd is not None:
            raise InputError(f"{odd} of a row is {str(content[odd])[:40]!r}, which is no {kinds[odd]}")
        return cls(**content)


class ResultsFile:
    """A JSON-lines file: a header with format, version and machine, then a row a line.

    A line that was cut off, as by a crash or a full disk, is dropped when the file is opened again. A row that can't be
    written is kept, and tried again with the next.

    Args:
        path: the file; made, with its folder, if need be.
        machine: what the rows are measured on; a file of another machine or of other settings is not continued.

    Raises:
        InputError: the file is of another format, version or machine.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self.path, self.rows, self._waiting = path, {}, list[Row]()
        self.rows: dict[str, Row]
        if path.exists() and path.stat().st_size:
            header, rows = read_results(path)
            odd = next((name for name, value in machine.items() if header["machine"].get(name) != value), None)
            if odd is not None:
                raise InputError(
                    f"{path} was measured with {odd} = {header['machine'].get(odd)!r}, not {machine[odd]!r}: times of the two "
                    "can't be compared; use another --output, or --fresh to begin anew"
                )
            self.rows = {row.key: row for row in rows}
            _drop_torn_line(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "version": VERSION, "machine": dict(machine)}
        _append(path, json.dumps(header, allow_nan=False))

    def append(self, row: Row) -> str | None:
        """Add a row, and those that could not be written before; returns the reason where that fails."""
        self.rows[row.key] = row
        self._waiting.append(row)
        while self._waiting:
            try:
                _append(self.path, json.dumps(self._waiting[0].as_dict(), allow_nan=False))
            except OSError as error:
                return f"{len(self._waiting)} row(s) not written to {self.path}: {error.strerror or error}"
            self._waiting.pop(0)
        return None

    @property
    def unwritten(self) -> int:
        """Rows that are not in the file."""
        return len(self._waiting)


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a results file; of rows with the same key the last.

    Raises:
        InputError: it is of another format or version, or a line is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        header = parse_json(lines[0])
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no results file of sostenuto bench: use another --output") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT or not isinstance(header.get("machine"), dict):
        raise InputError(f"{path} is no results file of sostenuto bench: use another --output")
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} has version {header.get('version')!r}, this sostenuto writes {VERSION}: use another --output, or --fresh"
        )
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines[1:-1], 2):  # what is behind the last newline was cut off, or is empty
        try:
            row = Row.from_dict(parse_json(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {path} is damaged ({error}): delete it, or use --fresh") from None
        rows.pop(row.key, None)
        rows[row.key] = row
    return header, list(rows.values())


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value of a file is what a column's type says."""
    if value is None:
        return kind.endswith(" | None")
    kind = kind.removesuffix(" | None")
    if kind.startswith("Mapping"):
        return isinstance(value, dict) and (
            kind.endswith("Any]") or all(_is_of(kind[13:-1], v) for v in value.values())
        )
    if kind.startswith("list"):
        return isinstance(value, list) and all(_is_of(kind[5:-1], item) for item in value)
    if kind == "str":
        return isinstance(value, str)
    return is_number(value) and (kind == "float" or isinstance(value, int))


def _append(path: Path, line: str) -> None:
    """Write a line to the end and on to the disk; a failure leaves the file as it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    """Plain data with null in place of infinities and what is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
