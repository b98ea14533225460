import math

import numpy as np
import pytest
import scipy.linalg
import torch

from sostenuto.demo.judge import Judge
from sostenuto.quality import spread
from sostenuto.quality.metrics import (
    Gaussian,
    covered,
    frechet_distance,
    inception_score,
    kernel_distance,
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


def test_frechet_distance_of_two_gaussians_is_the_formula_by_scipy_and_that_of_the_features():
    torch.manual_seed(1)
    a, b = torch.randn(300, 40) @ torch.randn(40, 40), torch.randn(400, 40) @ torch.randn(40, 40) + 0.5
    one, other = gaussian(a), gaussian(b)
    root = scipy.linalg.sqrtm(one.cov.numpy() @ other.cov.numpy()).real
    expected = (one.mean - other.mean).square().sum().item() + np.trace((one.cov + other.cov).numpy() - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, other) == pytest.approx(expected, rel=1e-4)
    few = gaussian(a[:20])  # its covariance has no inverse
    root = scipy.linalg.sqrtm(few.cov.numpy() @ other.cov.numpy()).real
    expected = (few.mean - other.mean).square().sum().item() + np.trace((few.cov + other.cov).numpy() - 2 * root)
    assert frechet_distance(few, other) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_between_different_networks_is_refused():
    with pytest.raises(ValueError, match="8 features and the reference 6"):
        frechet_distance(torch.randn(20, 8), gaussian(torch.randn(20, 6)))


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
    unlike = torch.rand(3, 1, 28, 28)
    psnr = [-10 * math.log10(float((a - b).square().mean())) for a, b in zip(images, unlike, strict=True)]
    assert paired_psnr(images, unlike) == pytest.approx(sum(psnr) / 3, rel=1e-5)


def kernel(x, y):
    return (float(x @ y) / len(x) + 1) ** 3


def test_kernel_distance_equals_a_naive_double_loop():
    torch.manual_seed(2)
    a, b = torch.randn(30, 6).double(), torch.randn(30, 6).double() * 1.3 + 0.2
    within = sum(kernel(x, y) for s in (a, b) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (30 * 29)
    across = sum(kernel(x, y) for x in a for y in b) / (30 * 30)
    mean, deviation = kernel_distance(a, b, subsets=2, subset_size=30)
    assert mean == pytest.approx(within - 2 * across, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9)
    assert kernel_distance(a, b, subset_size=15) == kernel_distance(a, b, subset_size=15)  # the same subsets every time
    with pytest.raises(ValueError, match="subsets of 31"):
        kernel_distance(a, b, subset_size=31)


def test_metrics_leave_the_global_generators_alone(monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    kernel_distance(torch.randn(9, 2, generator=torch.Generator()), torch.ones(9, 2), subset_size=4)
    inception_score(torch.zeros(5, 3))
    assert torch.equal(torch.rand(2), expected)
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("this seeds the GPUs, too"))
    inception_score(torch.zeros(5, 3))


def test_precision_and_recall_equal_naive_loops():
    torch.manual_seed(4)
    real, made = torch.randn(40, 3), torch.randn(50, 3) * 0.8 + 0.4

    def share(points, manifold):
        radii = [sorted(float((p - q).norm()) for q in manifold)[3] for p in manifold]  # the nearest is itself
        return sum(any(float((p - q).norm()) <= r for q, r in zip(manifold, radii, strict=True)) for p in points)

    precision, recall = precision_recall(made, real)
    assert precision == pytest.approx(share(made, real) / 50)
    assert recall == pytest.approx(share(real, made) / 40)
    with pytest.raises(ValueError, match="more than 3 images"):
        covered(made, real[:3])


def test_standard_error_of_the_frechet_distance_is_the_spread_over_many_sets():
    generator = torch.Generator().manual_seed(5)
    reference = Gaussian(torch.zeros(4).double(), torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0])).double(), 10**6)
    sets = [torch.randn(400, 4, generator=generator) * 1.2 + 0.3 for _ in range(300)]
    found = torch.tensor([frechet_distance(features, reference) for features in sets]).std().item()
    predicted = torch.tensor([spread.of_frechet_distance(features, reference) for features in sets]).mean().item()
    assert predicted == pytest.approx(found, rel=0.15)
    assert spread.of_frechet_distance(sets[0][:7], reference) is None


