"""What a calibration measured, on disk: which model and scheduler it belongs to, saved, loaded and checked."""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from sostenuto import compat
from sostenuto.errors import TableError
from sostenuto.files import publish_json
from sostenuto.sites import num_blocks
from sostenuto.timesteps import called_timesteps

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_BYTES = 16 * 2**20  # a thousand steps of two hundred sites are nine megabytes; read, it takes thirty times as much
_VERSION = 1


def fingerprint(denoiser: nn.Module) -> str:
    """sha256 of a denoiser's configuration: what was measured on one network is refused by another."""
    text = json.dumps(compat.config_of(denoiser), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(denoiser: nn.Module, scheduler: Any) -> dict[str, dict[str, Any]]:
    """What a file says of the model and scheduler that it was made for: ``{"model": …, "scheduler": …}``.

    Args:
        denoiser: the network.
        scheduler: its scheduler, with the timesteps of the generation.
    """
    config = getattr(scheduler, "config", {})
    return {
        "model": {
            "class": type(denoiser).__name__,
            "num_blocks": num_blocks(denoiser),
            "fingerprint": fingerprint(denoiser),
        },
        "scheduler": {
            "class": type(scheduler).__name__,
            "prediction_type": config.get("prediction_type") if hasattr(config, "get") else None,
            "timesteps": called_timesteps(scheduler).tolist(),
        },
    }


def check_made_for(
    what: str, model: Mapping[str, Any], scheduler: Mapping[str, Any], denoiser: nn.Module, sampler: Any
) -> None:
    """Refuse a network or scheduler that something was not made for.

    Args:
        what: what was made, in words.
        model: ``class``, ``num_blocks`` and ``fingerprint`` of the network it was made for; empty: any.
        scheduler: ``class`` and ``prediction_type`` of the scheduler it was made for; empty: any.
        denoiser: the network at hand.
        sampler: the scheduler at hand.

    Raises:
        TableError: with both names and the remedy.
    """
    _check_network(what, model, denoiser)
    made_for = scheduler.get("class")
    if made_for and type(sampler).__name__ != made_for:
        raise TableError(
            f"the {what} was made with {made_for}, this is {type(sampler).__name__}: "
            "calibrate one for it with sostenuto.calibrate, or use that scheduler"
        )
    wanted = scheduler.get("prediction_type")
    given = getattr(getattr(sampler, "config", None), "prediction_type", wanted)
    if wanted and given != wanted:
        raise TableError(
            f"the {what} was made for {wanted}-prediction, this scheduler expects {given}: calibrate one for it, or "
            f"set the scheduler's prediction_type to {wanted}"
        )


def _check_network(what: str, model: Mapping[str, Any], denoiser: nn.Module) -> None:
    names = [base.__name__ for base in type(compat.unwrapped(denoiser)).__mro__]
    known = model.get("fingerprint")
    if known:  # which tells more than class and depth, and is the same under a wrapper's class
        own = fingerprint(denoiser)
        if known != own:
            raise TableError(
                f"the {what} was made for {model.get('class', 'another network')} ({known[:12]}…), this is a "
                f"{names[0]} ({own[:12]}…): calibrate one for it with sostenuto.calibrate"
            )
        return
    made_for, depth = model.get("class"), model.get("num_blocks")
    if made_for is not None and made_for not in names:
        raise TableError(
            f"the {what} was made for {made_for}, this is a {names[0]}: calibrate one for it with sostenuto.calibrate"
        )
    if depth is not None and depth != num_blocks(denoiser):
        raise TableError(
            f"the {what} was made for {depth} blocks, this {names[0]} has {num_blocks(denoiser)}: calibrate one for it "
            "with sostenuto.calibrate"
        )


def check_timesteps(what: str, own: Sequence[float], timesteps: Sequence[float]) -> None:
    """Refuse a generation of another length or with other timesteps.

    Raises:
        TableError: with both numbers and the remedy.
    """
    if len(own) != len(timesteps):
        raise TableError(
            f"the {what} was made for {len(own)} steps, the sampler runs {len(timesteps)}: pass "
            f"num_inference_steps={len(own)}, or calibrate again"
        )
    pairs = enumerate(zip(own, timesteps, strict=True))
    odd = next((step for step, (a, b) in pairs if abs(a - b) > 1e-3 * max(1.0, abs(a))), None)
    if odd is not None:
        raise TableError(
            f"the {what} was made for timestep {own[odd]:g} at step {odd}, the sampler uses {timesteps[odd]:g}: "
            "set the scheduler as it was (timestep_spacing), or calibrate again"
        )


def table_file(path: Any, what: str) -> Path:
    """The path of a regular file that is no larger than such files are, so that reading it ends and fits into memory.

    Raises:
        TableError: it is no path, no regular file, can't be read, or is too large.
    """
    if not isinstance(path, (str, Path)):
        raise TableError(f"a {what} is loaded from a path, not from {path!r}")
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise TableError(f"{str(path)!r} can't be read as a {what}: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise TableError(f"{path} is no regular file: pass the file of a {what}")
    if found.st_size > _MAX_BYTES:
        raise TableError(f"{path} has {found.st_size} bytes: that is no {what}, the largest have {_MAX_BYTES}")
    return path


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        TableError: it can't be read.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TableError(
            f"{path} can't be read as a {what}, it is cut short or damaged ({error}): make it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"{path} can't be read as a {what}: {error}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text; Python's own parser also takes NaN and Infinity, which are no JSON and can't be saved again.

    Raises:
        ValueError: it is no JSON, or holds a number that is not finite.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text)
    _refuse_infinite(value, "")
    return value


def _refuse_infinite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{place or 'its content'}: {json.dumps(value)} is no finite number, write another or make it again"
        )
    if isinstance(value, dict):
        for name, entry in value.items():
            _refuse_infinite(entry, f"{place}.{name[:40]}" if place else name[:40])
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _refuse_infinite(entry, f"{place}[{index}]")


