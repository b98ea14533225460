"""Evaluating a set of images: every way in which it may come, what is found, and what is refused before any work is lost."""

import contextlib
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from sostenuto.cli import main
from sostenuto.demo.judge import DemoFeatures, Judge
from sostenuto.errors import InputError
from sostenuto.quality import measure as measuring
from sostenuto.quality.arrays import open_npz, read_moments
from sostenuto.quality.evaluate import evaluate
from sostenuto.quality.metrics import precision_recall, ssim_per_image
from sostenuto.quality.networks import Features
from sostenuto.quality.registry import Metric, Needs, Value, available_metrics, choose_metrics, register_metric
from sostenuto.quality.sources import FolderSource, open_source
from sostenuto.quality.statistics import Statistics, merge


class Colours:
    """A feature network of a few averages, of images of any size."""

    name, num_features = "colours-1", 6

    def __init__(self):
        self.batches = []

    def extract(self, images):
        self.batches.append(len(images))
        values = images.expand(-1, 3, -1, -1).float() / 255
        features = torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)
        return Features(features, features[:, :3] * 20, torch.nn.functional.adaptive_avg_pool2d(values, 4).flatten(1))


def pictures(count, seed=0, size=16, channels=3):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 200, (count, channels, 1, 1), generator=generator)
    return (base + torch.randint(0, 56, (count, channels, size, size), generator=generator)).to(torch.uint8)