def test_standard_error_of_the_inception_score_is_the_spread_over_many_sets():
    generator = torch.Generator().manual_seed(6)
    sets = [torch.randn(400, 5, generator=generator) * 3 for _ in range(200)]
    scores = [inception_score(logits) for logits in sets]
    predicted = [spread.of_inception_score(logits, score) for logits, score in zip(sets, scores, strict=True)]
    assert sum(predicted) / 200 == pytest.approx(torch.tensor(scores).std().item(), rel=0.15)


def test_standard_errors_of_videos_are_those_of_the_videos_and_not_of_their_frames():
    generator = torch.Generator().manual_seed(8)
    reference = Gaussian(torch.zeros(4).double(), torch.eye(4).double(), 10**6)

    def videos() -> torch.Tensor:
        """100 videos of 4 frames that hardly differ ``[400, 4]``."""
        first = torch.randn(100, 4, generator=generator) * 1.2 + 0.3
        return first.repeat_interleave(4, 0) + 0.1 * torch.randn(400, 4, generator=generator)

    sets = [videos() for _ in range(200)]
    for found, error in (
        (
            [frechet_distance(one, reference) for one in sets],
            lambda one, n: spread.of_frechet_distance(one, reference, n),
        ),
        (
            [inception_score(one) for one in sets],
            lambda one, n: spread.of_inception_score(one, inception_score(one), n),
        ),
    ):
        spread_of_sets = torch.tensor(found).std().item()
        assert sum(error(one, 4) for one in sets) / 200 == pytest.approx(spread_of_sets, rel=0.15)
        assert sum(error(one, 1) for one in sets) / 200 < 0.6 * spread_of_sets


def test_the_demo_is_judged_as_before_its_network_shared_an_interface():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    k = torch.arange(160).float().view(-1, 1, 1)
    images = ((torch.sin(3 * x * (1 + k % 7) + k) * torch.cos(2 * y * (1 + k % 5) - k) + 1) / 2).unsqueeze(1)
    judge = Judge()
    verdict = judge.judge(images, torch.arange(160) % 10)
    # What the earlier code printed.
    assert verdict.frechet_distance == pytest.approx(121.23142849589068, rel=1e-5)
    assert verdict.inception_score == pytest.approx(1.6043377, rel=1e-5)
    assert verdict.class_accuracy == pytest.approx(13 / 160)
    assert verdict.precision == pytest.approx(42 / 160)
    assert verdict.recall == 0
    assert judge.distance(images) == verdict.frechet_distance
    with torch.autocast("cpu", torch.bfloat16):  # the precision of what is judged
        assert judge.distance(images) == verdict.frechet_distance
    assert judge.floor(160) == pytest.approx(3.7733441665617136, rel=1e-5)
    assert paired_psnr(images, images.flip(0)) == pytest.approx(9.130375862121582, rel=1e-5)
    assert paired_ssim(images, images.flip(0)) == pytest.approx(0.023671848699450493, rel=1e-4)


def test_standard_error_of_a_difference_of_distances_is_the_spread_over_many_pairs():
    generator = torch.Generator().manual_seed(7)
    reference = Gaussian(torch.zeros(4).double(), torch.eye(4).double(), 10**6)
    pairs = []
    for _ in range(300):
        one = torch.randn(400, 4, generator=generator) * 1.2 + 0.3
        pairs.append((one, one * 0.95 + 0.1 * torch.randn(400, 4, generator=generator)))
    differences = [frechet_distance(one, reference) - frechet_distance(other, reference) for one, other in pairs]
    errors = []
    for one, other in pairs:
        own, its = (spread.influence_on_frechet_distance(features, reference) for features in (one, other))
        errors.append(spread.of_mean(own - its))
    found = torch.tensor(differences).std().item()
    assert sum(errors) / 300 == pytest.approx(found, rel=0.15)
    alone = spread.of_frechet_distance(pairs[0][0], reference)
    assert alone > 3 * found  # the noise that a pair shares is no noise of its difference
