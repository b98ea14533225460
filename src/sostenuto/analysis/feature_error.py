"""How far are the features of cached paths from those of the uncached one, branch by branch? (EB-Cache, figure 10)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.clock import Tick
from sostenuto.engine import Handle
from sostenuto.errors import SostenutoError
from sostenuto.features import leaves
from sostenuto.methods.base import Method
from sostenuto.probe import Prober

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ENTRIES = 2048  # of a row's feature that are compared: the whole path's features would be gigabytes
_INTERVAL = 3
_SHARE = 0.4  # the paper shows step 20 of 50


@contextmanager
def listening(denoiser: nn.Module, paths: list[str]) -> Iterator[dict[int, torch.Tensor]]:
    """What the modules at these paths put out in the last call of the denoiser, computed or reused, by their position.

    Of each row the same entries, chosen at random ``[rows, entries]``: evenly spaced ones would be of the same few channels
    of every token.
    """
    chosen: dict[int, torch.Tensor] = {}  # by the number of entries

    def some(rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[1]
        if count <= _MOST_ENTRIES:
            return rows
        if count not in chosen:
            chosen[count] = torch.randint(count, (_MOST_ENTRIES,), generator=torch.Generator().manual_seed(0))
        return rows[:, chosen[count].to(rows.device)]

    heard: dict[int, torch.Tensor] = {}

    def hear(index: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            rows = torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in leaves(output)], dim=1)
            heard[index] = some(rows).float().cpu()

        return hook

    with ExitStack() as stack:
        for index, path in enumerate(paths):
            stack.callback(denoiser.get_submodule(path).register_forward_hook(hear(index)).remove)
        yield heard


def features(subject: Subject, method: str | Method) -> dict[tuple[int, int, int], torch.Tensor]:
    """The features of a path by (branch, step, generation)."""
    found: dict[tuple[int, int, int], torch.Tensor] = {}
    generation = -1
    with listening(subject.denoiser, [site.id for site in subject.sites]) as heard:

        def watch(_handle: Handle, tick: Tick, prober: Prober) -> Any:
            nonlocal generation
            generation += tick.new_generation
            heard.clear()
            output = prober.follow()
            if tick.pass_index == 0:
                found.update({(index, tick.step, generation): value.clone() for index, value in heard.items()})
            return output

        subject.record(method, watch)
    return found


def relative_error(
    fresh: dict[tuple[int, int, int], torch.Tensor], cached: dict[tuple[int, int, int], torch.Tensor]
) -> dict[tuple[int, int], float]:
    """``mean |cached − fresh| / mean |fresh|`` by (branch, step), over all rows; where both were reached."""
    off: dict[tuple[int, int], float] = {}
    size: dict[tuple[int, int], float] = {}
    for (branch, step, generation), value in cached.items():
        reference = fresh.get((branch, step, generation))
        if reference is not None:
            place = (branch, step)
            off[place] = off.get(place, 0.0) + (value - reference).abs().sum().item()
            size[place] = size.get(place, 0.0) + reference.abs().sum().item()
    return {place: off[place] / max(size[place], 1e-30) for place in off}


def measure(subject: Subject) -> Data:
    """Maps ``[branch][step]`` of the error for uniform caching and for EB-Cache."""
    subject.tell("features, uncached")
    fresh = features(subject, "none")
    num_steps = 1 + max(step for _, step, _ in fresh)
    share = None if subject.eb_table is None else subject.eb_table.macs_fraction
    # The one that costs nearest to EB-Cache's table.
    interval = _INTERVAL if share is None else min(range(2, num_steps + 2), key=lambda each: abs(1 / each - share))
    left_out: dict[str, str] = {}
    maps: dict[str, Any] = {}
    places = subject.places

    def look(name: str, method: Method) -> None:
        subject.tell(f"features, {name}")
        errors = relative_error(fresh, features(subject, method))
        maps[name] = {
            kind: [[errors.get((place, step)) for step in range(num_steps)] for place in own]
            for kind, own in places.items()
        }

    look(f"every {interval}", subject.uniform(interval))
    try:
        look("EB-Cache", subject.eb(branches=True))
    except SostenutoError as error:
        left_out["EB-Cache"] = str(error)
    return {
        "errors": maps,
        "sites": {kind: [subject.sites[place].id for place in own] for kind, own in places.items()},
        "step": round(_SHARE * num_steps),
        "num_steps": num_steps,
        "eb_share": share,
        "left_out": left_out,
    }


def draw(data: Data) -> Figure:
    """A map for each method and kind, and the branches' errors at one step."""
    from sostenuto.analysis.style import BRANCHES, dress, figure, heat_map, line

    maps = data["errors"]
    made, axes = figure(len(maps), 1 + max(map(len, maps.values())), width=9.5, height=2.5)
    known = sorted(
        v for kinds in maps.values() for rows in kinds.values() for row in rows for v in row if v is not None
    )
    high = known[int(0.98 * (len(known) - 1))] if known else 1.0
    mesh = None
    for row, (name, kinds) in zip(axes, maps.items(), strict=True):
        for axis, (kind, rows) in zip(row, kinds.items(), strict=False):
            if rows:
                mesh = heat_map(axis, rows, f"{name}: {kind}", 0.0, high)
        for index, (kind, rows) in enumerate(kinds.items()):
            if rows:
                line(row[-1], [errors[data["step"]] for errors in rows], kind, index)
        dress(row[-1], f"{name}: at step {data['step']}", "relative error", xlabel=BRANCHES)
    if mesh is not None:
        made.colorbar(mesh, ax=axes[:, :-1], label="relative error")
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    words, means = [], {}
    for name, kinds in data["errors"].items():
        known = {kind: [v for row in rows for v in row if v is not None] for kind, rows in kinds.items()}
        at = [row[data["step"]] for rows in kinds.values() for row in rows if row[data["step"]] is not None]
        means[name] = fmean(v for values in known.values() for v in values)
        parts = ", ".join(f"{kind} {fmean(values):.3f}" for kind, values in known.items() if values)
        here = f", {fmean(at):.3f} at step {data['step']}" if at else ""
        words.append(f"{name}: {parts} on average over branches and steps{here}")
    text = "; ".join(words) + "."
    uniform = next(iter(means))
    if "EB-Cache" in means:
        lower = means["EB-Cache"] < means[uniform]
        text += (
            f" EB-Cache's errors are the {'lower' if lower else 'higher'}, {'as' if lower else 'not as'} the paper says"
        )
        if data.get("eb_share"):
            text += f"; its table costs {data['eb_share']:.0%} of the uncached work, which {uniform} comes nearest to"
        text += "."
    return text


FEATURE_ERROR = Instrument(
    name="feature-error",
    work=2.5,
    title="Errors of the features",
    source="EB-Cache (arXiv 2503.07120v1), figure 10",
    claim="Features of uniformly cached paths are far from the uncached ones; those of EB-Cache differ little.",
    method=(
        "mean |cached − fresh| / mean |fresh| of each branch's output at each step, the cached path against the uncached one "
        "from the same noise, over the same 2 048 entries of every row. Hatched: never reached."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
