"""FLUX.1-dev with TaylorSeer: every sixth step is computed, in between what the branches return is forecast.

Guidance is an input of this network: one call per step. Presets of other methods for this model, for --method:
teacache.flux_dev, fora.flux_dev, duca.flux_dev, toca.flux_dev, ab.flux_dev, dbcache.flux_dev, magcache.flux_dev (28 steps).
"""

from __future__ import annotations

import torch
from diffusers import FluxPipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="black-forest-labs/FLUX.1-dev",
        method=sostenuto.TaylorSeer.flux_dev(),
        steps=50,
        size=(1024, 1024),
        tiny_size=(32, 32),
        prompt="A cat with a cello on a stage, a single spotlight",
    )
    pipe = tiny.flux() if args.tiny else FluxPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.to(DEVICE)

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            guidance_scale=3.5,
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).images

    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
