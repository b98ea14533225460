"""Which part of the network takes which share of the work and of the time? (EB-Cache, table 8)"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

from sostenuto import compat
from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.clock import Tick
from sostenuto.engine import Handle
from sostenuto.features import leaves
from sostenuto.plan import Op
from sostenuto.probe import Prober

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REPEATS = 7
_KINDS = ("attention", "MLP", "fused")


def measure(subject: Subject) -> Data:
    """Shares of the multiply-accumulates, and of the time by leaving a component out."""
    macs: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ("all", *_KINDS)}
    rows = 0

    def kind(index: int) -> str:
        site = subject.sites[index]
        return "attention" if site.kind.is_attention else "fused" if site.kind.value == "fused" else "MLP"

    places = {name: [i for i in range(len(subject.sites)) if kind(i) == name] for name in _KINDS}

    def watch(handle: Handle, tick: Tick, prober: Prober) -> Any:
        nonlocal rows
        if tick.step == 0 and not macs:
            cost = prober.cost()
            rows = prober.batch_size
            macs["all"] = cost.macs
            macs.update({name: sum(cost.site_macs[place] for place in own) for name, own in places.items()})
        output = prober.run([Op.STORE] * len(handle.sites))
        if tick.step >= 1 and len(seconds["all"]) < _REPEATS and tick.pass_index == 0:
            for name in seconds:  # in turn, so that drift of the machine cancels
                if name == "all" or places[name]:
                    left = places.get(name, [])
                    ops = [Op.REUSE if index in left else Op.COMPUTE for index in range(len(handle.sites))]
                    seconds[name].append(_timed(prober, ops))
        return output

    subject.tell("components")
    subject.record(watch=watch)
    whole = median(seconds["all"])
    share_of_time = {
        name: max(0.0, median(a - b for a, b in zip(seconds["all"], seconds[name], strict=True)) / whole)
        for name in _KINDS
        if places[name]
    }
    share_of_macs = {name: macs[name] / macs["all"] for name in share_of_time}
    share_of_time["other"] = max(0.0, 1 - sum(share_of_time.values()))
    share_of_macs["other"] = 1 - sum(share_of_macs.values())
    return {
        "macs": macs["all"],
        "rows": rows,
        "seconds": whole,
        "share_of_macs": share_of_macs,
        "share_of_time": share_of_time,
        "repeats": len(seconds["all"]),
    }


def _timed(prober: Prober, ops: list[Op]) -> float:
    history = [(prober.tick.step,) if op == Op.REUSE else () for op in ops]
    device = next(leaves(prober.call.latents)).device
    compat.synchronize(device)
    began = time.perf_counter()
    prober.run(ops, history)
    compat.synchronize(device)
    return time.perf_counter() - began


def draw(data: Data) -> Figure:
    """Two stacked bars."""
    from sostenuto.analysis.style import dress, figure

    made, axes = figure(1, 1, width=7.0, height=1.7)
    axis = axes[0][0]
    shades = {"attention": "#333333", "MLP": "#9a9a9a", "fused": "#c4c4c4", "other": "#ffffff"}
    for place, key in enumerate(("share_of_time", "share_of_macs")):
        begin = 0.0
        for name, share in data[key].items():
            axis.barh(
                place,
                share,
                0.55,
                left=begin,
                color=shades[name],
                edgecolor="black",
                linewidth=0.6,
                hatch="///" if name == "other" else None,
                label=name if place == 0 else None,
            )
            if share > 0.04:
                ink = "white" if name == "attention" else "black"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if name == "other" else None
                axis.text(
                    begin + share / 2, place, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=7, bbox=box
                )
            begin += share
    axis.set_yticks([0, 1], ["time", "multiply-accumulates"])
    axis.grid(visible=False)
    axis.set_xlim(0, max(1.0, *(sum(data[key].values()) for key in ("share_of_time", "share_of_macs"))))
    dress(
        axis,
        f"one call of {data['rows']} rows: {data['macs'] / 1e9:.3g} GMACs, {data['seconds'] * 1e3:.3g} ms",
        "",
        "share",
        False,
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncol=4)
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    listed = "; ".join(
        f"{name} {data['share_of_macs'][name]:.0%} of the multiply-accumulates, {data['share_of_time'][name]:.0%} of the time"
        for name in data["share_of_time"]
    )
    text = f"{listed[0].upper()}{listed[1:]} (medians of {data['repeats']} calls of {data['rows']} rows)."
    macs, times = data["share_of_macs"], data["share_of_time"]
    if {"attention", "MLP"} <= macs.keys() and min(macs["attention"], macs["MLP"], times["MLP"]) > 0:
        per = (times["attention"] / macs["attention"]) / (times["MLP"] / macs["MLP"])
        text += f" A multiply-accumulate of attention takes {per:.1f} times as long as one of the MLP; in the paper 2.4 times."
    return text


COMPONENTS = Instrument(
    name="components",
    work=2,
    title="Work and time by component",
    source="EB-Cache (arXiv 2503.07120v1), table 8",
    claim=(
        "In DiT-XL/2 at 256 pixels self-attention has 38 % of the work and 51 % of the time, the MLP 62 % and 35 %, all else "
        "no work and 14 % of the time."
    ),
    method=(
        "Multiply-accumulates by torch's formulas, of the branches; time by what a call saves when the component is reused, "
        "the norm in front of it included (the paper removes the component)."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
