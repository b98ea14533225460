"""Which network turns images into features: the one protocol, and the networks that can be chosen by name."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sostenuto.errors import InputError, MetricError
from sostenuto.quality import weights as weights_

SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Features:
    """What a network sees in ``n`` images.

    Attributes:
        features: ``[n, d]`` float32.
        logits: ``[n, classes]`` float32, or ``None`` where it has no classes.
        spatial: ``[n, s]`` float32, features that keep where things are, or ``None``.
    """

    features: torch.Tensor
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None


class FeatureNetwork(Protocol):
    """What a feature network offers.

    Attributes:
        name: of the network and its weights; numbers of different names are not comparable.
        num_features: ``d``.
    """

    name: str
    num_features: int

    def extract(self, images: torch.Tensor) -> Features:
        """Features of images ``[n, c, h, w]``, uint8.

        Raises:
            InputError: images of this size or number of channels are not for this network.
        """
        ...


def as_it_is(device: str) -> torch.autocast:
    """Full precision for a network that judges, whatever that of the network that is judged: numbers stay comparable."""
    return torch.autocast(torch.device(device).type, enabled=False)


class Inception:
    """Inception-v3 of 2015, of the published FID: torch-fidelity's network, which resizes as TensorFlow did.

    Features are the 2048 of the last pooling; logits are without bias and the spatial features the first seven channels of
    ``mixed_6`` (17 × 17), position by position (row, column, channel), as in ADM's evaluator.

    Args:
        path: its state dict: torch-fidelity's or pytorch-fid's file, or the same as safetensors.
        device: where it runs.

    Raises:
        MetricError: torch-fidelity is not installed, or the file holds other weights.
    """

    num_features = 2048

    def __init__(self, path: Path, device: str = "cpu") -> None:
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            raise MetricError(
                "Inception-v3 needs the packages torch-fidelity and torchvision, the latter of the same build as torch: "
                f"pip install torch-fidelity torchvision ({str(error).splitlines()[0]})"
            ) from error
        state = io.BytesIO()
        torch.save(weights_.read_state(path), state)  # torch-fidelity unpickles what it is given
        state.seek(0)
        try:
            network: Any = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=state
            )
        except RuntimeError as error:
            raise MetricError(f"{path} does not hold the weights of {weights_.INCEPTION.files[0]}") from error
        self.name = f"inception-{weights_.digest(path)}"
        self.device = device
        self._network = network.to(device)
        self._spatial: list[torch.Tensor] = []
        # The block's first output channels are those of its 1×1 branch, TensorFlow's mixed_6/conv.
        network.Mixed_6d.register_forward_hook(lambda _, __, out: self._spatial.append(out[:, :SPATIAL_CHANNELS]))

    @torch.inference_mode()
    def extract(self, images: torch.Tensor) -> Features:
        """Features of images ``[n, c, h, w]``, uint8, grey (taken for RGB) or RGB of any size."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        self._spatial.clear()
        with as_it_is(self.device):
            features, logits = self._network(images.to(self.device))
        spatial = self._spatial.pop().permute(0, 2, 3, 1)  # TensorFlow's order, in which ADM's moments are published
        return Features(features.cpu(), logits.cpu(), spatial.flatten(1).float().cpu())


def _inception(given: Mapping[str, Path], device: str) -> FeatureNetwork:
    return Inception(weights_.find(weights_.INCEPTION, given), device)


def _demo(given: Mapping[str, Path], device: str) -> FeatureNetwork:
    return importlib.import_module(
        "sostenuto.demo.judge"
    ).DemoFeatures()  # the demo knows of this package, not the reverse


Loader = Callable[[Mapping[str, Path], str], FeatureNetwork]
_LOADERS: dict[str, Loader] = {"inception": _inception, "demo": _demo}
BUILT_IN = tuple(_LOADERS)
"""Names of networks whose own names begin with these."""


def register_network(name: str, load: Loader, weights: Sequence[str] = ()) -> None:
    """Make a feature network of one's own available by name.

    Args:
        name: what ``network=`` and ``--network`` are given.
        load: makes the network from the paths of ``--weights`` by name and the device.
        weights: the names of those that it takes, where it takes any: files or folders.

    Raises:
        InputError: the name is taken.
    """
    if name in _LOADERS or name == "auto":
        raise InputError(f"there is a feature network {name!r} already")
    _LOADERS[name] = load
    for given in weights:
        weights_.ALL.setdefault(given, weights_.Weights(given, (), f"those of the network {name!r}", folder=None))


def available_networks() -> tuple[str, ...]:
    """Names that :func:`load_network` takes."""
    return tuple(_LOADERS)


def load_network(name: str, given: Mapping[str, Path], shape: tuple[int, int, int], device: str) -> FeatureNetwork:
    """The network of a name; ``"auto"`` is the demo's for 28 × 28 images and Inception for all others.

    Raises:
        InputError: there is no such network.
        MetricError: its package or weights are not at hand.
    """
    if name == "auto":
        name = "demo" if shape[1:] == (28, 28) else "inception"
    if name not in _LOADERS:
        raise InputError(f"there is no feature network {name!r}; there are {', '.join(_LOADERS)} and auto")
    return _LOADERS[name](given, device)
