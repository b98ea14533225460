"""``sostenuto demo``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sostenuto.cli.common import write_json


@dataclass(frozen=True)
class Demo:
    """Sample the shipped model uncached and cached on the same noise; prints a table, writes a page and a picture."""

    output: Path = Path("demo-output")
    """Folder for demo.html, demo.png, the calibrated tables and the images; an interrupted run in it goes on."""
    num_images: int = 96
    """Images per row and seed."""
    batch_size: int = 32
    seeds: tuple[int, ...] = (0,)
    search_images: int = 100
    """Images per value when the noise scale is searched; 0 takes the shipped tables instead of calibrating."""
    shard: tuple[int, int] = (0, 1)
    """This process's part of the batches and the number of parts, to share a long run among processes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's matrix products, for every row alike."""
    threads: int = 0
    """Threads that torch uses; 0 leaves torch's default."""
    fresh: bool = False
    """Sample and calibrate anew: forget what the output folder holds of an earlier run."""
    join: tuple[Path, ...] = ()
    """Results files of the same comparison with other seeds, sampled elsewhere: shown together with this run's."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def run(self) -> None:
        """Compare, print, draw."""
        import shutil

        import torch

        from sostenuto.demo.compare import compare
        from sostenuto.demo.join import joined, read_results
        from sostenuto.demo.rows import Settings
        from sostenuto.demo.show import terminal_table, write_pictures
        from sostenuto.switch import check_not_switched_off

        others = [read_results(path) for path in self.join]  # before hours of sampling
        settings = Settings(self.num_images, self.batch_size, self.seeds, self.search_images, self.shard, self.dtype)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.fresh:
            check_not_switched_off("the comparison")
            if (self.output / "batches").is_dir():
                shutil.rmtree(self.output / "batches")
            for made in (*self.output.glob("table-*.json"), self.output / "run.json"):
                made.unlink(missing_ok=True)
        results = compare(self.output, settings)
        if not results["rows"]:
            print(f"this part is done; {results['missing']} batches of other parts are missing")
            return
        if self.join:
            results = joined(results, others)
        (self.output / "results.json").write_text(json.dumps(results, indent=1))
        write_json(self.json, results)
        picture, page = write_pictures(self.output, results)
        print(terminal_table(results))
        print(f"\npage: {page}\npicture: {picture}")
