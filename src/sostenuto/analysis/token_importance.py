"""Must important tokens be computed at every step, and are they important at all? (DuCa's two questions)"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.errors import InputError, SostenutoError
from sostenuto.methods import FORA, DuCa, ToCa
from sostenuto.methods.base import Method
from sostenuto.tokens import Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INTERVAL = 3
_RATIOS = (0.1, 0.3)
_SELECTIONS: tuple[Selection, ...] = ("attention", "value-norm", "cross-entropy")
_RANDOM_SEEDS = (0, 1)
_SAME: dict[str, Any] = {
    "interval": _INTERVAL,
    "ratio_schedule": "constant",
    "spatial_bonus": 0.0,
    "staleness_weight": 0.0,
    "threshold_weight": 0.0,
    "middle_interval": None,
}  # so that two runs differ in the tokens alone


def path_errors(clean: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """``‖x₀ − x₀,ref‖ / ‖x₀,ref‖`` of each row of samples ``[rows, …]``."""
    off = (clean - reference).double().flatten(1).norm(dim=1)
    return (off / reference.double().flatten(1).norm(dim=1).clamp(min=1e-300)).tolist()


def measure(subject: Subject) -> Data:
    """Errors of the final sample: by which tokens are refreshed, and by whether they are at every step or at every second."""
    base = subject.uncached
    if base.num_steps <= _INTERVAL:
        raise InputError(f"tokens are refreshed between full steps {_INTERVAL} apart: sample with more steps")
    reference = base.clean  # refused before anything else is sampled where it isn't known

    def run(name: str, method: Method) -> dict[str, Any]:
        subject.tell(name)
        path = subject.record(method, count=True)
        errors = path_errors(path.clean, reference)
        share = path.macs / path.macs_uncached if path.macs_uncached else None
        return {"errors": errors, "mean": fmean(errors), "macs_share": share}

    left_out: dict[str, str] = {}
    selections: dict[str, dict[str, Any]] = {}
    for ratio in _RATIOS:
        for selection in _SELECTIONS:
            if selection in left_out:
                continue
            try:
                found = run(f"tokens by {selection}", ToCa(fresh_ratio=ratio, selection=selection, **_SAME))
                selections.setdefault(selection, {})[f"{ratio:g}"] = found
            except SostenutoError as error:
                left_out[selection] = str(error)
        runs = [
            run("random tokens", ToCa(fresh_ratio=ratio, selection="random", seed=seed, **_SAME))
            for seed in _RANDOM_SEEDS
        ]
        errors = [fmean(values) for values in zip(*(found["errors"] for found in runs), strict=True)]
        selections.setdefault("random", {})[f"{ratio:g}"] = {
            "errors": errors,
            "mean": fmean(errors),
            "macs_share": runs[0]["macs_share"],
            "means_of_seeds": [found["mean"] for found in runs],
        }
    usable: list[Selection] = [selection for selection in _SELECTIONS if selection in selections]
    chosen = usable[0] if usable else "random"
    ratio = _RATIOS[-1]
    every_step = selections[chosen][f"{ratio:g}"]
    necessity = {
        "no tokens": run("no tokens", FORA(_INTERVAL)),
        "at every second step": run(
            "tokens at every second step",
            DuCa(fresh_ratio=ratio, selection=chosen, pattern_start="conservative_first", **_SAME),
        ),
        "at every step": every_step,
    }
    return {
        "interval": _INTERVAL,
        "ratios": list(_RATIOS),
        "selections": selections,
        "necessity": necessity,
        "necessity_selection": chosen,
        "necessity_ratio": ratio,
        "left_out": left_out,
    }


def draw(data: Data) -> Figure:
    """Bars with the spread over samples, for each question one."""
    from sostenuto.analysis.style import dress, figure

    made, axes = figure(1, 2, height=2.8)
    hatches = ("", "///", "...", "xx")
    shades = ("#333333", "#8f8f8f", "#c4c4c4", "#ffffff")
    ratios, names = [f"{ratio:g}" for ratio in data["ratios"]], list(data["selections"])
    for index, name in enumerate(names):
        entries = [data["selections"][name][ratio] for ratio in ratios]
        axes[0][0].bar(
            [place + 0.8 * (index + 0.5) / len(names) - 0.4 for place in range(len(ratios))],
            [entry["mean"] for entry in entries],
            0.8 / len(names),
            yerr=[_standard_error(entry["errors"]) for entry in entries],
            label=name,
            color=shades[index % 4],
            hatch=hatches[index % 4],
            edgecolor="black",
            linewidth=0.6,
            capsize=2,
        )
    axes[0][0].set_xticks(range(len(ratios)), [f"{float(ratio):.0%}" for ratio in ratios])
    dress(axes[0][0], "which tokens", "relative error", "tokens of the MLPs that are refreshed", legend=False)
    axes[0][0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncol=2)
    entries = data["necessity"]
    axes[0][1].bar(
        range(len(entries)),
        [entry["mean"] for entry in entries.values()],
        0.6,
        yerr=[_standard_error(entry["errors"]) for entry in entries.values()],
        color="#c4c4c4",
        edgecolor="black",
        linewidth=0.6,
        capsize=2,
    )
    labels = [
        name if entry["macs_share"] is None else f"{name}\n{entry['macs_share']:.0%} of MACs"
        for name, entry in entries.items()
    ]
    axes[0][1].set_xticks(range(len(entries)), labels)
    dress(
        axes[0][1],
        f"how often ({data['necessity_selection']}, {data['necessity_ratio']:.0%})",
        "relative error",
        xlabel="",
    )
    return made


def _standard_error(errors: list[float]) -> float:
    return stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else 0.0


def _verdict(gaps: list[float]) -> str:
    """What paired differences of errors say."""
    if len(gaps) < 2:
        return "by one sample not to be told from"
    mean, noise = fmean(gaps), 2 * _standard_error(gaps)
    return "no different from" if abs(mean) <= noise else "worse than" if mean > 0 else "better than"


def finding(data: Data) -> str:
    """What the numbers say."""
    random = data["selections"]["random"]
    words = []
    for name, by_ratio in data["selections"].items():
        if name == "random":
            continue
        verdicts = []
        for ratio, entry in by_ratio.items():
            gaps = [a - b for a, b in zip(entry["errors"], random[ratio]["errors"], strict=True)]
            means = f"{entry['mean']:.4f} against {random[ratio]['mean']:.4f}"
            verdicts.append(f"{_verdict(gaps)} random tokens at {float(ratio):.0%} ({means})")
        words.append(f"tokens by {name} are {' and '.join(verdicts)}")
    important = "; ".join(words) if words else "no selection by importance works on this network"
    entries = data["necessity"]
    none, second, every = (entries[name]["mean"] for name in ("no tokens", "at every second step", "at every step"))
    gain = none - every
    if gain <= 0:
        kept = "refreshing gains nothing here"
    elif second >= none:
        kept = "half of the refreshes, with the steps between them skipped whole, are worse than none"
    else:
        kept = f"half of the refreshes keep {(none - second) / gain:.0%} of what refreshing gains"
    return (
        f"Are they important? In the final sample's relative error, {important} (different: by more than two standard errors "
        f"of the paired difference). Must they be computed at every step? The error is {none:.4f} without, {second:.4f} at "
        f"every second step, {every:.4f} at every one: {kept}."
    )


TOKENS = Instrument(
    name="tokens",
    work=8,
    title="Importance of tokens",
    source="DuCa (arXiv 2412.18911), its two questions",
    claim=(
        "It is not necessary to compute the important tokens at every step, and those that are selected as important are often "
        "no better than random ones."
    ),
    method=(
        "Full steps three apart; between them some tokens of the MLPs are computed: by the columns of the attention map, the "
        "norm of the values, or at random; all of ToCa's other terms off. Error of the final sample against the uncached one."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
