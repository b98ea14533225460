"""Many images of one model, each from a seed and a label (or prompt) of its own, shared among processes and resumable.

The batches are the same for any number of processes: image i is always in the same one, in the same place. For the last bits
of a result depend on the size of the batch (kernels are chosen by shape, on CPUs as on GPUs), and methods that decide while
they run decide for a batch as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sostenuto
from sostenuto import compat
from sostenuto.config import file_digests
from sostenuto.distributed import lockstep
from sostenuto.distributed.folder import complete, one_at_a_time
from sostenuto.distributed.world import world
from sostenuto.errors import InputError
from sostenuto.files import publish, publish_json, tidy
from sostenuto.measured import fingerprint
from sostenuto.methods.base import Method
from sostenuto.pipelines import Conditions, call_arguments, first_output, parameters_of, pipeline_sample
from sostenuto.seeds import noise_seed
from sostenuto.switch import is_switched_off

_LEADING_VALUES = 16  # of every weight, which tell one training of a network from another


@dataclass(frozen=True)
class Images:
    """Which images.

    Attributes:
        num_images: how many, 1 or more.
        conditions: class labels or prompts; image i has number i modulo their number.
        num_inference_steps: steps of the sampler.
        guidance_scale: of classifier-free guidance; ``None`` leaves the pipeline its own.
        seed: of the run; image i has the noise of :func:`~sostenuto.seeds.noise_seed`.
        batch_size: images of one call; the last call may have fewer.
        arguments: further ones of the pipeline's call, plain data by name.
    """

    num_images: int
    conditions: Conditions
    num_inference_steps: int = 50
    guidance_scale: float | None = 1.0
    seed: int = 0
    batch_size: int = 32
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.batch_size < 1 or self.seed < 0 or not self.conditions:
            raise InputError(
                "images need a number and a batch size of 1 or more, a seed of 0 or more, and a label or prompt, not "
                f"{self.num_images}, {self.batch_size}, {self.seed} and {list(self.conditions)[:3]}"
            )

    def batches(self) -> dict[str, range]:
        """The images of each batch, by its name."""
        starts = range(0, self.num_images, self.batch_size)
        return {f"{s:08d}": range(s, min(s + self.batch_size, self.num_images)) for s in starts}

    def condition(self, index: int) -> int | str:
        """The label or prompt of an image."""
        return self.conditions[index % len(self.conditions)]


def sample_images(
    pipe: Any,
    method: Method,
    images: Images,
    output: Path,
    made_with: Any = None,
    *,
    max_cache_bytes: int | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Make what is missing of the images, together with the other processes of the launch and with other launches.

    Args:
        pipe: a pipeline that takes ``class_labels`` or ``prompt``, and a generator for each image; on its device.
        method: what is enabled on it.
        images: which images.
        output: a folder for ``00000000.png`` …, or a file that ends in ``.npz``, in the layout of the ADM evaluator: ``arr_0``
            ``[n, height, width, channels]`` uint8, and ``arr_1`` ``[n]`` int64 with the labels, where there are any. What has
            been done is noted in ``output/batches``, or beside the file in ``output.batches``.
        made_with: plain data that tells what the images depend on besides, such as where the model came from.
        max_cache_bytes: as for :func:`~sostenuto.enable`.
        show_progress: show a bar of batches, on the main process.

    Returns:
        ``num_images``, ``num_batches``, ``seconds`` (of sampling, summed over the batches), ``macs``, ``macs_uncached`` and
        ``ideal_speedup``; the same on every process.

    Raises:
        InputError: the folder holds images of another model, method or setting, or the pipeline makes videos.
    """
    if parameters_of(pipe).keys() & {"num_frames", "video_length", "frames"}:
        raise InputError(
            f"{type(pipe).__name__} makes videos, and this writes images: generate without a number of images for a picture "
            "of the middle frames, or call the pipeline in Python under sostenuto.enable"
        )
    shared = {"guidance_scale": images.guidance_scale, "arguments": images.arguments}
    call_arguments(pipe, images.conditions, **shared)  # refuses before anything is written
    store = _Npz(output) if output.suffix == ".npz" else _Pngs(output)
    bound = {"max_cache_bytes": max_cache_bytes, "model": made_with}
    _check_run(store, _identity(pipe, method, images) | bound)
    batches = images.batches()
    store.forget_lost(batches)
    with sostenuto.enable(pipe, method, max_cache_bytes=max_cache_bytes) as handle:

        def do(name: str) -> dict[str, Any]:
            indices, began = batches[name], time.perf_counter()
            conditions = [images.condition(i) for i in indices]
            sample = pipeline_sample(pipe, conditions, output_type="np", **shared)
            generators = [torch.Generator().manual_seed(noise_seed(images.seed, i)) for i in indices]
            made = first_output(sample(pipe, generators, images.num_inference_steps))
            seconds = time.perf_counter() - began
            store.put(name, indices, _bytes_of(made))
            stats = handle.stats
            return {
                "images": len(indices),
                "seconds": seconds,
                "macs": stats.macs,
                "macs_uncached": stats.macs_uncached,
            }

        records = complete(store.folder, list(batches), do, "sample", show_progress=show_progress)
    if world().is_main:
        store.finish(batches, images)
    totals = {key: sum(record[key] for record in records) for key in ("seconds", "macs", "macs_uncached")}
    return {
        "num_images": sum(record["images"] for record in records),
        "num_batches": len(records),
        **totals,
        "ideal_speedup": totals["macs_uncached"] / totals["macs"]
        if totals["macs"]
        else 1.0,  # where it is switched off
    }


