"""Tiny networks of the classes that diffusers exports: for tests, examples and ``sostenuto models --check``."""

from __future__ import annotations

from itertools import chain

from sostenuto.zoo import cogvideox, flux, hunyuan, ltx, lumina, pixart, wan
from sostenuto.zoo.tiny import TinyModel

TINY_MODELS: dict[str, TinyModel] = {
    model.name: model
    for model in chain.from_iterable(group.MODELS for group in (pixart, flux, hunyuan, cogvideox, wan, ltx, lumina))
}
"""All of them, by the name of their class."""

UNBUILT: dict[str, str] = {**ltx.UNBUILT}
"""Classes that can't be built tiny, with the reason."""

__all__ = ["TINY_MODELS", "UNBUILT", "TinyModel"]