def is_whole(value: object, least: int | None = None, most: int | None = None) -> bool:
    """Whether a value is a whole number from ``least`` to ``most``, where they are given."""
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and (least is None or least <= value)
        and (most is None or value <= most)
    )


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number of sensible size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def check_numbers(name: str, values: Any) -> tuple[float, ...]:
    """The values as floats.

    Raises:
        TableError: they are no sequence of finite numbers, or there are none.
    """
    if not isinstance(values, (list, tuple)) or not values:
        raise TableError(f"{name} must be one or more numbers, not {values!r}")
    for index, value in enumerate(values):
        if not is_number(value):
            raise TableError(f"{name} must be finite numbers, but entry {index} is {value!r}")
    return tuple(float(value) for value in values)


@dataclass(frozen=True)
class Measured:
    """Base of what a calibration measures for one method; a subclass adds the values as fields of its own.

    Attributes:
        model: ``class``, ``num_blocks`` and ``fingerprint`` of the network it was measured on; empty: any.
        scheduler: ``class``, ``prediction_type`` and ``timesteps`` (in sampling order) of the scheduler; empty: any.
        calibration: how it was measured.
    """

    model: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    scheduler: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    calibration: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    format: ClassVar[str] = ""
    what: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in _SHARED:
            if not isinstance(getattr(self, name), Mapping):
                raise TableError(f"{name} must be an object, not {getattr(self, name)!r}")
        if not isinstance(self.model.get("fingerprint", ""), str):
            raise TableError(f"model.fingerprint must be a text, not {self.model['fingerprint']!r}")
        if "timesteps" in self.scheduler:
            check_numbers("scheduler.timesteps", self.scheduler["timesteps"])

    @property
    def values(self) -> dict[str, Any]:
        """What was measured, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _SHARED}

    def check(self, denoiser: nn.Module, scheduler: Any) -> None:
        """Refuse a network or scheduler that it was not measured on.

        Raises:
            TableError: with both names and the remedy.
        """
        check_made_for(self.what, self.model, self.scheduler, denoiser, scheduler)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        shared = {name: dict(getattr(self, name)) for name in _SHARED}
        content = {"format": self.format, "version": _VERSION, "order": "sampling", **self.values, **shared}
        publish_json(path, content, indent=1)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate what :meth:`save` wrote.

        Raises:
            TableError: the file can't be read or its content is wrong; the message names the field and value.
        """
        path = table_file(path, cls.what)
        content = read_json(path, cls.what)
        if not isinstance(content, dict) or content.get("format") != cls.format:
            raise TableError(f"{path}: the field 'format' must be {cls.format!r}")
        for name, known in (("version", _VERSION), ("order", "sampling")):
            if content.get(name) != known:
                raise TableError(f"{path}: {name} {content.get(name)!r} is not known, only {known!r}")
        values = {name: value for name, value in content.items() if name not in ("format", "version", "order")}
        odd = sorted(set(values) ^ {f.name for f in fields(cls)})
        if odd:
            raise TableError(f"{path}: the field {odd[0]!r} is {'unknown' if odd[0] in values else 'missing'}")
        try:
            return cls(**values)
        except TableError as error:
            raise TableError(f"{path}: {error}") from None


_SHARED = tuple(f.name for f in fields(Measured))
