"""Arrays of images in ``.npy`` and ``.npz`` files, read in pieces, and the ``.npz`` of ADM's evaluator, read and written.

What a file declares is checked before anything of that size is read; nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from sostenuto.errors import InputError
from sostenuto.files import publish
from sostenuto.quality.metrics import Gaussian

MAX_IMAGE_BYTES = 2**28
"""Largest image or video frame that is read, e.g. 9 459 pixels square in RGB."""
_MAX_FEATURES = 16_384
_BOMB_RATIO = 500
_BOMB_BYTES = 2**30


class ArrayFile:
    """One array in a file: its shape and type are known at once, its rows are read in pieces.

    Args:
        path: what messages call it.
        open_stream: opens the array's bytes, header first, to be closed by whoever holds the last reference.
        size: bytes there are.

    Raises:
        InputError: it is no ``.npy`` array, holds Python objects, or declares another size than it has.
    """

    def __init__(self, path: str, open_stream: Callable[[], IO[bytes]], size: int) -> None:
        self.path = path
        self._stream: IO[bytes] | None = None
        self._open = open_stream
        with _readable(path), open_stream() as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"it has version {version} of the format")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, in_columns, self.dtype = read(stream, max_header_size=10_000)
            self._offset = stream.tell()
        if self.dtype.hasobject:
            raise InputError(f"{path} holds pickled Python objects, which are never read: save a plain array")
        declared = prod(self.shape) * self.dtype.itemsize
        if in_columns and len(self.shape) > 1:
            raise InputError(f"{path} is in Fortran order: save numpy.ascontiguousarray of it")
        if any(length < 0 for length in self.shape) or declared + self._offset != size:
            raise InputError(
                f"{path} declares {declared} bytes of shape {list(self.shape)} and has {size - self._offset}"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start … stop`` of the first dimension.

        Raises:
            InputError: the file is damaged there.
        """
        row = prod(self.shape[1:]) * self.dtype.itemsize
        with _readable(self.path):
            if self._stream is None:  # kept open: a compressed stream would begin anew for every piece
                self._stream = self._open()
            self._stream.seek(self._offset + start * row)
            content = self._stream.read((stop - start) * row)
        if len(content) != (stop - start) * row:
            raise InputError(f"{self.path} ends before image {stop}")
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """A damaged or unreadable file as an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file makes numpy and zipfile raise whatever comes
        raise InputError(f"{path} can't be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def open_npy(path: Path) -> ArrayFile:
    """The array of a ``.npy`` file.

    Raises:
        InputError: see :class:`ArrayFile`.
    """
    with _readable(str(path)):
        size = path.stat().st_size
    return ArrayFile(str(path), lambda: path.open("rb"), size)


def open_npz(path: Path) -> dict[str, ArrayFile]:
    """The arrays of a ``.npz`` file by name; compressed ones are unpacked piece by piece.

    Raises:
        InputError: see :class:`ArrayFile`; or it would unpack to far more than it is.
    """
    arrays: dict[str, ArrayFile] = {}
    with _readable(str(path)), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if not member.filename.endswith(".npy"):
            continue
        if member.file_size > max(_BOMB_BYTES, _BOMB_RATIO * member.compress_size):
            raise InputError(f"{path} would unpack {member.compress_size} bytes to {member.file_size}: refused")
        name = member.filename.removesuffix(".npy")
        arrays[name] = ArrayFile(f"{path} ({name})", _member(path, member.filename), member.file_size)
    return arrays


def _member(path: Path, name: str) -> Callable[[], IO[bytes]]:
    return lambda: zipfile.ZipFile(path).open(name)  # the stream keeps the archive's file open until it is closed


def read_moments(arrays: Mapping[str, ArrayFile], mean: str, cov: str) -> Gaussian | None:
    """The Gaussian that ``mu`` and ``sigma`` (or ``mu_s`` and ``sigma_s``) of ADM's reference files describe.

    Returns:
        Mean and covariance in float64, of an unknown number of images; ``None`` where the file has neither.

    Raises:
        InputError: one is missing, they don't fit each other, are no floating-point numbers or not finite.
    """
    if mean not in arrays and cov not in arrays:
        return None
    if mean not in arrays or cov not in arrays:
        raise InputError(f"a reference needs both {mean} and {cov}")
    first, second = arrays[mean], arrays[cov]
    width = prod(first.shape)
    if len(first.shape) != 1 or second.shape != (width, width) or not 1 <= width <= _MAX_FEATURES:
        raise InputError(
            f"{first.path} and {cov} have shapes {list(first.shape)} and {list(second.shape)}, not [d] and [d, d]"
        )
    if first.dtype.kind != "f" or second.dtype.kind != "f":
        raise InputError(f"{first.path} and {cov} must be floating-point numbers, not {first.dtype} and {second.dtype}")
    mu, sigma = (torch.from_numpy(array.read(0, width).astype(np.float64)) for array in (first, second))
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise InputError(f"{first.path} and {cov} hold values that are not finite")
    return Gaussian(mu, sigma, 0)


def write_npz(
    path: Path, images: Iterator[np.ndarray], shape: tuple[int, ...], others: Mapping[str, np.ndarray]
) -> None:
    """Write the ``.npz`` of ADM's evaluator, a piece at a time; the file appears when it is complete.

    Args:
        path: the file.
        images: pieces of ``arr_0``, uint8, together of ``shape``.
        shape: ``[n, h, w, 3]``.
        others: further arrays by name, such as ``mu`` and ``sigma``.
    """
    header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with publish(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for piece in images:
                stream.write(np.ascontiguousarray(piece, np.uint8).tobytes())
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
