"""``sostenuto methods``."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from sostenuto.cli.common import write_json


@dataclass(frozen=True)
class Methods:
    """List the methods."""

    json: Path | None = None
    """Write them to this file."""

    def run(self) -> None:
        """Print two or three lines a method, then what the letters mean."""
        from sostenuto.methods import available_methods
        from sostenuto.methods.base import LETTERS, presets_of

        rows = [
            {
                "name": name,
                "class": m.__name__,
                "paper": m.paper,
                "calibrated": m.calibrated,
                "compiles": m().works_compiled,
                "denoisers": m.denoisers,
                "state": m.state,
                "bytes_per_token": m.bytes_per_token,
                "summary": m.summary,
                "presets": presets_of(m),
            }
            for name, m in available_methods().items()
        ]
        for row in rows:
            needs = "calibrated" if row["calibrated"] else "ready"
            compiles = "compiles" if row["compiles"] else "eager only"
            print(f"{row['name']:16} {row['class']:15} {needs:11} {compiles:11} {row['denoisers']:12} {row['summary']}")
            print(f"{'':16} {row['paper'] or '–'}; keeps {row['state']}: {row['bytes_per_token']} bytes per token")
            if row["presets"]:
                names = ", ".join(f"{row['name']}.{preset}" for preset in row["presets"])
                print(textwrap.fill(names, 120, initial_indent=" " * 17, subsequent_indent=" " * 17))
        print(f"\nbytes per token: {LETTERS}")
        write_json(self.json, rows)
