import math

import numpy as np
import pytest
import scipy.linalg
import torch

from sostenuto.quality.metrics import (
    Gaussian,
    frechet_distance,
    inception_score,
    paired_psnr,
    paired_ssim,
    precision_recall,
)


def gaussian(features):
    return Gaussian(features.double().mean(0), features.double().T.cov(), len(features))


def test_frechet_distance_equals_the_formula_by_scipy():
    torch.manual_seed(0)
    a, b = torch.randn(300, 8) @ torch.randn(8, 8), torch.randn(400, 8) + 0.5
    expected = (
        (a.mean(0) - b.mean(0)).square().sum().item()
        + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real)
    )  # fmt: skip
    assert frechet_distance(a, gaussian(b)) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_a_set_to_itself_is_nothing_and_of_a_shift_its_square():
    features = torch.randn(500, 6)
    assert frechet_distance(features, gaussian(features)) == pytest.approx(0, abs=1e-4)
    shifted = features + torch.tensor([3.0, 0, 0, 0, 0, 0])
    assert frechet_distance(shifted, gaussian(features)) == pytest.approx(9, rel=1e-3)


def test_frechet_distance_of_one_image_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.randn(1, 4), gaussian(torch.randn(9, 4)))


def test_inception_score_is_the_number_of_classes_for_sure_and_even_answers():
    logits = torch.eye(10).repeat(20, 1) * 100
    assert inception_score(logits) == pytest.approx(10, rel=1e-4)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1, rel=1e-4)


def test_precision_and_recall_at_the_extremes():
    torch.manual_seed(0)
    real = torch.randn(200, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    narrow = real[:1] + 0.001 * torch.randn(200, 4)  # one mode only: believable, but covers little
    precision, recall = precision_recall(narrow, real)
    assert precision == 1.0
    assert recall < 0.1


def test_psnr_and_ssim_of_known_differences():
    images = torch.rand(3, 1, 28, 28)
    assert math.isinf(paired_psnr(images, images))
    assert paired_psnr(torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.1)) == pytest.approx(20, abs=1e-4)
    assert paired_ssim(images, images) == pytest.approx(1)
