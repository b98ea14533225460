"""The command line: ``sostenuto demo | generate | calibrate | inspect | verify | methods``."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Demo:
    """Sample the shipped model with every method on the same noise; prints a table, writes a page and a picture."""

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
    threads: int = 0
    """Threads that torch uses; 0 leaves torch's default."""
    fresh: bool = False
    """Delete what lies in the output folder first."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def run(self) -> None:
        """Compare, print, draw."""
        import shutil

        import torch

        from sostenuto.demo.compare import Settings, compare
        from sostenuto.demo.show import terminal_table, write_pictures

        settings = Settings(self.num_images, self.batch_size, self.seeds, self.search_images, self.shard)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.fresh and (self.output / "batches").is_dir():
            shutil.rmtree(self.output / "batches")
            for made in (*self.output.glob("table-*.json"), self.output / "run.json"):
                made.unlink(missing_ok=True)
        results = compare(self.output, settings)
        if not results["rows"]:
            print(f"this part is done; {results['missing']} batches of other parts are missing")
            return
        (self.output / "results.json").write_text(json.dumps(results, indent=1))
        write_json(self.json, results)
        picture, page = write_pictures(self.output, results)
        print(terminal_table(results))
        print(f"\npage: {page}\npicture: {picture}")


@dataclass(frozen=True)
class ModelChoice:
    """Which model, sampler and method."""

    model: str = "demo"
    """A diffusers folder, a hub id, or "demo"."""
    method: str = "eb"
    """A name from "sostenuto methods", or "none"."""
    table: Path | None = None
    """What "sostenuto calibrate" made for the method."""
    scheduler: str | None = None
    """Class of the diffusers scheduler to sample with, such as DDIMScheduler; by default the model's own, and for l2c DDIM."""
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    labels: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Class labels."""
    seed: int = 0

    def pipeline(self) -> Any:
        """The pipeline with its scheduler."""
        pipe = self._load()
        name = self.scheduler or ("DDIMScheduler" if self.method == "l2c" else None)
        if name is not None:
            import diffusers

            from sostenuto.errors import InputError

            scheduler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
            if scheduler is None:
                raise InputError(f"diffusers has no scheduler {name!r}: name its class, such as DDIMScheduler")
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        return pipe

    def _load(self) -> Any:
        if self.model == "demo":
            from sostenuto.demo.pipeline import load_demo_pipeline

            return load_demo_pipeline()
        from diffusers import DiffusionPipeline

        index = Path(self.model) / "model_index.json"
        if index.is_file() and json.loads(index.read_text()).get("_class_name") == "DemoPipeline":
            from sostenuto.demo.pipeline import DemoPipeline

            return DemoPipeline.from_pretrained(self.model)
        return DiffusionPipeline.from_pretrained(self.model)

    def method_object(self) -> Any:
        """The method with its table."""
        from sostenuto.errors import MethodError
        from sostenuto.methods import available_methods, by_name

        method = by_name(self.method)
        if self.table is None:
            return method
        if not method.calibrated:
            raise MethodError(f"--table is for a method that is calibrated, {self.method} takes no table")
        make: Any = available_methods()[self.method]
        return make(self.table)  # what was calibrated is the first parameter of all of them

    def sample(self, output_type: str = "pt") -> Any:
        """A ``sample`` for calibrate and verify."""

        def sample(pipe: Any, generator: Any, num_inference_steps: int = self.num_inference_steps) -> Any:
            return pipe(
                class_labels=list(self.labels),
                num_inference_steps=num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=generator,
                output_type=output_type,
            ).images

        return sample


@dataclass(frozen=True)
class Generate:
    """Generate images, cached and, to compare, uncached from the same noise."""

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = ModelChoice()
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
        with sostenuto.enable(pipe, self.choice.method_object()) as handle:
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


@dataclass(frozen=True)
class Calibrate:
    """Measure what a method needs for a model and sampler: a cache table, a polynomial, a router (on the demo model), …"""

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = ModelChoice()
    output: Path = Path("table.json")
    target_fraction: float | None = None
    """Share of the uncached multiply-accumulates that the table may cost."""
    forecast_order: int | None = None
    """How reused branches are filled: 0 last value, 1 linear extrapolation."""
    theta: float | None = None
    """The error that compressed attention may cause (ditfastattn); published: 0.025 to 0.15."""
    window: int | None = None
    """Tokens to each side that a token attends to (ditfastattn); by default an eighth of all."""
    num_samples: int = 8
    search_images: int = 200
    """On the demo model: images per value when the noise scale is searched; 0 leaves it as the method has it."""
    eps_scale_grid: tuple[float, ...] | None = None
    """Values to try: of the noise scale (eb), of what its curve is multiplied by (feb)."""
    data: Path | None = None
    """l2c: folder with Fashion-MNIST's four IDX files; by default where Debian's package puts them."""
    penalty: float | None = None
    """l2c: the paper's λ, the price of a computed branch; by default the preset for the number of steps."""
    num_iterations: int | None = None
    """l2c: batches to train on; by default the preset for the number of steps."""
    json: Path | None = None
    """Also write a summary to this file."""

    def run(self) -> None:
        """Calibrate and save."""
        if self.choice.method == "l2c":
            self._train_router()
        else:
            self._make_table()

    def _train_router(self) -> None:
        from dataclasses import replace

        import torch

        import sostenuto
        from sostenuto.errors import MethodError

        if self.choice.model != "demo":
            raise MethodError(
                "this command trains routers for the demo model: for another one call sostenuto.calibrate"
            )
        output = self.output.with_suffix(".safetensors")
        checkpoint = output.with_suffix(".checkpoint")
        steps = self.choice.num_inference_steps
        given = {"penalty": self.penalty, "num_iterations": self.num_iterations}
        router = sostenuto.calibrate(
            self.choice.pipeline(),
            replace(
                sostenuto.L2CCalibration.demo(steps, self.data),
                checkpoint=checkpoint,
                **{name: value for name, value in given.items() if value is not None},
            ),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(self.choice.seed),
            show_progress=True,
        )
        router.save(output)
        checkpoint.unlink()
        write_json(self.json, {"dropped": router.dropped(), "training": dict(router.training)})
        print(f"{output}: {router.dropped():.1%} of the cache steps' branches are reused at θ = 0.1")
        print(router.strip())

    def _make_table(self) -> None:
        import torch

        import sostenuto

        calibration = self.calibration()
        pipe, extra = self.choice.pipeline(), {}
        if self.choice.model == "demo" and self.search_images and hasattr(calibration, "eps_scale_grid"):
            from sostenuto.demo.compare import demo_sample
            from sostenuto.demo.judge import Judge

            extra = {"score": Judge().distance, "score_sample": demo_sample(self.search_images)}
        made = sostenuto.calibrate(
            pipe,
            calibration,
            self.choice.sample(),
            num_inference_steps=self.choice.num_inference_steps,
            num_samples=self.num_samples,
            generator=torch.Generator().manual_seed(self.choice.seed),
            show_progress=True,
            **extra,
        )
        made.save(self.output)
        if isinstance(made, sostenuto.CacheTable):
            values: dict[str, Any] = {"macs_fraction": made.macs_fraction, "eps_scale": _short(made.eps_scale)}
            print(made.strip())
        else:
            values = made.values
        write_json(self.json, values)
        print(f"{self.output}: " + ", ".join(f"{name} = {value}" for name, value in values.items()))

    def calibration(self) -> Any:
        """The calibration of the method, with the options that were given."""
        import inspect

        from sostenuto.calibrations import available_calibrations
        from sostenuto.errors import MethodError

        known = available_calibrations()
        if self.choice.method not in known:
            raise MethodError(f"{self.choice.method!r} has no calibration; {', '.join(sorted(known))} have")
        kind = known[self.choice.method]
        names = ("target_fraction", "forecast_order", "eps_scale_grid", "theta", "window")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        takes = inspect.signature(kind).parameters
        target = given.pop("target_fraction", None) if "target_fraction" not in takes else None
        if target is not None:
            return kind.at_cost(target)
        for name in given:
            if name not in takes:
                raise MethodError(
                    f"the calibration of {self.choice.method} has no --{name.replace('_', '-')}: leave it out"
                )
        return kind(**given)


