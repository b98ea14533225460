"""The papers' tables on the demo model: the same rows, the same protocol (same noise, equal cost, floors), one command each.

    python benchmarks/papers.py ab --num-images 1000 --seeds 0 1 2 --json docs/results/papers-ab.json

``table1`` (DDPM, 50 steps) and ``table1-250``, ``table2`` (DDIM, 20), ``table5`` (the noise scale), ``table6`` and ``table7``
(form and parameters of the threshold) are EB-Cache's (arXiv 2503.07120); ``eb``, ``feb``, ``duca`` and ``ab`` the ablations of
EB-Cache, FEB-Cache, DuCa and AB-Cache. Methods with a choice of settings stand with the one nearest to the cost of the others.
What an interrupted run has done is kept in the output folder.

Rows named EB-Cache and FEB-Cache are the papers' methods: the last value fills a gap, a step reuses attention, the MLP (FEB) or
both. What the papers leave open is ours: the criterion is the norm of the difference of predictions, nothing is reused more
than three times in a row, κ sets the cost. "Recommended" rows fill with linear forecasts and reuse whole steps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from lab import AS_PUBLISHED, Lab, arguments, compare

from sostenuto.calibrations import DiTFastAttnCalibration, EBCalibration, FEBCalibration
from sostenuto.demo.compare import CALIBRATIONS, SHIPPED
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.rows import Entry
from sostenuto.methods import (
    FORA,
    L2C,
    ABCache,
    DeltaDiT,
    DiTFastAttn,
    DuCa,
    EBCache,
    EpsilonScaling,
    FEBCache,
    ToCa,
)
from sostenuto.methods.token_cycle import StepKind
from sostenuto.router import Router
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable

LIGHT, STRONG = 0.66, 0.4  # of the multiply-accumulates: 33 and 20 of 50 steps, as in the paper


def table1(lab: Lab) -> list[Entry]:
    """DDPM, 50 or 250 steps: every baseline at 1.5× and at 2.5×, as far as it gets there."""
    light, strong = lab.published_eb(LIGHT), lab.published_eb(STRONG)
    many = lab.num_inference_steps > 50
    toca = partial(ToCa, ratio_schedule="ddpm250" if many else "ddim50")
    attention = lab.calibrated("ditfastattn", DiTFastAttnCalibration(theta=0.6), num_samples=1 if many else 4)
    return [
        lab.uncached(),
        lab.fewer(LIGHT),
        lab.row("FORA N=2", FORA(2)),
        lab.row("DiTFastAttn", DiTFastAttn(attention)),
        *learned(lab, 0.1, 0.95),
        lab.row("ToCa N=2", toca(2, 0.2)),
        lab.row("Δ-DiT N=2", DeltaDiT(2, num_cached_blocks=5)),
        lab.row("ε-scaling alone", scaling(light)),
        lab.row("EB-Cache 1.5×", EBCache(light)),
        lab.row("EB-Cache 1.5×, recommended", EBCache(recommended(lab))),
        lab.fewer(STRONG),
        lab.row("FORA N=3", FORA(3)),
        lab.row("ToCa N=4", toca(4, 0.07 if many else 0.04)),
        lab.row("ToCa N=4 | EB scaling", toca(4, 0.07 if many else 0.04) | scaling(strong)),
        lab.row("Δ-DiT N=3", DeltaDiT(3, num_cached_blocks=7)),
        lab.row("EB-Cache 2.5×", EBCache(strong)),
        lab.row("EB-Cache 2.5×, recommended", EBCache(recommended(lab, strong=True))),
    ]


def table2(lab: Lab) -> list[Entry]:
    """DDIM, 20 steps, at the cost of 16."""
    light = lab.published_eb(0.8)
    attention = lab.calibrated("ditfastattn", DiTFastAttnCalibration(theta=0.1), num_samples=4)
    return [
        lab.uncached(),
        lab.fewer(0.8),
        lab.row("ToCa N=2", ToCa(2, 0.6)),
        lab.row("DiTFastAttn", DiTFastAttn(attention)),
        lab.row("Δ-DiT N=2", DeltaDiT(2, num_cached_blocks=3)),
        *learned(lab, 0.1),
        lab.row("EB-Cache", EBCache(light)),
        lab.row("EB-Cache, b = 1", EBCache(light, eps_scale=1.0)),
        lab.row("EB-Cache, recommended", EBCache(recommended(lab, target_fraction=0.8))),
    ]


def table5(lab: Lab) -> list[Entry]:
    """The noise scale b: the paper's values, some on both sides of 1, and what the authors' code divides by, 1 / 0.965."""
    light = lab.published_eb(LIGHT)
    scales = (0.945, 0.95, 0.955, 0.96, 0.965, 0.975, 0.985, 1.0, 1.01, 1.02, 1 / 0.965, 1.05)
    return [
        lab.uncached(),
        lab.fewer(LIGHT),
        *(lab.row(f"b = {b:.4g}", EBCache(light, eps_scale=b)) for b in scales),
    ]


def thresholds(lab: Lab, forms: dict[str, tuple[float, float]]) -> list[Entry]:
    """Tables of equal cost from thresholds δ(τ) = intercept + slope · τ, all with the b of the paper's."""
    b = fmean(lab.published_eb(LIGHT).eps_scale)
    made = {name: lab.published_eb(LIGHT, delta=delta, eps_scale_rule="fixed") for name, delta in forms.items()}
    rows = [lab.row(name, EBCache(table, eps_scale=b)) for name, table in made.items()]
    return [lab.uncached(), lab.fewer(LIGHT), *rows]