def _bytes_of(images: Any) -> np.ndarray:
    """``[n, height, width, channels]`` in [0, 1] as uint8, rounded as diffusers does."""
    images = np.asarray(images)
    if images.ndim != 4:
        raise InputError(f"the pipeline returned arrays {list(images.shape)}, not images [n, height, width, channels]")
    return (images * 255).round().astype(np.uint8)


def _identity(pipe: Any, method: Method, images: Images) -> dict[str, Any]:
    """What the bytes of the images depend on, as plain data."""
    device = compat.execution_device(next(iter(compat.find_denoisers(pipe).values())))
    return {
        "denoisers": {name: _weights(denoiser) for name, denoiser in compat.find_denoisers(pipe).items()},
        "scheduler": [type(pipe.scheduler).__name__, compat.config_of(pipe.scheduler)],
        "method": "switched off" if is_switched_off() else lockstep.digest(type(method).__name__, method),
        **({"table": files} if (files := file_digests(method)) else {}),
        **vars(images),
        "conditions": hashlib.sha256(json.dumps(list(images.conditions)).encode()).hexdigest(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__, "sostenuto": sostenuto.__version__},
    }


def _weights(denoiser: nn.Module) -> str:
    digest = hashlib.sha256(fingerprint(denoiser).encode())
    for name, weight in (compat.unwrapped(denoiser).state_dict() | dict(compat.weights_of(denoiser))).items():
        leading = weight.flatten()[:_LEADING_VALUES].double().tolist() if weight.dtype.is_floating_point else []
        digest.update(repr((name, list(weight.shape), str(weight.dtype), leading)).encode())
    return digest.hexdigest()


def _check_run(store: _Store, identity: dict[str, Any]) -> None:
    """Refuse to add to what another run made; of processes that begin together the first one says what the run is."""
    path, identity = store.folder / "run.json", json.loads(json.dumps(identity, default=str))
    with one_at_a_time(store.folder / "run.guard"):
        if not path.exists():
            store.check_new()
            publish_json(path, identity)
    known = json.loads(path.read_text(encoding="utf-8"))
    odd = next((key for key in identity if known.get(key) != identity[key]), None)
    if odd is not None:
        raise InputError(
            f"{store.output} holds images of a run with another {odd}: choose another --output, or delete it and "
            f"{store.folder}"
        )


