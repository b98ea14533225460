"""Versions: names of diffusers come through one file, and a missing one is told with the version that is needed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sostenuto
from conftest import build_tiny
from sostenuto import DependencyError, EngineError, compat
from sostenuto.zoo import TINY_MODELS

SOURCES = Path(sostenuto.__file__).parent


def test_diffusers_is_imported_in_one_file_alone():
    """Elsewhere for the type checker only, which never runs; there by name, so that each is tested for."""
    for path in SOURCES.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        unrun = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "diffusers" for name in names):
                assert node in unrun, f"{path}:{node.lineno}"


def test_every_name_that_is_asked_for_is_public():
    """The names that begin with an underscore, of diffusers' caches, are asked for in one file."""
    for path in SOURCES.rglob("*.py"):
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("diffusers_name"):
                arguments = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                if arguments and len(arguments) == len(node.args):
                    assert not any(part.startswith("_") for part in ".".join(arguments).split(".")), path


@pytest.mark.parametrize(
    "asked", [("DDPMScheduler", ""), ("randn_tensor", "utils.torch_utils"), ("x", "no.such.module")]
)
def test_a_name_that_is_missing_is_told_with_the_version_that_is_needed(monkeypatch, asked):
    old = ModuleType("diffusers")
    old.__version__ = "0.20.1"
    monkeypatch.setitem(sys.modules, "diffusers", old)
    for module in [name for name in sys.modules if name.startswith("diffusers.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        DependencyError, match=r"diffusers 0\.20\.1 has no .*needs a newer one, 0\.35 at the least: pip install"
    ):
        compat.diffusers_name(*asked)
    with pytest.raises(ImportError, match=r"0\.35"):
        TINY_MODELS["DiTTransformer2DModel"].build()


def test_a_package_that_diffusers_lacks_for_a_name_is_told(monkeypatch):
    class Lazy(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(
                f"Failed to import diffusers.{name} because of the following error:\nNo module named 'ftfy'"
            )

    old = Lazy("diffusers")
    old.__version__ = "0.35.0"
    monkeypatch.setitem(sys.modules, "diffusers", old)
    with pytest.raises(DependencyError, match=r"^diffusers 0\.35\.0 can't import WanPipeline: No module named 'ftfy'$"):
        compat.diffusers_name("WanPipeline")


def test_diffusers_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DependencyError, match=r"can't be imported .*needs diffusers 0\.35 or newer"):
        compat.diffusers_name("DDPMScheduler")


def test_caching_a_network_of_ones_own_needs_no_diffusers(monkeypatch, scheduler):
    network = build_tiny(num_layers=1)
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    scheduler.set_timesteps(2)
    with torch.no_grad(), sostenuto.enable(network, "fora", scheduler=scheduler) as handle:
        for timestep in scheduler.timesteps:
            network(torch.randn(1, 2, 8, 8), timestep[None], torch.tensor([1]))
        assert handle.stats.num_steps == 2


def test_torch_without_the_place_for_compiled_calls_is_refused_with_the_version_that_is_needed(monkeypatch, scheduler):
    monkeypatch.setattr(compat, "CALL_SLOT", "_no_such_slot")
    network = build_tiny(num_layers=1)
    before = {name: set(vars(module)) for name, module in network.named_modules()}
    with pytest.raises(EngineError, match=rf"torch {torch.__version__.split('+')[0]}.*needs torch 2\.6 or newer"):
        sostenuto.enable(network, "fora", scheduler=scheduler)
    assert {name: set(vars(module)) for name, module in network.named_modules()} == before


def test_the_declared_versions_are_those_that_the_messages_name():
    text = (SOURCES.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"diffusers>={compat.OLDEST_DIFFUSERS}"' in text
    assert '"torch>=2.6"' in text
