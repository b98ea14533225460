"""An independent sampler for the model-based test: networks cached by hand, from scratch for every generation, no engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sostenuto.methods.base import Method

Row = Mapping[str, str]
"""What is skipped in a step: site → ``r`` last value or ``f`` forecast. Ranges of blocks are ``blocks:first:last``."""


@dataclass(frozen=True)
class Recipe:
    """A method under test and, written down by hand, what it must do."""

    name: str
    method: Method
    rows: Callable[[int, int], Sequence[Row]] = lambda steps, first: [{}] * steps
    """``rows(steps of the generation, its first step)``."""
    depth: int = 1
    """Outputs that a forecast combines."""
    binomial: bool = False
    recursive: bool = False
    ranges: tuple[str, ...] = ()
    scale: float = 1.0
    threshold: float | None = None
    """Of the estimated change, where the skip of the only range is decided while the network runs."""
    clean: bool = False
    """Of the output the clean sample in it is kept."""
    steps: int | None = None
    """The only length of a generation that it serves."""
    least: int = 1
    """The shortest that it serves."""

    @property
    def exact(self) -> bool:
        """Whether the outputs agree bit for bit: nothing is summed up."""
        return self.depth == 1 and not self.clean


@dataclass(frozen=True)
class Level:
    """How noisy a step's latents are: ``x = alpha·x₀ + sigma·ε``, and what the network predicts."""

    alpha: float
    sigma: float
    is_flow: bool
    bound: float
    """Within ± which the scheduler goes by a clean sample."""

    def clean(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """x₀ of ε, or of v = ε − x₀ of a flow."""
        if self.is_flow:
            return latents - self.sigma * prediction
        return (latents - self.sigma * prediction) / self.alpha

    def prediction(self, clean: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        clean = clean.clamp(-self.bound, self.bound)
        if self.is_flow:
            return (latents - clean) / self.sigma
        return (latents - self.alpha * clean) / self.sigma


@dataclass
class _Pass:
    last: int
    kept: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    signal: torch.Tensor | None = None
    change: float = 0.0


class NaiveNetwork:
    """A network of its own whose branches and blocks skip as they are told; it remembers what each of them did."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.last = len(network.transformer_blocks) - 1
        self.done: dict[str, str] = {}
        for index, block in enumerate(network.transformer_blocks):
            for name in ("attn1", "ff"):
                self._patch_branch(getattr(block, name), f"transformer_blocks.{index}.{name}")
            self._patch_block(block, index)

    @torch.no_grad()
    def call(self, recipe: Recipe, row: Row, call: Made, steps: int, state: _Pass) -> Any:
        """One call of a pass."""
        step, arguments, level = call.step, call.arguments, call.level
        self.recipe, self.step, self.steps, self.state = recipe, step, steps, state
        latents = arguments[0].to(torch.promote_types(arguments[0].dtype, torch.float32))
        self.row, self.done, self.entries = dict(row), {}, {}
        if self._skips("output"):
            prediction, rest = self._filled("output")[:, :2], state.kept["output"][0][1][:, 2:]
            if recipe.clean:
                prediction = level.prediction(prediction.to(latents.dtype), latents).to(rest.dtype)
            output = torch.cat([prediction, rest], dim=1)
        else:
            output = self.network(*arguments).sample
        if "output" not in self.done or recipe.recursive:
            clean = [level.clean(output[:, :2].to(latents.dtype), latents).to(output.dtype)] if recipe.clean else []
            self._keep("output", torch.cat([*clean, output[:, 2:]], dim=1) if clean else output)
        state.last = step
        return torch.cat([output[:, :2] * recipe.scale, output[:, 2:]], dim=1) if recipe.scale != 1 else output

    def _skips(self, site: str) -> bool:
        if site not in self.row or not self.state.kept.get(site):
            return False
        self.done[site] = self.row[site]
        return True

    def _keep(self, site: str, output: torch.Tensor) -> None:
        self.state.kept.setdefault(site, []).insert(0, (self.step, output.clone()))

    def _filled(self, site: str) -> torch.Tensor:
        read = self.state.kept[site][: self.recipe.depth if self.row[site] == "f" else 1]
        if len(read) == 1:
            self.done[site] = "r"
            return read[0][1].clone()
        total: Any = 0
        for j, (x, output) in enumerate(read):
            weight = math.prod((self.step - y) / (x - y) for y, _ in read if y != x)
            if self.recipe.binomial:
                weight = (-1) ** j * math.comb(len(read), j + 1)
            total = total + weight * output.double()
        return total.to(read[0][1].dtype)

    def _patch_branch(self, module: Any, site: str) -> None:
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._skips(site):
                return self._filled(site)
            output = compute(*args, **kwargs)
            self._keep(site, output)
            return output

        module.forward = forward

    def _patch_block(self, block: Any, index: int) -> None:
        compute = block.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for site in self.recipe.ranges:
                first, last = map(int, site.split(":")[1:])
                if index == first:
                    if self.recipe.threshold is not None:
                        self._decide(
                            block.norm1(x, kwargs["timestep"], kwargs["class_labels"], hidden_dtype=x.dtype)[0], site
                        )
                    self.entries[site] = x.clone(), self._skips(site)
            for site in self.recipe.ranges:
                first, last = map(int, site.split(":")[1:])
                entry, skipped = self.entries.get(site, (None, False))
                if skipped and first <= index <= last:
                    return entry + self._filled(site) if index == last else x
            output = compute(x, *args, **kwargs)
            for site in self.recipe.ranges:
                if index == int(site.split(":")[2]):
                    self._keep(site, output - self.entries[site][0])
            return output

        block.forward = forward

    def _decide(self, signal: torch.Tensor, site: str) -> None:
        """TeaCache's rule with the identity as polynomial, the first and the last step computed."""
        state, before = self.state, self.state.signal
        state.signal = signal.clone()
        if before is not None and 0 < self.step < self.steps - 1:
            distance = ((signal.float() - before.float()).abs().mean() / before.float().abs().mean()).item()
            if math.isfinite(distance) and state.change + distance < (self.recipe.threshold or 0):
                state.change += distance
                self.row[site] = "r"
                return
        state.change = 0.0


@dataclass(frozen=True)
class Made:
    """A call that was made: its place, what it was given, and what came out; without a result it failed."""

    step: int
    which: str
    """The pass, as the sampling loop knows it."""
    arguments: tuple[Any, ...]
    output: torch.Tensor | None
    level: Level


def replay(recipe: Recipe, naive: NaiveNetwork, calls: Sequence[Made], steps: int) -> list[tuple[Any, dict[str, str]]]:
    """The output of each call that was made, and what was skipped in it."""
    passes: dict[str, _Pass] = {}
    rows: Sequence[Row] | None = None
    results: list[tuple[Any, dict[str, str]]] = []
    for call in calls:
        if call.output is None:  # nothing survives a call that failed
            passes, rows = {}, None
            continue
        rows = recipe.rows(steps, call.step) if rows is None else rows
        state = passes.get(call.which)
        if state is None or state.last != call.step - 1:
            state = passes[call.which] = _Pass(call.step)
        output = naive.call(recipe, rows[call.step], call, steps, state)
        results.append((output, naive.done))
    return results
