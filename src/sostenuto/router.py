"""The router of Learning-to-Cache: one learned gate per cache step and site, on disk as safetensors, validated on load."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sostenuto.errors import TableError
from sostenuto.files import publish
from sostenuto.measured import check_made_for, parse_json, table_file
from sostenuto.plan import Action
from sostenuto.sites import inspect
from sostenuto.table import CacheTable
from sostenuto.table_content import in_sampling_order, read_made_for

FORMAT, VERSION = "sostenuto-router", 1
_MAX_STEPS = 10_000


def cache_steps(num_inference_steps: int) -> tuple[int, ...]:
    """The steps, in sampling order, that may reuse: those of even descending index ``i = S − 1 − p``, never the first.

    With an odd number of steps the first has an even index. It computes all the same, since nothing is kept yet, and so
    does the second: there are ``S // 2`` cache steps, each right after a full one.
    """
    return tuple(step for step in range(1, num_inference_steps) if (num_inference_steps - 1 - step) % 2 == 0)


@dataclass(frozen=True)
class Router:
    """One gate per cache step and site (arXiv 2406.01733): ``β = sigmoid(w)``, and a branch is computed where ``β > θ``.

    Attributes:
        logits: the paper's w, ``[cache_steps][sites]`` in sampling order; infinite ones are decided whatever θ is.
        sites: the ids of the sites, in the order of the columns.
        num_inference_steps: S, the steps of the sampler that it was trained for; there are ``S // 2`` cache steps.
        model: ``class``, ``num_blocks`` and ``fingerprint`` of the network it was made for; empty: any.
        scheduler: ``class``, ``prediction_type`` and ``timesteps`` of the scheduler it was made for; empty: any.
        training: how it was made.

    Raises:
        TableError: the parts don't fit each other, or a logit is not a number.
    """

    logits: tuple[tuple[float, ...], ...]
    sites: tuple[str, ...]
    num_inference_steps: int
    model: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or not 2 <= steps <= _MAX_STEPS:
            raise TableError(f"num_inference_steps must be a whole number from 2 to {_MAX_STEPS}, not {steps!r}")
        if not self.sites or not all(isinstance(site, str) for site in self.sites):
            raise TableError("a router needs the id of every site, at least one")
        if len(set(self.sites)) != len(self.sites):
            raise TableError("a router names a site twice")
        if len(self.logits) != steps // 2:
            raise TableError(f"the router has {len(self.logits)} cache steps, a sampler of {steps} has {steps // 2}")
        for row, logits in enumerate(self.logits):
            if len(logits) != len(self.sites):
                raise TableError(f"cache step {row} of the router has {len(logits)} gates for {len(self.sites)} sites")
            if any(math.isnan(logit) for logit in logits):
                raise TableError(f"cache step {row} of the router holds a gate that is not a number")

    @classmethod
    def from_mask(
        cls,
        mask: Sequence[Sequence[bool]],
        sites: Sequence[str],
        order: str = "sampling",
        **made_for: Mapping[str, Any],
    ) -> Router:
        """The router of a mask that is decided already.

        Args:
            mask: ``[step][site]`` for all steps, true where the branch is computed.
            sites: the ids of the sites.
            order: ``"sampling"``, or ``"timestep_index"`` (entry 0 is the last, cleanest step).
            made_for: ``model``, ``scheduler`` and ``training``.

        Raises:
            TableError: a full step reuses, or the shape or order is wrong.
        """
        mask = in_sampling_order(list(mask), order)
        cached = cache_steps(len(mask))
        for step, row in enumerate(mask):
            if step not in cached and not all(row):
                raise TableError(f"step {step} of {len(mask)} is a full step of L2C: its mask must compute every site")
        logits = tuple(tuple(math.inf if computed else -math.inf for computed in mask[step]) for step in cached)
        return cls(logits, tuple(sites), len(mask), **made_for)

    def mask(self, threshold: float = 0.1) -> tuple[tuple[bool, ...], ...]:
        """Which branches are computed, ``[step][site]`` for all steps in sampling order: those of ``β > threshold``."""
        if not 0 <= threshold < 1:
            raise TableError(f"the threshold must be 0 or more and below 1, not {threshold!r}")
        bar = math.log(threshold / (1 - threshold)) if threshold else -math.inf  # β > θ where w > log(θ / (1 − θ))
        rows = dict(zip(cache_steps(self.num_inference_steps), self.logits, strict=True))
        full = (math.inf,) * len(self.sites)
        return tuple(tuple(w > bar for w in rows.get(step, full)) for step in range(self.num_inference_steps))

    def dropped(self, threshold: float = 0.1) -> float:
        """Share of the cache steps' branches that are reused."""
        mask = self.mask(threshold)
        computed = sum(sum(mask[step]) for step in cache_steps(self.num_inference_steps))
        return 1 - computed / (len(self.logits) * len(self.sites))

    def strip(self, threshold: float = 0.1) -> str:
        """One line per cache step, one letter per site in the order in which they run: ``·`` compute, ``R`` reuse."""
        mask = self.mask(threshold)
        return "\n".join("".join("R·"[c] for c in mask[step]) for step in cache_steps(self.num_inference_steps))

    def to_table(self, threshold: float = 0.1) -> CacheTable:
        """The cache table of the thresholded gates, with an action for every step and site."""
        actions = tuple(
            {site: Action.COMPUTE if computed else Action.REUSE for site, computed in zip(self.sites, row, strict=True)}
            for row in self.mask(threshold)
        )
        return CacheTable(
            actions,
            method="l2c",
            model=self.model,
            scheduler=self.scheduler,
            calibration={**self.training, "threshold": threshold},
        )

    def check(self, denoiser: nn.Module, scheduler: Any) -> None:
        """Refuse a network or scheduler that the router was not made for.

        Raises:
            TableError: with what differs and the remedy.
        """
        check_made_for("router", self.model, self.scheduler, denoiser, scheduler)
        self.to_table().plan(inspect(denoiser))

    def check_steps(self, timesteps: Sequence[float]) -> None:
        """Refuse a generation of another length or with other timesteps.

        Raises:
            TableError: with both and the remedy.
        """
        if len(timesteps) != self.num_inference_steps:
            raise TableError(
                f"the router was trained for {self.num_inference_steps} steps, the sampler runs {len(timesteps)}: pass "
                f"num_inference_steps={self.num_inference_steps}, or train one with sostenuto.calibrate"
            )
        self.to_table().check_steps(timesteps)

    def save(self, path: str | Path) -> None:
        """Write the router: a tensor ``logits`` and, in the header, a JSON text of all the rest."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "method": "l2c",
            "order": "sampling",
            "num_inference_steps": self.num_inference_steps,
            "sites": list(self.sites),
            "model": dict(self.model),
            "scheduler": dict(self.scheduler),
            "training": dict(self.training),
        }
        header = {FORMAT: json.dumps(content, allow_nan=False)}
        with publish(Path(path)) as partial:
            save_file({"logits": torch.tensor(self.logits, dtype=torch.float32)}, partial, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Router:
        """Read a router.

        Raises:
            TableError: the file can't be read or its content is wrong; the message names the field and value.
        """
        path = table_file(path, "router")
        try:
            with safe_open(path, "pt") as file:
                return _from_file(file)
        except TableError as error:
            raise TableError(f"{path}: {error}") from None
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise TableError(f"{path} can't be read as a router: {error}") from None


def _from_file(file: Any) -> Router:
    header = (file.metadata() or {}).get(FORMAT)
    if header is None:
        raise TableError(f"the header lacks {FORMAT!r}: that is no router")
    content = parse_json(header)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TableError(f"the field 'format' must be {FORMAT!r}")
    if content.get("version") != VERSION:
        raise TableError(f"version {content.get('version')!r} is not known, only {VERSION}: update sostenuto")
    if content.get("method") != "l2c":
        raise TableError(f"method must be 'l2c', not {content.get('method')!r}")
    keys = sorted(file.keys())
    if keys != ["logits"]:
        raise TableError(f"the file must hold one tensor, 'logits', not {keys[:4]}")
    tensor = file.get_slice("logits")
    shape, dtype = tensor.get_shape(), tensor.get_dtype()
    if len(shape) != 2 or dtype != "F32":
        raise TableError(f"logits must be float32 of shape [cache steps, sites], not {dtype} of shape {shape}")
    sites = content.get("sites")
    if not isinstance(sites, list):
        raise TableError("the field 'sites' must list the id of every site")
    training = content.get("training", {})
    if not isinstance(training, dict):
        raise TableError("the field 'training' must be an object")
    order: Any = content.get("order")
    steps: Any = content.get("num_inference_steps")
    rows = in_sampling_order([tuple(row) for row in file.get_tensor("logits").tolist()], order)
    router = Router(tuple(rows), tuple(sites), steps, training=training)
    return replace(router, **read_made_for(content, steps, order))
