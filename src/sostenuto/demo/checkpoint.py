"""The checkpoint of a training: tensors as safetensors, the rest as JSON in their header; no pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sostenuto.errors import InputError
from sostenuto.files import publish

_HEADER = "sostenuto-training"


def save_checkpoint(
    path: Path,
    weights: dict[str, dict[str, torch.Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    progress: dict[str, Any],
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file.
        weights: sets of named weights, by a name without a dot.
        optimizers: what holds moments.
        progress: plain data.
    """
    tensors = {f"{group}.{name}": value for group, named in weights.items() for name, value in named.items()}
    for index, optimizer in enumerate(optimizers):
        for parameter, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{parameter}.{name}": value for name, value in moments.items()}
    copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}  # weights may share memory
    with publish(path) as partial:  # an interrupted save must not cost the run
        save_file(copies, partial, {_HEADER: json.dumps(progress)})


def load_checkpoint(
    path: Path,
    weights: dict[str, dict[str, torch.Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[str, Any]:
    """Read a checkpoint into weights and optimizers like those it was written of; returns the plain data.

    Raises:
        InputError: the file is no checkpoint of such weights.
    """
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()[_HEADER])
            for group, named in weights.items():
                for name, value in named.items():
                    with torch.no_grad():
                        value.copy_(file.get_tensor(f"{group}.{name}"))
            states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
            for name in file.keys():  # noqa: SIM118
                if name.startswith("optimizer."):
                    _, index, parameter, moment = name.split(".")
                    states[int(index)].setdefault(int(parameter), {})[moment] = file.get_tensor(name)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (OSError, SafetensorError, KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is no checkpoint of this training, delete it to begin anew: {error}") from None
    return progress
