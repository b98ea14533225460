"""The support matrix: every transformer class of the installed diffusers, and what was proved about it."""

from __future__ import annotations

from collections.abc import Iterable

from sostenuto.compat import diffusers_package, diffusers_version
from sostenuto.zoo import UNBUILT
from sostenuto.zoo.check import Support

_HEADER = (
    "| class | blocks | branches a block may have | reuse attention | reuse MLPs | reuse branches | reuse stack |\n"
    "|---|---|---|---|---|---|---|"
)


def exported() -> list[str]:
    """Names of the transformer classes that the installed diffusers exports."""
    from torch import nn

    diffusers = diffusers_package()
    # By name first: a pipeline is imported when it is looked at, and may need packages that aren't there.
    names = [name for name in dir(diffusers) if ("Transformer" in name or "DiT" in name) and "Pipeline" not in name]
    found = []
    for name in names:
        value = getattr(diffusers, name, None)
        if isinstance(value, type) and issubclass(value, nn.Module) and "ControlNet" not in name and "Vae" not in name:
            found.append(name)
    return found


def row(support: Support) -> str:
    """One line of the matrix."""
    if support.error:
        return f"| {support.model} | – | {support.error} | – | – | – | – |"
    kinds = ", ".join(f"{kind} ×{count}" for kind, count in support.kinds.items())
    shares = (support.macs.get(name) for name in ("attention", "mlp", "branches", "stack"))
    cells = " | ".join("–" if share is None else f"{share:.3f}" for share in shares)
    return f"| {support.model} | {support.num_blocks} | {kinds} | {cells} |"


def markdown(supported: Iterable[Support]) -> str:
    """The matrix as a page."""
    rows = "\n".join(row(support) for support in sorted(supported, key=lambda support: support.model))
    unbuilt = "\n".join(f"| {name} | {reason} |" for name, reason in sorted(UNBUILT.items()))
    return f"""# Networks

Every transformer class that diffusers {diffusers_version()} exports, as proved by

```bash
sostenuto models --check --output docs/models.md
```

on a tiny network of the class with random weights, in real calls:

- with everything computed the output is that of the stock network, bit for bit;
- with identical inputs the reuse of every branch alone, of all attention, of all MLPs, of all branches and of the whole stack
  of blocks returns the identical output, and the multiply-accumulates counted are those of the plan;
- after disabling nothing is left behind.

The last four columns are the share of the tiny network's multiply-accumulates that a step with this reuse still costs; in a
full-size network the rest, embeddings and modulation, is smaller. Where the stack is missing the network reads what is
between its blocks, and branches are what can be cached.

{_HEADER}
{rows}

Not proved this way:

| class | reason |
|---|---|
{unbuilt}

The table itself is [`families.py`](../src/sostenuto/families.py). `sostenuto inspect --verify` and `sostenuto.verify` prove the
same on a network of your own.
"""
