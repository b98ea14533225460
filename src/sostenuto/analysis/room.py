"""Where paths are kept: large tensors in a temporary file, of which the system keeps in memory what it has room for."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

_LARGE = 2**28  # bytes: fifty steps of sixteen latents of Stable Diffusion's first size are below it


def room(shape: Sequence[int]) -> torch.Tensor:
    """Room for a tensor in float32 on the CPU, of 256 MiB or more in a file that goes with it.

    The file has no name where the system allows that, and lies where ``TMPDIR`` says. It is used only where the disk has twice
    the room: a full disk ends a process that writes to such a tensor.
    """
    size = 4 * math.prod(shape)
    if size < _LARGE or shutil.disk_usage(tempfile.gettempdir()).free < 2 * size:
        return torch.empty(*shape)
    with tempfile.TemporaryFile() as file:  # what is mapped stays when it is closed
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=tuple(shape)))
