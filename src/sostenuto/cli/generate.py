"""``sostenuto generate``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from sostenuto.cli.common import ModelChoice, write_json
from sostenuto.distributed.world import apart, world


@dataclass(frozen=True)
class Generate:
    """Generate a few images, cached and, to compare, uncached from the same noise; or many (--num-images), by any number of
    processes (accelerate launch -m sostenuto generate …), each image from a seed and a label of its own."""

    shared: ClassVar[bool] = True

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=ModelChoice)
    output: Path = Path("generated.png")
    """The picture: the first row cached, the second uncached, of videos the middle frame. With --num-images: a folder for
    PNGs, or one file that ends in .npz (arr_0 [n, height, width, channels] uint8, as the ADM evaluator reads it). A run
    that was cut short goes on there."""
    compare: bool = True
    """Also generate without caching (of a few images)."""
    num_images: int | None = None
    """Generate so many images (no videos), image i with label or prompt i modulo their number; the same by any number of
    processes."""
    batch_size: int = 32
    """With --num-images: images of one call, 1 for a large model; another size changes the last bits of the images."""
    json: Path | None = None
    """Write the statistics to this file."""

    def run(self) -> None:
        """Generate, save, print statistics."""
        if self.num_images is not None:
            self._many(self.num_images)
        elif world().is_main:
            with apart():
                self._few()

    def _many(self, num_images: int) -> None:
        import time

        from sostenuto.sampling import Images, sample_images

        choice, began = self.choice, time.perf_counter()
        conditions = choice.conditions()
        images = Images(
            num_images,
            conditions,
            choice.num_inference_steps,
            seed=choice.seed,
            batch_size=self.batch_size,
            **choice.arguments(conditions),
        )
        table = None if choice.table is None else hashlib.sha256(choice.table.read_bytes()).hexdigest()
        made_with = {"name": choice.model, "method": choice.method, "table": table}
        pipe = choice.pipeline()
        limit = choice.max_cache_bytes()
        content = sample_images(pipe, choice.method_object(), images, self.output, made_with, max_cache_bytes=limit)
        content |= {"wall_s": time.perf_counter() - began, "processes": world().size}
        if world().is_main:
            write_json(self.json, content)
            print(
                f"{self.output}: {content['num_images']} images, {content['seconds']:.1f} s of sampling, "
                f"{content['ideal_speedup']:.2f}× by multiply-accumulates"
            )

    def _few(self) -> None:
        import time

        import torch

        import sostenuto
        from sostenuto.pipelines import pictures
        from sostenuto.switch import check_not_switched_off

        _check_picture(self.output)
        if self.compare:
            check_not_switched_off("a comparison (--no-compare generates without one)")
        pipe = self.choice.pipeline()
        sample = self.choice.sample(pipe, "pil")
        steps = self.choice.num_inference_steps

        def noise() -> torch.Generator:
            return torch.Generator().manual_seed(self.choice.seed)

        pipe.set_progress_bar_config(disable=False)
        began = time.perf_counter()
        limit = self.choice.max_cache_bytes()
        with sostenuto.enable(pipe, self.choice.method_object(), max_cache_bytes=limit) as handle:
            rows = [pictures(sample(pipe, noise(), steps))]
            seconds = time.perf_counter() - began
            stats = handle.stats.as_dict()
        content: dict[str, Any] = {"wall_s": seconds, **stats}
        if self.compare:
            began = time.perf_counter()
            rows.append(pictures(sample(pipe, noise(), steps)))
            content["wall_s_uncached"] = time.perf_counter() - began
            content["speedup"] = content["wall_s_uncached"] / seconds
        _contact_sheet(rows).save(self.output)
        write_json(self.json, content)
        speed = f", {content['speedup']:.2f}× measured" if self.compare else ""
        print(f"{self.output}: {seconds:.2f} s, {stats['ideal_speedup']:.2f}× by multiply-accumulates{speed}")


def _check_picture(path: Path) -> None:
    """Refuse, before anything is generated, a path that no picture can be written to; make its folder."""
    from PIL import Image

    from sostenuto.errors import InputError

    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(
            f"--output {path} doesn't end as a picture does: use {path.name}.png, or --num-images for a folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def _contact_sheet(rows: list[list[Any]]) -> Any:
    from PIL import Image

    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (c * width, r * height))
    return sheet
