"""``sostenuto inspect`` and ``sostenuto verify``: the sites of a model, and the proof that reuse is exact there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import tyro

from sostenuto.cli.common import ModelChoice, SamplerChoice, write_json
from sostenuto.pipelines import PROMPT

_TINY = "tiny:"
_TIMESTEPS = (900.0, 700.0, 500.0, 300.0)


@dataclass(frozen=True)
class Inspect:
    """List the sites of a model's denoisers, blocks that are alike in one line."""

    model: str = "demo"
    """A diffusers folder, a hub id, "demo", or a tiny one with random weights such as "tiny:FluxTransformer2DModel"."""
    prompt: str = PROMPT
    """What the proof generates, where the pipeline takes a prompt."""
    verify: bool = False
    """Also prove on the model that reuse is exact at every site."""
    device: str = "auto"
    """Where a pipeline runs for the proof: cpu, cuda, or auto, which takes the GPU where there is one."""
    json: Path | None = None
    """Write the sites to this file."""

    def run(self) -> None:
        """Print the sites by list of blocks, and what the proof found."""
        subject = _tiny(self.model.removeprefix(_TINY)) if self.model.startswith(_TINY) else self._loaded()
        rows: list[dict[str, Any]] = []
        for name, denoiser in subject.denoisers.items():
            sites = sites_of(denoiser)
            print(f"{name}: {type(denoiser).__name__}")
            for line in grouped(sites):
                print(f"  {line}")
            if self.verify:
                _prove(subject, denoiser)
            rows += [{**vars(site), "kind": site.kind.value, "denoiser": name} for site in sites]
        write_json(self.json, rows)

    def _loaded(self) -> _Subject:
        from torch import nn

        from sostenuto.compat import DENOISERS, find_denoiser

        choice = SamplerChoice(self.model, device=self.device)
        if not self.verify:  # a list of sites needs no numbers: half of the memory will do
            choice = SamplerChoice(self.model, device="cpu", dtype="bfloat16")
        pipe = choice.pipeline()
        known = (*DENOISERS, "prior")
        found = {name: getattr(pipe, name) for name in known if isinstance(getattr(pipe, name, None), nn.Module)}

        def sample(_: Any, generator: Any, num_inference_steps: int) -> Any:
            return choice.sample(pipe, prompt=self.prompt)(pipe, generator, num_inference_steps)

        return _Subject(found or {"denoiser": find_denoiser(pipe)}, sample, pipe.scheduler)


@dataclass(frozen=True)
class Verify:
    """Prove on a model that what is reused is exact, and that a method's plan is what runs."""

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=ModelChoice)
    json: Path | None = None
    """Write what was proved to this file."""

    def run(self) -> None:
        """Verify and print what was proved."""
        import sostenuto

        pipe = self.choice.pipeline()
        proved = sostenuto.verify(
            pipe,
            self.choice.method_object(),
            self.choice.sample(pipe),
            num_inference_steps=self.choice.num_inference_steps,
            show_progress=True,
        )
        print(_words(proved))
        write_json(self.json, proved)


@dataclass(frozen=True)
class _Subject:
    """What is examined: networks by name, one generation of theirs, and what drives them."""

    denoisers: dict[str, Any]
    sample: Callable[..., Any]
    scheduler: Any


def tiny_model(name: str) -> Any:
    """The tiny network of a class in the zoo, not built yet.

    Raises:
        InputError: there is none.
    """
    import difflib

    from sostenuto.errors import InputError
    from sostenuto.zoo import TINY_MODELS

    if name not in TINY_MODELS:
        near = ", ".join(difflib.get_close_matches(name, TINY_MODELS, 3, 0.4) or sorted(TINY_MODELS)[:3])
        raise InputError(f"there is no tiny {name!r}; there are {near}, … (sostenuto models lists all)")
    return TINY_MODELS[name]


def _tiny(name: str) -> _Subject:
    """A tiny network of the zoo."""
    import torch

    tiny = tiny_model(name)
    scheduler: Any = SimpleNamespace(timesteps=None)

    def sample(network: Any, generator: Any, num_inference_steps: int) -> Any:
        scheduler.timesteps = torch.tensor(_TIMESTEPS[:num_inference_steps])
        seed, output = generator.initial_seed(), None
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for timestep in scheduler.timesteps.tolist():  # the same conditioning at every step
                output = network(**tiny.inputs(timestep, torch.Generator().manual_seed(seed)))
        return output

    return _Subject({"tiny": tiny.build()}, sample, scheduler)


def sites_of(denoiser: Any) -> list[Any]:
    """The sites of a transformer; of a U-Net what lies beyond each of its skip connections."""
    import sostenuto
    from sostenuto.unet import is_unet, num_branches

    if not is_unet(denoiser):
        return sostenuto.inspect(denoiser)
    deep = (sostenuto.DeepCache(branch_id=branch) for branch in range(num_branches(denoiser)))
    return [site for method in deep for site in method.sites(denoiser)]


def grouped(sites: list[Any]) -> Iterator[str]:
    """A line for the same branch of all blocks of a list, such as ``transformer_blocks.0-27.attn1``, and one of totals."""
    groups: dict[str, list[Any]] = {}
    for site in sites:  # the number of the block is the last one in its path
        like = site.id if site.kind.value == "deep" else re.sub(r"\.\d+(?!.*\.\d)", ".#", site.id)
        groups.setdefault(like, []).append(site)
    for like, members in groups.items():
        first = members[0]
        numbers = [int(match.group(1)) for site in members if (match := re.search(r"\.(\d+)(?!.*\.\d)", site.id))]
        path = like.replace("#", _ranges(numbers))
        notes = [
            *([f"in front: {', '.join(front.rpartition('.')[2] for front in first.front)}"] if first.front else []),
            *(["not in every call"] if first.optional else []),
            *([f"{first.calls} calls"] if first.calls > 1 else []),
            *([f"beyond connection {first.block}"] if first.kind.value == "deep" else []),
        ]
        parameters = sum(site.parameters for site in members)
        yield f"{path:44} {first.kind.value:18} {len(members):>3} × {parameters:>14,} parameters  {'; '.join(notes)}".rstrip()
    kinds = Counter(site.kind.value for site in sites)
    blocks = len({site.block for site in sites})
    yield f"{len(sites)} sites in {blocks} blocks: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"


def _ranges(numbers: list[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _prove(subject: _Subject, denoiser: Any) -> None:
    """Prove that reuse is exact on one network, and print which share of a call's work is left."""
    import sostenuto
    from sostenuto.unet import is_unet

    method = sostenuto.DeepCache(branch_id=0) if is_unet(denoiser) else sostenuto.FORA(2)
    proved = sostenuto.verify(
        denoiser,
        method,
        subject.sample,
        scheduler=subject.scheduler,
        num_inference_steps=len(_TIMESTEPS),
        show_progress=True,
    )
    print(f"  {_words(proved)}")
    for what, share in proved["macs"].items():
        if share < 1:
            print(f"  reuse of {what:10} leaves {share:6.1%} of the multiply-accumulates of a call")


def _words(proved: dict[str, Any]) -> str:
    return (
        f"proved: {proved['sites']} sites are bit-identical when reused with identical inputs, each saves its counted "
        f"multiply-accumulates, and {proved['steps']} steps of {proved['passes']} pass(es) ran as planned"
    )
