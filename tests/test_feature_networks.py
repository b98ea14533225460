"""Loading the networks of metrics from weights that the user has; here with random ones of the right shapes."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sostenuto.errors import InputError, MetricError
from sostenuto.quality import networks, perceptual, weights
from sostenuto.quality.evaluate import evaluate


def pictures(count, size=64, seed=0):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield
    torch.hub.set_dir(before)


def test_missing_weights_are_a_reason_that_says_what_to_fetch_and_how_to_pass_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", types.ModuleType("ImageReward"))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    images = pictures(3)
    found = evaluate(images, images, paired=images // 2, prompts=["a", "b", "c"], show=False)
    for name, file, flag in (
        ("frechet_distance", "weights-inception-2015-12-05-6726825d.pth", "--weights inception=FILE"),
        ("lpips", "alexnet-owt-7be5be79.pth", "--weights alexnet=FILE"),
        ("dists", "vgg16-397923af.pth", "--weights vgg16=FILE"),
        ("image_reward", "ImageReward.pt", "--weights image-reward=FOLDER"),
    ):
        assert found[name].value is None
        assert file in found[name].reason
        assert flag in found[name].reason
    assert found["psnr"].value is not None  # what can be computed is


def test_missing_packages_are_a_reason_too(monkeypatch, tmp_path):
    for module in ("torchvision", "ImageReward", "torch_fidelity.feature_extractor_inceptionv3", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    for load, package in (
        (perceptual.load_lpips, "torchvision"),
        (perceptual.load_dists, "torchvision"),
        (perceptual.load_image_reward, "image-reward"),
        (perceptual.load_clip_score, "transformers"),
        (lambda given, device: networks.Inception(tmp_path / "any.pth"), "torch-fidelity"),
    ):
        with pytest.raises(MetricError, match=f"pip install {package}"):
            load({}, "cpu")


def test_weights_are_found_in_torchs_cache_and_a_given_path_comes_first(tmp_path):
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    with pytest.raises(MetricError, match="not at hand"):
        weights.find(weights.INCEPTION, {})
    (cache / "pt_inception-2015-12-05-6726825d.pth").touch()  # pytorch-fid's name for the same file
    assert weights.find(weights.INCEPTION, {}) == cache / "pt_inception-2015-12-05-6726825d.pth"
    assert weights.find(weights.INCEPTION, {"inception": tmp_path}) == tmp_path
    with pytest.raises(InputError, match="NAME=PATH with a name of inception"):
        weights.parse_weights(("resnet=/x",))


class Explosive:
    def __reduce__(self):
        return Path.mkdir, (Path("exploded"),)


def test_weights_that_hold_code_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "other": Explosive()}, "bad.pth")
    Path("junk.safetensors").write_bytes(b"junk")
    torch.save([1, 2], "list.pth")
    for name in ("bad.pth", "junk.safetensors", "list.pth", "absent.pth"):
        with pytest.raises(MetricError, match=f"{name} can't be read as weights"):
            weights.read_state(Path(name))
    assert not Path("exploded").exists()
    torch.save({"weight": torch.ones(2)}, "good.pth")
    save_file({"weight": torch.ones(2)}, "good.safetensors")
    for name in ("good.pth", "good.safetensors"):
        assert torch.equal(weights.read_state(Path(name))["weight"], torch.ones(2))


def random_inception(path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state, **options):
            return None

    torch.save({}, path)
    torch.manual_seed(0)
    network = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    torch.save(network.state_dict(), path)
    return network


def test_inception_gives_the_features_of_torch_fidelity_and_adms_spatial_ones(tmp_path):
    own = random_inception(tmp_path / "inception.pth")
    loaded = networks.Inception(tmp_path / "inception.pth")
    images = pictures(3)
    seen = loaded.extract(images)
    assert torch.equal(seen.features, own(images)[0])
    assert seen.logits.shape == (3, 1008)
    assert torch.allclose(seen.logits, seen.features @ own.fc.weight.T, atol=1e-5)  # without bias
    caught = []
    own.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: caught.append(out))
    own(images)
    assert seen.spatial.shape == (3, 7 * 17 * 17)  # mixed_6/conv of the original graph, its first seven channels
    laid_out_by_tensorflow = caught[0].numpy().transpose(0, 2, 3, 1)  # [n, h, w, c]; then as ADM's evaluator.py has it
    assert np.array_equal(seen.spatial.numpy(), laid_out_by_tensorflow[..., :7].reshape(3, -1))
    grey = images[:, :1]
    assert torch.equal(loaded.extract(grey).features, loaded.extract(grey.expand(-1, 3, -1, -1)).features)
    save_file(own.state_dict(), tmp_path / "inception.safetensors")
    again = networks.Inception(tmp_path / "inception.safetensors")
    assert torch.equal(again.extract(images).features, seen.features)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MetricError, match="does not hold the weights of weights-inception"):
        networks.Inception(tmp_path / "other.safetensors")


def test_spatial_features_follow_each_other_position_by_position_as_adms(tmp_path, monkeypatch):
    """Without torch-fidelity's package: a network whose block is known by hand, on pictures that are not square."""

    class Known(torch.nn.Module):
        def __init__(self, *_, **__):
            super().__init__()
            self.Mixed_6d = torch.nn.Conv2d(3, 9, 1, bias=False)
            self.Mixed_6d.weight.data = torch.arange(27.0).view(9, 3, 1, 1)

        def forward(self, images):
            maps = self.Mixed_6d(images.float())
            return maps.mean((2, 3)), maps.mean((2, 3))

    package = types.ModuleType("feature_extractor_inceptionv3")
    package.FeatureExtractorInceptionV3 = Known
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", package)
    torch.save({}, tmp_path / "any.pth")
    images = pictures(2, size=5)[:, :, :3]
    seen = networks.Inception(tmp_path / "any.pth").extract(images).spatial
    expected = [
        [sum((3 * channel + colour) * int(image[colour, row, column]) for colour in range(3))
         for row in range(3) for column in range(5) for channel in range(7)]
        for image in images
    ]  # fmt: skip
    assert seen.tolist() == expected


