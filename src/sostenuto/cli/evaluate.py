"""``sostenuto evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import tyro

from sostenuto.cli.common import device_of, read_prompts, write_json
from sostenuto.errors import InputError

if TYPE_CHECKING:
    from sostenuto.quality.evaluate import Evaluation
    from sostenuto.quality.statistics import Statistics


@dataclass(frozen=True)
class Evaluate:
    """Measure how good images are: distance to real ones, fidelity to the uncached ones, agreement with prompts."""

    shared: ClassVar[bool] = True  # among the processes of a launch

    samples: tyro.conf.Positional[tuple[str, ...]]
    """A folder of pictures, an .npz (arr_0) or .npy, demo:train or demo:test; or the .safetensors files of --statistics."""
    reference: str | None = None
    """Real images in any of these forms, an .npz of ADM's evaluator (mu, sigma, mu_s, sigma_s), or demo:train or demo:test."""
    paired: str | None = None
    """The same images without caching, in the same order: for PSNR, SSIM, LPIPS, DISTS and CLIP-I."""
    prompts: Path | None = None
    """A text file with one prompt a line, in the order of the images: for CLIP score and ImageReward. Of fewer prompts the same
    ones go over and over, in whole rounds."""
    metrics: tuple[str, ...] = ()
    """Which metrics, such as FID KID PSNR; all of them by default."""
    network: str = "auto"
    """The feature network: inception, demo, or auto, which takes the demo's for 28 x 28 images."""
    weights: tuple[str, ...] = ()
    """Weights that don't lie in the caches of their libraries, as NAME=PATH: inception, alexnet, vgg16, clip, image-reward."""
    batch_size: int = 100
    """Images that go through a network at once."""
    statistics: Path | None = None
    """Keep what is known of the images in this .safetensors file; an interrupted run goes on from it."""
    shard: tuple[int, int] = (0, 1)
    """This process's part of the batches and the number of parts, each with a --statistics of its own."""
    video: bool = False
    """Each subfolder is a video, its pictures are the frames; an array [n, frames, h, w] holds grey videos."""
    device: str = "auto"
    """Where networks run: cpu, cuda, or auto."""
    write_npz: Path | None = None
    """Also write the images as the .npz of ADM's evaluator."""
    write_moments: bool = False
    """In that file also the moments by Inception, as in a file that is a reference: where it has them ADM's evaluator takes
    them for FID and sFID in place of its own network's."""
    json: Path | None = None
    """Write the numbers to this file."""

    def run(self) -> None:
        """Evaluate, print a table, write what was asked for."""
        from sostenuto.distributed.world import gather, world
        from sostenuto.errors import MetricError
        from sostenuto.quality.evaluate import evaluate
        from sostenuto.quality.weights import parse_weights

        if not self.samples:
            raise InputError("name what to evaluate: a folder of pictures, an .npz or an .npy")
        if self.shard[1] > 1 and self.statistics is None:
            raise InputError("a part of the images is kept in a file of its own: give --statistics FILE.safetensors")
        if self.statistics is not None and self.statistics.suffix != ".safetensors":
            raise InputError(f"--statistics writes a .safetensors file, not {self.statistics.name}")
        launch = world()
        if self.shard[1] > 1 and launch.size > 1:
            raise InputError("the processes of a launch share the images by themselves: leave out --shard")
        first, *more = self.samples
        if self.write_npz is not None and (more or first.endswith(".safetensors")):
            raise InputError("--write-npz needs the images themselves, not statistics")
        if self.write_moments and self.write_npz is None:
            raise InputError("--write-moments says what --write-npz FILE holds: give both")
        if self.write_moments and self.network not in ("auto", "inception"):
            raise InputError(f"--write-moments writes moments by Inception: leave out --network {self.network}")
        if launch.size > 1 and self.statistics is None and not first.endswith(".safetensors"):
            raise InputError(
                "each process keeps what it measured in a file of its own: give --statistics FILE.safetensors"
            )
        measured = partial(
            evaluate,
            paired=self.paired,
            prompts=None if self.prompts is None else read_prompts(self.prompts),
            metrics=self.metrics,
            network="inception" if self.write_moments else self.network,
            weights=parse_weights(self.weights),
            batch_size=self.batch_size,
            video=self.video,
            device=str(device_of(self.device)),
            features=self.write_moments,
        )
        merged = self.statistics if launch.size > 1 and not more else None  # of the parts that the processes measure
        if merged is not None:
            parts = [merged.with_suffix(f".{rank}-of-{launch.size}.safetensors") for rank in range(launch.size)]
            measured(first, self.reference, statistics=parts[launch.rank], shard=(launch.rank, launch.size))
            gather(None)  # until all parts are there; of few images some processes look at none
            parts = [part for part in parts if part.exists()]
            measured = partial(
                measured, parts, paired=None, prompts=None, folder=merged.parent
            )  # the parts hold what they were compared with
        else:
            measured = partial(measured, self.samples if more else first, statistics=self.statistics, shard=self.shard)
        if not launch.is_main:
            return
        found = measured(reference=self.reference)
        if merged is not None:
            found.statistics.save(merged)
        for line in lines(found):
            print(line)
        for warning in found.warnings:
            print(f"note: {warning}", file=sys.stderr)
        write_json(self.json, found.as_dict())
        if self.write_npz is not None:
            write_adm(self.write_npz, first, self.video, found.statistics if self.write_moments else None)
            print(f"images for ADM's evaluator: {self.write_npz}")
        if found.rows and all(row.value is None for row in found.rows) and not (self.statistics or self.write_npz):
            raise MetricError(f"no metric could be computed; {found.rows[0].label}: {found.rows[0].reason}")


