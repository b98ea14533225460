"""Train the demo denoiser: ``python -m sostenuto.demo.train --images 1500000 --output runs/demo``.

Resumable (the same command goes on from the last checkpoint, also to a larger ``--images``) and data parallel under
``torchrun --nproc-per-node N -m sostenuto.demo.train …``.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from sostenuto.demo.checkpoint import load_checkpoint, save_checkpoint
from sostenuto.demo.data import load
from sostenuto.demo.network import NULL_CLASS, build_denoiser, build_scheduler
from sostenuto.files import publish, publish_text

LEAST_ACCURACY = 0.85  # of generated images, below which a model is no good, whatever its loss


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of."""

    output: Path = Path("runs/demo")
    """Folder of checkpoint, loss curve and weights."""
    data: Path | None = None
    """Folder with the four IDX files; by default where Debian's package puts them."""
    images: int = 1_500_000
    """Images to train on in all, counted over resumed runs."""
    batch_size: int = 128
    """Images per step, over all processes."""
    learning_rate: float = 1e-3
    """Peak rate, reached after the warm-up; falls to 1 % of it on a cosine."""
    warmup_steps: int = 200
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, so that classifier-free guidance works."""
    init: Path | None = None
    """Start from these safetensors weights rather than from scratch."""
    num_layers: int = 8
    """Blocks of the denoiser."""
    num_heads: int = 4
    """Heads of 48 channels, which make its width."""
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the matrix products; on CPUs without matrix units for bfloat16 float32 is the faster one."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizers(denoiser: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, biases and the head."""
    matrices, others = [], []
    for name, parameter in denoiser.named_parameters():
        is_matrix = parameter.ndim == 2 and "transformer_blocks" in name and "emb." not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


def stratified_timesteps(batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps ``[batch]`` that cover 0 … 999 evenly: uniform for each image, less variance in the gradient."""
    strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    return (strata / batch_size * 1000).long()[torch.randperm(batch_size, generator=generator)]


def average_gradients(denoiser: torch.nn.Module, world_size: int) -> None:
    """Mean of the gradients over all processes, in one message."""
    if world_size == 1:
        return
    gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(config: TrainConfig) -> Path:
    """Run the training and return the path of the EMA weights (safetensors, float16)."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    checkpoint_path, weights_path = config.output / "checkpoint.safetensors", config.output / "ema.safetensors"

    images, labels = load("train", config.data)
    images, labels = images.to(device), labels.to(device)
    denoiser = build_denoiser(config.num_layers, config.num_heads).to(device)
    if config.init:
        denoiser.load_state_dict({k: v.float() for k, v in load_file(config.init).items()}, strict=True)
    ema = {name: p.detach().clone() for name, p in denoiser.state_dict().items()}
    optimizers = build_optimizers(denoiser)
    step, seconds_before, curve = 0, 0.0, []
    if checkpoint_path.exists():
        state = load_checkpoint(checkpoint_path, {"denoiser": denoiser.state_dict(), "ema": ema}, optimizers)
        step, seconds_before, curve = state["step"], state["seconds"], state["curve"]

    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
    total_steps = math.ceil(config.images / config.batch_size)
    local_batch = config.batch_size // world_size
    started, running_loss, window = time.time(), 0.0, 0
    progress = tqdm(total=total_steps, initial=step, unit="step", disable=rank != 0, mininterval=5)
    # At 49 tokens the fused CPU attention kernel is the slower one on its backward pass.
    backend = sdpa_kernel(SDPBackend.MATH if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)

    def save() -> None:
        if rank != 0:
            return
        seconds = seconds_before + time.time() - started
        weights = {"denoiser": denoiser.state_dict(), "ema": ema}
        save_checkpoint(checkpoint_path, weights, optimizers, {"step": step, "seconds": seconds, "curve": curve})
        with publish(weights_path) as partial:
            save_file({k: v.half().contiguous().cpu() for k, v in ema.items()}, partial)
        about = {"images": step * config.batch_size, "seconds": round(seconds), "curve": curve}
        publish_text(config.output / "curve.json", json.dumps(about))

    with backend:
        while step < total_steps:
            rate = learning_rate(config, step, total_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            # One generator per step and process: a resumed run sees the very batches that an unbroken one would have seen.
            generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 4096 + rank)
            index = torch.randint(len(images), (local_batch,), generator=generator)
            timestep = stratified_timesteps(local_batch, generator).to(device)
            noise = torch.randn(local_batch, 1, 28, 28, generator=generator).to(device)
            dropped = (torch.rand(local_batch, generator=generator) < config.label_dropout).to(device)
            clean, label = images[index.to(device)], torch.where(dropped, NULL_CLASS, labels[index.to(device)])
            alpha = alphas_cumprod[timestep].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            denoiser.eval()  # labels are dropped above; diffusers' own label dropout would count as training mode
            with torch.autocast(device.type, torch.bfloat16, config.dtype == "bfloat16"):
                prediction = denoiser(noisy, timestep, label).sample
            loss = (prediction.float() - noise).square().mean()
            loss.backward()
            average_gradients(denoiser, world_size)
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in denoiser.state_dict().items():
                    ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else ema[name].copy_(value)
            step += 1
            running_loss, window = running_loss + loss.item(), window + 1
            progress.update()
            if step % 50 == 0:
                curve.append([step * config.batch_size, round(running_loss / window, 5)])
                progress.set_postfix(loss=f"{curve[-1][1]:.4f}")
                running_loss, window = 0.0, 0
            if step % config.checkpoint_every == 0:
                save()
    save()
    progress.close()
    if world_size > 1:
        dist.destroy_process_group()
    return weights_path


def class_accuracy(folder: Path, num_images: int = 200) -> float:
    """Share of images of the trained weights (50 DDPM steps, no guidance) that the judge sees as the class asked for."""
    # Here, so that --help needs none of it.
    from sostenuto.demo.compare import SEARCH_SEED
    from sostenuto.demo.judge import Judge
    from sostenuto.demo.pipeline import load_trained_pipeline
    from sostenuto.demo.rows import demo_sample, labels_of

    pipe, labels = load_trained_pipeline(folder), labels_of(num_images)
    return (
        Judge().judge(demo_sample(num_images)(pipe, torch.Generator().manual_seed(SEARCH_SEED)), labels).class_accuracy
    )


def main() -> None:
    """Train, and say whether what came out makes recognizable garments, which a low loss alone doesn't."""
    config = tyro.cli(TrainConfig, description=__doc__)
    train(config)
    if int(os.environ.get("RANK", 0)) == 0:
        accuracy = class_accuracy(config.output)
        print(f"class accuracy of 200 generated images: {accuracy:.3f}")
        if accuracy < LEAST_ACCURACY:
            print(f"that is below {LEAST_ACCURACY}: train on more images before using these weights")


if __name__ == "__main__":
    main()