@pytest.mark.slow  # eigenvalues of matrices of 2048 by 2048
def test_images_are_evaluated_through_inception_by_the_command(tmp_path, capsys):
    from sostenuto.cli import main

    random_inception(tmp_path / "inception.pth")
    np.savez(tmp_path / "made.npz", pictures(6).permute(0, 2, 3, 1).numpy())
    words = [str(tmp_path / "made.npz"), "--weights", f"inception={tmp_path / 'inception.pth'}", "--device", "cpu"]
    whole = tmp_path / "whole.npz"
    assert main(["evaluate", *words, "--write-npz", str(whole), "--metrics", "IS"]) == 0
    with np.load(whole) as archive:
        assert sorted(archive.files) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        assert archive["sigma"].shape == (2048, 2048)
        assert archive["mu_s"].shape == (2023,)
    assert main(["evaluate", *words, "--reference", str(whole), "--metrics", "FID", "sFID", "precision"]) == 0
    printed = capsys.readouterr().out.splitlines()
    values = {
        line.split()[0]: float(line.split()[1]) for line in printed if line.startswith(("FID", "sFID", "precision"))
    }
    assert values["FID"] == pytest.approx(0, abs=1e-3)
    assert values["sFID"] == pytest.approx(0, abs=1e-3)
    assert values["precision"] == 1


