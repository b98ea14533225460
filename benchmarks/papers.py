"""The papers' tables on the demo model: the same rows, the same protocol (same noise, equal cost, floors), one command each.

    python benchmarks/papers.py ab --num-images 1000 --seeds 0 1 2 --json docs/results/papers-ab.json

``table1`` (DDPM, 50 steps) and ``table1-250``, ``table2`` (DDIM, 20), ``table5`` (the noise scale), ``table6`` and ``table7``
(form and parameters of the threshold) are EB-Cache's (arXiv 2503.07120); ``eb``, ``feb``, ``duca`` and ``ab`` the ablations of
EB-Cache, FEB-Cache, DuCa and AB-Cache. What an interrupted run has done is kept in the output folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch

import sostenuto
from sostenuto.calibrations import DiTFastAttnCalibration, EBCalibration, FEBCalibration
from sostenuto.demo.compare import SHIPPED, Entry, Settings, demo_sample, run_entries, with_solver
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.record import record
from sostenuto.demo.show import terminal_table
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
    NoCache,
    TaylorSeer,
    ToCa,
)
from sostenuto.router import Router
from sostenuto.table import CacheTable

LIGHT = CacheTable.load(SHIPPED / "demo-ddpm50-1.5x.json")
STRONG = CacheTable.load(SHIPPED / "demo-ddpm50-2.5x.json")
FEB = CacheTable.load(SHIPPED / "demo-ddpm50-feb-1.5x.json")
ROUTER = replace(Router.load(SHIPPED / "demo-ddim50-l2c.safetensors").to_table(), scheduler={})
"""L2C's, trained for DDIM."""
SCALE = fmean(LIGHT.eps_scale)
CALIBRATION_SEED = 900_001  # none of the noise that the rows are judged on
SHARE = 0.64  # of the multiply-accumulates, where tables are compared at equal cost


