"""What the file of a cache table holds, checked before a table is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from sostenuto.errors import TableError
from sostenuto.measured import is_number, is_whole
from sostenuto.step_state import StepState, read_state

FORMAT, VERSION = "sostenuto-cache-table", 1
_FIELDS = (
    "format", "version", "method", "order", "num_inference_steps", "eps_scale", "forecast_order", "fill", "include_cross",
    "actions", "model", "scheduler", "calibration", "macs_fraction",
)  # fmt: skip
MAX_STEPS = 10_000

# The authors' files hold 0, 1, 2; FEB-Cache's text adds 3.
_NPY_STATES = (StepState.COMPUTE, StepState.REUSE_ATTENTION, StepState.REUSE_BOTH, StepState.REUSE_MLP)
_SAVE_AGAIN = "save whole numbers, one per step, with numpy.save(path, array.astype(int))"


def read_npy(path: Path) -> list[Any]:
    """The whole numbers of the authors' bare ``.npy``, one per step.

    Raises:
        TableError: the file is cut short, or holds something else.
    """
    values: list[Any] | None = None
    try:
        with path.open("rb") as file:
            shape, dtype = _npy_header(file)
            # Of any other shape the memory that it asks for isn't taken.
            if len(shape) == 1 and 1 <= shape[0] <= MAX_STEPS and dtype.kind in "iu":
                file.seek(0)
                values = np.lib.format.read_array(file, allow_pickle=False).tolist()
    except Exception as error:  # numpy's parser of hostile headers raises errors of many kinds
        why = str(error).partition("\n")[0].rstrip(".")
        raise TableError(
            f"{path} is cut short, or no plain .npy array (pickles are never opened; {why}): {_SAVE_AGAIN}"
        ) from None
    if dtype.hasobject:
        raise TableError(f"{path} holds pickled objects, which are never opened: {_SAVE_AGAIN}")
    if values is None:
        raise TableError(f"{path} must hold one whole number per step, not shape {shape} of {dtype}: {_SAVE_AGAIN}")
    return values


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type that a ``.npy`` file says it has."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"its version is {version}, known are 1.0 and 2.0")
    shape, _, dtype = readers[version](file)
    return shape, dtype


def in_sampling_order(values: list[Any], order: Any) -> list[Any]:
    """Values of every step of a file with this ``order``, noisiest step first.

    Raises:
        TableError: the order is not known.
    """
    if order == "sampling":
        return values
    if order == "timestep_index":
        return values[::-1]
    raise TableError(f"order must be 'sampling' or 'timestep_index', not {order!r}")


def states_of(numbers: Sequence[int], order: str) -> tuple[StepState, ...]:
    """The states that EB-Cache's authors write in numbers, noisiest step first.

    Raises:
        TableError: a number or the order is not known.
    """
    for index, number in enumerate(numbers):
        if number not in range(len(_NPY_STATES)):
            raise TableError(
                f"unknown action {number!r} at entry {index}; known are 0 (compute), 1 (attn), 2 (both), 3 (mlp)"
            )
    return tuple(_NPY_STATES[number] for number in in_sampling_order(list(numbers), order))


def read_fields(content: Any, order: str | None) -> dict[str, Any]:
    """The fields of a :class:`~sostenuto.table.CacheTable` that a JSON file with this content holds.

    Args:
        content: what the file holds.
        order: of its entries; ``None``: what the file says.

    Raises:
        TableError: a field is of the wrong kind.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TableError(f"the field 'format' must be {FORMAT!r}")
    version = content.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise TableError(f"version {version!r} is not known, only {VERSION}: update sostenuto")
    unknown = next((name for name in content if name not in _FIELDS), None)
    if unknown is not None:  # a misspelt one would be left out silently
        near = get_close_matches(str(unknown), _FIELDS, 1)
        raise TableError(
            f"there is no field {unknown!r}" + (f": did you mean {near[0]!r}?" if near else ": leave it out")
        )
    actions, steps = content.get("actions"), content.get("num_inference_steps")
    if not isinstance(actions, list) or not 1 <= len(actions) <= MAX_STEPS:
        raise TableError("the field 'actions' must list the action of every step")
    if steps != len(actions):
        raise TableError(f"num_inference_steps is {steps!r}, but there are {len(actions)} actions")
    states = [read_state(entry, step) for step, entry in enumerate(actions)]
    scale = content.get("eps_scale", 1.0)
    if not is_number(scale) and not (isinstance(scale, list) and scale and all(map(is_number, scale))):
        raise TableError("eps_scale must be a number or one number per step")
    if isinstance(scale, list) and len(scale) != len(states):
        raise TableError(f"eps_scale has {len(scale)} entries for {len(states)} steps")
    scales = scale if isinstance(scale, list) else [scale] * len(states)
    order = order or content.get("order")
    method, fraction = content.get("method", "eb"), content.get("macs_fraction")
    forecast_order = content.get("forecast_order", 0)
    if isinstance(forecast_order, list):
        forecast_order = tuple(in_sampling_order(forecast_order, order))
    if not isinstance(method, str) or not method:
        raise TableError(f"method must be a name, not {method!r}")
    if fraction is not None and not (is_number(fraction) and 0 < fraction <= 1):
        raise TableError(f"macs_fraction must be above 0 and at most 1, not {fraction!r}")
    return {
        "actions": tuple(in_sampling_order(states, order)),
        "method": method,
        "eps_scale": tuple(float(s) for s in in_sampling_order(scales, order)),
        "forecast_order": forecast_order,
        "macs_fraction": fraction,
        "fill": content.get("fill", "branches"),
        "include_cross": content.get("include_cross", True),
        "calibration": _read_calibration(content.get("calibration", {})),
        **read_made_for(content, len(states), order),
    }


