"""What a row is measured on: the demo, a tiny network, a folder, or a benchmark network, all sampled in the same way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sostenuto import compat
from sostenuto.arguments import Reader
from sostenuto.bench.cases import Settings
from sostenuto.bench.networks import NETWORKS, Network, network_of
from sostenuto.bench.specs import nearest
from sostenuto.errors import InputError
from sostenuto.features import mapped, moved
from sostenuto.measured import read_json, table_file
from sostenuto.pipelines import PROMPT, as_images, first_output, pipeline_sample, suited

TINY = "tiny:"
Sample = Callable[[torch.Generator, int], torch.Tensor]
"""``sample(generator, num_inference_steps)``: one generation; images ``[n, c, h, w]`` in ``[0, 1]``, or final latents."""


@dataclass
class Subject:
    """A model that can be sampled.

    Attributes:
        target: what a method or a peer is enabled on: the pipeline, or the bare denoiser.
        denoiser: its network.
        owner: what holds the scheduler, as ``owner.scheduler``.
        sample: one generation.
        batch_size: rows of a generation.
        makes_images: whether ``sample`` returns images; else latents.
        labels: the classes that the images are asked to be of, where the shipped judge knows them.
    """

    target: Any
    denoiser: nn.Module
    owner: Any
    sample: Sample
    batch_size: int
    makes_images: bool = False
    labels: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.denoiser.parameters()).device

    @contextmanager
    def scheduled(self, name: str | None) -> Iterator[None]:
        """With the diffusers scheduler of that class, made from the model's own; ``None`` leaves the model's."""
        before = self.owner.scheduler
        self.owner.scheduler = before if name is None else scheduler_like(name, before)
        try:
            yield
        finally:
            self.owner.scheduler = before


def scheduler_like(name: str, other: Any = None) -> Any:
    """A diffusers scheduler by its class, with the configuration of another where that is given.

    Raises:
        InputError: diffusers has no such scheduler.
    """
    diffusers = compat.diffusers_package()
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        known = [other for other in dir(diffusers) if other.endswith("Scheduler")]
        raise InputError(f"diffusers has no scheduler {name!r}; {nearest(name, known)}")
    return kind() if other is None else kind.from_config(other.config)


def build_subject(model: str, batch_size: int, settings: Settings) -> Subject:
    """The model of that name, on the run's device and in its precision.

    Args:
        model: ``demo``, ``tiny:NAME`` of the zoo, a benchmark network (``dit:layers=6``), a diffusers folder or a hub id.
        batch_size: rows of a generation; 0 leaves a benchmark network its own.
        settings: of the run.

    Raises:
        InputError: there is no such model.
    """
    device, dtype = settings.device, getattr(torch, settings.dtype)
    if model.startswith(TINY):
        return _tiny(model.removeprefix(TINY), device, dtype)
    network = network_of(model)
    if network is not None:
        return _sampled(network, batch_size or network.batch_size, device, dtype)
    if model == "demo":
        return _demo(batch_size or settings.batch_size, device, dtype)
    if "/" not in model and not Path(model).exists():
        raise InputError(
            f"there is no model {model!r}: give demo, tiny:NAME, a folder, a hub id, or {', '.join(NETWORKS)}"
        )
    return _pipeline(model, batch_size or 1, device, dtype)


def _demo(batch_size: int, device: str, dtype: torch.dtype) -> Subject:
    from sostenuto.demo.pipeline import load_demo_pipeline
    from sostenuto.demo.rows import labels_of

    pipe: Any = load_demo_pipeline().to(device)
    pipe = pipe if dtype is torch.float32 else pipe.to(dtype)
    labels = labels_of(batch_size)

    def sample(generator: torch.Generator, num_inference_steps: int) -> torch.Tensor:
        return pipe(labels.tolist(), num_inference_steps, generator=generator, output_type="pt").images

    return Subject(pipe, pipe.transformer, pipe, sample, batch_size, makes_images=True, labels=labels)


def load_pipeline(model: str, **options: Any) -> Any:
    """A pipeline without its progress bar, from a folder or hub id: diffusers', or the demo's own, which that doesn't know.

    Args:
        model: the folder or id.
        options: of ``from_pretrained``.

    Raises:
        TableError: the folder's model index can't be read.
        DependencyError: diffusers is not installed.
    """
    index, kind = Path(model) / "model_index.json", None
    if index.is_file():
        content = read_json(table_file(index, "model index"), "model index")
        if isinstance(content, dict) and content.get("_class_name") == "DemoPipeline":
            from sostenuto.demo.pipeline import DemoPipeline

            kind = DemoPipeline
    # Weights in another format may be pickles.
    pipe = (kind or compat.diffusers_name("DiffusionPipeline")).from_pretrained(model, use_safetensors=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pipeline(folder: str, batch_size: int, device: str, dtype: torch.dtype) -> Subject:
    pipe = load_pipeline(folder, torch_dtype=dtype).to(device)
    conditions = suited(pipe, [i % 10 for i in range(batch_size)], [PROMPT] * batch_size)
    call = pipeline_sample(pipe, conditions, output_type="pt")

    def sample(generator: torch.Generator, num_inference_steps: int) -> torch.Tensor:
        return as_images(first_output(call(pipe, generator, num_inference_steps)))

    return Subject(pipe, compat.find_denoiser(pipe), pipe, sample, batch_size, makes_images=True)


def _sampled(network: Network, batch_size: int, device: str, dtype: torch.dtype) -> Subject:
    model = network.build(device, dtype)
    owner = SimpleNamespace(scheduler=scheduler_like(network.scheduler))

    @torch.no_grad()
    def sample(generator: torch.Generator, num_inference_steps: int) -> torch.Tensor:
        scheduler = owner.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        drawn = network.inputs(network, batch_size, generator)
        inputs = {name: moved(value, device, dtype) for name, value in drawn.items()}
        latents = inputs["hidden_states"] * getattr(scheduler, "init_noise_sigma", 1.0)
        with _context(model):
            for timestep in scheduler.timesteps:
                given = (
                    latents
                    if not hasattr(scheduler, "scale_model_input")
                    else scheduler.scale_model_input(latents, timestep)
                )
                at = timestep.expand(batch_size)
                at = at if network.timestep_scale == 1 else at.to(dtype) * network.timestep_scale
                noise = model(**{**inputs, "hidden_states": given, "timestep": at}).sample
                latents = _stepped(scheduler, noise, timestep, latents, generator)
        return latents

    return Subject(model, model, owner, sample, batch_size)


def _tiny(name: str, device: str, dtype: torch.dtype) -> Subject:
    """A network of the zoo; its own batch. Where it predicts something of another shape its latents stay as they are."""
    from sostenuto.zoo import TINY_MODELS

    if name not in TINY_MODELS:
        raise InputError(f"there is no tiny {name!r}; {nearest(name, TINY_MODELS)}")
    tiny = TINY_MODELS[name]
    model = tiny.build().to(device)
    model = (model if dtype is torch.float32 else model.to(dtype)).requires_grad_(False)
    reader = Reader(model)
    owner = SimpleNamespace(scheduler=scheduler_like("FlowMatchEulerDiscreteScheduler"))
    probe = reader.read((), tiny.inputs(500.0, torch.Generator().manual_seed(0))).latents
    batch = len(probe)

    @torch.no_grad()
    def sample(generator: torch.Generator, num_inference_steps: int) -> torch.Tensor:
        scheduler = owner.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        seed, latents = int(torch.randint(2**31, (1,), generator=generator)), None
        prediction: Any = None
        with _context(model):
            for timestep in scheduler.timesteps:
                given = tiny.inputs(float(timestep), torch.Generator().manual_seed(seed))
                inputs = {name: moved(value, device, dtype) for name, value in given.items()}
                if latents is not None:
                    _, inputs = reader.with_latents((), inputs, latents)
                latents = reader.read((), inputs).latents
                prediction = compat.prediction_of(model(**inputs))
                evolves = isinstance(latents, torch.Tensor) and isinstance(prediction, torch.Tensor)
                if evolves and prediction.shape == latents.shape:
                    latents = _stepped(scheduler, prediction, timestep, latents, generator)
                else:
                    scheduler.step(torch.zeros(1), timestep, torch.zeros(1))  # the step is counted all the same
        result = latents if isinstance(latents, torch.Tensor) else prediction
        parts: list[torch.Tensor] = []
        mapped(lambda tensor: parts.append(tensor.flatten()) or tensor, result)
        return torch.cat(parts)

    return Subject(model, model, owner, sample, batch)


def _context(model: nn.Module) -> AbstractContextManager[Any]:
    """diffusers' own caches want to be told which pass a call belongs to."""
    return model.cache_context("cond") if hasattr(model, "cache_context") else nullcontext()  # type: ignore[operator]


def _stepped(
    scheduler: Any, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor, generator: Any
) -> torch.Tensor:
    """The next latents; a learned variance is left out."""
    channel = 1 if prediction.ndim == 4 else prediction.ndim - 1
    if prediction.ndim != 5:
        prediction = prediction.narrow(channel, 0, latents.shape[channel])
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return scheduler.step(prediction, timestep, latents, **({"generator": generator} if takes else {})).prev_sample
