"""Where in the picture does caching err? (EB-Cache, figure 10)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.errors import SostenutoError
from sostenuto.methods.base import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INTERVAL = 3
_SHARE = 0.4  # the paper shows step 20 of 50
_MOST_IMAGES = 4


def measure(subject: Subject) -> Data:
    """Pictures of the clean estimate part of the way and of the final sample, and their differences from the uncached path's.

    Pictures are the channels' mean ``[height][width]``, rounded to three places.
    """
    base = subject.uncached
    step = round(_SHARE * base.num_steps)
    subject.images(base.clean[:1])  # refuses latents that are no images before anything is sampled
    methods: dict[str, Method] = {f"every {_INTERVAL}": subject.uniform(_INTERVAL)}
    left_out = {}
    try:
        methods["EB-Cache"] = subject.eb()
    except SostenutoError as error:
        left_out["EB-Cache"] = str(error)
    paths = {"uncached": base, **{name: subject.path(name, method) for name, method in methods.items()}}

    def pictures(latents: torch.Tensor) -> torch.Tensor:
        return subject.images(latents[:_MOST_IMAGES])[:_MOST_IMAGES].mean(1)

    stages: dict[str, Any] = {}
    for stage, of in (
        (f"estimate at step {step}", lambda path: path.clean_estimates(step)),
        ("final sample", lambda path: path.clean),
    ):
        own = {name: pictures(of(path)) for name, path in paths.items()}
        reference = own["uncached"]
        span = (reference.max() - reference.min()).clamp(min=1e-12)
        stages[stage] = {
            "pictures": {name: _plain(images) for name, images in own.items()},
            "mean_error": {
                name: ((images - reference).abs().mean() / span).item()
                for name, images in own.items()
                if name != "uncached"
            },
            "error_at_edges": {
                name: _share_at_edges((images - reference).abs(), reference)
                for name, images in own.items()
                if name != "uncached"
            },
        }
    return {"stages": stages, "step": step, "left_out": left_out}


def _share_at_edges(error: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of the error in the quarter of the pixels where the reference changes most from pixel to pixel."""
    down = (reference[:, 1:, :-1] - reference[:, :-1, :-1]).abs()
    across = (reference[:, :-1, 1:] - reference[:, :-1, :-1]).abs()
    steep, off = (down + across).flatten(), error[:, :-1, :-1].flatten()
    most = steep.topk(max(1, steep.numel() // 4)).indices
    return (off[most].sum() / off.sum().clamp(min=1e-30)).item()


def _plain(images: torch.Tensor) -> list[Any]:
    return [[[round(value, 3) for value in row] for row in image] for image in images.tolist()]


def draw(data: Data) -> Figure:
    """For each sample: uncached, and of every method the picture and its error; the errors' scale is shared."""
    import numpy

    from sostenuto.analysis.style import figure

    stages = data["stages"]
    first = next(iter(stages.values()))["pictures"]
    names = [name for name in first if name != "uncached"]
    samples = len(first["uncached"])
    made, axes = figure(1, len(stages), width=9.5, height=0.3 + (4.2 / samples) * (1 + 2 * len(names)))
    for axis, (stage, entry) in zip(axes[0], stages.items(), strict=True):
        pictures = {name: numpy.array(values) for name, values in entry["pictures"].items()}
        reference = pictures["uncached"]
        low, high = reference.min(), max(reference.max(), reference.min() + 1e-12)
        errors = {name: numpy.abs(pictures[name] - reference) for name in names}
        most = max(1e-12, *(float(numpy.quantile(error, 0.995)) for error in errors.values()))
        strips = [("uncached", (reference - low) / (high - low))]
        for name in names:
            strips += [(name, (pictures[name] - low) / (high - low)), (f"{name}: error", 1 - errors[name] / most)]
        gap = max(1, reference.shape[-1] // 14)
        height, width = reference.shape[1] + gap, reference.shape[2] + gap
        sheet = numpy.ones((height * len(strips) - gap, width * samples - gap))
        for r, (_, images) in enumerate(strips):
            for c, image in enumerate(numpy.clip(images, 0, 1)):
                sheet[r * height : r * height + image.shape[0], c * width : c * width + image.shape[1]] = image
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.grid(visible=False)
        axis.set_xticks([])
        axis.set_yticks([r * height + height / 2 for r in range(len(strips))], [name for name, _ in strips])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_title(f"{stage} (errors dark, black is {most:.2g})")
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    words = []
    for stage, entry in data["stages"].items():
        parts = ", ".join(
            f"{name} {error:.2%} of the range, {entry['error_at_edges'][name]:.0%} of it at edges"
            for name, error in entry["mean_error"].items()
        )
        words.append(f"{stage}: mean error {parts}")
    text = "; ".join(words) + " (edges: the quarter of the pixels where the picture changes most)."
    final = data["stages"]["final sample"]["mean_error"]
    if "EB-Cache" in final:
        uniform = next(name for name in final if name != "EB-Cache")
        lower = final["EB-Cache"] < final[uniform]
        text += (
            f" At the end EB-Cache, whose noise scale moves the path on purpose, is "
            f"{'nearer to' if lower else 'farther from'} the uncached sample than {uniform}."
        )
    return text


ERROR_IMAGES = Instrument(
    name="error-images",
    work=0.5,
    title="Pictures of the error",
    source="EB-Cache (arXiv 2503.07120v1), figure 10",
    claim="EB-Cache's errors are at edges only and small; uniform caching errs in the structure.",
    method="The clean sample as estimated part of the way, and at the end, from the same noise.",
    measure=measure,
    draw=draw,
    finding=finding,
)
