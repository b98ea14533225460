"""ParaAttention as a peer, which can be named but not run: it is put on for good, and doesn't install beside this diffusers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from sostenuto.bench.peers.base import Peer
from sostenuto.errors import MethodError


@dataclass(frozen=True)
class ParaAttn(Peer):
    """ParaAttention's FirstBlockCache; diffusers' port of it is ``diffusers-first-block-cache``."""

    kind: ClassVar[str] = "para-attn"
    library: ClassVar[str] = "ParaAttention"
    distribution: ClassVar[str] = "para-attn"

    def problem(self, target: Any) -> str:
        """Why it can't run."""
        if self.version() == "not installed":
            return (
                "para-attn is not installed: it wants compiled attention kernels and its last release is of 2025; "
                "diffusers-first-block-cache is the same method"
            )
        return (
            f"para-attn {self.version()} replaces methods of the pipeline's class and has no way to take them off again, so "
            "nothing could be measured after it; diffusers-first-block-cache is the same method"
        )

    def _attach(self, target: Any, num_inference_steps: int, stack: ExitStack) -> None:
        raise MethodError(self.problem(target))