def write_folder(folder, images, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(folder / f"{number}.{suffix}")
    return folder


def run(*words):
    return main(["evaluate", *map(str, words)])


# What it finds.


def test_every_form_of_the_same_images_gives_the_same_numbers(tmp_path):
    images, real = pictures(40), pictures(60, 1)
    np.save(tmp_path / "last.npy", images.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "first.npy", images.numpy())
    np.savez(tmp_path / "plain.npz", images.permute(0, 2, 3, 1).numpy(), np.zeros(40, np.int64))
    np.savez_compressed(tmp_path / "packed.npz", images.permute(0, 2, 3, 1).numpy())
    forms = [tmp_path / name for name in ("last.npy", "first.npy", "plain.npz", "packed.npz")]
    forms += [write_folder(tmp_path / "png", images), images]
    found = [evaluate(form, real, network=Colours(), batch_size=16, show=False) for form in forms]
    for row in ("frechet_distance", "kernel_distance", "spatial_frechet_distance", "inception_score", "recall"):
        values = [evaluation[row].value for evaluation in found]
        assert values[0] is not None
        assert values == [values[0]] * len(values)


def test_demo_images_are_judged_as_the_demo_judges_them(tmp_path):
    judge = Judge()
    images = pictures(60, channels=1, size=28)
    row = judge.judge(images.float() / 255, torch.zeros(60))
    found = evaluate(images, "demo:train", show=False)
    assert found["frechet_distance"].value == pytest.approx(row.frechet_distance, rel=1e-4)
    assert found["inception_score"].value == pytest.approx(row.inception_score, rel=1e-5)
    assert found["precision"].value == pytest.approx(row.precision)
    assert found["recall"].value == pytest.approx(row.recall)
    assert found["frechet_distance"].floor == pytest.approx(judge.floor(60), rel=1e-4)
    assert found["frechet_distance"].floor_n == 60
    assert any("FID of 60 says little, it wants 128" in warning for warning in found.warnings)
    coloured = evaluate(images.expand(-1, 3, -1, -1), "demo:train", show=False)  # saved as RGB
    assert coloured["frechet_distance"].value == found["frechet_distance"].value


def test_floor_is_one_half_of_the_reference_against_the_other():
    real = pictures(80, 2)
    found = evaluate(pictures(40), real, network=Colours(), show=False)
    features = Colours().extract(real).features
    even, odd = features[::2], features[1::2]
    assert found["precision"].floor == pytest.approx(precision_recall(even, odd)[0])
    assert found["precision"].floor_n == 40
    few = evaluate(pictures(10), real, network=Colours(), show=False)
    assert few["frechet_distance"].floor_n == 10
    assert few["frechet_distance"].interval is None  # fewer than two images for each of the 6 features
    low, high = found["frechet_distance"].interval
    assert low < found["frechet_distance"].value < high


def test_paired_metrics_are_means_over_images_and_their_interval_is_their_spread():
    images, twins = pictures(20), pictures(20, 7)
    found = evaluate(images, paired=twins, metrics=("psnr", "SSIM"), show=False)
    mse = (images.double() / 255 - twins.double() / 255).square().mean((1, 2, 3))
    psnr = -10 * mse.log10()
    assert [row.name for row in found.rows] == ["psnr", "ssim"]
    assert found["psnr"].value == pytest.approx(psnr.mean().item(), rel=1e-5)
    half = 1.96 * psnr.std().item() / 20**0.5
    assert found["psnr"].interval == pytest.approx((psnr.mean().item() - half, psnr.mean().item() + half), rel=1e-4)
    grey = evaluate(images[:, :1], paired=twins[:, :1], metrics=("ssim",), show=False)["ssim"].value
    assert grey == pytest.approx(ssim_per_image(images[:, :1] / 255, twins[:, :1] / 255).mean().item(), rel=1e-5)


def test_videos_count_once_though_their_frames_are_compared_one_by_one(tmp_path):
    videos, twins = (pictures(12, seed).view(4, 3, 3, 16, 16) for seed in (0, 1))
    found = evaluate(videos, paired=twins, metrics=("psnr", "fid"), network=Colours(), reference=twins, show=False)
    per_frame = -10 * (videos.double() / 255 - twins.double() / 255).square().mean((2, 3, 4)).log10()
    assert found["psnr"].value == pytest.approx(per_frame.mean().item(), rel=1e-5)
    assert found["psnr"].n == 4
    half = 1.96 * per_frame.mean(1).std().item() / 2
    assert found["psnr"].interval[1] == pytest.approx(per_frame.mean().item() + half, rel=1e-4)
    assert found["frechet_distance"].n == 12
    assert found.as_dict()["n"] == 4
    for number, frames in enumerate(videos):
        write_folder(tmp_path / "v" / f"clip{number}", frames)
    np.save(tmp_path / "t.npy", twins.permute(0, 1, 3, 4, 2).numpy())
    again = evaluate(tmp_path / "v", paired=tmp_path / "t.npy", metrics=("psnr",), video=True, batch_size=5, show=False)
    assert again["psnr"].value == pytest.approx(found["psnr"].value)
    assert again["psnr"].n == 4
    (tmp_path / "v" / "clip0" / "0.png").unlink()
    with pytest.raises(InputError, match="differ in length"):
        evaluate(tmp_path / "v", video=True, show=False)


def test_identical_images_have_no_finite_psnr_and_say_so(tmp_path, capsys):
    folder = write_folder(tmp_path / "a", pictures(4))
    assert run(folder, "--paired", folder, "--metrics", "psnr", "ssim", "--json", tmp_path / "o.json") == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "o.json").read_text())["metrics"]}
    assert rows["psnr"]["value"] is None
    assert "4 of 4 are identical" in rows["psnr"]["reason"]
    assert rows["ssim"]["value"] == pytest.approx(1)
    assert "not computed: PSNR" in capsys.readouterr().out


def test_the_command_prints_a_table_and_writes_numbers(tmp_path, capsys):
    folder = write_folder(tmp_path / "made", pictures(40, channels=1, size=28))
    twins = write_folder(tmp_path / "plain", pictures(40, 3, channels=1, size=28))
    words = [folder, "--reference", "demo:train", "--paired", twins, "--json", tmp_path / "o.json"]
    assert run(*words) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["n"] == 40
    assert found["network"] == DemoFeatures().name
    assert [row["name"] for row in found["metrics"]] == list(available_metrics())
    for row in found["metrics"]:
        assert (row["value"] is None) == (row["reason"] is not None)
        assert row["label"] in printed.out
    assert "note: FID of 40 says little" in printed.err


# Metrics and networks of one's own.


def test_metrics_are_chosen_by_name_or_label_and_unknown_ones_named():
    assert [m.name for m in choose_metrics(("psnr", "FID"))] == ["frechet_distance", "psnr"]
    with pytest.raises(InputError, match="no metric 'fvd'; there are FID"):
        choose_metrics(("fvd",))


