"""What one row of a benchmark measures, and how a whole run is set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sostenuto.errors import InputError

UNCACHED = "uncached"
PEER = "peer:"


@dataclass(frozen=True)
class Case:
    """One row: a method or a peer on a model, and what it is measured against.

    Attributes:
        name: shown in table and page.
        method: how it is written on the command line: ``uncached`` (nothing enabled), ``fora:interval=3``,
            ``peer:cache-dit``, … (:func:`~sostenuto.bench.specs.method_of`).
        model: ``demo``, ``tiny:NAME``, a folder, or a benchmark network such as ``dit:layers=6``
            (:func:`~sostenuto.bench.subjects.build_subject`).
        num_inference_steps: steps of the sampler, 1 or more.
        scheduler: class of the diffusers scheduler; ``None`` for the model's own.
        mode: whether both sides run ``eager`` or ``compiled``.
        kind: ``measure`` runs both sides; ``count`` only counts multiply-accumulates, without weights and without time.
        batch_size: rows of a call; ``None`` takes a benchmark network's own, and the run's for the demo.
        baseline: the other side of every pair, as ``method``.
        baseline_steps, baseline_scheduler: of the other side, where they differ.
        axis, value: which size of a growth curve is varied, and its value.
        printed: what a paper prints for this row, for comparison.
        suite: the suite it belongs to.
    """

    name: str
    method: str
    model: str = "demo"
    num_inference_steps: int = 50
    scheduler: str | None = None
    mode: Literal["eager", "compiled"] = "eager"
    kind: Literal["measure", "count"] = "measure"
    batch_size: int | None = None
    baseline: str = UNCACHED
    baseline_steps: int | None = None
    baseline_scheduler: str | None = None
    axis: str | None = None
    value: float | None = None
    printed: Mapping[str, float] = field(default_factory=dict)
    suite: str = ""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or (self.baseline_steps is not None and self.baseline_steps < 1):
            raise InputError(f"{self.name}: num_inference_steps must be 1 or more, not {self.num_inference_steps}")
        if self.mode not in ("eager", "compiled"):
            raise InputError(f"{self.name}: mode must be eager or compiled, not {self.mode!r}")

    @property
    def same_noise(self) -> bool:
        """Whether both sides follow the same trajectory but for the caching, so that their images can be compared in pairs."""
        return self.baseline_steps in (None, self.num_inference_steps) and self.baseline_scheduler in (
            None,
            self.scheduler,
        )

    @property
    def is_reference(self) -> bool:
        """Whether there is nothing to compare: it is its own baseline."""
        return self.method == self.baseline and self.same_noise


@dataclass(frozen=True)
class Settings:
    """How a whole run is set; the same for every row of a results file.

    Attributes:
        repeats: pairs measured per row; medians, least and most are over them.
        warmup: pairs run before, not measured.
        batch_size: images of a generation, where a case doesn't say.
        seed: from which the noise of every repeat follows; none that a tuning or calibration with the same seed looks at.
        threads: threads of torch; 0 leaves its default.
        device: ``cpu`` or ``cuda``.
        dtype: precision of the weights and latents.
        attention: the backend of ``scaled_dot_product_attention``; ``auto`` leaves the choice to torch.
        malloc: ``retain`` keeps freed memory in the process (glibc), ``default`` leaves the allocator as it is.
        compiler: backend of ``torch.compile``.
    """

    repeats: int = 5
    warmup: int = 1
    batch_size: int = 16
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"] = "auto"
    malloc: Literal["retain", "default"] = "retain"
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        least = {"repeats": 1, "warmup": 0, "batch_size": 1, "threads": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} must be {bound} or more, not {getattr(self, name)}")


def key_of(case: Case, settings: Settings) -> str:
    """What tells a row from all others: a digest of everything that it measures."""
    content: dict[str, Any] = {"case": asdict(case), "settings": asdict(settings)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
