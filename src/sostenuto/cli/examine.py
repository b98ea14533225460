"""``sostenuto inspect`` and ``sostenuto verify``: the sites of a model, and the proof that reuse is exact there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from sostenuto.cli.common import ModelChoice, write_json


@dataclass(frozen=True)
class Inspect:
    """List the sites of a model's denoiser."""

    model: str = "demo"
    """A diffusers folder, a hub id, or "demo"."""
    verify: bool = False
    """Also prove on the model that reuse is exact at every site."""
    json: Path | None = None
    """Write the sites to this file."""

    def run(self) -> None:
        """Print one line a site."""
        import sostenuto

        choice = ModelChoice(self.model)
        pipe = choice.pipeline()
        sites = sostenuto.inspect(pipe.transformer)
        for site in sites:
            print(f"{site.id:36} {site.kind.value:16} block {site.block:<4} {site.parameters:>12,} parameters")
        if self.verify:
            _verify(pipe, choice, "none")
        write_json(self.json, [{**vars(site), "kind": site.kind.value} for site in sites])


@dataclass(frozen=True)
class Verify:
    """Prove on a model that what is reused is exact, and that a method's plan is what runs."""

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=ModelChoice)
    json: Path | None = None
    """Write what was proved to this file."""

    def run(self) -> None:
        """Verify and print what was proved."""
        write_json(self.json, _verify(self.choice.pipeline(), self.choice, self.choice.method_object()))


def _verify(pipe: Any, choice: ModelChoice, method: Any) -> dict[str, Any]:
    import sostenuto

    proved = sostenuto.verify(pipe, method, choice.sample(), num_inference_steps=choice.num_inference_steps)
    print(
        f"proved: {proved['sites']} sites are bit-identical when reused with identical inputs, each saves its counted "
        f"multiply-accumulates, and {proved['steps']} steps of {proved['passes']} pass(es) ran as planned"
    )
    return proved
