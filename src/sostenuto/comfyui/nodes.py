"""The nodes: a method by its name or by its configuration file, a calibration that makes one, and what a sampling did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from sostenuto.comfyui.caching import Caching, patched, wrapper_of
from sostenuto.comfyui.calibrating import METHODS, Calibrating
from sostenuto.config import Config, file_digests, load_config, parse_method
from sostenuto.errors import ConfigError, SostenutoError
from sostenuto.methods import available_methods

_MIB = 2**20
_CATEGORY = "model_patches/sostenuto"


class SostenutoCache:
    """A model that reuses features between the steps of its sampling, by a method's name."""

    CATEGORY: ClassVar[str] = _CATEGORY
    FUNCTION: ClassVar[str] = "apply"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    DESCRIPTION: ClassVar[str] = (
        "Samples a diffusion transformer faster by feature caching. Put it last before the sampler."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets and widgets, as ComfyUI asks for them."""
        limit = {"default": 0, "min": 0, "max": 2**20, "tooltip": "Most memory for kept features; 0: no limit."}
        parameters = {"default": "{}", "multiline": True, "tooltip": 'The parameters as JSON, such as {"interval": 3}.'}
        return {
            "required": {
                "model": ("MODEL",),
                "method": ([name for name in available_methods() if name != "none"], {"default": "fora"}),
                "parameters": ("STRING", parameters),
                "max_cache_mib": ("INT", limit),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, method: str | None, parameters: str | None, max_cache_mib: int | None) -> bool | str:
        """True, or what is wrong with the widgets: ComfyUI shows it before anything runs.

        What comes from another node is None here, and checked when it is there.
        """
        if method is None or parameters is None or max_cache_mib is None:
            return True
        try:
            _config(method, parameters, max_cache_mib)
        except SostenutoError as error:
            return str(error)
        return True

    def apply(self, model: Any, method: str, parameters: str = "{}", max_cache_mib: int = 0) -> tuple[Any]:
        """The patched model.

        Raises:
            ConfigError, MethodError, TableError: the parameters are wrong.
        """
        return (patched(model, Caching(_config(method, parameters, max_cache_mib))),)


class SostenutoConfig:
    """The same by a configuration file, which may also combine methods."""

    CATEGORY: ClassVar[str] = _CATEGORY
    FUNCTION: ClassVar[str] = "apply"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    DESCRIPTION: ClassVar[str] = (
        "Samples by a sostenuto configuration file (.json or .yaml). Put it last before the sampler."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets and widgets, as ComfyUI asks for them."""
        return {"required": {"model": ("MODEL",), "path": ("STRING", {"default": "sostenuto.json"})}}

    @classmethod
    def VALIDATE_INPUTS(cls, path: str | None) -> bool | str:
        """True, also where another node gives the path, or what is wrong with the file."""
        if path is None:
            return True
        try:
            load_config(path)
        except SostenutoError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, path: str | None, **_: Any) -> str:
        """The contents of the file and of those that it names: ComfyUI runs the node anew when they change."""
        if path is None or not Path(path).is_file():  # another node gives it, whose own change ComfyUI sees
            return ""
        text = Path(path).read_text(encoding="utf-8")
        try:
            measured = file_digests(load_config(path).method)
        except SostenutoError:
            measured = []
        return " ".join([text, *measured])

    def apply(self, model: Any, path: str) -> tuple[Any]:
        """The patched model.

        Raises:
            ConfigError, MethodError, TableError: the file is wrong.
        """
        return (patched(model, Caching(load_config(path))),)


class SostenutoCalibrate:
    """A model whose next sampling measures what a method needs, and writes it as a configuration file."""

    CATEGORY: ClassVar[str] = _CATEGORY
    FUNCTION: ClassVar[str] = "apply"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    DESCRIPTION: ClassVar[str] = (
        "The sampling behind it measures what the method needs, for Sostenuto Cache (from a file)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets and widgets, as ComfyUI asks for them."""
        options = {"default": "{}", "multiline": True, "tooltip": 'The options as JSON, such as {"alpha": 0.1}.'}
        samples = {"default": 1, "min": 1, "max": 64, "tooltip": "Rows to measure on, of noise of their own."}
        return {
            "required": {
                "model": ("MODEL",),
                "method": ([*METHODS], {"default": METHODS[0]}),
                "options": ("STRING", options),
                "samples": ("INT", samples),
                "name": ("STRING", {"default": "calibrated", "tooltip": "Of the file in the folder sostenuto."}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, method: str | None, options: str | None, samples: int | None, name: str | None
    ) -> bool | str:
        """True, also where another node gives some of them, or what is wrong with the widgets."""
        if method is None or options is None or samples is None or name is None:
            return True
        try:
            Calibrating(method, _object(options), samples, name)
        except SostenutoError as error:
            return str(error)
        return True

    def apply(self, model: Any, method: str, options: str, samples: int, name: str) -> tuple[Any]:
        """The patched model.

        Raises:
            ConfigError, MethodError: an option or the name is wrong.
        """
        return (patched(model, Calibrating(method, _object(options), samples, name)),)


class SostenutoReport:
    """What the sampling that made a latent did, as text."""

    CATEGORY: ClassVar[str] = _CATEGORY
    FUNCTION: ClassVar[str] = "report"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("LATENT", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("samples", "report")
    DESCRIPTION: ClassVar[str] = "Steps, speed-up by multiply-accumulates and memory of the sampling before it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets, as ComfyUI asks for them; the latent makes it wait for the sampler."""
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",)}}

    def report(self, model: Any, samples: Any) -> tuple[Any, str]:
        """The latent unchanged, and the report."""
        wrapper = wrapper_of(model)
        return samples, "this model has no sostenuto node" if wrapper is None else wrapper.report


def _config(method: str, parameters: str, max_cache_mib: int) -> Config:
    return Config(parse_method({**_object(parameters), "name": method}, Path.cwd()), max_cache_mib * _MIB or None)


def _object(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text.strip() or "{}")
    except ValueError as error:
        raise ConfigError(f'the parameters are no JSON, such as {{"interval": 3}}: {error}') from None
    if not isinstance(given, dict) or "name" in given:
        raise ConfigError(f'the parameters are a JSON object of parameters, such as {{"interval": 3}}, not {text}')
    return given


NODE_CLASS_MAPPINGS = {
    "SostenutoCache": SostenutoCache,
    "SostenutoConfig": SostenutoConfig,
    "SostenutoCalibrate": SostenutoCalibrate,
    "SostenutoReport": SostenutoReport,
}
"""The nodes by the names that workflows hold."""

NODE_DISPLAY_NAME_MAPPINGS = {
    "SostenutoCache": "Sostenuto Cache",
    "SostenutoConfig": "Sostenuto Cache (from a file)",
    "SostenutoCalibrate": "Sostenuto Calibrate",
    "SostenutoReport": "Sostenuto Report",
}
"""What users see of them."""
