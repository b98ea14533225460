"""The demo's diffusers pipeline: class labels to 28x28 grey images in pixel space."""

# Annotations are evaluated here: diffusers reads the types of a pipeline's parts from its signature.

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from sostenuto.compat import diffusers_name
from sostenuto.demo.assets import asset
from sostenuto.demo.network import (
    CLASS_NAMES,
    HEAD_DIM,
    IMAGE_SIZE,
    NULL_CLASS,
    NUM_CLASSES,
    build_denoiser,
    build_scheduler,
)
from sostenuto.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin
    from diffusers.utils.torch_utils import randn_tensor
else:
    _NAMES = ("DiffusionPipeline", "DiTTransformer2DModel", "ImagePipelineOutput", "SchedulerMixin")
    DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin = map(diffusers_name, _NAMES)
    randn_tensor = diffusers_name("randn_tensor", "utils.torch_utils")


class DemoPipeline(DiffusionPipeline):
    """Class-conditional generation with any diffusers scheduler, classifier-free guidance in one batched call.

    Args:
        transformer: the denoiser, ε-prediction, 10 classes and a null class.
        scheduler: any diffusers scheduler.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar = ["latents"]

    transformer: DiTTransformer2DModel
    scheduler: SchedulerMixin

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image per label.

        Args:
            class_labels: labels 0 … 9, see ``sostenuto.demo.network.CLASS_NAMES``.
            num_inference_steps: denoising steps, 1 or more.
            guidance_scale: classifier-free guidance; above 1 the denoiser runs on twice the batch.
            generator: source of the initial noise and of the sampler's own.
            latents: initial noise ``[batch, 1, 28, 28]`` instead of drawing it.
            output_type: ``"pil"``, ``"np"`` (``[batch, 28, 28, 1]`` in ``[0, 1]``), ``"pt"`` (``[batch, 1, 28, 28]`` in
                ``[0, 1]``) or ``"latent"`` (as the sampler leaves them, about ``[-1, 1]``).
            return_dict: whether to return an ``ImagePipelineOutput`` or a tuple.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": …})`` after every step; may return
                changed tensors.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback is given; there is ``latents``.

        Raises:
            InputError: a label is out of range, or another argument makes no sense.
        """
        labels = _labels(class_labels)
        if not labels:
            raise InputError("class_labels is empty: pass at least one label")
        if num_inference_steps < 1:
            raise InputError(f"num_inference_steps must be 1 or more, not {num_inference_steps}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be 'pil', 'np', 'pt' or 'latent', not {output_type!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise InputError(f"the callback can be given {self._callback_tensor_inputs}, not {sorted(unknown)}")

        device, dtype = self._execution_device, self.transformer.dtype
        shape = (len(labels), 1, IMAGE_SIZE, IMAGE_SIZE)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        guided = guidance_scale > 1
        label_input = torch.tensor(labels, device=device)
        if guided:
            label_input = torch.cat([label_input, torch.full_like(label_input, NULL_CLASS)])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        extra = self._extra_step_arguments(generator)
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                model_input = torch.cat([latents] * 2) if guided else latents
                model_input = self.scheduler.scale_model_input(model_input, timestep)
                noise = self.transformer(
                    model_input, timestep=timestep.expand(len(model_input)), class_labels=label_input
                ).sample
                if guided:
                    conditional, unconditional = noise.chunk(2)
                    noise = unconditional + guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(noise, timestep, latents, **extra).prev_sample
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress.update()
        self.maybe_free_model_hooks()
        images = self._postprocess(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _extra_step_arguments(self, generator: Any) -> dict[str, Any]:
        """The generator, for the schedulers whose step draws noise of its own."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    @staticmethod
    def _postprocess(latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays
        return [Image.fromarray((array[..., 0] * 255).round().astype("uint8")) for array in arrays]


def _labels(class_labels: Any) -> list[int]:
    """Checked labels of whatever holds whole numbers: an int, a list, an array or a tensor."""
    values = np.atleast_1d(np.asarray(class_labels))
    if values.size and values.dtype.kind not in "iu":
        raise InputError(f"class labels are whole numbers, not {class_labels!r}")
    for label in values.reshape(-1).tolist():
        if not 0 <= label < NUM_CLASSES:
            names = ", ".join(f"{i} {name}" for i, name in enumerate(CLASS_NAMES))
            raise InputError(f"class label {label} is out of range: there are {names}")
    return values.reshape(-1).tolist()


def load_demo_pipeline() -> DemoPipeline:
    """The demo pipeline with the weights that ship with the package, in float32, with the DDPM scheduler.

    Raises:
        FileNotFoundError: the weights are missing from the installation.
    """
    return _pipeline(asset("denoiser.safetensors"))


def load_trained_pipeline(folder: str | Path) -> DemoPipeline:
    """The pipeline with the weights that ``sostenuto.demo.train`` left in its ``--output``, of whatever depth and width.

    Raises:
        InputError: the folder holds no such weights.
    """
    path = Path(folder) / "ema.safetensors"
    if not path.is_file():
        raise InputError(f"there is no {path}: give the folder that sostenuto.demo.train wrote, or train one")
    return _pipeline(path)


def _pipeline(path: Path) -> DemoPipeline:
    weights = {name: value.float() for name, value in load_file(path).items()}
    blocks = {name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}
    denoiser = build_denoiser(len(blocks), weights["pos_embed.proj.weight"].shape[0] // HEAD_DIM)
    denoiser.load_state_dict(weights)
    pipeline = DemoPipeline(denoiser.eval().requires_grad_(False), build_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
