"""What papers print for large models, beside which the multiply-accumulates of the same settings are counted here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """A printed row.

    Attributes:
        model: the benchmark network.
        name: of the row.
        method: as on the command line.
        num_inference_steps: steps of the sampler.
        macs: multiply-accumulates of one image and one guidance half, in units of 10¹².
        wall_s: printed seconds.
        speedup: printed speed-up.
        baseline_steps: of the uncached row that it is compared with.
        scheduler: class of the scheduler.
    """

    model: str
    name: str
    method: str
    num_inference_steps: int
    macs: float | None = None
    wall_s: float | None = None
    speedup: float | None = None
    baseline_steps: int | None = None
    scheduler: str = "DDPMScheduler"

    def values(self) -> dict[str, float]:
        """What is printed, as numbers."""
        macs = None if self.macs is None else self.macs * 1e12
        values = {"macs": macs, "wall_s": self.wall_s, "speedup": self.speedup}
        return {name: value for name, value in values.items() if value is not None}


_XL = "dit-xl-2-256"
_TOCA = "toca.dit_xl_2:interval=4,fresh_ratio=0.1"
_TOCA_250 = "toca.dit_xl_2_ddpm250:fresh_ratio=0.1"

# EB-Cache, arXiv 2503.07120 (v1): DiT-XL/2 at 256², guidance 1.5, ancestral DDPM; "FLOPs" are multiply-accumulates of one
# half. Methods whose tables are not published (EB-Cache, DiTFastAttn, L2C) can't be counted from their names.
DIT_XL = (
    Printed(_XL, "DiT-XL/2, 250 steps", "uncached", 250, 29.67, 77.42, 1.0),
    Printed(_XL, "165 steps", "uncached", 165, 19.58, 51.36, 1.51, 250),
    Printed(_XL, "FORA N=2, 250 steps", "fora:interval=2", 250, 16.27, 49.96, 1.55),
    Printed(_XL, "100 steps", "uncached", 100, 11.93, 30.96, 2.50, 250),
    Printed(_XL, "FORA N=4, 250 steps", "fora:interval=4", 250, 11.31, 31.49, 2.46),
    Printed(_XL, "ToCa N=4 R=90 %, 250 steps", _TOCA_250, 250, 11.87, 31.79, 2.44),
    Printed(_XL, "DiT-XL/2, 50 steps", "uncached", 50, 5.98, 15.52, 1.0),
    Printed(_XL, "33 steps", "uncached", 33, 3.87, 10.37, 1.50, 50),
    Printed(_XL, "FORA N=2, 50 steps", "fora:interval=2", 50, 3.51, 10.01, 1.55),
    Printed(_XL, "20 steps", "uncached", 20, 2.47, 6.20, 2.50, 50),
    Printed(_XL, "FORA N=4, 50 steps", "fora:interval=4", 50, 2.39, 6.34, 2.45),
    Printed(_XL, "ToCa N=4 R=90 %, 50 steps", _TOCA, 50, 2.51, 6.47, 2.40),
    # The table's 512² row prints the cost of 256² times 100; its latency is of 100 steps.
    Printed("dit-xl-2-512", "DiT-XL/2 512², 100 steps", "uncached", 100, 11.87, 88.73, 1.0),
    Printed("dit-xl-2-512", "60 steps, 512²", "uncached", 60, None, None, 1.65, 100),
    Printed("dit-xl-2-512", "FORA N=2, 512²", "fora:interval=2", 100, None, None, 1.67),
    Printed("dit-xl-2-512", "ToCa N=3 R=70 %, 512²", "toca.dit_xl_2:fresh_ratio=0.3", 100, None, None, 1.62),
    # DDIM, from the papers of FORA, ToCa, DuCa and TaylorSeer, which count 2 × MAC of both halves: 23.74 T there.
    Printed(_XL, "DiT-XL/2, DDIM 50", "uncached", 50, 23.74 / 4, None, 1.0, scheduler="DDIMScheduler"),
    Printed(_XL, "FORA N=3, DDIM 50", "fora:interval=3", 50, None, None, 2.77, scheduler="DDIMScheduler"),
    Printed(_XL, "ToCa N=3, DDIM 50", "toca.dit_xl_2", 50, 10.23 / 4, None, 2.32, scheduler="DDIMScheduler"),
    Printed(_XL, "DuCa N=3, DDIM 50", "duca.dit_xl_2", 50, 9.58 / 4, None, 2.48, scheduler="DDIMScheduler"),
    Printed(
        _XL,
        "TaylorSeer N=3 O=3, DDIM 50",
        "taylorseer.dit_xl_2",
        50,
        None,
        None,
        2.77,
        scheduler="DDIMScheduler",
    ),
)

_SIGMA, _DPM = "pixart-sigma-1024", "DPMSolverMultistepScheduler"
_FLUX, _FLOW = "flux-1-dev", "FlowMatchEulerDiscreteScheduler"
_VIDEO = "cogvideox-2b"
LARGE = (
    Printed(_SIGMA, "PixArt-Σ 1024, 20 steps", "uncached", 20, 173.08, 1.39, 1.0, scheduler=_DPM),
    Printed(_SIGMA, "PixArt-Σ 1024, 13 steps", "uncached", 13, 112.52, 0.93, None, 20, scheduler=_DPM),
    Printed(
        _SIGMA,
        "PixArt-Σ 1024, ToCa N=3 R=50 %",
        "toca.pixart_alpha:fresh_ratio=0.5",
        20,
        109.93,
        0.95,
        None,
        scheduler=_DPM,
    ),
    # 2 × MAC, no guidance in two halves: 3719.5 T for 50 steps.
    Printed(_FLUX, "FLUX.1-dev, 50 steps", "uncached", 50, 3719.5 / 2, None, 1.0, scheduler=_FLOW),
    Printed(_FLUX, "FLUX.1-dev, FORA N=3", "fora.flux_dev", 50, 1320.07 / 2, None, 2.82, scheduler=_FLOW),
    Printed(_FLUX, "FLUX.1-dev, FORA N=6", "fora.flux_dev:interval=6", 50, None, None, 4.99, scheduler=_FLOW),
    Printed(_FLUX, "FLUX.1-dev, ToCa N=6", "toca.flux_dev:interval=6", 50, 924.3 / 2, None, 4.0, scheduler=_FLOW),
    Printed(_FLUX, "FLUX.1-dev, DuCa N=5", "duca.flux_dev", 50, 978.76 / 2, None, 3.80, scheduler=_FLOW),
    Printed(
        _FLUX, "FLUX.1-dev, TaylorSeer N=3 O=2", "taylorseer.flux_dev:interval=3", 50, None, None, 2.82, scheduler=_FLOW
    ),
    Printed(_FLUX, "FLUX.1-dev, TaylorSeer N=6 O=2", "taylorseer.flux_dev", 50, None, None, 4.99, scheduler=_FLOW),
    Printed(_VIDEO, "CogVideoX-2B, 50 steps", "uncached", 50, 8417.40, 142.10, 1.0, scheduler="DDIMScheduler"),
    Printed(_VIDEO, "CogVideoX-2B, 35 steps", "uncached", 35, 5892.18, 98.73, None, 50, scheduler="DDIMScheduler"),
    # Printed is PAB357; this network's attention is joint, for which 3 counts, in the window of its preset.
    Printed(
        _VIDEO,
        "CogVideoX-2B, PAB357",
        "pab.cogvideox_2b:spatial_range=3",
        50,
        5905.38,
        97.52,
        None,
        scheduler="DDIMScheduler",
    ),
)
