"""Proof, on a tiny network of a diffusers class, that caching works on that class with the installed diffusers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sostenuto.errors import SostenutoError, VerificationError
from sostenuto.features import leaves
from sostenuto.methods import FORA
from sostenuto.sites import has_stack, inspect, num_blocks
from sostenuto.verify import verify
from sostenuto.zoo.tiny import TinyModel

_TIMESTEPS = (900.0, 700.0, 500.0, 300.0)


@dataclass(frozen=True)
class Support:
    """What was found out about one class.

    Attributes:
        model: the class.
        num_blocks: blocks of the tiny network.
        kinds: how many sites of each kind.
        macs: share of the multiply-accumulates left when ``"attention"``, ``"mlp"``, ``"branches"``, ``"stack"`` are reused.
        error: why it doesn't work, or empty.
    """

    model: str
    num_blocks: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    error: str = ""


def check(tiny: TinyModel) -> Support:
    """Build the network and prove what :func:`sostenuto.verify` proves, and that nothing of it stays behind."""
    try:
        # Flexible attention compiles itself when it is called: minutes, for nothing here.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return _prove(tiny)
    except (SostenutoError, ImportError) as error:
        return Support(tiny.name, error=str(error))


def _prove(tiny: TinyModel) -> Support:
    model = tiny.build()
    scheduler: Any = SimpleNamespace(timesteps=None)

    def sample(network: nn.Module, generator: torch.Generator, num_inference_steps: int) -> Any:
        scheduler.timesteps = torch.tensor(_TIMESTEPS[:num_inference_steps])
        seed, output = generator.initial_seed(), None
        for timestep in scheduler.timesteps.tolist():  # the same conditioning at every step
            output = network(**tiny.inputs(timestep, torch.Generator().manual_seed(seed)))
        return output

    before = sample(model, torch.Generator().manual_seed(1), 2)
    proved = verify(model, FORA(2), sample, scheduler=scheduler)
    after = sample(model, torch.Generator().manual_seed(1), 2)
    if not all(map(torch.equal, _tensors(before), _tensors(after))) or _traces(model):
        raise VerificationError(f"{tiny.name} is not as before after disabling")
    kinds = Counter(site.kind.value for site in inspect(model))
    assert ("stack" in proved["macs"]) == has_stack(model)
    return Support(tiny.name, num_blocks(model), dict(kinds), proved["macs"])


def _tensors(output: Any) -> list[torch.Tensor]:
    return list(leaves(tuple(output.values()) if isinstance(output, dict) else output))


def _traces(model: nn.Module) -> list[str]:
    """Modules with something of ours left on them."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module) or "_sostenuto_handle" in vars(module) or "_compiled_call_impl" in vars(module)
    ]