class _Store:
    """Where images are put, and the records of their batches."""

    def __init__(self, output: Path, folder: Path) -> None:
        self.output, self.folder = output, folder

    def files(self, name: str, indices: range) -> list[Path]:
        """The files that a batch consists of."""
        raise NotImplementedError

    def put(self, name: str, indices: range, images: np.ndarray) -> None:
        """Write a batch."""
        raise NotImplementedError

    def check_new(self) -> None:
        """Refuse an output of which nothing is known."""

    def finish(self, batches: dict[str, range], images: Images) -> None:
        """Called by the main process when all batches are there."""
        tidy(self.output)

    def forget_lost(self, batches: dict[str, range]) -> None:
        """Forget that batches were done whose files are gone; files are there before their record is."""
        done = {path.stem for path in self.folder.glob("*.json")} & batches.keys()
        present = self.present()
        for name in done:
            if not present.issuperset(file.name for file in self.files(name, batches[name])):
                (self.folder / f"{name}.json").unlink(missing_ok=True)

    def present(self) -> set[str]:
        """The names of the files that are there."""
        return set(os.listdir(self.output))


class _Pngs(_Store):
    """A folder with a PNG for each image."""

    def __init__(self, output: Path) -> None:
        if output.suffix or output.is_file():
            raise InputError(f"{output} can't hold many images: name a folder, or a file that ends in .npz")
        super().__init__(output, output / "batches")

    def files(self, name: str, indices: range) -> list[Path]:
        return [self.output / f"{index:08d}.png" for index in indices]

    def put(self, name: str, indices: range, images: np.ndarray) -> None:
        from PIL import Image

        def write(path: Path, image: np.ndarray) -> None:
            with publish(path) as partial:
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial, "PNG")

        with ThreadPoolExecutor() as pool:  # encoding large images takes longer than some networks
            list(pool.map(write, self.files(name, indices), images))


class _Npz(_Store):
    """One ``.npz`` file; until all batches are there, a ``.npy`` file for each."""

    def __init__(self, output: Path) -> None:
        super().__init__(output, output.with_name(f"{output.name}.batches"))

    def check_new(self) -> None:
        if self.output.exists():
            raise InputError(f"{self.output} exists and no run of this command made it: choose another --output")

    def files(self, name: str, indices: range) -> list[Path]:
        return [self.folder / f"{name}.npy"]

    def put(self, name: str, indices: range, images: np.ndarray) -> None:
        with publish(self.folder / f"{name}.npy") as partial:
            np.save(partial, images)

    def forget_lost(self, batches: dict[str, range]) -> None:
        with one_at_a_time(self.folder / "run.guard"):  # another process may be putting the parts together
            super().forget_lost({} if self.output.exists() else batches)

    def present(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.npy")}

    def finish(self, batches: dict[str, range], images: Images) -> None:
        with one_at_a_time(self.folder / "run.guard"):
            if not self.output.exists():
                with publish(self.output) as partial:
                    self._assemble(partial, batches, images)
            for left in (*self.folder.glob("*.npy"), *self.output.parent.glob(f".partial-*-{self.output.name}")):
                left.unlink(missing_ok=True)

    def _assemble(self, path: Path, batches: dict[str, range], images: Images) -> None:
        """What ``numpy.savez`` would write, from one part after the other: all of them may be more than memory holds."""
        parts = [self.folder / f"{name}.npy" for name in batches]
        shape = (images.num_images, *np.lib.format.open_memmap(parts[0], mode="r").shape[1:])
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(np.lib.format.open_memmap(part, mode="r").tobytes())
            if not isinstance(images.conditions[0], str):
                labels = np.array([images.condition(i) for i in range(images.num_images)], dtype=np.int64)
                with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, labels, allow_pickle=False)
