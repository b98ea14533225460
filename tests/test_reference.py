"""What images are compared with: what is refused before any of it is looked at, and what is kept of it."""

import pytest
import torch

from image_sets import Colours, pictures, write_folder
from sostenuto.cli import main
from sostenuto.errors import InputError
from sostenuto.quality import distance, networks
from sostenuto.quality.distance import FrechetDistance
from sostenuto.quality.evaluate import evaluate
from sostenuto.quality.metrics import Gaussian, frechet_distance
from sostenuto.quality.statistics import Statistics


class Counting(Colours):
    """Counts the images that it looks at."""

    seen = 0

    def extract(self, images):
        type(self).seen += len(images)
        return super().extract(images)


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(Counting, "seen", 0)
    monkeypatch.setattr(networks, "_LOADERS", {**networks._LOADERS, "counting": lambda given, device: Counting()})
    return Counting


def test_the_distance_looks_at_the_reference_when_it_is_asked_and_keeps_what_it_saw(tmp_path, counting):
    real, images = pictures(40), pictures(30, 1).float() / 255
    score = FrechetDistance(real, "counting", folder=tmp_path)
    assert counting.seen == 0
    first = score(images)
    assert counting.seen == 70
    assert first == pytest.approx(frechet_distance(Colours().extract(pictures(30, 1)).features, score.real), rel=1e-6)
    assert FrechetDistance(real, "counting", folder=tmp_path)(images) == first
    assert counting.seen == 100  # the reference was there
    assert (
        FrechetDistance(pictures(40, 2), "counting", folder=tmp_path)(images) != first
    )  # another one has its own file
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 2


def test_a_distance_is_taken_of_moments(counting, monkeypatch):
    """torchmetrics' eigenvalues of a general matrix take minutes for 2048 features."""
    monkeypatch.setattr(distance.metrics, "FrechetInceptionDistance", None)
    assert FrechetDistance(pictures(40), "counting")(pictures(30, 1) / 255) > 0


def test_moments_of_features_are_those_of_the_sample():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    moments = Gaussian.of(features)
    assert torch.allclose(moments.root @ moments.root, features.T.cov())
    assert torch.equal(moments.mean, features.mean(0))
    assert moments.count == 30


def test_one_image_has_no_moments(counting):
    with pytest.raises(InputError, match="at least 2 images, not 1: let score_sample make more"):
        FrechetDistance(pictures(4), "counting")(pictures(1) / 255)
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        Gaussian.of(torch.zeros(1, 4))


def test_parts_of_a_network_of_ones_own_are_put_together_under_the_name_that_was_asked_for(tmp_path, counting):
    """A network's own name says of its weights, that under which it is chosen doesn't."""
    files = [tmp_path / f"{part}.safetensors" for part in range(2)]
    for part, file in enumerate(files):
        evaluate(pictures(8), network="counting", statistics=file, shard=(part, 2), batch_size=4, show=False)
    real, kept = pictures(20, 1), tmp_path / "kept"
    found = evaluate(files, real, network="counting", batch_size=4, show=False, folder=kept)
    assert found["frechet_distance"].value is not None
    assert list(kept.glob("reference-*.safetensors"))
    assert evaluate(files, network="counting", show=False).statistics.complete
    for wrong in ("couting", "colours"):
        with pytest.raises(InputError, match=f"with the network 'colours-1', not '{wrong}'"):
            evaluate(files, network=wrong, show=False)
    seen = counting.seen
    again = evaluate(files, real, network=Counting(), batch_size=4, show=False, folder=kept)
    assert again["frechet_distance"].value == found["frechet_distance"].value
    assert counting.seen == seen


def test_images_of_another_size_than_the_real_ones_are_told_once(counting, recwarn):
    score = FrechetDistance(pictures(8), "counting")
    score(pictures(8) / 255)
    assert not recwarn
    for _ in range(2):
        score(pictures(8, size=20) / 255)
    assert ["20 x 20" in str(warning.message) for warning in recwarn] == [True]


def test_a_reference_of_another_network_is_refused_before_it_is_looked_at(tmp_path, counting):
    with pytest.raises(InputError, match="known in the features of demo"):
        FrechetDistance("demo:train", "counting")
    kept = tmp_path / "kept.safetensors"
    evaluate(pictures(8), network=Colours(), statistics=kept, show=False)
    network = Statistics.load(kept).origin.network
    with pytest.raises(InputError, match=f"made with the network '{network}'"):
        FrechetDistance(str(kept), "demo")


def test_a_speed_up_of_one_is_refused_before_a_model_or_a_reference_is_looked_at(tmp_path, capsys):
    words = ["tune", "--speedup", "1", "--model", str(tmp_path / "none"), "--reference", str(tmp_path / "none")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 1
    assert "above 1" in capsys.readouterr().err


def test_without_a_reference_no_network_looks_at_images(counting, tmp_path):
    found = evaluate(pictures(8), metrics=["FID", "KID"], network="counting", show=False)
    assert counting.seen == 0
    assert "give --reference" in found["frechet_distance"].reason
    evaluate(pictures(8), metrics=["FID"], network="counting", statistics=tmp_path / "kept.safetensors", show=False)
    assert counting.seen == 9  # the first one to see whether the network takes it
    assert Statistics.load(tmp_path / "kept.safetensors").features is not None
    found = evaluate(pictures(8), metrics=["FID"], network="counting", features=True, show=False)
    assert found.statistics.features is not None


def test_a_reference_is_kept_beside_the_statistics(counting, tmp_path):
    kept, real = tmp_path / "kept.safetensors", pictures(20, 1)
    first = evaluate(pictures(8), real, network="counting", statistics=kept, show=False)
    seen = counting.seen
    again = evaluate(pictures(8), real, network="counting", statistics=kept, show=False)
    assert counting.seen == seen + 1
    assert again["frechet_distance"].value == first["frechet_distance"].value


def test_other_metrics_than_it_began_with_are_refused_before_the_work(tmp_path, counting):
    images = write_folder(tmp_path / "made", pictures(24))
    one = evaluate(
        images, network="counting", statistics=tmp_path / "part.safetensors", batch_size=8, shard=(0, 3), show=False
    )
    assert len(one.statistics) == 8
    seen = counting.seen
    with pytest.raises(InputError, match=r"was begun with features, and now psnr are measured.*or delete it"):
        evaluate(
            images, paired=images, metrics=["PSNR"], statistics=tmp_path / "part.safetensors", batch_size=8, show=False
        )
    assert counting.seen == seen


def test_statistics_are_used_again_with_the_network_that_made_them(tmp_path):
    kept, real = tmp_path / "kept.safetensors", pictures(20, 1)
    first = evaluate(pictures(8), real, network=Colours(), statistics=kept, show=False)
    again = evaluate(kept, real, network=Colours(), show=False)
    assert again["frechet_distance"].value == first["frechet_distance"].value
    with pytest.raises(InputError, match="was measured with the network 'colours-1'"):
        evaluate(kept, real, network="demo", show=False)
    assert evaluate(kept, real, network=Colours(), show=False)["frechet_distance"].value is not None
    with pytest.raises(InputError, match="--shard go with images"):
        evaluate(kept, shard=(0, 2), show=False)
