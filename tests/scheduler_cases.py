"""Schedulers by the rows of docs/schedulers.md, and their formulas written out: levels, predictions, first-order steps."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import re
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch

PAGE = Path(__file__).parents[1] / "docs" / "schedulers.md"
KINDS = ("epsilon", "v_prediction", "sample", "flow")
STEPS = 5
GRID = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "snr_shift_scale": 1.0}
EXACT = {"clip_sample": False, "variance_type": "fixed_small", "eta": 0.0, "set_alpha_to_one": True}
FIRST_ORDER = (
    "EDMDPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler",
)  # so that one formula holds for all of its steps
# σ_data of the preconditioned ones
DATA = {"EDMEulerScheduler": 0.5, "EDMDPMSolverMultistepScheduler": 0.5, "CosineDPMSolverMultistepScheduler": 1.0}


@dataclass(frozen=True)
class Row:
    """One row of the table: a class, what it is set up with, and what is said of each kind of prediction."""

    name: str
    options: dict
    cells: dict

    @property
    def id(self):
        return "-".join([self.name.removesuffix("Scheduler"), *self.options])

    def build(self, kind, num_steps=STEPS):
        """The scheduler for that kind of prediction, with its timesteps set."""
        cls = scheduler_class(self.name)
        known = inspect.signature(cls.__init__).parameters
        given = {key: value for key, value in {**GRID, **EXACT}.items() if key in known} | self.options
        if self.name in FIRST_ORDER:
            given["solver_order"] = 1
        if "prediction_type" in known:
            given["prediction_type"] = "flow_prediction" if kind == "flow" else kind
        if self.name == "UnCLIPScheduler":
            given |= {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.restart(cls(**given), num_steps)

    def restart(self, scheduler, num_steps=STEPS):
        """The same scheduler for another generation."""
        scheduler.set_timesteps(num_steps)
        if self.name.startswith("Cosine"):
            scheduler.noise_sampler = lambda *_: torch.zeros(())  # torchsde's
        return scheduler


def scheduler_class(name):
    """A class of diffusers; of those that need torchsde, which they use in ``step`` alone, also without it."""
    cls = getattr(diffusers, name)
    if hasattr(cls, "_backends"):
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
        file = {
            "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep",
            "DPMSolverSDEScheduler": "dpmsolver_sde",
        }
        cls = getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{file[name]}"), name)
    return cls


def rows():
    """The table of docs/schedulers.md."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 2 + len(KINDS):
            options = eval(f"dict({cells[1].strip('`')})")
            found.append(Row(cells[0].strip("`"), options, dict(zip(KINDS, cells[2:], strict=True))))
    return found


def cases(word):
    """All (row, kind) of which the table says ``word``."""
    return [(row, kind) for row in rows() for kind in KINDS if row.cells[kind] == word]


def diffusers_schedulers():
    """Names of all scheduler classes that diffusers exports."""
    skipped = {"KarrasDiffusionSchedulers", "SchedulerMixin", "AysSchedules"}
    return {name for name in dir(diffusers) if re.fullmatch(r"[A-Z]\w*Scheduler", name)} - skipped


# --- levels ------------------------------------------------------------------------------------------------------


def shares():
    """ᾱ of the linear training grid."""
    return np.cumprod(1 - np.linspace(GRID["beta_start"], GRID["beta_end"], 1000))


def unclip_shares():
    def f(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.cumprod([1 - min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999) for i in range(1000)])


def ratios():
    """σ / α of the linear training grid."""
    return np.sqrt((1 - shares()) / shares())


def karras(n, lowest, highest):
    """Equation 5 of arXiv 2206.00364, ρ = 7."""
    low, high = lowest ** (1 / 7), highest ** (1 / 7)
    return [(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)]


ON_GRID = ("DDIM", "DDPM", "PNDM", "LCMS", "TCD", "CogVideoX", "UnCLIP")


