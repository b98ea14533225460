"""L2C's calibration: the router trained by gradient descent through a frozen denoiser (arXiv 2406.01733)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_map

from sostenuto import compat
from sostenuto.attachment import replace_forward, runs
from sostenuto.calibrations.base import Calibration, Settings, made_for
from sostenuto.engine import Handle, attach
from sostenuto.errors import MethodError, TableError
from sostenuto.features import moved
from sostenuto.files import publish
from sostenuto.methods import NoCache
from sostenuto.methods.checks import check_number, check_whole
from sostenuto.prediction import without_variance
from sostenuto.progress import progress
from sostenuto.router import Router, cache_steps
from sostenuto.sites import anatomy_of

Data = Callable[[torch.Generator, int], tuple[torch.Tensor, dict[str, Any]]]

_LARGEST_LOGIT = 5.0
_CHECKPOINT = "sostenuto-router-training"
_CURVE_POINTS = 50

_PUBLISHED = {  # model and resolution → steps → (λ, learning rate)
    ("DiT-XL/2", 256): {50: (1e-6, 1e-3), 20: (5e-6, 1e-3), 10: (1e-6, 1e-3)},
    ("DiT-XL/2", 512): {50: (5e-6, 1e-3)},
    ("DiT-L/2", 256): {50: (1e-6, 1e-3), 20: (5e-6, 1e-2)},
}
_DEMO_PENALTY = {20: 3e-5, 50: 4.5e-6, 250: 1.6e-7}  # about as the square of the distance between steps


@dataclass(frozen=True)
class L2CCalibration(Calibration):
    """Training of an L2C router (arXiv 2406.01733, section 3.3): gates learn to close where the output changes little.

    Each iteration draws one cache step p. A clean x₀ is noised to the step before, ``x = q(x₀, t_{p−1})``; a full call there
    keeps every branch's output, and one DDIM step leads to p. There the outputs of a full call and of one whose branches are
    ``β·computed + (1 − β)·kept`` are compared: ``loss = MSE(full, gated) + λ·Σβ``, over all output channels and without
    guidance. Only the logits of this step learn, by AdamW without weight decay; they start as unit normal noise and are
    kept within ±5. The denoiser is frozen and in evaluation mode: what is random, such as dropped labels, is in ``data``.

    Attributes:
        data: draws a batch: ``data(generator, batch_size)`` returns clean latents ``[batch, channels, …]``, scaled as the
            denoiser knows them, and the keyword arguments of its call besides latents and timestep.
        penalty: the paper's λ, 0 or more: the price of a gate of 1, in mean squared output; more of it closes more gates.
        learning_rate: of AdamW, above 0.
        threshold: the paper's θ, 0 or more and below 1; used while training only by ``straight_through``.
        batch_size: rows of a batch, 1 or more.
        num_iterations: batches in all, 1 or more.
        straight_through: the gated call uses the thresholded gates, and gradients pass as if it had used β.
        checkpoint: a safetensors file that is written on the way, and gone on from where it is there.
        checkpoint_every: iterations between two writes of it.
        made_for: steps of the sampler that λ belongs to; another number is refused. ``None``: any.
    """

    data: Data | None = None
    penalty: float = 5e-6
    learning_rate: float = 1e-3
    threshold: float = 0.1
    batch_size: int = 64
    num_iterations: int = 50_000
    straight_through: bool = False
    checkpoint: str | Path | None = None
    checkpoint_every: int = 100
    made_for: int | None = None

    method: ClassVar[str] = "l2c"

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_iterations", "checkpoint_every"):
            check_whole(name, getattr(self, name), least=1)
        if not 0 <= self.penalty < math.inf:
            raise MethodError(f"the penalty λ must be 0 or more, not {self.penalty!r}")
        if not 0 < self.learning_rate < math.inf:
            raise MethodError(f"the learning rate must be above 0, not {self.learning_rate!r}")
        check_number("L2C's threshold", self.threshold, least=0, below=1)

    @classmethod
    def dit_xl_2(cls, data: Data, num_inference_steps: int = 50, resolution: int = 256) -> L2CCalibration:
        """Published for DiT-XL/2 with DDIM of 50, 20 or 10 steps at 256², 50 at 512²: batch 64, at most 50 000 iterations."""
        return cls._published("DiT-XL/2", resolution, num_inference_steps, data, 0.1 if resolution == 256 else 0.9)

    @classmethod
    def dit_l_2(cls, data: Data, num_inference_steps: int = 50) -> L2CCalibration:
        """Published for DiT-L/2 at 256² with DDIM of 50 or 20 steps: batch 64, at most 50 000 iterations."""
        return cls._published("DiT-L/2", 256, num_inference_steps, data, 0.1)

    @classmethod
    def _published(cls, model: str, resolution: int, steps: int, data: Data, threshold: float) -> L2CCalibration:
        settings = _PUBLISHED.get((model, resolution), {})
        if steps not in settings:
            raise MethodError(
                f"L2C published nothing for {model} at {resolution} with {steps} steps: choose λ yourself"
            )
        penalty, learning_rate = settings[steps]
        return cls(data, penalty, learning_rate, threshold, made_for=steps)

    @classmethod
    def demo(cls, num_inference_steps: int = 20, folder: str | Path | None = None) -> L2CCalibration:
        """For the demo model on Fashion-MNIST: at 20 and 50 steps λ is such that about 48 % of the cache steps' branches close.

        Args:
            num_inference_steps: λ was chosen at 20 and at 50 steps and carried on to 250, where 30 % close; another number
                takes that of the nearest one.
            folder: the folder of the data set's IDX files, see :func:`sostenuto.demo.data.find_folder`.
        """
        from sostenuto.demo.data import batches

        nearest = min(_DEMO_PENALTY, key=lambda steps: abs(steps - num_inference_steps))
        return cls(
            batches(folder),
            penalty=_DEMO_PENALTY[nearest],
            learning_rate=0.1,
            batch_size=8,
            num_iterations=100 * (num_inference_steps // 2),
        )

    @classmethod
    def default_for(cls, settings: Settings) -> L2CCalibration:
        """The preset on the demo model."""
        if type(settings.target).__name__ == "DemoPipeline":
            return cls.demo(settings.num_inference_steps)
        return cls()

    def run(self, settings: Settings) -> Router:
        """Train, and return the router with the curve of its training."""
        if self.data is None:
            raise MethodError(
                "L2C learns from clean latents: pass L2CCalibration(data) with data(generator, batch_size) → (latents, "
                "keyword arguments of the denoiser's call)"
            )
        if self.made_for not in (None, settings.num_inference_steps):
            raise MethodError(
                f"this λ was published for {self.made_for} steps, and you train for {settings.num_inference_steps}: give the "
                "preset that number, or choose λ yourself"
            )
        with attach(settings.target, NoCache(), scheduler=settings.scheduler) as handle:
            if handle._mount.compiled:
                raise MethodError("L2C trains through the denoiser as it is written: calibrate before you compile it")
            scheduler = handle._scheduler()
            if not any(base.__name__ == "DDIMScheduler" for base in type(scheduler).__mro__):
                raise MethodError(
                    f"L2C is trained on DDIM's steps, not {type(scheduler).__name__}'s: set pipe.scheduler = "
                    "DDIMScheduler.from_config(pipe.scheduler.config)"
                )
            scheduler.set_timesteps(settings.num_inference_steps)
            training = _Training(self, handle, settings)
        checkpoint = None if self.checkpoint is None else Path(self.checkpoint)
        if checkpoint is not None and checkpoint.exists():
            training.resume(checkpoint)
        with (
            gated(training.denoiser, training.sites) as gates,
            progress(self.num_iterations, "train router", settings.show_progress) as bar,
        ):
            bar.update(training.iteration)
            while training.iteration < self.num_iterations:
                training.advance(gates)
                bar.update()
                done = training.iteration
                if checkpoint is not None and (done % self.checkpoint_every == 0 or done == self.num_iterations):
                    training.save(checkpoint)
        return training.router()


class Gates:
    """What stands in for the branches of a denoiser while its router is trained.

    Attributes:
        keep: whether calls keep the branches' outputs.
        beta: where given, ``[sites]``: calls return ``β·computed + (1 − β)·kept`` at every branch.
    """

    def __init__(self) -> None:
        self.keep = False
        self.beta: torch.Tensor | None = None
        self._kept: dict[int, torch.Tensor] = {}

    def branch(self, index: int, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The stand-in of one branch."""

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = compute(*args, **kwargs)
            if self.keep:
                self._kept[index] = output.detach().clone()
            if self.beta is None:
                return output
            return torch.lerp(self._kept[index], output, self.beta[index].to(output.dtype))  # exact at 0 and at 1

        return forward


