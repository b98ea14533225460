"""Where paths are kept: large tensors in a temporary file, of which the system keeps in memory what it has room for."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

_LARGE = 2**28  # bytes: fifty steps of sixteen latents of Stable Diffusion's first size are below it
_SPARE = 4  # a path is three such tensors, which take their room as they are written where it can't be reserved


def room(shape: Sequence[int]) -> torch.Tensor:
    """Room for a tensor in float32 on the CPU, of 256 MiB or more in a file that goes with it.

    The file has no name where the system allows that, and lies where ``TMPDIR`` says. It is used only where the disk has room:
    a full one ends a process that writes to such a tensor.
    """
    size = 4 * math.prod(shape)
    if size < _LARGE or shutil.disk_usage(tempfile.gettempdir()).free < _SPARE * size:
        return torch.empty(*shape)
    with tempfile.TemporaryFile() as file:  # what is mapped stays when it is closed
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                return torch.empty(*shape)
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=tuple(shape)))
