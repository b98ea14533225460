"""On which networks other libraries' caches work: tiny networks of diffusers' classes, each peer, eight identical steps.

    python benchmarks/peer_support.py --json docs/results/peer-support.json

With identical inputs at every step a cache must reproduce the output, so whatever differs is wrong. Every peer is set to
skip as much as it can. Of each pair of network and peer the share of multiply-accumulates that is left is told, or how far
the output is off, or why it doesn't run. What is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from sostenuto.bench.peers import Peer, peer
from sostenuto.compat import block_is_registered, first_tensor
from sostenuto.counting import MacCounter
from sostenuto.sites import blocks_of
from sostenuto.zoo import TINY_MODELS, TinyModel

NUM_STEPS = 8
TOLERANCE = 1e-3  # relative; residuals are added in another order
PEERS = (
    "diffusers-first-block-cache:threshold=1000.0",
    "diffusers-magcache",
    "diffusers-taylorseer:taylor_factors_dtype=float32",
    "diffusers-taylorseer:modules=branches,taylor_factors_dtype=float32",
    "diffusers-pab:timestep_skip_range=[0,1001]",
    "diffusers-fastercache",
    "diffusers-seacache:threshold=1000.0",
    "cache-dit:residual_diff_threshold=10.0,max_warmup_steps=2",
    "cache-dit-taylorseer:residual_diff_threshold=10.0,max_warmup_steps=2",
    "dit-smoothcache",
    "para-attn:residual_diff_threshold=10.0",
)


@torch.no_grad()
def eight_steps(tiny: TinyModel, model: torch.nn.Module) -> tuple[torch.Tensor, int]:
    """The outputs of all steps, and the multiply-accumulates."""
    with MacCounter() as counter:
        outputs = [
            first_tensor(model(**tiny.inputs(500.0, torch.Generator().manual_seed(0)))).clone()
            for _ in range(NUM_STEPS)
        ]
    return torch.stack(outputs), counter.macs


def try_peer(tiny: TinyModel, model: torch.nn.Module, other: Peer, plain: torch.Tensor, macs: int) -> dict:
    reason = other.problem(model)
    if reason is not None:
        return {"result": "refused", "reason": reason}
    try:
        with other.attached(model, NUM_STEPS):
            outputs, left = eight_steps(tiny, model)
    except Exception as error:
        return {"result": "fails", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    off = ((outputs - plain).norm() / plain.norm()).item()
    result = "wrong" if not off <= TOLERANCE else "works" if left < macs else "skips nothing"
    return {"result": result, "macs": round(left / macs, 4), "error": off}


def blocks_unknown_to_diffusers(model: torch.nn.Module) -> bool:
    """Whether diffusers' caches must be told of the blocks first, which the adapter does."""
    classes = {type(model.get_submodule(block.path)) for block in blocks_of(model)}
    return not all(map(block_is_registered, classes))


def try_network(tiny: TinyModel, row: dict) -> None:
    """Try the peers that aren't in the row yet."""
    if row.keys() >= set(PEERS):
        return
    model = tiny.build()
    plain, macs = eight_steps(tiny, model)
    row["unknown_blocks"] = blocks_unknown_to_diffusers(model)
    for name in PEERS:
        if name in row:
            continue
        other = peer(name, **({"ratios": (1.0,)} if "magcache" in name else {}))
        type(other).wrong_on = {}  # found out here, not taken for granted
        row[name] = try_peer(tiny, model, other, plain, macs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(TINY_MODELS), help="classes to try")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: peer(name).version() for name in PEERS}
    rows: dict[str, dict] = {}
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["networks"]
    for name in tqdm(options.only):
        with torch.compiler.set_stance("force_eager"):
            try_network(TINY_MODELS[name], rows.setdefault(name, {}))
        if options.json:
            content = {"num_steps": NUM_STEPS, "versions": versions, "networks": dict(sorted(rows.items()))}
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    helped = sum(row["unknown_blocks"] for row in rows.values())
    print(f"{len(rows)} networks; of {helped} diffusers' caches don't know the blocks, and the adapter tells them.\n")
    print("| peer | works | skips nothing | wrong | fails | refused |\n|---|---|---|---|---|---|")
    for name in PEERS:
        found = Counter(row[name]["result"] for row in rows.values())
        cells = (str(found[result]) for result in ("works", "skips nothing", "wrong", "fails", "refused"))
        print(f"| `{name}` ({versions[name]}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