@contextmanager
def gated(denoiser: nn.Module, sites: tuple[str, ...]) -> Iterator[Gates]:
    """Gates at these sites of a denoiser, which is frozen and in evaluation mode meanwhile; all is restored at the end."""
    gates = Gates()
    learning = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    in_training = [module for module in denoiser.modules() if module.training]
    with ExitStack() as stack:
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in learning])
        stack.callback(lambda: [setattr(module, "training", True) for module in in_training])
        denoiser.requires_grad_(False).eval()
        for index, site in enumerate(sites):
            module = denoiser.get_submodule(site)
            stack.callback(replace_forward(module, gates.branch(index, runs(module))))
        yield gates


class _Training:
    """A router on its way: logits, the optimiser's state, and the errors so far."""

    def __init__(self, options: L2CCalibration, handle: Handle, settings: Settings) -> None:
        self.options, self.seed = options, settings.seed
        self.denoiser, self.scheduler = handle._denoiser, handle._scheduler()
        self.sites = tuple(site.id for site in handle.sites)
        self.made_for = made_for(handle)
        self.num_steps = settings.num_inference_steps
        self.device, self.dtype = compat.execution_device(self.denoiser), next(self.denoiser.parameters()).dtype
        if self.dtype is torch.float16:
            raise MethodError(
                "a router's gradients are too small for float16: load the model in float32 or bfloat16 to train one"
            )
        self.steps = cache_steps(self.num_steps)
        noise = torch.randn(len(self.steps), len(self.sites), generator=torch.Generator().manual_seed(self.seed))
        noise = noise.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).to(self.device)
        self.logits = [nn.Parameter(row) for row in noise.unbind()]  # apart: only the drawn step's row and moments move
        self.optimizer = torch.optim.AdamW(self.logits, lr=options.learning_rate, weight_decay=0.0)
        self.curve: list[tuple[float, float]] = []  # error and loss of every iteration

    @property
    def iteration(self) -> int:
        """Iterations that are done."""
        return len(self.curve)

    def advance(self, gates: Gates) -> None:
        """One iteration."""
        # A generator for each iteration: a resumed run draws what an unbroken one would have drawn.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.iteration + 1) % 2**63)
        row = int(torch.randint(len(self.steps), (), generator=generator))
        assert self.options.data is not None
        clean, arguments = self.options.data(generator, self.options.batch_size)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        with torch.enable_grad():
            beta = soft = self.logits[row].sigmoid()
            if self.options.straight_through:
                beta = (soft > self.options.threshold).to(soft) + (soft - soft.detach())
            error = self.error(gates, self.steps[row], beta, clean, noise, arguments)
            loss = error + self.options.penalty * soft.sum()
            if not math.isfinite(loss.item()):
                raise MethodError(f"the loss is {loss.item()} at iteration {self.iteration}: is the data scaled right?")
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.logits[row].data.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        self.curve.append((error.item(), loss.item()))

    def error(
        self,
        gates: Gates,
        step: int,
        beta: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Mean square of what the gates change in the output of a cache step; only the gated call has gradients."""
        given = (clean, noise, arguments)
        clean, noise, arguments = tree_map(partial(moved, device=self.device, dtype=self.dtype), given)
        timestep = anatomy_of(self.denoiser).timestep
        before, now = (self.scheduler.timesteps[p].to(self.device).expand(len(clean)) for p in (step - 1, step))
        with torch.no_grad():
            noisy = self.scheduler.add_noise(clean, noise, before)
            gates.keep = True
            output = compat.first_tensor(self.denoiser(noisy, **{timestep: before}, **arguments))
            gates.keep = False
            predicted = without_variance(output, noisy)
            latents = self.scheduler.step(predicted, self.scheduler.timesteps[step - 1], noisy).prev_sample
            full = compat.first_tensor(self.denoiser(latents, **{timestep: now}, **arguments))
        gates.beta = beta
        mixed = compat.first_tensor(self.denoiser(latents, **{timestep: now}, **arguments))
        gates.beta = None
        return (mixed - full).to(torch.promote_types(full.dtype, torch.float32)).square().mean()

    def router(self) -> Router:
        """The router as it is now."""
        return Router(
            tuple(tuple(row.tolist()) for row in self.logits),
            self.sites,
            self.num_steps,
            **self.made_for,
            training={
                **self._settings(),
                "num_iterations": self.iteration,
                "images": self.iteration * self.options.batch_size,
                "curve": self._means(),
            },
        )

    def _means(self) -> list[list[float]]:
        """The curve in at most 50 points: iterations done, mean error and mean loss since the point before."""
        length = max(1, math.ceil(self.iteration / _CURVE_POINTS))
        points = []
        for start in range(0, self.iteration, length):
            part = self.curve[start : start + length]
            errors, losses = zip(*part, strict=True)
            points.append([start + len(part), float(f"{fmean(errors):.4g}"), float(f"{fmean(losses):.4g}")])
        return points

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        tensors = {"logits": torch.stack(tuple(self.logits)), "curve": torch.tensor(self.curve, dtype=torch.float64)}
        for row, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{row}.{name}": value for name, value in moments.items()}
        with publish(path) as partial:  # an interrupted save must not cost the run
            save_file({name: value.detach().cpu() for name, value in tensors.items()}, partial, metadata=self._header())

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            TableError: it can't be read.
            MethodError: it belongs to another training.
        """
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata() == self._header()
                tensors = {name: file.get_tensor(name) for name in file.keys()} if known else {}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise TableError(f"{path} can't be read as a checkpoint: {error}") from None
        if not known:
            raise MethodError(f"{path} is the checkpoint of a training with other settings: delete it, or name another")
        try:
            self._restore(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TableError(f"{path} is not a whole checkpoint: {error}") from None

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name not in ("logits", "curve"):
                row, moment = name.split(".")
                moments.setdefault(int(row), {})[moment] = value
        for row, found in moments.items():
            shapes = {name: tuple(value.shape) for name, value in found.items()}
            like = tuple(self.logits[row].shape) if 0 <= row < len(self.logits) else None
            if shapes != {"step": (), "exp_avg": like, "exp_avg_sq": like}:
                raise ValueError(f"the optimiser's state of row {row} has shapes {shapes}")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, row in zip(self.logits, tensors["logits"], strict=True):
            parameter.data.copy_(row)
        self.curve = [(error, loss) for error, loss in tensors["curve"].tolist()]

    def _header(self) -> dict[str, str]:
        content = {**self._settings(), **self.made_for, "sites": self.sites, "num_inference_steps": self.num_steps}
        return {_CHECKPOINT: json.dumps(content)}

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the training that goes on from it."""
        names = ("penalty", "learning_rate", "threshold", "batch_size", "straight_through")
        return {name: getattr(self.options, name) for name in names} | {"seed": self.seed}