def _read_calibration(content: Any) -> dict[str, Any]:
    """What a file says of its calibration: facts that tables share are checked, those of one method are its own.

    Raises:
        TableError: a fact is of the wrong kind.
    """
    if not isinstance(content, dict):
        raise TableError("the field 'calibration' must be an object")
    for name, (fits, words) in _CALIBRATION.items():
        value = content.get(name)
        if value is not None and not fits(value):
            raise TableError(f"calibration.{name} must be {words}, not {value!r}")
    return content


_CALIBRATION: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_samples": (lambda value: is_whole(value, 1), "a whole number of 1 or more"),
    "seed": (is_whole, "a whole number"),
    "threshold": (
        lambda value: is_number(value) or (isinstance(value, list) and all(map(is_number, value))),
        "a number or a list of numbers",
    ),
    "norm": (lambda value: isinstance(value, str) and value != "", "a name"),
    "norms": (lambda value: isinstance(value, dict | list), "an object or a list"),
}


def read_made_for(content: Mapping[str, Any], num_steps: int, order: Any) -> dict[str, dict[str, Any]]:
    """The fields ``model`` and ``scheduler`` of a file's content, checked, with the timesteps in sampling order.

    Raises:
        TableError: a field is of the wrong kind.
    """
    maps = {name: content.get(name, {}) for name in ("model", "scheduler")}
    for name, value in maps.items():
        if not isinstance(value, dict):
            raise TableError(f"the field {name!r} must be an object")
    timesteps = maps["scheduler"].get("timesteps")
    if timesteps is not None:
        if not isinstance(timesteps, list) or len(timesteps) != num_steps or not all(map(is_number, timesteps)):
            raise TableError("scheduler.timesteps must be one number per step")
        maps["scheduler"] = {**maps["scheduler"], "timesteps": in_sampling_order(timesteps, order)}
    for name, field in (
        ("model", "class"),
        ("model", "fingerprint"),
        ("scheduler", "class"),
        ("scheduler", "prediction_type"),
    ):
        value = maps[name].get(field)
        if value is not None and not (isinstance(value, str) and value):
            raise TableError(f"{name}.{field} must be a text, not {value!r}")
    depth = maps["model"].get("num_blocks")
    if depth is not None and not is_whole(depth, 1):
        raise TableError(f"model.num_blocks must be a whole number of 1 or more, not {depth!r}")
    return maps
