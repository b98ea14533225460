"""Where images come from: a folder, an array in a file, the demo's data set; checked at the start, read in pieces."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sostenuto.errors import InputError
from sostenuto.progress import progress
from sostenuto.quality.arrays import MAX_IMAGE_BYTES, ArrayFile, open_npy, open_npz

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 5


class Source(Protocol):
    """Images that are read in pieces.

    Attributes:
        name: what messages call it.
        identity: digest of what it is made of, to tell whether it is still the same.
        shape: channels, height, width.
        frames: frames of a video, which follow each other; 1 for images.
    """

    name: str
    identity: str
    shape: tuple[int, int, int]
    frames: int

    @property
    def keys(self) -> list[str] | None:
        """A name for each image, by which two folders are matched; ``None`` where images have none."""
        ...

    def __len__(self) -> int:
        """Number of images, or of frames of all videos."""
        ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images ``start … stop``, uint8 ``[n, c, h, w]``.

        Raises:
            InputError: one of them is damaged.
        """
        ...


class ArraySource:
    """The images of an array ``[n, h, w]``, ``[n, h, w, c]`` or ``[n, c, h, w]``, with ``frames`` after ``n`` for videos.

    Args:
        array: uint8 in a file.
        path: that file.
        video: take four dimensions without 1 or 3 channels for grey videos ``[n, frames, h, w]``; five are videos anyway.

    Raises:
        InputError: another type or shape, or no image in it.
    """

    keys = None

    def __init__(self, array: ArrayFile, path: Path, video: bool = False) -> None:
        self.name, self._array = str(path), array
        shape = list(array.shape)
        if array.dtype != np.uint8:
            raise InputError(
                f"{array.path} must hold bytes (uint8, 0 … 255), not {array.dtype}: scale, round and convert it"
            )
        if not 3 <= len(shape) <= 5:
            raise InputError(f"{array.path} must be [n, h, w], [n, h, w, c] or [n, frames, h, w, c], not {shape}")
        self._videos = len(shape) == 5 or (video and _grey_videos(shape))
        self.frames = shape.pop(1) if self._videos else 1
        self._channels_last = len(shape) == 4 and shape[3] in (1, 3)
        if len(shape) == 3:
            self.shape = (1, shape[1], shape[2])
        elif self._channels_last:
            self.shape = (shape[3], shape[1], shape[2])
        elif shape[1] in (1, 3):
            self.shape = (shape[1], shape[2], shape[3])
        else:
            raise InputError(
                f"{array.path} has neither 1 nor 3 channels: its shape is {list(array.shape)}; if it holds grey videos, say "
                "so (--video)"
            )
        self._count = shape[0] * self.frames
        check_size(array.path, self._count, self.shape)
        self.identity = _content(path)

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images ``start … stop``, uint8 ``[n, c, h, w]``."""
        first, last = start // self.frames, -(-stop // self.frames)  # the rows that hold them
        rows = self._array.read(first, last)
        images = torch.from_numpy(rows.copy())
        if self._videos:
            images = images.flatten(0, 1)[start - first * self.frames : stop - first * self.frames]
        if images.ndim == 3:
            return images.unsqueeze(1)
        return images.permute(0, 3, 1, 2).contiguous() if self._channels_last else images


class FolderSource:
    """The pictures of a folder and its subfolders in natural order of their paths (2 before 10), all of one size.

    Args:
        folder: where they lie.
        video: take each folder that holds pictures for a video, and its pictures for the frames.
        show: show a progress bar while they are checked.

    Raises:
        InputError: there are none, some are damaged (they are named), or their sizes differ.
    """

    def __init__(self, folder: Path, video: bool = False, show: bool = False) -> None:
        paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        self._paths = sorted(paths, key=lambda path: _natural(path.relative_to(folder).as_posix()))
        self.name = str(folder)
        if not self._paths:
            raise InputError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
        self.keys = [path.relative_to(folder).with_suffix("").as_posix() for path in self._paths]
        self.frames = self._frames() if video else 1
        self.shape, self.identity = self._examine(show)

    def __len__(self) -> int:
        return len(self._paths)

    def _frames(self) -> int:
        counts: dict[Path, int] = {}
        for path in self._paths:
            counts[path.parent] = counts.get(path.parent, 0) + 1
        if len(set(counts.values())) > 1:
            few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            raise InputError(f"videos differ in length: {few} has {counts[few]} frames and {many} {counts[many]}")
        return next(iter(counts.values()))

    def _examine(self, show: bool) -> tuple[tuple[int, int, int], str]:
        """Look at every file before any work is done: size and type, and whether all of it is there."""
        damaged: list[str] = []
        sizes: dict[tuple[int, int], Path] = {}
        grey, made_of = True, hashlib.sha256()
        with progress(len(self._paths), f"check {self.name}", show and len(self._paths) > 2000) as bar:
            for path, key in zip(self._paths, self.keys, strict=True):
                try:
                    with _opened(path) as picture:
                        _check(picture)
                        sizes.setdefault(picture.size, path)
                        grey = grey and picture.mode in ("L", "LA", "1")
                except ValueError as error:
                    damaged.append(f"{path.name} ({error})")
                made_of.update(f"{key} {_content(path)}\n".encode())
                bar.update()
        if damaged:
            more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
            raise InputError(f"{self.name} has unusable pictures: {', '.join(damaged[:_SHOWN])}{more}")
        if len(sizes) > 1:
            (size, first), (other, second) = list(sizes.items())[:2]
            raise InputError(
                f"the pictures of {self.name} differ in size: {first.name} is {size[0]} x {size[1]} and {second.name} "
                f"{other[0]} x {other[1]}; bring them to one size first"
            )
        width, height = next(iter(sizes))
        shape = (1 if grey else 3, height, width)
        check_size(self.name, len(self._paths), shape)
        return shape, made_of.hexdigest()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images ``start … stop``, uint8 ``[n, c, h, w]``.

        Raises:
            InputError: one was damaged since the folder was looked at; it is named.
        """
        return torch.stack([self._read(path) for path in self._paths[start:stop]])

    def _read(self, path: Path) -> torch.Tensor:
        try:
            with _opened(path) as picture:
                pixels = np.asarray(picture.convert("L" if self.shape[0] == 1 else "RGB")).copy()
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}") from error
        image = torch.from_numpy(pixels)
        return image.unsqueeze(0) if image.ndim == 2 else image.permute(2, 0, 1).contiguous()


