"""``sostenuto generate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from sostenuto.cli.common import ModelChoice, write_json


@dataclass(frozen=True)
class Generate:
    """Generate images, cached and, to compare, uncached from the same noise."""

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=ModelChoice)
    output: Path = Path("generated.png")
    """The picture: the first row cached, the second uncached."""
    compare: bool = True
    """Also generate without caching."""
    json: Path | None = None
    """Write the statistics to this file."""

    def run(self) -> None:
        """Generate, save, print statistics."""
        import time

        import torch

        import sostenuto

        pipe, sample = self.choice.pipeline(), self.choice.sample("pil")
        pipe.set_progress_bar_config(disable=False)
        began = time.perf_counter()
        limit = self.choice.max_cache_bytes()
        with sostenuto.enable(pipe, self.choice.method_object(), max_cache_bytes=limit) as handle:
            rows = [sample(pipe, torch.Generator().manual_seed(self.choice.seed))]
            seconds = time.perf_counter() - began
            stats = handle.stats.as_dict()
        content: dict[str, Any] = {"wall_s": seconds, **stats}
        if self.compare:
            began = time.perf_counter()
            rows.append(sample(pipe, torch.Generator().manual_seed(self.choice.seed)))
            content["wall_s_uncached"] = time.perf_counter() - began
            content["speedup"] = content["wall_s_uncached"] / seconds
        _contact_sheet(rows).save(self.output)
        write_json(self.json, content)
        speed = f", {content['speedup']:.2f}× measured" if self.compare else ""
        print(f"{self.output}: {seconds:.2f} s, {stats['ideal_speedup']:.2f}× by multiply-accumulates{speed}")


def _contact_sheet(rows: list[list[Any]]) -> Any:
    from PIL import Image

    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (c * width, r * height))
    return sheet