def random_backbone(name, path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    torch.save(getattr(models, name)(weights=None).state_dict(), path)
    return path


def test_lpips_is_nothing_for_twins_and_symmetric_with_the_backbone_given(tmp_path):
    given = {"alexnet": random_backbone("alexnet", tmp_path / "mine.pth")}
    before = torch.hub.get_dir()
    score = perceptual.load_lpips(given, "cpu")
    assert torch.hub.get_dir() == before
    images, others = pictures(3), pictures(3, seed=1)
    assert score(images, images).tolist() == [0, 0, 0]
    assert torch.allclose(score(images, others), score(others, images))
    one_by_one = torch.cat([score(a[None], b[None]) for a, b in zip(images, others, strict=True)])
    assert torch.allclose(score(images, others), one_by_one, atol=1e-6)
    found = evaluate(images, paired=others, weights=given, metrics=("lpips",), show=False)["lpips"]
    assert found.value == pytest.approx(one_by_one.double().mean().item(), rel=1e-5)
    reference = pytest.importorskip("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(given["alexnet"], weights_only=True)
    for key in reference.net.state_dict():
        reference.net.get_parameter(key).data = state["features." + key.partition(".")[2]]
    with torch.no_grad():
        expected = reference(images / 127.5 - 1, others / 127.5 - 1).flatten()
    assert torch.allclose(score(images, others), expected, atol=1e-5)


@pytest.mark.slow  # writes and reads half a gigabyte
def test_dists_is_nothing_for_twins_with_the_backbone_given(tmp_path):
    given = {"vgg16": random_backbone("vgg16", tmp_path / "mine.pth")}
    score = perceptual.load_dists(given, "cpu")
    images, others = pictures(2), pictures(2, seed=1)
    assert score(images, images).abs().max() < 1e-4
    assert (score(images, others) > 0).all()
    assert torch.allclose(score(images, others), score(others, images), atol=1e-5)
    assert score(images[:1], others[:1]).shape == (1,)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MetricError, match="does not hold the weights of vgg16"):
        perceptual.load_dists({"vgg16": tmp_path / "other.safetensors"}, "cpu")


@pytest.fixture
def clip_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "clip"
    folder.mkdir()
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_a_hundred_times_the_cosine_of_image_and_prompt(clip_folder):
    import transformers

    images, prompts = pictures(3), ["a piano", "a note", "nothing"]
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    processor = transformers.CLIPProcessor.from_pretrained(clip_folder)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = processor(text=[prompt], images=[image.permute(1, 2, 0).numpy()], return_tensors="pt")
        with torch.no_grad():
            seen = model.vision_model(inputs["pixel_values"]).pooler_output @ model.visual_projection.weight.T
            read = model.text_model(inputs["input_ids"]).pooler_output @ model.text_projection.weight.T
        expected.append(100 * max(0.0, torch.cosine_similarity(seen, read).item()))
    found = evaluate(images, prompts=prompts, weights={"clip": clip_folder}, metrics=("CLIP score",), show=False)
    assert found.statistics.scores["clip_score"].tolist() == pytest.approx(expected, abs=1e-3)
    assert found["clip_score"].value == pytest.approx(sum(expected) / 3, abs=1e-3)
    long = evaluate(images, prompts=["a " * 99] * 3, weights={"clip": clip_folder}, metrics=("CLIP score",), show=False)
    assert long["clip_score"].value is not None  # cut to what the model reads
    videos = images.unsqueeze(1).expand(-1, 2, -1, -1, -1)
    each = evaluate(videos, prompts=prompts, weights={"clip": clip_folder}, metrics=("CLIP score",), show=False)
    assert each["clip_score"].value == pytest.approx(sum(expected) / 3, abs=1e-3)


def test_clip_similarity_is_the_cosine_of_an_image_and_its_twin(clip_folder):
    import transformers

    images, twins = pictures(3), pictures(3).flip(0)
    twins[1] = images[1]
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    processor = transformers.CLIPProcessor.from_pretrained(clip_folder)
    expected = []
    for pair in zip(images, twins, strict=True):
        inputs = processor(images=[image.permute(1, 2, 0).numpy() for image in pair], return_tensors="pt")
        with torch.no_grad():
            seen = model.vision_model(inputs["pixel_values"]).pooler_output @ model.visual_projection.weight.T
        expected.append(torch.cosine_similarity(*seen, dim=0).item())
    found = evaluate(images, paired=twins, weights={"clip": clip_folder}, metrics=("CLIP-I",), show=False)
    assert found.statistics.scores["clip_similarity"].tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[1] == pytest.approx(1)
    assert min(expected) < 0.999


def test_a_folder_without_a_clip_model_is_a_reason(tmp_path):
    pytest.importorskip("transformers")
    for load in (perceptual.load_clip_score, perceptual.load_clip_similarity):
        with pytest.raises(MetricError, match="does not hold a CLIP model"):
            load({"clip": tmp_path}, "cpu")
        with pytest.raises(MetricError, match=r"fetch openai/clip-vit-large-patch14 .* --weights clip=FOLDER"):
            load({}, "cpu")


def test_image_reward_scores_each_image_with_its_prompt(tmp_path, monkeypatch):
    """Its package is replaced by one with the same two functions, since it needs weights of two gigabytes."""
    asked = []

    def load(name, device, med_config):
        asked.append((name, device, med_config))
        print("load checkpoint")  # as the package does
        return types.SimpleNamespace(score=lambda prompt, picture: len(prompt) + picture.size[0])

    package = types.ModuleType("ImageReward")
    package.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    tokenizers = types.SimpleNamespace(from_pretrained=lambda name, local_files_only: tokens[name])
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(BertTokenizer=tokenizers))
    torch.save({"weight": torch.ones(1)}, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text("{}")
    given, tokens = {"image-reward": tmp_path}, {}
    found = evaluate(pictures(2), paired=pictures(2).flip(0), prompts=["ab", "cd"], weights=given, show=False)
    assert "bert-base-uncased" in found["image_reward"].reason
    assert not asked  # the package would fetch it
    assert found["psnr"].value is not None
    tokens["bert-base-uncased"] = "there"
    found = evaluate(pictures(2), prompts=["ab", "abcd"], weights=given, metrics=("ImageReward",), show=False)
    assert found.statistics.scores["image_reward"].tolist() == [66, 68]
    assert asked == [(str(tmp_path / "ImageReward.pt"), "cpu", str(tmp_path / "med_config.json"))]
    (tmp_path / "ImageReward.pt").unlink()
    with pytest.raises(MetricError, match=r"fetch ImageReward\.pt"):
        perceptual.load_image_reward(given, "cpu")


def test_networks_of_ones_own_are_chosen_by_name(monkeypatch):
    class Mean:
        name, num_features = "mean", 3

        def extract(self, images):
            return networks.Features(images.float().mean((2, 3)) / 255)

    monkeypatch.setattr(networks, "_LOADERS", dict(networks._LOADERS))
    networks.register_network("mean", lambda given, device: Mean())
    assert "mean" in networks.available_networks()
    found = evaluate(pictures(8), pictures(8, seed=1), network="mean", show=False)
    assert found["frechet_distance"].value is not None
    assert found["inception_score"].reason == "the class logits of the images are not known"
    with pytest.raises(InputError, match="'mean' already"):
        networks.register_network("mean", lambda given, device: Mean())


def test_networks_of_ones_own_are_given_their_weights(monkeypatch, tmp_path):
    class Mean:
        name, num_features = "mean", 3

        def extract(self, images):
            return networks.Features(images.float().mean((2, 3)) / 255)

    given = []
    monkeypatch.setattr(networks, "_LOADERS", dict(networks._LOADERS))
    monkeypatch.setattr(weights, "ALL", dict(weights.ALL))
    networks.register_network("mean", lambda paths, device: given.append(dict(paths)) or Mean(), weights=["mean"])
    for path in (tmp_path, tmp_path / "file"):
        path.touch()
        parsed = weights.parse_weights((f"mean={path}",))
        evaluate(pictures(8), network="mean", weights=parsed, show=False)
    assert given == [{"mean": tmp_path}, {"mean": tmp_path / "file"}]
    kept = tmp_path / "kept.safetensors"
    evaluate(pictures(8), network="mean", statistics=kept, show=False)

    def missing(paths, device):
        raise MetricError("no weights here")

    monkeypatch.setitem(networks._LOADERS, "mean", missing)
    found = evaluate(kept, pictures(8, seed=1), network="mean", show=False)
    assert found["frechet_distance"].reason == "no weights here"
    with pytest.raises(InputError, match="the weights of mean should be a file or a folder"):
        weights.parse_weights((f"mean={tmp_path / 'none'}",))
