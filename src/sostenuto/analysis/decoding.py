"""What makes images of latents: the pipeline itself, whatever it packs, scales or shifts on the way to its VAE."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from sostenuto import compat
from sostenuto.clock import Tick
from sostenuto.cost import signature
from sostenuto.engine import Handle, attach
from sostenuto.errors import InputError
from sostenuto.methods import NoCache
from sostenuto.plan import Op
from sostenuto.probe import Prober

_NUM_STEPS = 2  # the fewest that every scheduler has


def image_decoder(pipe: Any, sample: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What turns the latents of a pipeline's sampler into images by its VAE; ``None`` without one.

    Pipelines differ in how they unpack, scale and shift latents before they decode them. So the pipeline is called as it is
    used, for two steps, at the end of each of which its scheduler hands it the latents in question. The network runs once for
    each shape of its inputs, and the text encoders once: what they gave then stands for all later calls.

    Args:
        pipe: a diffusers pipeline.
        sample: calls it to the images, not to latents: ``sample(pipe, generator, num_inference_steps=…)``.

    Returns:
        A function of latents ``[rows, …]`` as the sampler's steps have them. It gives what the VAE does, before anything is
        clipped: ``[rows, channels, height, width]`` about ``[−1, 1]``, or ``[rows, channels, frames, height, width]``.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or not callable(getattr(vae, "decode", None)):
        return None
    known: dict[Any, Any] = {}
    encoded: list[Any] = []

    def predict(handle: Handle, tick: Tick, prober: Prober) -> Any:
        what = tick.pass_index, signature(prober.call.latents)
        if what not in known:
            known[what] = prober.run([Op.COMPUTE] * len(handle.sites))
        return known[what]

    def some(latents: torch.Tensor) -> torch.Tensor:
        """Images of as many latents as one call of the pipeline makes, or of the first ones where there are more."""
        handing, listening = _Handing(pipe.scheduler, latents), _Listening(vae)
        with ExitStack() as stack:
            stack.enter_context(replaced(pipe.scheduler, "step", handing))
            stack.enter_context(replaced(vae, "decode", listening))
            if hasattr(pipe, "encode_prompt"):
                stack.enter_context(replaced(pipe, "encode_prompt", _Remembering(pipe.encode_prompt, encoded)))
            handle = stack.enter_context(attach(pipe, NoCache()))
            handle.driver = lambda tick, prober: predict(handle, tick, prober)
            sample(pipe, torch.Generator().manual_seed(0), num_inference_steps=_NUM_STEPS)
        made = sum(map(len, listening.images))
        if made != handing.rows:
            raise InputError(
                f"the pipeline decodes {made} of its {handing.rows} rows: sample to images, without guidance"
            )
        return torch.cat(listening.images)[: len(latents)]

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        images: list[torch.Tensor] = []
        while (done := sum(map(len, images))) < len(latents):
            images.append(some(latents[done:]))
        return torch.cat(images)

    return decode


class _Handing:
    """A scheduler's step that ends at given latents."""

    def __init__(self, scheduler: Any, latents: torch.Tensor) -> None:
        self._scheduler, self._step, self._latents = scheduler, scheduler.step, latents
        self.__signature__ = inspect.signature(scheduler.step)  # pipelines look whether it takes an eta, or a generator
        self.rows = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Of a copied scheduler, as pipelines have one for the sound beside the pictures: its own step."""
        copied = memo[id(self._scheduler)]
        return partial(type(copied).step, copied)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self._step(*args, **kwargs)
        sample = self.__signature__.bind(*args, **kwargs).arguments["sample"]
        self.rows = len(sample)
        given = self._latents[: self.rows]
        if [size for size in given.shape[1:] if size > 1] == [size for size in sample.shape[1:] if size > 1]:
            given = given.reshape(-1, *sample.shape[1:])  # the network may be given a picture as a video of one frame
        if given.shape[1:] != sample.shape[1:]:
            raise InputError(
                f"latents of shape {list(given.shape[1:])} are not what the sampler's steps have: {list(sample.shape[1:])}"
            )
        given = torch.cat([given, given[-1:].expand(self.rows - len(given), *given.shape[1:])])
        return compat.map_prediction(made, lambda _: given.to(sample.device, sample.dtype))


class _Remembering:
    """A function that is called in the same way by every call of a pipeline: what it gave the first time it gives again."""

    def __init__(self, function: Callable[..., Any], results: list[Any]) -> None:
        self._function, self._results, self._calls = function, results, 0
        self.__signature__ = inspect.signature(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._calls > len(self._results):
            self._results.append(self._function(*args, **kwargs))
        return self._results[self._calls - 1]


class _Listening:
    """A VAE's decoding that keeps the images."""

    def __init__(self, vae: Any) -> None:
        self._decode = vae.decode
        self.images: list[torch.Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self._decode(*args, **kwargs)
        self.images.append(compat.first_tensor(made).float().cpu())
        return made


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object replaced for a while, whether the object or its class has it."""
    restore = compat.place(owner, **{name: value})
    try:
        yield
    finally:
        restore()