def lines(found: Evaluation) -> Iterator[str]:
    """The table, and below it what could not be computed and why."""
    about = found.as_dict()
    size = f"{about['shape'][2]} x {about['shape'][1]}"
    what = f"{about['n']} images" if about["frames"] == 1 else f"{about['n']} videos of {about['frames']} frames"
    yield f"{about['samples']}: {what} of {size}, network {about['network'] or 'none'}, reference {found.reference or 'none'}"
    if not found.rows:
        yield f"{about['measured']} of {about['n'] * about['frames']} images are measured; next, give the files of all parts"
        return
    yield f"{'':12} {'value':>10}  {'95 % interval':>22}  {'real images':>16}  better"
    for row in found.rows:
        if row.value is None:
            continue
        interval = "" if row.interval is None else f"{row.interval[0]:.5g} … {row.interval[1]:.5g}"
        floor = "" if row.floor is None else f"{row.floor:.5g} (n {row.floor_n})"
        yield f"{row.label:12} {row.value:10.5g}  {interval:>22}  {floor:>16}  {row.better}"
    reasons: dict[str, list[str]] = {}
    for row in found.rows:
        if row.reason is not None:
            reasons.setdefault(row.reason, []).append(row.label)
    for reason, labels in reasons.items():
        yield f"not computed: {', '.join(labels)}: {reason}"


def write_adm(path: Path, samples: str, video: bool, statistics: Statistics | None) -> None:
    """Write the images as ADM's evaluator reads them, grey ones as RGB; with the moments of statistics by Inception."""
    from sostenuto.quality.arrays import write_npz
    from sostenuto.quality.sources import open_source

    source = open_source(samples, video)
    moments: dict[str, Any] = {}
    if statistics is not None:
        if not statistics.origin.network.startswith("inception") or not statistics.complete or len(source) < 2:
            raise InputError(
                "--write-moments writes moments by Inception, of two images or more: there are none of these"
            )
        for suffix, kept in (("", statistics.moments), ("_s", statistics.spatial)):
            if kept is not None:
                gaussian = kept.gaussian()
                moments |= {f"mu{suffix}": gaussian.mean.numpy(), f"sigma{suffix}": gaussian.cov.numpy()}

    def pieces() -> Iterator[Any]:
        for start in range(0, len(source), 256):
            images = source.read(start, min(start + 256, len(source)))
            yield images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

    write_npz(path, pieces(), (len(source), *source.shape[1:], 3), moments)
