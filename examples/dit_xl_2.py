"""DiT-XL/2 with EB-Cache: a calibrated table says which branches each step reuses.

The table is measured once on a few images and kept in a file. Presets of other methods for this model, for --method:
fora.dit_xl_2, duca.dit_xl_2, toca.dit_xl_2, taylorseer.dit_xl_2, delta-dit.dit_xl_2.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiTPipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, calibrated, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="facebook/DiT-XL-2-256",
        method=None,  # see below
        steps=50,
    )
    pipe = tiny.dit_xl_2() if args.tiny else DiTPipeline.from_pretrained(args.model, torch_dtype=torch.float16)
    pipe.to(DEVICE)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def sample(pipe, generator, num_inference_steps=args.steps):
        return pipe(
            class_labels=args.labels,
            guidance_scale=4.0,
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).images

    if args.method is None:
        calibration = sostenuto.EBCalibration(target_fraction=0.6)
        args.method = sostenuto.EBCache(calibrated(args, pipe, calibration, sample, num_samples=8))
    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