def test_a_metric_of_ones_own_is_computed_like_the_others(monkeypatch):
    from sostenuto.quality import registry

    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))
    darkness = Metric(
        "darkness",
        "darkness",
        Needs.PAIRS,
        "lower",
        load=lambda given, device: lambda a, b: 255 - a.float().mean((1, 2, 3)),
    )
    mean = Metric("mean", "mean", Needs.FEATURES, "lower", compute=lambda a, b: Value(float(a.features.mean())))
    register_metric(darkness)
    register_metric(mean)
    images = pictures(6)
    found = evaluate(images, images, paired=images, metrics=("darkness", "mean"), network=Colours(), show=False)
    assert found["darkness"].value == pytest.approx(255 - images.float().mean().item(), rel=1e-5)
    assert found["mean"].value == pytest.approx(Colours().extract(images).features.mean().item(), rel=1e-5)
    with pytest.raises(InputError, match="already"):
        register_metric(mean)
    with pytest.raises(InputError, match="either compute"):
        register_metric(Metric("neither", "neither", Needs.PAIRS, "lower"))


# Sufficient statistics.


def test_parts_put_together_are_to_the_bit_the_whole_in_any_order(tmp_path):
    images, twins = pictures(50), pictures(50, 4)

    def part(number, parts):
        path = tmp_path / f"{number}of{parts}.safetensors"
        found = evaluate(
            images, paired=twins, network=Colours(), batch_size=8, shard=(number, parts), statistics=path, show=False,
        )  # fmt: skip
        assert (found.rows == ()) == (parts > 1)
        return path

    (whole,), three = [part(0, 1)], [part(number, 3) for number in range(3)]
    real = pictures(60, 5)

    class Here(Colours):
        pass

    def numbers(paths):
        merged = merge([Statistics.load(path) for path in paths])
        reference = Statistics.load(part_of_real)
        assert reference.complete
        return evaluate(paths, part_of_real, show=False).rows, merged

    part_of_real = tmp_path / "real.safetensors"
    evaluate(real, network=Here(), statistics=part_of_real, show=False)
    rows, one = numbers([whole])
    assert next(row.value for row in rows if row.name == "frechet_distance") is not None
    for order in (three, three[::-1], [three[1], three[2], three[0]]):
        other_rows, merged = numbers(order)
        assert other_rows == rows
        assert torch.equal(merged.moments.outer, one.moments.outer)
        assert torch.equal(merged.spatial.total, one.spatial.total)
        assert torch.equal(merged.features, one.features)
        assert torch.equal(merged.scores["psnr"], one.scores["psnr"])
    one.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == whole.read_bytes()


