"""``sostenuto models``: the networks whose anatomy is known, and the proof that caching works on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sostenuto.cli.common import write_json


@dataclass(frozen=True)
class Models:
    """List the networks that are known."""

    names: list[str] = field(default_factory=list)
    """Only these classes."""
    check: bool = False
    """Prove it for each: build a tiny network of the class with the installed diffusers, and reuse all its parts."""
    output: Path | None = None
    """With --check: write the support matrix to this Markdown file."""
    json: Path | None = None
    """Write the list to this file."""

    def run(self) -> None:
        """Print one line a class.

        Raises:
            InputError: a name isn't known, or the proof fails for a class.
        """
        from sostenuto.errors import InputError
        from sostenuto.families import ANATOMIES

        odd = next((name for name in self.names if name not in ANATOMIES), None)
        if odd is not None:
            raise InputError(f"no anatomy of {odd} is known: sostenuto models lists them all")
        names = self.names or sorted(ANATOMIES)
        if self.check:
            self._check(names)
            return
        rows = []
        for name in names:
            for blocks in ANATOMIES[name].blocks:
                branches = ", ".join(f"{branch.module} ({branch.kind.value})" for branch in blocks.branches)
                rows.append({"class": name, "blocks": blocks.path, "branches": branches, "stack": blocks.whole})
        for line in rows:
            print(f"{line['class']:40} {line['blocks']:28} {line['branches']}{'' if line['stack'] else ' · no stack'}")
        write_json(self.json, rows)

    def _check(self, names: list[str]) -> None:
        from sostenuto.errors import InputError
        from sostenuto.zoo import TINY_MODELS
        from sostenuto.zoo.check import check
        from sostenuto.zoo.matrix import markdown, row

        odd = next((name for name in self.names if name not in TINY_MODELS), None)
        if odd is not None:
            raise InputError(f"there is no tiny {odd} to check: its class is not among diffusers' models")
        results = []
        for name in names:
            if name in TINY_MODELS:
                results.append(check(TINY_MODELS[name]))
                print(row(results[-1]), flush=True)
        if self.output is not None:
            self.output.write_text(markdown(results), encoding="utf-8")
        write_json(self.json, [vars(result) for result in results])
        failed = [result.model for result in results if result.error]
        if failed:
            raise InputError(f"{len(failed)} of {len(results)} classes failed: {', '.join(failed)}")
