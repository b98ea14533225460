"""Which degree of forecast a network's features bear: how smooth they are over the steps, and what makes them rough.

    python benchmarks/smoothness.py --json docs/results/smoothness.json

Along an uncached generation the outputs of all branches are differenced once, twice and three times: what forecasts of
degree 0, 1 and 2 are off by at the next step, over the size of the feature. Then the same around some steps with the latents
held fast while the timestep goes on, and with the timestep held fast while the latents go on. Differences of a smooth path
shrink from one order to the next; noise that is independent from step to step makes them grow by √3 and √(10/3).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from inspect import signature
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import sostenuto
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline, load_trained_pipeline
from sostenuto.demo.rows import labels_of, with_solver
from sostenuto.files import publish_json
from sostenuto.machine import machine

AROUND = 3  # steps to each side, around those that are looked at
PLACES = (0.25, 0.5, 0.75)  # of the generation
SEED = 0


class Listener:
    """Keeps what the branches return, and what the network is given, call by call."""

    def __init__(self, network: nn.Module) -> None:
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.given: list[dict[str, Any]] = []  # by name
        self._names = list(signature(network.forward).parameters)
        self._hooks = [network.register_forward_pre_hook(self._given, with_kwargs=True)]
        for site in sostenuto.inspect(network):
            self.outputs[site.id] = []
            self._hooks.append(network.get_submodule(site.id).register_forward_hook(self._keeper(site.id)))

    def _given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given.append(dict(zip(self._names, args, strict=False)) | kwargs)

    def _keeper(self, site: str) -> Any:
        return lambda module, args, output: self.outputs[site].append(output.detach().float())

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def differences(path: Sequence[torch.Tensor]) -> list[float]:
    """Mean norm of the first, second and third differences of a path, over that of its values."""
    size, found, moved = fmean(value.norm().item() for value in path), [], list(path)
    for _ in range(3):
        moved = [later - earlier for earlier, later in pairwise(moved)]
        found.append(fmean(change.norm().item() for change in moved) / size)
    return found


def over_branches(outputs: Iterable[Sequence[torch.Tensor]]) -> list[float]:
    """The differences of every branch, and their mean."""
    return [fmean(column) for column in zip(*map(differences, outputs), strict=True)]


@torch.no_grad()
def replayed(network: nn.Module, calls: Sequence[dict[str, Any]]) -> list[float]:
    """The differences over calls of the network that are made one after the other."""
    listener = Listener(network)
    for arguments in calls:
        network(**arguments)
    listener.close()
    return over_branches(listener.outputs.values())


def measure(pipe: DemoPipeline, solver: str, num_steps: int, num_samples: int) -> list[dict[str, Any]]:
    """The rows: what moves, around which step, and the differences of order 1 to 3."""
    network, rows = pipe.transformer, []
    listener = Listener(network)
    with with_solver(pipe, solver):
        pipe(
            labels_of(num_samples).tolist(),
            num_steps,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        )
    listener.close()
    for place in PLACES:
        middle = round(place * (num_steps - 1))
        steps = range(middle - AROUND, middle + AROUND + 1)
        chain = [listener.given[step] for step in steps]
        here = listener.given[middle]
        moving = {
            "both": over_branches([own[step] for step in steps] for own in listener.outputs.values()),
            "timestep": replayed(network, [here | {"timestep": call["timestep"]} for call in chain]),
            "latents": replayed(network, [call | {"timestep": here["timestep"]} for call in chain]),
        }
        rows += [{"step": middle, "moves": what, "differences": found} for what, found in moving.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder that demo.train wrote; by default the demo's own model")
    parser.add_argument("--solver", choices=("ddpm", "ddim", "dpm-solver++"), default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-samples", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = load_demo_pipeline() if options.model is None else load_trained_pipeline(options.model)
    rows = measure(pipe, options.solver, options.steps, options.num_samples)
    print("step  moves     1st     2nd     3rd  2nd/1st  3rd/2nd")
    for row in rows:
        first, second, third = row["differences"]
        ratios = f"{second / first:7.2f}  {third / second:7.2f}"
        print(f"{row['step']:4d}  {row['moves']:8}{first:7.4f} {second:7.4f} {third:7.4f}  {ratios}")
    if options.json:
        facts = {"solver": options.solver, "steps": options.steps, "n": options.num_samples, "seed": SEED}
        publish_json(options.json, {"rows": rows, **facts, "machine": machine()}, indent=1)


if __name__ == "__main__":
    main()
