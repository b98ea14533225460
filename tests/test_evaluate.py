"""Evaluating a set of images: every way in which it may come, and what is found."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import processes
from image_sets import Colours, pictures, run, write_folder
from sostenuto.cli import main
from sostenuto.cli.evaluate import write_adm
from sostenuto.demo.judge import DemoFeatures, Judge
from sostenuto.errors import InputError
from sostenuto.quality import measure as measuring
from sostenuto.quality import networks, registry
from sostenuto.quality.evaluate import evaluate
from sostenuto.quality.metrics import Gaussian, frechet_distance, precision_recall, ssim_per_image
from sostenuto.quality.registry import Metric, Needs, Value, available_metrics, choose_metrics, register_metric
from sostenuto.quality.sources import open_source
from sostenuto.quality.statistics import Statistics, merge

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
    colour = twins[:, :1].expand(-1, 3, -1, -1).contiguous()  # grey pictures of which one set was written in colour
    for pair in ((images[:, :1], colour), (images[:, :1].expand(-1, 3, -1, -1).contiguous(), twins[:, :1])):
        mixed = evaluate(pair[0], paired=pair[1], metrics=("psnr", "ssim"), show=False)
        assert mixed["ssim"].value == pytest.approx(grey, rel=1e-5)
        alone = evaluate(images[:, :1], paired=twins[:, :1], metrics=("psnr",), show=False)
        assert mixed["psnr"].value == pytest.approx(alone["psnr"].value, rel=1e-5)


def test_videos_count_once_though_their_frames_are_compared_one_by_one(tmp_path):
    videos, twins = (pictures(12, seed).view(4, 3, 3, 16, 16) for seed in (0, 1))
    found = evaluate(videos, paired=twins, metrics=("psnr", "fid"), network=Colours(), reference=twins, show=False)
    per_frame = -10 * (videos.double() / 255 - twins.double() / 255).square().mean((2, 3, 4)).log10()
    assert found["psnr"].value == pytest.approx(per_frame.mean().item(), rel=1e-5)
    assert found["psnr"].n == 4
    half = 1.96 * per_frame.mean(1).std().item() / 2
    assert found["psnr"].interval[1] == pytest.approx(per_frame.mean().item() + half, rel=1e-4)
    assert found["frechet_distance"].n == 12
    assert (
        found["frechet_distance"].interval is None
    )  # of four videos, though there are twice as many frames as features
    assert any("FID of 4 says little" in warning for warning in found.warnings)
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


def test_prompts_go_over_and_over_as_generate_takes_them():
    def load(given, device):
        return lambda images, prompts: torch.tensor([float(len(prompt)) for prompt in prompts])

    register_metric(Metric("words", "words", Needs.PROMPTS, "higher", load=load))
    try:
        found = evaluate(pictures(6), prompts=["a", "bb"], metrics=("words",), batch_size=3, show=False)
        videos = evaluate(pictures(8).view(4, 2, 3, 16, 16), prompts=["a", "bb"], metrics=("words",), show=False)
    finally:
        registry._BY_NAME.pop("words")
    assert found.statistics.scores["words"].tolist() == [1, 2] * 3
    assert videos.statistics.scores["words"].tolist() == [1, 1, 2, 2] * 2


def test_the_floor_beside_a_file_with_its_own_moments_is_that_of_other_images(tmp_path):
    class Inceptionlike(Colours):
        name = "inception-00000000"

    real = write_folder(tmp_path / "real", pictures(40, 3))
    found = evaluate(real, network=Inceptionlike(), features=True, show=False)
    write_adm(tmp_path / "r.npz", str(real), False, found.statistics)
    own, plain = (
        evaluate(pictures(40), reference, network=Inceptionlike(), metrics=("FID",), show=False)["frechet_distance"]
        for reference in (tmp_path / "r.npz", real)
    )
    assert own.value == pytest.approx(plain.value, rel=1e-4)
    assert own.floor == pytest.approx(plain.floor, rel=1e-4)
    assert own.floor > 0
    assert own.floor_n == plain.floor_n == 20


def test_a_copy_of_a_folder_is_the_same_images_and_other_ones_are_not(tmp_path):
    made = write_folder(tmp_path / "made", pictures(6))
    copied = shutil.copytree(made, tmp_path / "copied", copy_function=shutil.copyfile)  # with times of its own
    other = write_folder(tmp_path / "other", pictures(6, 1))
    np.savez(tmp_path / "a.npz", arr_0=pictures(6).permute(0, 2, 3, 1).numpy())
    shutil.copyfile(tmp_path / "a.npz", tmp_path / "b.npz")

    def part(source, place):
        return evaluate(source, network=Colours(), batch_size=2, shard=(place, 2), show=False).statistics

    assert merge([part(made, 0), part(copied, 1)]).complete
    assert merge([part(tmp_path / "a.npz", 0), part(tmp_path / "b.npz", 1)]).complete
    with pytest.raises(InputError, match="are not the same images"):
        merge([part(made, 0), part(other, 1)])


def test_floor_of_videos_is_that_of_other_videos():
    still = pictures(20).unsqueeze(1).expand(-1, 5, -1, -1, -1).contiguous()  # all five frames of a video are the same
    of_videos = evaluate(still, still, network=Colours(), metrics=("fid", "kid"), show=False)
    of_images = evaluate(still[:, 0], still[:, 0], network=Colours(), metrics=("fid", "kid"), show=False)
    assert of_videos["frechet_distance"].floor_n == 50  # ten whole videos beside ten others
    assert of_videos["frechet_distance"].floor == pytest.approx(of_images["frechet_distance"].floor, rel=0.25)
    assert of_images["frechet_distance"].floor > 0
    assert evaluate(still[:1], still, network=Colours(), metrics=("fid",), show=False)["frechet_distance"].floor_n == 5


def test_grey_videos_need_no_channels(tmp_path):
    videos, twins = (pictures(12, seed)[:, 0].view(3, 4, 16, 16) for seed in (0, 1))
    wanted = evaluate(videos.unsqueeze(2), paired=twins.unsqueeze(2), metrics=("psnr",), show=False)["psnr"]
    assert evaluate(videos, paired=twins, metrics=("psnr",), video=True, show=False)["psnr"] == wanted
    np.save(tmp_path / "videos.npy", videos.numpy())
    found = evaluate(tmp_path / "videos.npy", paired=twins, metrics=("psnr",), video=True, batch_size=5, show=False)
    assert found["psnr"].value == pytest.approx(wanted.value)
    assert found["psnr"].n == 3
    with pytest.raises(InputError, match="--video"):
        evaluate(tmp_path / "videos.npy", show=False)


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
    with pytest.raises(InputError, match="not the same images"):
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
        assert archive.files == ["arr_0"]
    assert run(grey, "--write-moments") == 1
    capsys.readouterr()
    other = tmp_path / "h.npz"
    assert run(grey, "--reference", "demo:test", "--write-npz", other, "--write-moments") == 1
    refused = capsys.readouterr()  # Inception or its package is missing: said before anything is measured
    assert "nception" in refused.err
    assert not refused.out
    assert not other.exists()


@pytest.mark.parametrize("metrics", [(), ("--metrics", "IS"), ("--metrics", "PSNR")])
def test_moments_are_written_where_they_are_asked_for(tmp_path, monkeypatch, capsys, metrics):
    class Inceptionlike(Colours):
        name = "inception-00000000"

    monkeypatch.setitem(networks._LOADERS, "inception", lambda given, device: Inceptionlike())
    folder = write_folder(tmp_path / "made", images := pictures(30, size=28))  # "auto" would take the demo's network
    assert run(folder, *metrics, "--write-npz", tmp_path / "r.npz", "--write-moments") == 0
    with np.load(tmp_path / "r.npz") as archive:
        assert set(archive.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
        features = Inceptionlike().extract(images).features.double()
        np.testing.assert_allclose(archive["mu"], features.mean(0), atol=1e-4)
    one, part = write_folder(tmp_path / "one", pictures(1, size=28)), ("--shard", 0, 2, "--batch-size", 15)
    for few in ((one,), (folder, *part, "--statistics", tmp_path / "part.safetensors")):
        assert run(*few, "--write-npz", tmp_path / "few.npz", "--write-moments") == 1
        assert "two images or more" in capsys.readouterr().err
        assert not (tmp_path / "few.npz").exists()


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
    some = Inceptionlike().extract(real[:50][torch.arange(40) * 50 // 40])
    floor = frechet_distance(
        Gaussian.of(some.features), Gaussian.of(seen.features)
    )  # beside the moments of all, as the images
    assert full["frechet_distance"].floor == pytest.approx(floor, rel=1e-3)
    assert full["frechet_distance"].floor_n == 40
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    narrow = evaluate(images, tmp_path / "narrow.npz", paired=images // 2, network=Inceptionlike(), show=False)
    assert narrow["frechet_distance"].reason == "the images have 6 features and the reference 3: use one network"
    assert narrow["psnr"].value is not None
    with pytest.raises(InputError, match=r"of Inception's features, those of the images of colours-1's"):
        evaluate(images, tmp_path / "moments.npz", network=Colours(), show=False)


def _evaluated(folder, *more):
    """The command, as every process of a launch runs it."""
    assert (
        main(
            [
                "evaluate",
                str(folder),
                "--paired",
                str(folder),
                "--json",
                str(folder.parent / "out.json"),
                *more,
                "--debug",
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    "size", [2, pytest.param(5, marks=pytest.mark.slow)], ids=["two", "more than there are batches"]
)
def test_several_processes_find_what_one_finds(tmp_path, size):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        picture = torch.randint(256, (28, 28), generator=generator, dtype=torch.uint8)
        Image.fromarray(picture.numpy()).save(folder / f"{index:02}.png")
    _evaluated(folder, "--reference", "demo:test")
    alone = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").unlink()
    statistics = ("--reference", "demo:test", "--batch-size", "3", "--statistics", str(tmp_path / "kept.safetensors"))
    processes.run(_evaluated, size, folder, *statistics)
    shared = json.loads((tmp_path / "out.json").read_text())
    known = {row["name"]: row["value"] for row in alone["metrics"] if row["value"] is not None}
    found = {row["name"]: row["value"] for row in shared["metrics"] if row["value"] is not None}
    assert found == pytest.approx(known, rel=1e-4)
    assert known
    assert main(["evaluate", str(tmp_path / "kept.safetensors"), "--json", str(tmp_path / "again.json")]) == 0
    again = {row["name"]: row["value"] for row in json.loads((tmp_path / "again.json").read_text())["metrics"]}
    assert again["ssim"] == found["ssim"]
