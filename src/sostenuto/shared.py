"""What several blocks compute of the timestep alone, without weights: computed once in a denoiser call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from sostenuto import compat
from sostenuto.attachment import Attachment, runs


class _Made(NamedTuple):
    given: torch.Tensor
    given_version: int
    output: torch.Tensor
    output_version: int

    def holds(self, given: torch.Tensor) -> bool:
        """Whether it is what such a module makes of the timestep, and nobody wrote into either since."""
        return (
            given is self.given and given._version == self.given_version and self.output._version == self.output_version
        )


class SharedTimesteps(Attachment):
    """Lets modules that embed the same timestep in the same way do so once in a denoiser call; the outputs are the same bits.

    A DiT has such a module in every block: of a step that reuses all branches they are a good part. A compiled network, or one
    with compiled blocks, is left alone.

    Args:
        denoiser: the network.
        is_compiled: whether it is compiled as a whole.
    """

    def __init__(self, denoiser: nn.Module, is_compiled: bool) -> None:
        super().__init__()
        self._made: dict[Any, _Made] | None = None  # by the kind of embedding; nothing outside of a call
        modules = list(denoiser.modules())
        kinds = {module: kind for module in modules if (kind := compat.timestep_embedding_of(module)) is not None}
        count = Counter(kinds.values())
        is_compiled = is_compiled or any(map(compat.is_compiled, modules[1:]))
        self._kinds = {} if is_compiled else {module: kind for module, kind in kinds.items() if count[kind] > 1}

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The modules that have others like them."""
        return [(module, self._shared(kind, runs(module))) for module, kind in self._kinds.items()]

    def begin(self) -> None:
        """Get ready for a denoiser call."""
        self._made = {}

    def leave(self) -> None:
        """Let go of everything that belongs to a call."""
        self._made = None

    def _shared(self, kind: Any, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = self._made
            if made is None or kwargs or len(args) != 1:
                return compute(*args, **kwargs)
            (given,) = args
            known = made.get(kind)
            if known is not None and known.holds(given):
                return known.output
            output = compute(given)
            # Of an inference tensor nobody could tell whether it was written to.
            if not (given.is_inference() or output.is_inference() or output.requires_grad):
                made[kind] = _Made(given, given._version, output, output._version)
            return output

        return forward
