"""How alike are a branch's outputs at consecutive steps, and is attention more alike than MLPs? (EB-Cache, figure 6)"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.clock import Tick
from sostenuto.engine import Handle
from sostenuto.features import Feature, leaves
from sostenuto.plan import Op
from sostenuto.probe import Prober

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLD = 0.8


def cosine(one: Feature, other: Feature) -> torch.Tensor:
    """Cosine of the angle between two features, tokens and channels of a row as one vector; one value per row."""
    dot = first = second = torch.zeros(())
    for a, b in zip(leaves(one), leaves(other), strict=True):
        a, b = (tensor.reshape(tensor.shape[0], -1).double().cpu() for tensor in (a, b))
        dot, first, second = dot + (a * b).sum(1), first + a.square().sum(1), second + b.square().sum(1)
    return dot / (first * second).sqrt().clamp(min=1e-300)


def measure(subject: Subject) -> Data:
    """Maps ``[branch][step]`` of attention and of MLPs, from the second step on, and the shares above the threshold."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)

    def watch(handle: Handle, tick: Tick, prober: Prober) -> Any:
        output = prober.run([Op.STORE] * len(handle.sites))
        for index, (newest, before) in enumerate(prober.state.slots):
            if newest is not None and before is not None:
                found[index, tick.step] += cosine(newest, before).tolist()
        return output

    subject.tell("similarity")
    path = subject.record(watch=watch, num_slots=2)
    steps = range(1, path.num_steps)
    maps: dict[str, Any] = {}
    for name, places in subject.places.items():
        rows = [[fmean(found[place, step]) if found[place, step] else None for step in steps] for place in places]
        shares = []
        for column in zip(*rows, strict=True):
            known = [value for value in column if value is not None]
            shares.append(sum(value > THRESHOLD for value in known) / len(known) if known else None)
        maps[name] = {"sites": [subject.sites[place].id for place in places], "cosine": rows, "share_above": shares}
    return {"steps": list(steps), "threshold": THRESHOLD, "maps": maps}


def draw(data: Data) -> Figure:
    """Both maps, and the share of branches above the threshold."""
    from sostenuto.analysis.style import dress, figure, heat_map, line

    made, axes = figure(1, len(data["maps"]) + 1, width=9.5, height=2.6)
    known = [v for entry in data["maps"].values() for row in entry["cosine"] for v in row if v is not None]
    low = min(known, default=0.0)
    mesh = None
    for axis, (name, entry) in zip(axes[0], data["maps"].items(), strict=False):
        if entry["cosine"]:
            mesh = heat_map(axis, entry["cosine"], name, low, 1.0, data["steps"][0])
    if mesh is not None:
        made.colorbar(mesh, ax=list(axes[0][:-1]), label="cosine")
    for index, (name, entry) in enumerate(data["maps"].items()):
        if entry["share_above"]:
            line(axes[0][-1], entry["share_above"], name, index, x=data["steps"])
    axes[0][-1].set_ylim(-0.03, 1.03)
    dress(axes[0][-1], f"share of branches above {data['threshold']}", "share")
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    words, means = [], {}
    for name, entry in data["maps"].items():
        known = [value for row in entry["cosine"] for value in row if value is not None]
        shares = [share for share in entry["share_above"] if share is not None]
        if known:
            means[name] = fmean(known)
            words.append(
                f"{name}: mean cosine {means[name]:.3f}, least {min(known):.3f}, {fmean(shares):.0%} of branches above "
                f"{data['threshold']} on average"
            )
    text = "; ".join(words) + "."
    if {"attention", "MLP"} <= means.keys():
        more = means["attention"] > means["MLP"]
        text += f" {'Attention' if more else 'The MLP'} is the more alike, {'as' if more else 'not as'} the paper says."
    return text


SIMILARITY = Instrument(
    name="similarity",
    work=1.5,
    title="Similarity of attention and of MLPs from step to step",
    source="EB-Cache (arXiv 2503.07120v1), figure 6",
    claim="Outputs of attention are more alike from one step to the next than those of MLPs, in more blocks above 0.8.",
    method="Cosine of a branch's outputs at consecutive steps of the uncached path, a row's tokens and channels as one vector.",
    measure=measure,
    draw=draw,
    finding=finding,
)
