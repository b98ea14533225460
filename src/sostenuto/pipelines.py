"""How a pipeline is called: with labels or prompts, guidance and size, as its class takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sostenuto.errors import InputError

Conditions = Sequence[int | str]
"""What is generated: class labels, or prompts; a row of the batch each."""

PROMPT = "a photo of a piano"
"""What is generated where any prompt will do."""

_IN_PYTHON = "in Python pass a sample(pipe, generator, num_inference_steps=…) that calls it"


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call by name."""
    return inspect.signature(type(pipe).__call__).parameters


def are_prompts(conditions: Conditions) -> bool:
    """Whether they are prompts, not labels."""
    return isinstance(next(iter(conditions), None), str)


def suited(pipe: Any, labels: Sequence[int], prompts: Sequence[str] = (PROMPT,)) -> Conditions:
    """Those of both that the pipeline takes."""
    taken = parameters_of(pipe)
    return prompts if "prompt" in taken and "class_labels" not in taken else labels


def call_arguments(
    pipe: Any,
    conditions: Conditions,
    guidance_scale: float | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a pipeline is called with, besides the steps, the generator and the type of output.

    Args:
        pipe: a diffusers pipeline.
        conditions: class labels or prompts. Of labels a pipeline that takes neither (unconditional) is given their number.
        guidance_scale: of classifier-free guidance; ``None`` leaves the pipeline its own.
        arguments: others by name, such as ``height`` and ``num_frames``.

    Raises:
        InputError: the pipeline takes other conditions, lacks an argument, or needs one that is not given.
    """
    kind, taken = type(pipe).__name__, parameters_of(pipe)
    given = {**_conditioning(kind, taken, conditions), **(arguments or {})}
    if guidance_scale is not None and ("guidance_scale" in taken or guidance_scale != 1):  # 1 is none
        given["guidance_scale"] = guidance_scale
    unknown = [name for name in given if not _accepts(taken, name)]
    if unknown:
        raise InputError(f"{kind} has no argument {unknown[0]!r}; it takes {', '.join([*taken][1:])}")
    ours = {"num_inference_steps", "generator", "output_type"}
    missing = [
        name
        for name, parameter in [*taken.items()][1:]  # the first is self
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in given.keys() | ours
    ]
    if missing:
        raise InputError(f"{kind} needs {' and '.join(missing)}, too: {_IN_PYTHON}")
    return given


def _accepts(taken: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def _conditioning(kind: str, taken: Mapping[str, Any], conditions: Conditions) -> dict[str, Any]:
    if are_prompts(conditions):
        if "prompt" not in taken:
            raise InputError(f"{kind} takes no prompts: give class labels where it takes those")
        return {"prompt": conditions[0] if len(conditions) == 1 else [*conditions]}
    number = {"batch_size": len(conditions)} if "batch_size" in taken else {}
    if "class_labels" in taken:
        return {"class_labels": [*conditions], **number}
    if "prompt" in taken:
        raise InputError(f"{kind} takes prompts in place of class labels: give some (--prompt, --prompts)")
    if not number:
        raise InputError(f"{kind} takes neither class labels nor prompts: {_IN_PYTHON}")
    return number


def pipeline_sample(
    pipe: Any,
    conditions: Conditions,
    *,
    guidance_scale: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    output_type: str = "latent",
) -> Callable[..., Any]:
    """A ``sample(pipe, generator, num_inference_steps)`` that calls a pipeline; arguments and errors of :func:`call_arguments`.

    It returns what the pipeline does.
    """
    given = call_arguments(pipe, conditions, guidance_scale, arguments)
    if _accepts(parameters_of(pipe), "output_type"):
        given["output_type"] = output_type

    def sample(pipe: Any, generator: Any, num_inference_steps: int) -> Any:
        return pipe(**given, num_inference_steps=num_inference_steps, generator=generator)

    return sample


def first_output(made: Any) -> Any:
    """The images, frames or latents in what a pipeline returned."""
    return next(iter(made.values())) if hasattr(made, "values") else made[0]


def as_images(output: Any) -> torch.Tensor:
    """Images or frames ``[n, c, h, w]`` of what a pipeline returned: a tensor, an array ``[…, h, w, c]``, or a list of them."""
    if isinstance(output, (list, tuple)):
        output = torch.stack([as_images(part) for part in output])
    images = output if isinstance(output, torch.Tensor) else torch.as_tensor(output).movedim(-1, -3)
    return images.reshape(-1, *images.shape[-3:]).float() if images.ndim >= 3 else images.float()


def image_sample(sample: Callable[..., Any], num_images: int) -> Callable[..., torch.Tensor]:
    """A ``sample`` of so many images ``[n, c, h, w]``, of videos frames, by as many calls of another one as that takes."""

    def images(pipe: Any, generator: Any, num_inference_steps: int) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        while sum(map(len, parts)) < num_images:
            parts.append(as_images(first_output(sample(pipe, generator, num_inference_steps))))
        return torch.cat(parts)[:num_images]

    return images


def pictures(made: Any) -> list[Any]:
    """PIL images of a pipeline's images or arrays ``[height, width, channels]`` in [0, 1]; of each video the middle frame."""
    return [_picture(image) for image in first_output(made)]


def _picture(image: Any) -> Any:
    if hasattr(image, "save"):
        return image
    if isinstance(image, list) or image.ndim == 4:
        return _picture(image[len(image) // 2])
    from PIL import Image

    return Image.fromarray((image * 255).round().astype("uint8"))