class TensorSource:
    """Images that are in memory: uint8 ``[n, c, h, w]``, or videos ``[n, frames, c, h, w]``.

    Raises:
        InputError: another type or shape, or no image in it.
    """

    keys = None

    def __init__(self, images: torch.Tensor, name: str = "images") -> None:
        if images.dtype != torch.uint8 or images.ndim not in (4, 5) or images.shape[-3] not in (1, 3):
            raise InputError(
                f"{name} must be uint8 [n, c, h, w] or [n, frames, c, h, w] with 1 or 3 channels, not {images.dtype} "
                f"{list(images.shape)}"
            )
        self.name, self.frames = name, images.shape[1] if images.ndim == 5 else 1
        self._images = images.flatten(0, 1) if images.ndim == 5 else images
        self.shape = (self._images.shape[1], self._images.shape[2], self._images.shape[3])
        check_size(name, len(self._images), self.shape)
        self.identity = hashlib.sha256(self._images.cpu().numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images ``start … stop``, uint8 ``[n, c, h, w]``."""
        return self._images[start:stop].cpu()


def open_source(where: str | Path | torch.Tensor, video: bool = False, show: bool = False) -> Source:
    """The images of a folder, ``.npz`` (``arr_0``), ``.npy``, ``demo:train``, ``demo:test`` or a tensor.

    With ``video`` each subfolder is a video, and four dimensions, none of them 1 or 3 channels, are grey ones
    ``[n, frames, h, w]``; where there are 1 or 3 frames, give the channel too.

    Raises:
        InputError: there is nothing of the kind, or it is unusable.
    """
    if isinstance(where, torch.Tensor):
        return TensorSource(where.unsqueeze(2) if video and _grey_videos(where.shape) else where)
    if str(where) in ("demo:train", "demo:test"):
        from sostenuto.demo.data import load

        images, _ = load(str(where).removeprefix("demo:"))
        return TensorSource(((images + 1) * 127.5).round().to(torch.uint8), str(where))
    path = Path(where)
    if path.is_dir():
        return FolderSource(path, video, show)
    if not path.is_file():
        raise InputError(f"there is no {path}: give a folder of pictures, an .npz, an .npy, demo:train or demo:test")
    if path.suffix == ".npy":
        return ArraySource(open_npy(path), path, video)
    if path.suffix == ".npz":
        arrays = open_npz(path)
        if "arr_0" not in arrays:
            raise InputError(
                f"{path} has no arr_0 (it has {', '.join(arrays) or 'nothing'}): there are no images in it"
            )
        return ArraySource(arrays["arr_0"], path, video)
    raise InputError(f"{path} is neither a folder of pictures nor an .npz or .npy")


def _content(path: Path) -> str:
    """Digest of what a file holds, the same for every copy of it."""
    digest = hashlib.sha256()
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:  # it has check sums of what it holds
            digest.update(repr([(part.filename, part.CRC, part.file_size) for part in archive.infolist()]).encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _grey_videos(shape: Sequence[int]) -> bool:
    """Whether four dimensions are ``[n, frames, h, w]`` rather than images of 1 or 3 channels."""
    return len(shape) == 4 and not {shape[1], shape[3]} & {1, 3}


def check_size(name: str, count: int, shape: tuple[int, int, int]) -> None:
    """Refuse a source without images, or with such large ones that a batch would not fit.

    Raises:
        InputError: so it is.
    """
    if count < 1 or min(shape) < 1:
        raise InputError(f"{name} holds no images")
    if shape[0] * shape[1] * shape[2] > MAX_IMAGE_BYTES:
        raise InputError(
            f"an image of {name} is {shape[2]} x {shape[1]}: more than {MAX_IMAGE_BYTES} bytes are refused"
        )


def _natural(path: str) -> list[tuple[int, Any]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path) if part]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A picture, refused by its header where Pillow takes it for a decompression bomb."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as picture:
                yield picture
        except Exception as error:  # a damaged picture makes Pillow raise whatever comes
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _check(picture: Any) -> None:
    """Refuse what is not 8-bit grey or RGB, or is damaged.

    Raises:
        Exception: so it is, of whatever kind Pillow raises.
    """
    if picture.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA", "PA"):
        raise ValueError(f"its pixels are {picture.mode}, not 8-bit grey or RGB")
    if "A" in picture.getbands():
        if picture.getchannel("A").getextrema()[0] < 255:
            raise ValueError("it is partly transparent")
    elif picture.format == "PNG":
        picture.verify()  # by its check sums, a hundredth of the time that decoding takes
    else:
        picture.load()  # JPEG and WebP have none: only decoding tells, which is little beside what a network does with it