def test_parts_of_different_sets_or_twice_the_same_are_refused(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, seed in zip(paths, (0, 1), strict=False):
        evaluate(pictures(20, seed), network=Colours(), batch_size=5, shard=(0, 2), statistics=path, show=False)
    evaluate(pictures(20), network=Colours(), batch_size=4, shard=(1, 2), statistics=paths[2], show=False)
    with pytest.raises(InputError, match="with identity"):
        evaluate(paths[:2], show=False)
    with pytest.raises(InputError, match="with batch_size 4"):
        evaluate([paths[0], paths[2]], show=False)
    with pytest.raises(InputError, match="10 images of images are in more than one part, such as 0"):
        evaluate([paths[0], paths[0]], show=False)
    with pytest.raises(InputError, match="10 of the 20 images of images are in these"):
        evaluate(paths[0], show=False)
    with pytest.raises(InputError, match="10 of 20 images: finish it first"):
        evaluate(pictures(9), paths[0], show=False)


def test_an_interrupted_run_keeps_what_was_done_and_goes_on(tmp_path, monkeypatch):
    images, kept = pictures(40), tmp_path / "kept.safetensors"

    class Fails(Colours):
        def extract(self, batch):
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().extract(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate(images, network=Fails(), batch_size=8, statistics=kept, show=False)
    assert len(Statistics.load(kept)) == 16  # the first call was the check of one image
    network = Colours()
    found = evaluate(images, images, network=network, batch_size=8, statistics=kept, show=False)
    fresh = evaluate(images, images, network=Colours(), batch_size=8, show=False)
    assert network.batches.count(8) - 5 == 3  # five for the reference, three that were missing
    assert found.rows == fresh.rows
    monkeypatch.setattr(measuring, "_SECONDS_BETWEEN_SAVES", 0.0)
    written = []
    monkeypatch.setattr(Statistics, "save", lambda self, path: written.append(len(self)))
    evaluate(images, network=Colours(), batch_size=16, statistics=tmp_path / "new.safetensors", show=False)
    assert written == [16, 32, 40]  # so that a kill loses little


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t, a: t.pop("indices"), "indices"),
        (lambda t, a: t.update(indices=t["indices"].flip(0)), "do not increase"),
        (lambda t, a: t.update(indices=t["indices"] + 5), "outside"),
        (lambda t, a: t.update(features=t["features"][:3]), "one row for each"),
        (lambda t, a: t.update({"moments.count": torch.tensor([3, 1])}), "another number"),
        (lambda t, a: t.update({"moments.outer": t["moments.outer"].double()}), "malformed"),
        (lambda t, a: t.pop("moments.total"), "incomplete"),
        (lambda t, a: a.update(version=9), "version 1"),
        (lambda t, a: a.update(shape=[3, 16]), "makes no sense"),
        (lambda t, a: a.update(total="many"), "many"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, change, complaint):
    from safetensors import safe_open

    path = tmp_path / "s.safetensors"
    evaluate(pictures(10), network=Colours(), statistics=path, show=False)
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118
    change(tensors, about)
    save_file(tensors, path, {"about": json.dumps(about)})
    with pytest.raises(InputError, match=complaint):
        Statistics.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="can't be read"):
        Statistics.load(path)


# ADM's evaluator.


def test_adm_files_are_written_and_read_back(tmp_path, capsys):
    images = pictures(30)
    folder = write_folder(tmp_path / "made", images)
    assert run(folder, "--metrics", "psnr", "--paired", folder, "--write-npz", tmp_path / "o.npz") == 0
    with np.load(tmp_path / "o.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], images.permute(0, 2, 3, 1).numpy())
    source = open_source(tmp_path / "o.npz")
    assert torch.equal(source.read(7, 19), images[7:19])
    assert torch.equal(source.read(0, 30), images)  # back to the beginning
    grey = write_folder(tmp_path / "grey", pictures(5, channels=1, size=28))
    assert run(grey, "--reference", "demo:test", "--write-npz", tmp_path / "g.npz") == 0
    with np.load(tmp_path / "g.npz") as archive:
        assert archive["arr_0"].shape == (5, 28, 28, 3)  # the evaluator takes RGB


def test_an_adm_reference_gives_moments_of_all_and_images_of_some(tmp_path):
    class Inceptionlike(Colours):
        name = "inception-00000000"

    real, images = pictures(200, 8), pictures(40)
    seen = Inceptionlike().extract(real)
    moments = {
        f"{name}{suffix}": value.numpy()
        for suffix, features in (("", seen.features.double()), ("_s", seen.spatial.double()))
        for name, value in (("mu", features.mean(0)), ("sigma", features.T.cov()))
    }
    np.savez(tmp_path / "full.npz", arr_0=real[:50].permute(0, 2, 3, 1).numpy(), **moments)
    np.savez(tmp_path / "moments.npz", **moments)
    direct = evaluate(images, real, network=Inceptionlike(), show=False)
    full = evaluate(images, tmp_path / "full.npz", network=Inceptionlike(), show=False)
    bare = evaluate(images, tmp_path / "moments.npz", network=Inceptionlike(), show=False)
    for name in ("frechet_distance", "spatial_frechet_distance"):
        for found in (full, bare):
            assert found[name].value == pytest.approx(direct[name].value, rel=1e-3)
    some = precision_recall(Inceptionlike().extract(images).features, seen.features[torch.arange(40) * 50 // 40])
    assert full["precision"].value == pytest.approx(some[0])
    assert bare["precision"].value is None
    assert "give a reference with images" in bare["precision"].reason
    assert bare["frechet_distance"].floor is None
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    narrow = evaluate(images, tmp_path / "narrow.npz", paired=images // 2, network=Inceptionlike(), show=False)
    assert narrow["frechet_distance"].reason == "the images have 6 features and the reference 3: use one network"
    assert narrow["psnr"].value is not None
    with pytest.raises(InputError, match=r"of Inception's features, those of the images of colours-1's"):
        evaluate(images, tmp_path / "moments.npz", network=Colours(), show=False)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"mu": np.zeros(4)}, "both mu and sigma"),
        ({"mu": np.zeros(4), "sigma": np.zeros((3, 3))}, r"not \[d\] and \[d, d\]"),
        ({"mu": np.zeros(4, int), "sigma": np.zeros((4, 4))}, "floating-point"),
        ({"mu": np.full(4, np.nan), "sigma": np.zeros((4, 4))}, "not finite"),
    ],
)
def test_wrong_moments_are_refused(tmp_path, arrays, complaint):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(InputError, match=complaint):
        read_moments(open_npz(tmp_path / "r.npz"), "mu", "sigma")