@dataclass(frozen=True)
class Inspect:
    """List the sites of a model's denoiser."""

    model: str = "demo"
    """A diffusers folder, a hub id, or "demo"."""
    verify: bool = False
    """Also prove on the model that reuse is exact at every site."""
    json: Path | None = None
    """Write the sites to this file."""

    def run(self) -> None:
        """Print one line a site."""
        import sostenuto

        choice = ModelChoice(self.model)
        pipe = choice.pipeline()
        sites = sostenuto.inspect(pipe.transformer)
        for site in sites:
            print(f"{site.id:36} {site.kind.value:16} block {site.block:<4} {site.parameters:>12,} parameters")
        if self.verify:
            _verify(pipe, choice, "none")
        write_json(self.json, [{**vars(site), "kind": site.kind.value} for site in sites])


@dataclass(frozen=True)
class Verify:
    """Prove on a model that what is reused is exact, and that a method's plan is what runs."""

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = ModelChoice()
    json: Path | None = None
    """Write what was proved to this file."""

    def run(self) -> None:
        """Verify and print what was proved."""
        write_json(self.json, _verify(self.choice.pipeline(), self.choice, self.choice.method_object()))


@dataclass(frozen=True)
class Methods:
    """List the methods."""

    json: Path | None = None
    """Write them to this file."""

    def run(self) -> None:
        """Print two lines a method."""
        from sostenuto.methods import available_methods

        rows = [
            {
                "name": name,
                "class": m.__name__,
                "paper": m.paper,
                "calibrated": m.calibrated,
                "compiles": m.compiles,
                "denoisers": m.denoisers,
                "state": m.state,
                "summary": m.summary,
            }
            for name, m in available_methods().items()
        ]
        for row in rows:
            needs = "calibrated" if row["calibrated"] else "ready"
            compiles = "compiles" if row["compiles"] else "eager only"
            print(f"{row['name']:16} {row['class']:15} {needs:11} {compiles:11} {row['denoisers']:12} {row['summary']}")
            print(f"{'':16} {row['paper'] or '–'}; keeps {row['state']}")
        write_json(self.json, rows)


