"""What each image is worth on its own: against its twin from the same noise, or against its prompt."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sostenuto.errors import MetricError
from sostenuto.quality import metrics
from sostenuto.quality import weights as weights_

Scorer = Callable[[torch.Tensor, Any], torch.Tensor]
"""Maps images ``[n, c, h, w]`` (uint8) and their twins (likewise) or prompts (a list) to values ``[n]``."""
Load = Callable[[Mapping[str, Path], str], Scorer]


def load_psnr(given: Mapping[str, Path], device: str) -> Scorer:
    """Peak signal-to-noise ratio in dB."""
    return lambda images, twins: metrics.psnr_per_image(images.float() / 255, twins.float() / 255)


def load_ssim(given: Mapping[str, Path], device: str) -> Scorer:
    """Structural similarity."""
    return lambda images, twins: metrics.ssim_per_image(images.float() / 255, twins.float() / 255)


def _rgb(images: torch.Tensor, device: str) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1).to(device).float() / 255


def _torchvision(what: str) -> None:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise MetricError(
            f"{what} needs the package torchvision, of the same build as torch: pip install torchvision"
        ) from error


def load_lpips(given: Mapping[str, Path], device: str) -> Scorer:
    """Learned perceptual similarity (arXiv 1801.03924) with AlexNet, as video papers report it; torchmetrics has the rest.

    Raises:
        MetricError: torchvision or AlexNet's weights are missing.
    """
    _torchvision("LPIPS")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    with weights_.torchvision_finds(weights_.ALEXNET, given), _as_metric_error(weights_.ALEXNET):
        network: Any = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)

    @torch.inference_mode()
    def score(images: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
        return network(_rgb(images, device), _rgb(twins, device), normalize=True).flatten().cpu()

    return score


def load_dists(given: Mapping[str, Path], device: str) -> Scorer:
    """Structure and texture similarity (arXiv 2004.07728) with VGG-16; torchmetrics has the rest.

    Raises:
        MetricError: torchvision or VGG's weights are missing.
    """
    _torchvision("DISTS")
    from torchmetrics.functional.image.dists import DISTSNetwork

    with weights_.torchvision_finds(weights_.VGG16, given), _as_metric_error(weights_.VGG16):
        network = DISTSNetwork().eval().to(device)

    def score(images: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
        return network(_rgb(images, device), _rgb(twins, device)).detach().reshape(-1).cpu()

    return score


@contextlib.contextmanager
def _as_metric_error(weights: weights_.Weights) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise MetricError(
            f"the file given for {weights.name} does not hold the weights of {weights.files[0]}"
        ) from error


def load_clip_score(given: Mapping[str, Path], device: str) -> Scorer:
    """100 × max(cos, 0) of CLIP's embeddings of image and prompt (arXiv 2104.08718), ViT-L/14 unless given another.

    Raises:
        MetricError: transformers or the model is missing.
    """
    model, processor = _clip(given, device)

    @torch.inference_mode()
    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        limit = model.config.text_config.max_position_embeddings
        text = {"text": list(prompts), "padding": True, "truncation": True, "max_length": limit}
        inputs = processor(images=_pictures(images), return_tensors="pt", **text).to(device)
        out = model(**inputs)  # its embeddings are normalised
        return 100 * (out.image_embeds * out.text_embeds).sum(-1).clamp(min=0).cpu()

    return score


def load_clip_similarity(given: Mapping[str, Path], device: str) -> Scorer:
    """The cosine of CLIP's embeddings of an image and of its twin (CLIP-I, arXiv 2208.12242), ViT-L/14 unless given another.

    Raises:
        MetricError: transformers or the model is missing.
    """
    model, processor = _clip(given, device)

    @torch.inference_mode()
    def score(images: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
        inputs = processor(images=[*_pictures(images), *_pictures(twins)], return_tensors="pt").to(device)
        seen = model.vision_model(**inputs).pooler_output
        own, other = model.visual_projection(seen).chunk(2)
        return torch.nn.functional.cosine_similarity(own, other).cpu()

    return score


def _pictures(images: torch.Tensor) -> list[Any]:
    """Images ``[n, c, h, w]`` (uint8) as CLIP's processor takes them."""
    return [image.permute(1, 2, 0).numpy() for image in images.expand(-1, 3, -1, -1)]


def _clip(given: Mapping[str, Path], device: str) -> tuple[Any, Any]:
    """CLIP and what prepares its inputs."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise MetricError("CLIP needs the package transformers: pip install transformers") from error
    source = given.get("clip", weights_.CLIP.files[0])
    try:
        loaded: Any = CLIPModel.from_pretrained(source, local_files_only=True)
        processor: Any = CLIPProcessor.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        if "clip" in given:
            raise MetricError(f"{source} does not hold a CLIP model: {str(error).splitlines()[0]}") from error
        raise weights_.missing(weights_.CLIP) from error
    return loaded.to(device).eval(), processor


def load_image_reward(given: Mapping[str, Path], device: str) -> Scorer:
    """Human preference as ImageReward (arXiv 2304.05977) predicts it; its own package scores one image at a time.

    Raises:
        MetricError: the package or its files are missing.
    """
    try:
        package = importlib.import_module("ImageReward")
    except Exception as error:  # it asks for versions of its time, and fails in many ways with others
        raise MetricError(
            f"ImageReward needs the package image-reward (pip install image-reward): {str(error).splitlines()[0]}"
        ) from error
    from PIL import Image

    folder = given.get("image-reward", Path.home() / ".cache" / "ImageReward")
    checkpoint, config = (folder / name for name in weights_.IMAGE_REWARD.files)
    if not (checkpoint.is_file() and config.is_file()):
        raise weights_.missing(weights_.IMAGE_REWARD)
    weights_.read_state(checkpoint)  # it must hold nothing but tensors: the package unpickles it
    try:
        from transformers import BertTokenizer

        BertTokenizer.from_pretrained("bert-base-uncased", local_files_only=True)  # the package would fetch it
        with contextlib.redirect_stdout(io.StringIO()):
            model = package.load(str(checkpoint), device=device, med_config=str(config))
    except Exception as error:  # what it can't do takes no other metric with it
        raise MetricError(
            "ImageReward can't be loaded (besides its own files it wants the tokenizer bert-base-uncased in the hub's cache): "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.expand(-1, 3, -1, -1)]
        with torch.inference_mode():
            return torch.tensor(
                [model.score(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
            )

    return score