# Bad input.


def test_an_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    assert run(tmp_path / "empty", "--reference", "demo:train") == 1
    assert "empty holds no picture (.png" in capsys.readouterr().err
    assert run(tmp_path / "missing", "--reference", "demo:train") == 1
    assert "there is no" in capsys.readouterr().err


def test_corrupt_pictures_are_named_before_any_work(tmp_path):
    folder = write_folder(tmp_path / "made", pictures(9))
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    (folder / "6.png").write_bytes(b"not a picture")
    network = Colours()
    with pytest.raises(InputError, match=r"unusable pictures: 4\.png .*6\.png") as error:
        evaluate(folder, network=network, show=False)
    assert "7.png" not in str(error.value)
    assert network.batches == []


def test_a_jpeg_that_ends_early_is_named_and_what_was_measured_is_kept(tmp_path):
    folder = write_folder(tmp_path / "made", pictures(12, size=64), "jpg")
    whole = (folder / "9.jpg").read_bytes()
    (folder / "9.jpg").write_bytes(whole[: len(whole) * 2 // 3])  # JPEG has no check sums: only decoding tells
    kept = tmp_path / "kept.safetensors"
    with pytest.raises(InputError, match=r"9\.jpg is damaged"):
        evaluate(folder, network=Colours(), batch_size=4, statistics=kept, show=False)
    assert Statistics.load(kept).indices.tolist() == list(range(8))


def test_pictures_of_different_sizes_are_refused(tmp_path):
    folder = write_folder(tmp_path / "made", pictures(3))
    Image.new("RGB", (20, 16)).save(folder / "odd.png")
    with pytest.raises(InputError, match=r"0\.png is 16 x 16 and odd\.png 20 x 16"):
        FolderSource(folder)
    with pytest.raises(InputError, match="pairs need one size"):
        evaluate(pictures(3), paired=pictures(3, size=20), show=False)
    found = evaluate(pictures(30), pictures(30, size=20), network=Colours(), show=False)
    assert any("16 x 16 and the reference 20 x 20" in warning for warning in found.warnings)


def test_kinds_of_pixels_are_taken_or_refused_by_name(tmp_path):
    image = Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy())
    folder = tmp_path / "kinds"
    folder.mkdir()
    image.save(folder / "a.png")
    image.convert("RGBA").save(folder / "b.png")
    image.convert("P").save(folder / "c.png")
    image.convert("L").save(folder / "d.webp", lossless=True)
    source = FolderSource(folder)
    assert source.shape == (3, 16, 16)
    assert torch.equal(source.read(0, 1), source.read(1, 2))
    clear = image.convert("RGBA")
    clear.putalpha(100)
    clear.save(folder / "e.png")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(folder / "f.png")
    with pytest.raises(InputError, match=r"e\.png \(it is partly transparent\), f\.png \(its pixels are I;16"):
        FolderSource(folder)


def test_pairs_and_prompts_must_fit(tmp_path, capsys):
    one, other = write_folder(tmp_path / "a", pictures(3)), write_folder(tmp_path / "b", pictures(4))
    with pytest.raises(InputError, match=r"3 images and .* 4: pairs need as many"):
        evaluate(one, paired=other, show=False)
    (other / "3.png").unlink()
    (other / "1.png").rename(other / "1x.png")
    with pytest.raises(InputError, match=r"has 1 where .* has 1x"):
        evaluate(one, paired=other, show=False)
    with pytest.raises(InputError, match="3 images and there are 2 prompts"):
        evaluate(one, prompts=["a", "b"], show=False)
    (tmp_path / "p.txt").write_text("a piano\n\nanother\n")
    assert run(one, "--prompts", tmp_path / "p.txt") == 1
    assert "none of them empty" in capsys.readouterr().err


def test_arrays_of_another_type_or_shape_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    wrong = [
        (np.zeros((4, 8, 8, 3), np.float32), "must hold bytes"),
        (np.zeros((4, 8, 8, 5), np.uint8), "neither 1 nor 3 channels"),
        (np.zeros((4, 8), np.uint8), r"must be \[n, h, w\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
        (np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8)), "Fortran order"),
    ]
    for array, complaint in wrong:
        np.save(path, array)
        with pytest.raises(InputError, match=complaint):
            open_source(path)
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"has no arr_0 \(it has images\)"):
        open_source(tmp_path / "b.npz")
    with pytest.raises(InputError, match="uint8"):
        evaluate(torch.rand(4, 3, 8, 8), show=False)
    (tmp_path / "c.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="neither a folder"):
        open_source(tmp_path / "c.bin")


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickled_arrays_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.empty(1, object)
    objects[0] = Explosive()
    np.save("a.npy", objects, allow_pickle=True)
    np.savez("b.npz", arr_0=objects, mu=objects, sigma=objects)
    for name in ("a.npy", "b.npz"):
        with pytest.raises(InputError, match="pickled Python objects"):
            open_source(name)
        with pytest.raises(InputError, match="pickled Python objects"):
            evaluate(pictures(3), name, network=Colours(), show=False)
    assert not os.path.exists("exploded")


def header(shape, dtype="|u1"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_declared_sizes_are_checked_before_anything_is_read(tmp_path):
    huge = tmp_path / "huge.npy"
    huge.write_bytes(header("(1000000000, 1024, 1024, 3)") + b"0" * 100)
    with pytest.raises(InputError, match=r"declares 3145728000000000 bytes .* and has 100"):
        open_source(huge)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header("(1000000, 4096, 4096, 3)") + b"0" * 100)
    with pytest.raises(InputError, match="declares"):
        open_source(tmp_path / "huge.npz")
    (tmp_path / "wide.npy").write_bytes(header("(1, 20000, 20000, 3)"))
    with open(tmp_path / "wide.npy", "r+b") as file:
        file.truncate(len(header("(1, 20000, 20000, 3)")) + 20000 * 20000 * 3)  # a sparse file: nothing is written
    with pytest.raises(InputError, match="more than 268435456 bytes are refused"):
        open_source(tmp_path / "wide.npy")
    for junk in (
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + b"x" * 50,
        header("(-1, 2, 2)"),
        header("'a'"),
        header("(2,", "|O"),
    ):
        huge.write_bytes(junk)
        with pytest.raises(InputError):
            open_source(huge)
    (tmp_path / "no.npz").write_bytes(b"PK not a zip")
    with pytest.raises(InputError, match="can't be read"):
        open_source(tmp_path / "no.npz")


def test_zip_bombs_and_damaged_archives_are_refused(tmp_path, monkeypatch):
    from sostenuto.quality import arrays

    monkeypatch.setattr(arrays, "_BOMB_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header("(1000, 64, 64, 3)") + bytes(1000 * 64 * 64 * 3))
    with pytest.raises(InputError, match="would unpack"):
        open_source(tmp_path / "bomb.npz")
    monkeypatch.undo()
    images = pictures(6)
    np.savez(tmp_path / "a.npz", images.permute(0, 2, 3, 1).numpy())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 255  # its check sum is now wrong
    (tmp_path / "a.npz").write_bytes(content)
    source = open_source(tmp_path / "a.npz")
    with pytest.raises(InputError, match="CRC"):
        source.read(0, 6)


def test_a_picture_that_declares_a_monstrous_size_is_refused_by_its_header(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    with pytest.raises(InputError, match=r"unusable pictures: bomb\.png"):
        FolderSource(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_never_raise_anything_else(tmp_path_factory, data):
    made = tmp_path_factory.getbasetemp() / "whole"
    if not made.exists():
        images = pictures(4, size=12)
        write_folder(made / "png", images[:1])
        write_folder(made / "jpg", images[:1], "jpg")
        np.savez(made / "a.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), mu=np.zeros(3), sigma=np.eye(3))
        np.savez_compressed(made / "b.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
        np.save(made / "c.npy", images.numpy())
        evaluate(images, network=Colours(), statistics=made / "d.safetensors", show=False)
    name = data.draw(st.sampled_from(["png/0.png", "jpg/0.jpg", "a.npz", "b.npz", "c.npy", "d.safetensors"]))
    content = bytearray((made / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    folder = tmp_path_factory.getbasetemp() / "damaged" / name.replace(".", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name.rpartition("/")[2]
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        if name.endswith("safetensors"):
            Statistics.load(path)
        else:
            source = open_source(folder if "/" in name else path)
            assert source.read(0, len(source)).shape == (len(source), *source.shape)
        if name.endswith("npz"):
            read_moments(open_npz(path), "mu", "sigma")


def test_too_few_images_for_a_metric_say_so_and_leave_the_others(tmp_path):
    found = evaluate(pictures(3), pictures(30), paired=pictures(3, 9), network=Colours(), show=False)
    assert found["precision"].value is None
    assert found["precision"].reason == "it needs at least 4 images, there are 3"
    assert found["frechet_distance"].value is not None
    assert found["psnr"].value is not None
    alone = evaluate(pictures(1), pictures(30), network=Colours(), show=False)
    assert alone["frechet_distance"].reason == "it needs at least 2 images, there are 1"
    for count in (1, 2, 3):
        scant = evaluate(pictures(9), pictures(count), network=Colours(), show=False)
        assert scant["kernel_distance"].reason == f"it needs at least 4 reference images, there are {count}"
        assert (scant["frechet_distance"].value is None) == (count < 2)
    for count in (4, 5, 9):  # every floor that can be had, and no failure where none can
        assert evaluate(pictures(9), pictures(count), network=Colours(), show=False)["recall"].value is not None
    assert any("PSNR of 3 says little" in warning for warning in found.warnings)


def test_images_for_another_network_are_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match="28 x 28, not 16 x 16"):
        evaluate(pictures(5), "demo:train", network="demo", show=False)
    with pytest.raises(InputError, match="grey images, not colours"):
        evaluate(pictures(5, size=28), "demo:train", network="demo", show=False)
    with pytest.raises(InputError, match="no feature network 'vgg'; there are inception, demo"):
        evaluate(pictures(5), "demo:train", network="vgg", show=False)
    with pytest.raises(InputError, match="not of colours-1"):
        evaluate(pictures(5), "demo:train", network=Colours(), show=False)


def test_wrong_usage_of_the_command_is_one_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "a", pictures(3))
    wrong = [
        ((folder, "--shard", 0, 2), "give --statistics"),
        ((folder, "--statistics", tmp_path / "s.json"), "writes a .safetensors"),
        ((folder, "--weights", "inception"), "NAME=PATH"),
        ((folder, "--weights", f"inception={tmp_path / 'none'}"), "should be a file"),
        ((folder, folder), "one folder or file of images"),
        ((folder, "--batch-size", 0, "--paired", folder), "make no sense"),
        ((), "name what to evaluate"),
    ]
    for words, complaint in wrong:
        assert run(*words) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("sostenuto: ")
        assert complaint in error


def test_values_of_images_beyond_exact_sums_are_refused():
    class Broken(Colours):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def extract(self, images):
            return Features(super().extract(images).features * self.factor)

    with pytest.raises(InputError, match="not finite"):
        evaluate(pictures(5), network=Broken(float("nan")), show=False)
    with pytest.raises(InputError, match="too large to be summed exactly"):
        evaluate(pictures(5), network=Broken(1e5), show=False)