def table6(lab: Lab) -> list[Entry]:
    """The form of the threshold."""
    return thresholds(
        lab, {"rising with noise": (0.05, 0.15), "constant": (0.125, 0.0), "falling with noise": (0.2, -0.15)}
    )


def table7(lab: Lab) -> list[Entry]:
    """The parameters of the threshold; κ brings all tables to the same cost, so that the shape alone differs."""
    return thresholds(lab, {f"{a:.2f} + {b:.2f} τ": (a, b) for a, b in ((0.1, 0.05), (0.05, 0.15), (0.0, 0.25))})


def eb(lab: Lab) -> list[Entry]:
    """EB-Cache: scale, table, both, the table read from its other end, and the paper's criterion taken literally."""
    light = lab.published_eb(LIGHT)
    flipped = replace(light, actions=(light.actions[0], *light.actions[:0:-1]))
    b = fmean(light.eps_scale)  # scales the norms that are compared, and the path on which they are
    literal = lab.published_eb(
        LIGHT, criterion="norm_gap", max_consecutive_reuse=None, eps_scale_rule="fixed", eps_scale=b
    )
    return [
        lab.uncached(),
        lab.fewer(LIGHT),
        lab.row("scale alone", scaling(light)),
        lab.row("table alone", EBCache(light, eps_scale=1.0)),
        lab.row("both", EBCache(light)),
        lab.row("both, table backwards", EBCache(flipped)),
        lab.row("both, norms compared, no bound", EBCache(literal)),
        lab.row("both, recommended", EBCache(recommended(lab))),
    ]


