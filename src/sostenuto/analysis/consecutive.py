"""How do consecutive outputs of the network differ, and how well do k earlier ones foretell the next? (AB-Cache)"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import torch

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.forecast import binomial_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = (1, 2, 3, 4, 5)
_CLEARLY = 1.2  # times its least value a curve rises at both ends to be called a U


def changes(outputs: torch.Tensor) -> tuple[list[float], list[float]]:
    """Relative L1 distance and cosine of each output and the one before; from step 1 on; outputs ``[steps, rows, …]``."""
    rows = outputs.double().flatten(2)
    distance = ((rows[1:] - rows[:-1]).abs().sum(2) / rows[:-1].abs().sum(2).clamp(min=1e-300)).mean(1)
    cosine = torch.nn.functional.cosine_similarity(rows[1:], rows[:-1], dim=2).mean(1)
    return distance.tolist(), cosine.tolist()


def residuals(outputs: torch.Tensor, order: int) -> list[float | None]:
    """``‖f_n − Σ_j w_j·f_{n−j}‖ / ‖f_n‖`` with AB-Cache's weights of k outputs, mean over rows; ``None`` in the first k."""
    rows = outputs.double().flatten(2)
    found: list[float | None] = [None] * min(order, len(rows))
    for step in range(order, len(rows)):
        foretold = torch.zeros_like(rows[step])
        for place, weight in enumerate(binomial_weights(order), start=1):
            foretold += weight * rows[step - place]
        found.append(((rows[step] - foretold).norm(dim=1) / rows[step].norm(dim=1).clamp(min=1e-300)).mean().item())
    return found


def measure(subject: Subject) -> Data:
    """Of the uncached path: change from step to step, and what k = 1 … 5 earlier outputs leave unexplained."""
    outputs = subject.uncached.predictions
    distance, cosine = changes(outputs)
    return {
        "relative_l1": [None, *distance],
        "cosine": [None, *cosine],
        "residual": {str(order): residuals(outputs, order) for order in ORDERS if order < len(outputs)},
    }


def draw(data: Data) -> Figure:
    """The U-curve, and the residuals on a logarithmic axis."""
    from sostenuto.analysis.style import dress, figure, line

    made, axes = figure(1, 3, width=9.5, height=2.6)
    line(axes[0][0], data["relative_l1"], "relative L1", 0)
    line(axes[0][1], data["cosine"], "cosine", 0)
    for index, (order, values) in enumerate(data["residual"].items()):
        line(axes[0][2], values, f"k = {order}", index)
    axes[0][2].set_yscale("log")
    dress(axes[0][0], "change from step to step", "relative L1 distance", legend=False)
    dress(axes[0][1], "similarity from step to step", "cosine", legend=False)
    dress(axes[0][2], "what k outputs leave", "relative residual")
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    distance = [value for value in data["relative_l1"] if value is not None]
    low = min(range(len(distance)), key=distance.__getitem__)
    most = max(range(len(distance)), key=distance.__getitem__)
    last = len(distance) - 1
    inside = 0 < low < last and min(distance[0], distance[last]) > _CLEARLY * distance[low]
    shape = (
        f"has its least at step {low + 1} and rises to both ends: the U of the paper"
        if inside
        else f"has its least at step {low + 1} and its most at step {most + 1}: no U"
    )
    # Away from both ends, over the same steps for all orders.
    steps = range(len(distance) // 5 + max(map(int, data["residual"])), 1 + last - len(distance) // 5)
    inner = {order: fmean(values[step] for step in steps) for order, values in data["residual"].items() if len(steps)}
    text = f"The change from one output to the next {shape}."
    if inner:
        best = min(inner, key=inner.__getitem__)
        listed = ", ".join(f"k = {order} {value:.4f}" for order, value in inner.items())
        falls = "k > 1 does better than plain reuse, as the paper says" if best != "1" else "plain reuse does best"
        text += f" Away from both ends the relative residual is {listed}: best with k = {best}, so {falls}."
    return text


CONSECUTIVE = Instrument(
    name="consecutive-outputs",
    work=0.5,
    title="Consecutive outputs, and what they foretell",
    source="AB-Cache (arXiv 2504.10540), from its abstract; the relation of k outputs as derived from Adams–Bashforth",
    claim=(
        "The change between neighbouring steps is U-shaped over the path; k earlier outputs combined linearly foretell the "
        "next with an error of O(h^k)."
    ),
    method=(
        "Predictions of the uncached path; weights (−1)^(j−1)·C(k, j) of the k outputs before, each truly "
        "computed. A sampler that draws noise of its own at every step puts into each output what none before could foretell: "
        "look at an ODE solver too."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
