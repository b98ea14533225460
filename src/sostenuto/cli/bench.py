"""``sostenuto bench``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from sostenuto.cli.common import write_json


@dataclass(frozen=True)
class Bench:
    """Measure methods, models, schedulers and peers side by side: a results file, a table, a page."""

    shared: ClassVar[bool] = True

    suite: tuple[str, ...] = ()
    """Named sets of rows: overhead, efficiency, demo-quality, dit-xl, flux-like, peers, partial, growth."""
    methods: tuple[str, ...] = ()
    """Methods and peers, each beside the uncached sampler: "fora:interval=3", "eb", "peer:cache-dit"."""
    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model"])] = ("demo",)
    """For --methods: "demo", "tiny:NAME", a folder or hub id, or a benchmark network such as "dit", "flux:width=512"."""
    schedulers: tuple[str, ...] = ()
    """For --methods: classes of diffusers schedulers, such as DDIMScheduler; by default the model's own."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    """For --methods: how both sides run."""
    num_inference_steps: tuple[int, ...] = ()
    """For --methods: steps of the sampler, by default 50. For a suite: instead of its own, one number."""
    only: tuple[str, ...] = ()
    """Of the rows only those whose name contains one of these."""
    output: Path = Path("bench-output")
    """Folder for results.jsonl, bench.html and samples; an interrupted run in it goes on."""
    fresh: bool = False
    """Measure anew: forget what the output folder holds of an earlier run."""
    retry: bool = False
    """Measure again the rows that ended in an error."""
    repeats: int | None = None
    """Pairs per row; by default the suite's, or 5."""
    warmup: int = 1
    """Pairs before, not measured."""
    batch_size: int = 16
    """Images of a generation of the demo model."""
    seed: int = 0
    threads: int = 1
    """Threads of torch; 0 leaves its default."""
    device: str = "cpu"
    """Where all runs: cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"] = "auto"
    """Backend of scaled_dot_product_attention; auto leaves the choice to torch."""
    malloc: Literal["retain", "default"] = "retain"
    """Whether the process keeps freed memory (glibc), or leaves the allocator as it is."""
    compiler: str = "inductor"
    """Backend of torch.compile."""
    isolate: bool = True
    """Each row in a process of its own, so that one that crashes or hangs is a row with its error; else all in this one."""
    time_limit: float = 1800.0
    """Seconds for a row in a process of its own."""
    json: Path | None = None
    """Also write the rows to this file."""

    def run(self) -> None:
        """Measure, print, draw.

        Raises:
            InputError: a suite, method or setting makes no sense, or no row could be measured or written.
        """
        from sostenuto.bench.session import RESULTS, run
        from sostenuto.errors import InputError
        from sostenuto.report.bench_page import render
        from sostenuto.report.bench_table import terminal_table

        cases = self._cases()
        outcome = run(
            cases,
            self._settings(),
            self.output,
            isolate=self.isolate,
            time_limit=self.time_limit,
            retry=self.retry,
            fresh=self.fresh,
        )
        if outcome is None:
            return
        content = outcome.content()
        print(terminal_table(outcome.rows, outcome.machine))
        for words in said_of(outcome.rows):
            print(f"note: {words}", file=sys.stderr)
        page = self.output / "bench.html"
        page.write_text(render(content, self.output), encoding="utf-8")
        write_json(self.json, content)
        print(f"\nresults: {self.output / RESULTS}\npage: {page}")
        if outcome.unwritten:
            raise InputError(f"{outcome.unwritten}; run the command again to measure them anew")
        if all(row.error for row in outcome.rows):
            raise InputError(f"no row could be measured: {outcome.rows[0].error}")

    def _settings(self) -> Any:
        from sostenuto.bench.cases import Settings
        from sostenuto.bench.suites import SUITES

        usual = max((SUITES[name].repeats for name in self.suite), default=5)
        repeats = usual if self.repeats is None else self.repeats
        names = ("warmup", "batch_size", "seed", "threads", "device", "dtype", "attention", "malloc", "compiler")
        return Settings(repeats=repeats, **{name: getattr(self, name) for name in names})

    def _cases(self) -> list[Any]:
        from dataclasses import replace

        from sostenuto.bench.suites import cases_of, grid
        from sostenuto.errors import InputError

        given = {"models": self.models != ("demo",), "schedulers": self.schedulers, "modes": self.modes != ("eager",)}
        idle = next((name for name, is_given in given.items() if is_given and not self.methods), None)
        if idle is not None:
            raise InputError(f"--{idle} is for --methods: name some, such as --methods fora:interval=3 taylorseer")
        cases = cases_of(self.suite or (() if self.methods else ("demo-quality",)), self.device)
        steps = list(self.num_inference_steps)
        if steps and cases:
            if len(steps) > 1:
                raise InputError(f"a suite takes one --num-inference-steps, not {len(steps)}")
            cases = [case if case.kind == "count" else replace(case, num_inference_steps=steps[0]) for case in cases]
        if self.methods:
            cases += grid(self.models, self.methods, self.schedulers or (None,), steps or [50], self.modes)
        return [case for case in cases if not self.only or any(part in case.name for part in self.only)]


def said_of(rows: Sequence[Any]) -> list[str]:
    """What distances of so few images are worth."""
    counts = sorted({row.n for row in rows if row.frechet_distance is not None})
    if not counts:
        return []
    from sostenuto.demo.judge import Judge

    judge = Judge()
    return [few for few in map(judge.too_few, counts) if few]