def levels(row, scheduler):
    """α and σ of ``x = α·x₀ + σ·ε`` for what the sampler holds at every call, from the formulas of its paper or page."""
    timesteps = [float(t) for t in scheduler.timesteps]
    name = row.name
    if name.startswith("EDM"):
        return [(1.0, math.exp(4 * t)) for t in timesteps]  # c_noise = log(σ) / 4
    if name.startswith("Cosine"):
        return [(1.0, math.tan(math.pi / 2 * t)) for t in timesteps]
    if name == "IPNDMScheduler":
        return [(math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)) for t in timesteps]
    if name == "MiniMaxH3Scheduler":
        return [(t, 1 - t) for t in timesteps]
    if row.options.get("invert_sigmas"):
        return [(t / 1000, 1 - t / 1000) for t in timesteps]
    if "FlowMatch" in name or name == "LTXEulerAncestralRFScheduler":
        return [(1 - t / 1000, t / 1000) for t in timesteps]
    if row.options.get("use_flow_sigmas"):
        shift, ends = row.options.get("flow_shift", 1.0), (1, 1 / 1000)
        even = np.linspace(*ends, len(timesteps) + 1)
        even = even[:-1] if name.startswith("UniPC") else np.flip(1 - even)[:-1]
        sigmas = shift * even / (1 + (shift - 1) * even)
        return [(1 - s, s) for s in sigmas]
    if name.startswith(ON_GRID):
        grid = unclip_shares() if name.startswith("UnCLIP") else shares()
        return [(math.sqrt(grid[int(t)]), math.sqrt(1 - grid[int(t)])) for t in timesteps]
    if row.options.get("use_karras_sigmas"):
        rho = karras(len(timesteps), ratios()[0], ratios()[-1])
    elif name.startswith("KDPM2"):
        listed = np.interp(timesteps[::2], range(1000), ratios())
        between = np.sqrt(listed[:-1] * listed[1:])
        rho = [(listed, between)[p % 2][p // 2] for p in range(len(timesteps))]
        if "Ancestral" in name:
            rho = ancestral_midpoints(listed)
    else:
        rho = np.interp(timesteps, range(1000), ratios())
    if row.options.get("timestep_type") and scheduler.config.prediction_type == "v_prediction":
        rho = [math.exp(4 * t) for t in timesteps]
    if name.startswith(("Euler", "Heun", "KDPM2", "LMS")):
        return [(1.0, r) for r in rho]
    return [(1 / math.hypot(1, r), r / math.hypot(1, r)) for r in rho]


def ancestral_midpoints(listed):
    """Calls of KDPM2 ancestral: at every listed σ, and between it and where its deterministic part ends."""
    rho = [listed[0]]
    for sigma, after in itertools.pairwise(listed):
        up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
        rho += [math.sqrt(sigma * math.sqrt(after**2 - up**2)), after]
    return rho


# --- predictions -------------------------------------------------------------------------------------------------


def given_to_network(row, x, alpha, sigma):
    """What the network is given of the sampler's x: EDM and the variance-exploding schedulers scale it."""
    if row.name in DATA:
        return x / math.hypot(sigma, DATA[row.name])
    return x / math.hypot(1, sigma) if alpha == 1.0 else x


def prediction(row, kind, x, noise, alpha, sigma):
    """What a network of this kind says whose noise is ``noise``, for the sampler's x."""
    x0 = (x - sigma * noise) / alpha
    if row.name in DATA:  # x₀ = c_skip·x + c_out·y
        data = DATA[row.name]
        variance = sigma**2 + data**2
        c_out = (1 if kind == "epsilon" else -1) * sigma * data / math.sqrt(variance)
        return (x0 - data**2 / variance * x) / c_out
    if kind == "v_prediction":
        size = math.hypot(alpha, sigma)  # of unit variance, also where the sampler holds x₀ + σ·ε
        return (alpha * noise - sigma * x0) / size
    if kind == "flow":
        return x0 - noise if row.name == "MiniMaxH3Scheduler" or row.options.get("invert_sigmas") else noise - x0
    return {"epsilon": noise, "sample": x0}[kind]


def network(z):
    """The noise that the network believes in."""
    return torch.tanh(1.3 * z) + 0.1 * torch.ones_like(z).cumsum(-1)


# --- running ------------------------------------------------------------------------------------------------------

STEPPED_BY_HAND = ("RePaintScheduler", "DDPMWuerstchenScheduler")  # ``step`` needs more than a prediction


def listed(scheduler):
    return [float(t) for t in scheduler.timesteps]


def draw(seed, *shape):
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(scheduler, output, timestep, x):
    """The scheduler's own step; random noise, where it adds any, is the same for everyone."""
    known = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(9)} if "generator" in known else {}
    if "old_pred_original_sample" in known:  # CogVideoX's, first order
        extra["old_pred_original_sample"] = extra["timestep_back"] = None
        return scheduler.step(output, None, timestep, None, x, generator=extra["generator"], return_dict=False)[0]
    return scheduler.step(output, timestep, x, return_dict=False, **extra)[0]
