"""What the numbers are measured on, and the settings that they hang on: threads, allocator, attention backend."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sostenuto.bench.cases import Settings
from sostenuto.compat import attention_of_diffusers
from sostenuto.errors import InputError
from sostenuto.machine import machine
from sostenuto.switch import check_not_switched_off

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_RETAINED = 1 << 30
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more on 64 bits

_BACKENDS = {
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}


def prepare(settings: Settings) -> dict[str, Any]:
    """Set threads and allocator as the run wants them; returns the description of the machine.

    Raises:
        EngineError: caching is switched off.
        InputError: the device isn't there.
    """
    check_not_switched_off("a benchmark")
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; leave it out to measure on the CPU")
    if torch.device(settings.device).index is not None:
        torch.cuda.set_device(torch.device(settings.device))  # whose events are timed and whose memory is counted
    if settings.threads:
        torch.set_num_threads(settings.threads)
    described = machine()
    described["device"] = (
        f"cuda: {torch.cuda.get_device_name()}" if torch.device(settings.device).type == "cuda" else settings.device
    )
    return described | {
        "dtype": settings.dtype,
        "malloc": _malloc(settings.malloc),
        "attention": _attention(settings.attention),
        "compiler": settings.compiler,
    }


def _malloc(wanted: str) -> str:
    preloaded = os.environ.get("LD_PRELOAD", "")
    if wanted == "default" or preloaded:
        return f"preloaded: {os.path.basename(preloaded)}" if preloaded else "default"
    # A step frees and maps the same memory again, and pays for every page of it: more than many a method saves.
    if platform.libc_ver()[0] != "glibc":
        return "default (no glibc)"
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and libc.mallopt(_M_TRIM_THRESHOLD, _RETAINED)
    return "glibc, mmap threshold 32 MiB, trim threshold 1 GiB" if done else "default (mallopt failed)"


def _attention(wanted: str) -> str:
    dispatched = attention_of_diffusers()
    return f"scaled_dot_product_attention: {wanted}; diffusers: {dispatched}"


@contextmanager
def attention_backend(wanted: str) -> Iterator[None]:
    """Within it ``scaled_dot_product_attention`` uses that backend; ``auto`` leaves the choice to torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if wanted == "auto":
        yield
        return
    with sdpa_kernel(getattr(SDPBackend, _BACKENDS[wanted])):
        yield
