"""The tool of calibrations and proofs: one denoiser call under way, to be run at will."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sostenuto import compat
from sostenuto.clock import Tick
from sostenuto.cost import Cost
from sostenuto.errors import MethodError
from sostenuto.features import as_rows, mapped
from sostenuto.plan import Op, Row
from sostenuto.prediction import check_prediction, predicted_noise, without_variance
from sostenuto.state import Call, PassState

if TYPE_CHECKING:
    from sostenuto.engine import Handle


@dataclass(frozen=True)
class Prober:
    """Runs one denoiser call under ops of the caller's choice, any number of times: the tool of calibration and proofs."""

    handle: Handle
    tick: Tick
    state: PassState
    call: Call

    def run(self, ops: Sequence[Op], history: Sequence[tuple[int, ...]] | None = None) -> Any:
        """The denoiser's output with these ops; ``STORE`` keeps outputs for later runs and steps."""
        row = Row(tuple(ops), tuple(history or ((),) * len(ops)))
        return self.handle._execute(self.tick, self.state, self.call, row)

    @property
    def batch_size(self) -> int:
        """Rows of the denoiser's batch."""
        return len(self.call.latents)  # of a tensor, or of a list of them

    @property
    def tells_noise(self) -> bool:
        """Whether the network predicts what its scheduler takes, so that its noise and its clean sample can be told."""
        try:
            check_prediction(self.handle._denoiser, self.handle._reader.converts, *self.handle._mean_over)
        except MethodError:
            return False
        return True

    def follow(self) -> Any:
        """The denoiser's output as the method's plan has it; no factor of the noise is applied yet."""
        return self.handle._follow(self.tick, self.state, self.call)

    def with_latents(self, latents: torch.Tensor) -> Prober:
        """The same call with other latents of the same shape; the kept features stay those of this generation."""
        args, kwargs = self.handle._reader.with_latents(self.call.args, self.call.kwargs, latents)
        return replace(self, call=replace(self.call, args=args, kwargs=kwargs, latents=latents))

    def prediction(self, output: Any) -> torch.Tensor:
        """What an output of this call predicts ``[rows, …]``, without a learned variance; the samples of a list are rows."""
        return self._predicted(output, partial(without_variance, noisy_last=self.call.noisy_last))

    def noise(self, output: Any) -> torch.Tensor:
        """The noise ε that an output of this call predicts, also where the network predicts something else; rows as above."""
        conversion = self.handle._conversion(self.tick)
        return self._predicted(output, partial(predicted_noise, conversion=conversion, noisy_last=self.call.noisy_last))

    def _predicted(self, output: Any, read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        prediction, latents = compat.prediction_of(output), self.call.latents
        if isinstance(prediction, torch.Tensor):
            return read(prediction, as_rows(latents))
        return as_rows(mapped(read, prediction, latents))

    def scaled(self, output: Any, scale: float) -> Any:
        """An output of this call with its noise multiplied by ``scale``."""
        return self.handle._scaled(self.tick, self.call, output, scale)

    def cost(self) -> Cost:
        """What the call costs when everything is computed."""
        return self.handle._dry_runs.cost(self.call.signature)
