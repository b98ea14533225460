"""The page that teaches networks: all of its code runs, in order, and what it says in words is so."""

import importlib
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sostenuto
from sostenuto.families import ANATOMIES

PAGE = Path(__file__).parents[1] / "docs" / "teach-a-network.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
TAUGHT = ("Vit", "PostNormVit", "OwnBlocks", "Conditioned")


@contextmanager
def restored():
    """Torch's fused path as a user finds it, and in the end the table and the path as they were."""
    before, known = torch.backends.mha.get_fastpath_enabled(), dict(ANATOMIES)
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        ANATOMIES.clear()
        ANATOMIES.update(known)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the page's code defines: run from a file, as a user would, so that its source is at hand."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "taught_page.py").write_text("\n".join(BLOCKS), encoding="utf-8")
    with restored(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield vars(importlib.import_module("taught_page"))


@pytest.fixture
def page(run):
    fused = torch.backends.mha.get_fastpath_enabled()
    with restored():
        torch.backends.mha.set_fastpath_enabled(fused)  # as the page left it
        yield run


def test_every_block_of_the_page_runs_and_proves_what_it_teaches(page):
    assert page["proved"]["sites"] == 4  # two branches of two blocks
    assert page["proved"]["macs"]["stack"] <= page["proved"]["macs"]["branches"] < 0.05
    assert set(TAUGHT) <= set(ANATOMIES)


def test_the_fused_path_of_torch_is_refused_with_the_remedy_and_then_works(page):
    torch.backends.mha.set_fastpath_enabled(True)
    network = page["Vit"]().eval()
    with pytest.raises(sostenuto.EngineError, match=r"never reached encoder.layers.0.self_attn.*set_fastpath_enabled"):
        sostenuto.verify(network, "fora", page["sample"], scheduler=page["scheduler"])
    with (
        sostenuto.enable(network, sostenuto.FORA(2), scheduler=page["scheduler"]),
        pytest.raises(sostenuto.EngineError, match="set_fastpath_enabled"),
    ):
        page["sample"](network, torch.Generator().manual_seed(0), 4)
    torch.backends.mha.set_fastpath_enabled(False)
    sostenuto.verify(network, "fora", page["sample"], scheduler=page["scheduler"])


def test_a_norm_behind_the_sum_declared_in_front_is_found_out(page):
    wrong = page["vit"]  # that of norm_first=True
    sostenuto.register_anatomy(page["PostNormVit"], wrong)
    with pytest.raises(sostenuto.VerificationError, match=r"encoder.layers.0.self_attn: reused .*check front"):
        sostenuto.verify(page["PostNormVit"]().eval(), "fora", page["sample"], scheduler=page["scheduler"])


@pytest.mark.parametrize("name", ["Vit", "PostNormVit"])
def test_structure_alone_tells_of_torchs_layers_what_the_page_teaches(page, name):
    network = page[name]().eval()
    taught = sostenuto.inspect(network)
    del ANATOMIES[name]
    ANATOMIES.pop("Vit", None)
    assert [(s.id, s.kind, s.front, s.hollow) for s in sostenuto.inspect(network)] == [
        (s.id, s.kind, s.front, s.hollow) for s in taught
    ]
    proved = sostenuto.verify(network, "fora", page["sample"], scheduler=page["scheduler"])
    assert "stack" in proved["macs"]
