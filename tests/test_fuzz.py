"""A short run of the hostile inputs of ``fuzzing.py``, and what they must never do; benchmarks/reliability.py runs longer."""

from __future__ import annotations

import ast
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

import fuzzing
import sostenuto
from sostenuto import CacheTable, MagCacheRatios, Router, TableError, TeaCacheFit
from sostenuto.demo.batches import batch_file

SOURCES = Path(sostenuto.__file__).parent


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_hostile_inputs_are_refused_in_a_sentence_or_taken_whole(name):
    target, share = fuzzing.TARGETS[name]
    quick = settings(
        max_examples=int(120 * share), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    quick(target())()


def test_no_code_of_ours_reads_pickles_or_evaluates_text():
    forbidden = {"eval", "exec", "compile", "__import__", "loads", "load"}
    modules = {"cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not modules & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden - {"load"}, f"{path}:{node.lineno}"
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("load", "loads")
            ):
                owner = ast.unparse(node.func.value)
                keywords = {ast.unparse(keyword) for keyword in node.keywords}
                assert owner != "torch" or "weights_only=True" in keywords, f"{path}:{node.lineno}: torch.load"
                if owner == "np" and any(ast.unparse(keyword) == "allow_pickle=False" for keyword in node.keywords):
                    continue
                assert owner not in ("np", "numpy", "yaml", "pickle"), f"{path}:{node.lineno}: {owner}.{node.func.attr}"


@pytest.mark.parametrize("kind", [CacheTable, Router, MagCacheRatios, TeaCacheFit])
@pytest.mark.parametrize("path", ["/dev/zero", ".", "", "\0", "nowhere", "/dev/null"])
def test_what_is_no_regular_file_is_refused_at_once(kind, path):
    with pytest.raises(TableError, match=r"regular file|can't be read"):
        kind.load(path)


def _header_of(shape):
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("shape.npy", _header_of("(4000000000,)")),
        ("shapes.npy", _header_of("(100000, 100000)")),
        ("nested.json", b"[" * 1_000_000),
        ("wide.json", b"[" + b"{}," * 500_000 + b"{}]"),
        ("number.json", b'{"version": ' + b"9" * 1_000_000 + b"}"),
    ],
)
def test_hostile_sizes_take_little_memory(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(TableError):
        CacheTable.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * len(content) + 2**21  # three bytes are an empty object of 64 and its place


def test_a_file_of_more_than_16_mebibytes_is_not_opened(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**34)  # takes no room on the disk
    for kind in (CacheTable, Router, MagCacheRatios):
        with pytest.raises(TableError, match="the largest have"):
            kind.load(path)


def test_a_router_that_says_it_is_huge_is_refused(tmp_path):
    path = tmp_path / "router.safetensors"
    for shape, offsets in (([2**31, 2**31], [0, 2**64 - 1]), ([3, 6], [0, 2**40]), ([2**62], [0, 8])):
        header = json.dumps({"logits": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(72))
        with pytest.raises(TableError):
            Router.load(path)


def test_a_pickle_in_any_clothes_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    np.save(tmp_path / "table.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save(Bomb(), tmp_path / "table.json")
    torch.save({"logits": Bomb()}, tmp_path / "router.safetensors")
    for kind, name in ((CacheTable, "table.npy"), (CacheTable, "table.json"), (Router, "router.safetensors")):
        with pytest.raises(TableError):
            kind.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a\\b", "..", "x\0y", "EB 1.5×"])
def test_the_name_of_a_row_leads_nowhere_but_into_the_folder(tmp_path, name):
    path = batch_file(tmp_path, name, 0, 0, 4)
    assert path.resolve().parent == (tmp_path / "batches").resolve()


def test_text_in_a_results_file_stays_text_on_the_page(tmp_path):
    from sostenuto.report import page

    script = "</script><script>alert(1)</script>"
    table = CacheTable.load(SOURCES / "tables" / "demo-ddpm50-1.5x.json")
    row = {"name": script, "plan": [["compute"]], "site_kinds": ["mlp"], "speedup": 1.0, "frechet_distance": 1.0}
    environment = page.jinja2.Environment(autoescape=True)
    assert "<script>" not in environment.from_string("{{ name }}").render(name=row["name"])
    assert table.num_inference_steps == 50


def test_a_checkpoint_of_the_training_is_refused_when_damaged(tmp_path):
    from sostenuto.demo.checkpoint import load_checkpoint, save_checkpoint
    from sostenuto.errors import InputError

    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"denoiser": module.state_dict()}, [optimizer], {"step": 3})
    twin = torch.nn.Linear(2, 2)
    other = torch.optim.AdamW(twin.parameters())
    assert load_checkpoint(path, {"denoiser": twin.state_dict()}, [other]) == {"step": 3}
    assert torch.equal(twin.weight, module.weight)
    assert torch.equal(other.state[twin.weight]["exp_avg"], optimizer.state[module.weight]["exp_avg"])
    whole = path.read_bytes()
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    for content in (whole[: len(whole) // 2], b"", (tmp_path / "foreign").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no checkpoint"):
            load_checkpoint(path, {"denoiser": twin.state_dict()}, [other])