def feb(lab: Lab) -> list[Entry]:
    """FEB-Cache: scale, table, both, and the separation of stages by itself."""
    options = FEBCalibration(target_fraction=LIGHT, eps_scale_rule="fixed", **AS_PUBLISHED)  # b(τ) as printed
    table = lab.calibrated(f"feb-{LIGHT:g}", options)
    few = replace(lab, solver="ddim", num_inference_steps=max(2, lab.num_inference_steps // 5))
    published = lab.published_eb(LIGHT)
    return [
        lab.uncached(),
        lab.fewer(LIGHT),
        lab.row("b(τ) alone", FEBCache(replace(table, actions=(StepState.COMPUTE,) * lab.num_inference_steps))),
        lab.row("table alone", FEBCache(table, eps_scale=1.0)),
        lab.row("both", FEBCache(table)),
        lab.row("both, constant b", FEBCache(table, eps_scale=published.eps_scale[0])),
        lab.row("EB-Cache", EBCache(published)),
        *stages(lab, "uncached", ""),
        replace(few.uncached(), name="DDIM: uncached", reference=None),
        *stages(few, "DDIM: uncached", "DDIM: "),
    ]


@dataclass(frozen=True)
class OneStage(FEBCalibration):
    """FEB-Cache's calibration with the states of both stages at every step."""

    def candidates_at(self, tau: float) -> tuple[StepState, ...]:
        """All of them."""
        return self.candidates


def stages(lab: Lab, reference: str, prefix: str) -> list[Entry]:
    """The separation of stages on and off, nothing else; of one branch alone, since what may reuse both does so."""
    options = {
        "target_fraction": 0.72,
        "candidates": (StepState.REUSE_MLP, StepState.REUSE_ATTENTION),
        "eps_scale_rule": "fixed",
        "b_high": 1.0,
        "b_low": 1.0,
        **AS_PUBLISHED,
    }
    made = {"stages apart": FEBCalibration(**options), "no stages": OneStage(**options)}
    return [
        replace(lab.row(prefix + name, FEBCache(lab.calibrated(name.replace(" ", "-"), one))), reference=reference)
        for name, one in made.items()
    ]


@dataclass(frozen=True)
class OnlyAggressive(DuCa):
    """DuCa with the same full steps and none that repairs what aggressive ones do."""

    def between(self, offset: int, since_full: int) -> StepKind:
        """Aggressive."""
        return StepKind.AGGRESSIVE


def duca(lab: Lab) -> list[Entry]:
    """DuCa: which steps are aggressive, and which tokens are chosen, at the cost of 19 of 50 steps."""
    rules = ("random", "value-norm", "attention")
    return [
        lab.uncached(),
        lab.fewer(0.385),
        lab.row("FORA N=3", FORA(3)),
        lab.row("full and aggressive", OnlyAggressive(4)),
        lab.row("full and conservative (ToCa N=4)", ToCa(4, 0.03)),
        *(lab.row(f"DuCa N=4, {rule}", DuCa(4, selection=rule)) for rule in rules),
    ]


def ab(lab: Lab) -> list[Entry]:
    """AB-Cache: order, interval, solver."""
    rows = [lab.uncached()]
    for interval, fraction in ((2, 0.54), (3, 0.4), (4, 0.32)):
        rows.append(lab.fewer(fraction))
        rows += [lab.row(f"k={k}, every {interval}", ABCache(k, 5, interval)) for k in (1, 2, 3)]
    for solver in ("ddpm", "dpm-solver++"):
        other, reference = replace(lab, solver=solver), f"{solver}, uncached"
        rows.append(replace(other.uncached(), name=reference, reference=None))
        fewer = other.fewer(0.54)
        rows.append(replace(fewer, name=f"{solver}, {fewer.name}", reference=fewer.reference and reference))
        rows.append(replace(other.row(f"{solver}, k=2, every 2", ABCache(2, 5, 2)), reference=reference))
    return rows


def scaling(table: CacheTable) -> EpsilonScaling:
    """The b of a table, without its reuse."""
    return EpsilonScaling(1 / fmean(table.eps_scale))


def recommended(lab: Lab, strong: bool = False, **changes: float) -> CacheTable:
    """The table that ships for this speed; for other samplers one calibrated in the same way."""
    if (lab.solver, lab.num_inference_steps) == ("ddpm", 50):
        return CacheTable.load(SHIPPED / f"demo-ddpm50-{'2.5x' if strong else '1.5x'}.json")
    options: EBCalibration = replace(CALIBRATIONS[strong], eps_scale_grid=lab.scales, **changes)
    computed = max(1, round(options.last_computed * lab.num_inference_steps / 50))
    return lab.calibrated("recommended", replace(options, last_computed=computed))


def learned(lab: Lab, *thresholds: float) -> list[Entry]:
    """Learning-to-Cache where a router ships for so many steps; trained for DDIM, run with any solver."""
    path = SHIPPED / f"demo-ddim{lab.num_inference_steps}-l2c.safetensors"
    router = replace(Router.load(path), scheduler={}) if path.exists() else None
    return [lab.row(f"L2C θ={one:g}", L2C(router, one)) for one in thresholds if router]


TABLES: dict[str, tuple[Callable[[Lab], list[Entry]], str, int]] = {
    "table1": (table1, "ddpm", 50),
    "table1-250": (table1, "ddpm", 250),
    "table2": (table2, "ddim", 20),
    "table5": (table5, "ddpm", 50),
    "table6": (table6, "ddpm", 50),
    "table7": (table7, "ddpm", 50),
    "eb": (eb, "ddpm", 50),
    "feb": (feb, "ddpm", 50),
    "duca": (duca, "ddim", 50),
    "ab": (ab, "ddim", 50),
}
"""The rows of a table, its solver and steps."""

_ATTENTION = "DiTFastAttn at 2.5×: attention is a third of this network's work, 1.5× at most"
_LEARNED = "L2C at 2.5×: every second step is computed, below 2×"
ABSENT = {
    "table1": [_ATTENTION, _LEARNED],
    "table1-250": [_ATTENTION, _LEARNED],
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--search-images", type=int, default=128, help="for each value of b; 0: not searched")
    parser.add_argument("--steps", type=int, help="in place of the table's own, for a quick look")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, solver, steps = TABLES[options.table]
    pipe = load_demo_pipeline()
    lab = Lab(pipe, options.output, solver, options.steps or steps, options.dtype, options.search_images)
    compare(options, rows(lab), pipe, table=options.table, absent=ABSENT.get(options.table, []))


if __name__ == "__main__":
    main()
