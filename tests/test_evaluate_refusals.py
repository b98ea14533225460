"""What evaluating refuses: unusable, damaged and hostile input, before any work is lost."""

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

from image_sets import Colours, pictures, run, write_folder
from sostenuto.errors import InputError
from sostenuto.quality.arrays import open_npz, read_moments
from sostenuto.quality.evaluate import evaluate
from sostenuto.quality.networks import Features
from sostenuto.quality.sources import FolderSource, open_source
from sostenuto.quality.statistics import Statistics


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
        (lambda t, a: a.update(version=1), "version 3: measure the images again"),
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
    for suffix in ("jpg", "webp"):  # these have no check sums: only decoding tells that they end early
        cut = write_folder(tmp_path / suffix, pictures(1, size=64), suffix) / f"0.{suffix}"
        (folder / f"8{cut.name}").write_bytes(cut.read_bytes()[:-20])
    network = Colours()
    for samples, reference in ((folder, None), (pictures(9), folder)):
        with pytest.raises(InputError, match=r"unusable pictures: 4\.png .*6\.png.*80\.jpg.*80\.webp") as error:
            evaluate(samples, reference, network=network, show=False)
        assert "7.png" not in str(error.value)
    assert network.batches == []


def test_a_picture_that_is_damaged_meanwhile_is_named_and_what_was_measured_is_kept(tmp_path):
    folder = write_folder(tmp_path / "made", pictures(12, size=64), "jpg")

    class Damaging(Colours):
        def extract(self, images):
            whole = (folder / "9.jpg").read_bytes()
            (folder / "9.jpg").write_bytes(whole[: len(whole) * 2 // 3])
            return super().extract(images)

    kept = tmp_path / "kept.safetensors"
    with pytest.raises(InputError, match=r"9\.jpg is damaged"):
        evaluate(folder, network=Damaging(), batch_size=4, statistics=kept, show=False)
    assert Statistics.load(kept).indices.tolist() == list(range(8))


def test_pictures_of_different_sizes_are_refused(tmp_path):
    folder = write_folder(tmp_path / "made", pictures(3))
    Image.new("RGB", (20, 16)).save(folder / "odd.png")
    with pytest.raises(InputError, match=r"0\.png is 16 x 16 and odd\.png 20 x 16"):
        FolderSource(folder)
    with pytest.raises(InputError, match="pairs need one size"):
        evaluate(pictures(3), paired=pictures(3, size=20), show=False)
    kept = tmp_path / "real.safetensors"
    evaluate(pictures(30, size=20), network=Colours(), statistics=kept, show=False)
    for reference in (pictures(30, size=20), kept):  # the network takes images of any size
        found = evaluate(pictures(30), reference, network=Colours(), show=False)
        assert found["frechet_distance"].value is not None
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
    with pytest.raises(InputError, match="3 images and there are 2 prompts: give one for each"):
        evaluate(one, prompts=["a", "b"], show=False)
    with pytest.raises(InputError, match="there are 0 prompts"):
        evaluate(one, prompts=[], show=False)
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


def test_weights_may_be_named_by_strings_and_are_looked_for_first():
    with pytest.raises(InputError, match="should be a file"):
        evaluate(pictures(3), weights={"inception": "nowhere.pth"}, show=False)


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