COMMANDS = {
    "demo": Demo,
    "generate": Generate,
    "calibrate": Calibrate,
    "inspect": Inspect,
    "verify": Verify,
    "methods": Methods,
}


def _verify(pipe: Any, choice: ModelChoice, method: Any) -> dict[str, Any]:
    import sostenuto

    proved = sostenuto.verify(pipe, method, choice.sample(), num_inference_steps=choice.num_inference_steps)
    print(
        f"proved: {proved['sites']} sites are bit-identical when reused with identical inputs, each saves its counted "
        f"multiply-accumulates, and {proved['steps']} steps of {proved['passes']} pass(es) ran as planned"
    )
    return proved


def _short(values: Sequence[float]) -> float | list[float]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else list(values)


def _contact_sheet(rows: list[list[Any]]) -> Any:
    from PIL import Image

    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (c * width, r * height))
    return sheet


def write_json(path: Path | None, content: Any) -> None:
    """Write the numbers where ``--json`` says, if it does."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def main(args: list[str] | None = None) -> int:
    """Run a command; returns 0, or 1 with a one-line reason on standard error (``--debug`` for the traceback)."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="sostenuto", description="Faster sampling for diffusion transformers.", args=words
    )
    try:
        command.run()
    except KeyboardInterrupt:
        print("sostenuto: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"sostenuto: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