class Tables:
    """Tables that are calibrated for a row, kept in a folder."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self._folder, self._dtype = folder, dtype

    def made(
        self,
        name: str,
        options: EBCalibration | FEBCalibration | DiTFastAttnCalibration,
        steps: int = 50,
        solver: str = "ddpm",
    ) -> CacheTable:
        """The table of that name, calibrated on 8 samples where it isn't there yet."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            pipe = load_demo_pipeline()
            reduced = torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == "bfloat16")
            with with_solver(pipe, solver), reduced:
                table = sostenuto.calibrate(
                    pipe,
                    options,
                    demo_sample(8),
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(CALIBRATION_SEED),
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            table.save(path)
        return CacheTable.load(path)


def uncached(steps: int = 50, solver: str = "ddpm") -> Entry:
    """The row that everything is measured against."""
    return Entry("uncached", NoCache(), steps, solver)


def fewer(steps: int, solver: str = "ddpm") -> Entry:
    """The uncached sampler with fewer steps."""
    return Entry(f"{steps} steps", NoCache(), steps, solver, reference=None)


def table1(tables: Tables) -> list[Entry]:
    """DDPM, 50 steps."""
    return [
        uncached(),
        fewer(33),
        Entry("FORA N=2", FORA(2)),
        Entry("DiTFastAttn", DiTFastAttn(tables.made("ditfastattn", DiTFastAttnCalibration()))),
        Entry("L2C", EBCache(ROUTER)),
        Entry("ToCa N=2", ToCa(2)),
        Entry("Δ-DiT N=2", DeltaDiT(2)),
        Entry("ε-scaling alone", EpsilonScaling(1 / SCALE)),
        Entry("EB-Cache 1.5×", EBCache(LIGHT)),
        fewer(20),
        Entry("FORA N=3", FORA(3)),
        Entry("ToCa N=3", ToCa(3)),
        Entry("ToCa N=3 | EB scaling", ToCa(3) | EpsilonScaling(1 / SCALE)),
        Entry("DuCa N=3", DuCa(3)),
        Entry("TaylorSeer N=3", TaylorSeer(interval=3, order=2)),
        Entry("EB-Cache 2.5×", EBCache(STRONG)),
    ]


def table1_250(tables: Tables) -> list[Entry]:
    """DDPM, 250 steps; the tables of 50 steps stretched."""
    rows = [
        Entry("FORA N=2", FORA(2)),
        Entry("ToCa N=2", ToCa(2)),
        Entry("EB-Cache 1.5×", EBCache(unbound(LIGHT).resample(250))),
        Entry("FORA N=3", FORA(3)),
        Entry("ToCa N=3", ToCa(3)),
        Entry("ToCa N=3 | EB scaling", ToCa(3) | EpsilonScaling(1 / SCALE)),
        Entry("EB-Cache 2.5×", EBCache(unbound(STRONG).resample(250))),
    ]
    return [uncached(250), fewer(165), fewer(100), *(replace(row, num_inference_steps=250) for row in rows)]


def unbound(table: CacheTable) -> CacheTable:
    """A table that doesn't ask for the timesteps that it was made with."""
    return replace(table, scheduler={key: value for key, value in table.scheduler.items() if key != "timesteps"})


def table2(tables: Tables) -> list[Entry]:
    """DDIM, 20 steps."""
    light = tables.made("ddim20", EBCalibration(target_fraction=SHARE, fill="stack"), 20, "ddim")
    rows = [
        Entry("FORA N=2", FORA(2)),
        Entry("L2C", L2C()),
        Entry("TaylorSeer N=2", TaylorSeer(interval=2, order=2)),
        Entry("EB-Cache, b = 1", EBCache(light, eps_scale=1.0)),
        Entry("EB-Cache, b = 0.99", EBCache(light, eps_scale=0.99)),
    ]
    return [uncached(20, "ddim"), fewer(13, "ddim"), *(replace(r, num_inference_steps=20, solver="ddim") for r in rows)]


def table5(tables: Tables) -> list[Entry]:
    """The noise scale b."""
    scales = (0.95, 0.96, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02)
    return [uncached(), *(Entry(f"b = {b:g}", EBCache(LIGHT, eps_scale=b)) for b in scales)]


def thresholds(tables: Tables, forms: dict[str, tuple[float, float]]) -> list[Entry]:
    """Tables of equal cost from thresholds δ(τ) = intercept + slope · τ."""
    made = {
        name: tables.made(
            f"delta-{delta[0]:g}-{delta[1]:g}", EBCalibration(target_fraction=SHARE, delta=delta, fill="stack")
        )
        for name, delta in forms.items()
    }
    return [uncached(), *(Entry(name, EBCache(table, eps_scale=SCALE)) for name, table in made.items())]


def table6(tables: Tables) -> list[Entry]:
    """The form of the threshold."""
    return thresholds(
        tables, {"rising with noise": (0.05, 0.15), "constant": (0.125, 0.0), "falling with noise": (0.2, -0.15)}
    )


def table7(tables: Tables) -> list[Entry]:
    """The parameters of the threshold; κ brings all tables to the same cost, so that the shape alone differs."""
    forms = ((0.05, 0.05), (0.05, 0.15), (0.05, 0.25), (0.15, 0.05))
    return thresholds(tables, {f"{a:g} + {b:g} τ": (a, b) for a, b in forms})


def eb(tables: Tables) -> list[Entry]:
    """EB-Cache: scale, table, both, and the table read from its other end."""
    flipped = replace(LIGHT, actions=(LIGHT.actions[0], *LIGHT.actions[:0:-1]))
    return [
        uncached(),
        Entry("scale alone", EpsilonScaling(1 / SCALE)),
        Entry("table alone", EBCache(LIGHT, eps_scale=1.0)),
        Entry("both", EBCache(LIGHT)),
        Entry("both, table backwards", EBCache(flipped)),
    ]


def feb(tables: Tables) -> list[Entry]:
    """FEB-Cache: scale, table, both, and the separation of stages."""
    return [
        uncached(),
        Entry("b(τ) alone", FEBCache(CacheTable((FEB.actions[0],) * 50))),
        Entry("table alone", FEBCache(FEB, eps_scale=1.0)),
        Entry("both", FEBCache(FEB)),
        Entry("no stages, b = 1", EBCache(LIGHT, eps_scale=1.0)),
        Entry("no stages, constant b", EBCache(LIGHT)),
    ]


def duca(tables: Tables) -> list[Entry]:
    """DuCa: which steps are aggressive, and which tokens are chosen."""
    rules = ("random", "value-norm", "attention")
    return [
        uncached(),
        Entry("full and aggressive (FORA N=4)", FORA(4)),
        Entry("full and conservative (ToCa N=4)", ToCa(4)),
        *(Entry(f"DuCa N=4, {rule}", DuCa(4, selection=rule)) for rule in rules),
    ]


def ab(tables: Tables) -> list[Entry]:
    """AB-Cache: order, interval, solver."""
    rows = [uncached(50, "ddim")]
    for interval in (2, 3, 4):
        rows += [Entry(f"k={k}, every {interval}", ABCache(k, 5, interval), 50, "ddim") for k in (1, 2, 3)]
    for solver in ("ddpm", "dpm-solver++"):
        rows.append(replace(uncached(50, solver), name=f"{solver}, uncached", reference=None))
        rows.append(Entry(f"{solver}, k=2, every 2", ABCache(2, 5, 2), 50, solver, reference=f"{solver}, uncached"))
    return rows


TABLES: dict[str, Callable[[Tables], Sequence[Entry]]] = {
    "table1": table1,
    "table1-250": table1_250,
    "table2": table2,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "eb": eb,
    "feb": feb,
    "duca": duca,
    "ab": ab,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--shard", type=int, nargs=2, default=[0, 1], help="this process's part and the number of parts"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/papers"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.output / options.table
    entries = TABLES[options.table](Tables(folder / "tables", options.dtype))
    part = (options.shard[0], options.shard[1])
    settings = Settings(options.num_images, options.batch_size, tuple(options.seeds), shard=part, dtype=options.dtype)
    results = run_entries(folder, entries, settings)
    if not results["rows"]:
        print(f"this part is done; {results['missing']} batches of other parts are missing")
        return
    results = record(folder, entries, settings, results)
    print(terminal_table(results))
    if len(options.seeds) > 1:
        for row in results["rows"]:
            values = row["frechet_distance_per_seed"]
            print(f"{row['name']:34} {fmean(values):.3f} ± {stdev(values):.3f} over {len(values)} seeds")
    if options.json:
        options.json.write_text(json.dumps(results | {"table": options.table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
