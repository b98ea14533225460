"""Where the weights of a network lie: given by a path, or in the user's cache; nothing is downloaded here.

Files are read without unpickling code: safetensors, or torch's format restricted to tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sostenuto.errors import InputError, MetricError


@dataclass(frozen=True)
class Weights:
    """What a network's weights are called.

    Attributes:
        name: the word before ``=`` in ``--weights``.
        files: names under which the file lies in torch's cache of checkpoints.
        origin: whose release it is, in words.
        folder: whether a folder is expected rather than a file; ``None``: either.
    """

    name: str
    files: tuple[str, ...]
    origin: str
    folder: bool | None = False


INCEPTION = Weights(
    "inception",
    ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    "the release files of torch-fidelity or pytorch-fid; it is the Inception-v3 of the published FID and of ADM's evaluator",
)
ALEXNET = Weights("alexnet", ("alexnet-owt-7be5be79.pth",), "torchvision's AlexNet_Weights.IMAGENET1K_V1")
VGG16 = Weights("vgg16", ("vgg16-397923af.pth",), "torchvision's VGG16_Weights.IMAGENET1K_V1")
CLIP = Weights(
    "clip", ("openai/clip-vit-large-patch14",), "the model of that name on the Hugging Face hub", folder=True
)
IMAGE_REWARD = Weights(
    "image-reward", ("ImageReward.pt", "med_config.json"), "THUDM/ImageReward on the Hugging Face hub", folder=True
)
ALL = {weights.name: weights for weights in (INCEPTION, ALEXNET, VGG16, CLIP, IMAGE_REWARD)}


def parse_weights(words: tuple[str, ...]) -> dict[str, Path]:
    """``("inception=/some/file.pth", …)`` as paths by name.

    Raises:
        InputError: a word is not NAME=PATH, the name is unknown, or nothing lies at the path.
    """
    given: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in ALL:
            raise InputError(f"--weights takes NAME=PATH with a name of {', '.join(ALL)}, not {word!r}")
        given[name] = path
    return paths_of(given)


def paths_of(given: Mapping[str, str | Path]) -> dict[str, Path]:
    """Weights by name as paths; unknown names and paths where nothing lies are refused before any work is done.

    Raises:
        InputError: so it is.
    """
    paths = {name: Path(path).expanduser() for name, path in given.items()}
    for name, path in paths.items():
        if name not in ALL:
            raise InputError(f"no metric takes weights called {name!r}, only {', '.join(ALL)}")
        what = {True: "folder", False: "file", None: "file or a folder"}[ALL[name].folder]
        if not {"folder": path.is_dir, "file": path.is_file}.get(what, path.exists)():
            raise InputError(f"the weights of {name} should be a {what}: {path}")
    return paths


def find(weights: Weights, given: Mapping[str, Path]) -> Path:
    """The file of a network's weights: the one given, or the one in torch's cache.

    Raises:
        MetricError: there is none; the message says what to fetch and how to pass it.
    """
    if weights.name in given:
        return given[weights.name]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in weights.files:
        if (cache / name).is_file():
            return cache / name
    raise missing(weights)


def missing(weights: Weights) -> MetricError:
    """What to tell a user who hasn't got the weights."""
    what = "FOLDER" if weights.folder else "FILE"
    return MetricError(
        f"the weights of {weights.name} are not at hand: fetch {weights.files[0]} ({weights.origin}) and pass "
        f"--weights {weights.name}={what}"
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file or of a torch checkpoint that holds nothing but tensors.

    Raises:
        MetricError: it is neither, or would run code when read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise MetricError(f"{path} can't be read as weights: {str(error).splitlines()[0]}") from error
    except Exception as error:  # safetensors' own, which it doesn't derive from a builtin
        raise MetricError(f"{path} can't be read as weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise MetricError(f"{path} can't be read as weights: it holds more than tensors by name")
    return state


@contextlib.contextmanager
def torchvision_finds(weights: Weights, given: Mapping[str, Path]) -> Iterator[None]:
    """Within, torchvision loads these weights from a cache of one file, and so never from anywhere else.

    What it finds was read here and written anew, since torchvision would unpickle whatever lies there.
    """
    state = read_state(find(weights, given))
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        torch.save(state, checkpoints / weights.files[0])
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


def digest(path: Path) -> str:
    """First eight hexadecimal digits of a file's SHA-256, as torch puts into names of checkpoints."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()[:8]
