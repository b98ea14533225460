"""Every transformer class of the installed diffusers is cached right, or is listed with the reason why it isn't tried."""

from pathlib import Path

import pytest

from conftest import supported
from sostenuto.families import ANATOMIES
from sostenuto.zoo import TINY_MODELS, UNBUILT
from sostenuto.zoo.check import check
from sostenuto.zoo.matrix import exported, row

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_exported_class_is_in_the_table_and_in_the_zoo(pytestconfig):
    names = set(exported())
    assert names <= ANATOMIES.keys()
    assert names <= TINY_MODELS.keys() | UNBUILT.keys()
    if not pytestconfig.getoption("--oldest"):
        assert len(names) >= 70
        assert names == TINY_MODELS.keys() | UNBUILT.keys()


# Built of a relative's blocks, which is tried in every run, and slow to count.
RELATIVES = {
    "AnyFlowFARTransformer3DModel",
    "AnyFlowTransformer3DModel",
    "BriaFibo2Transformer2DModel",
    "BriaFiboTransformer2DModel",
    "BriaTransformer2DModel",
    "ChronoEditTransformer3DModel",
    "CogView3PlusTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "JoyImageEditPlusTransformer3DModel",
    "Kandinsky6SRTransformer3DModel",
    "Kandinsky6Transformer3DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "SanaWMLTX2RefinerTransformer3DModel",
    "SanaWMTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "WanAnimate2Transformer3DModel",
    "WanAnimateTransformer3DModel",
    "WanVACETransformer3DModel",
}
CLASSES = [pytest.param(name, marks=[pytest.mark.slow] * (name in RELATIVES)) for name in TINY_MODELS]


@pytest.mark.parametrize("name", CLASSES)
def test_reuse_is_exact_and_costs_what_the_plan_says(name):
    support = supported(name)
    assert support.macs["branches"] < support.macs["attention"] < 1
    assert support.macs["branches"] < support.macs["mlp"] < 1
    assert support.macs.get("stack", 0) < 1
    assert row(support) in PAGE, "make docs/models.md anew: sostenuto models --check --output docs/models.md"


def test_a_class_that_this_diffusers_lacks_is_an_error_in_words():
    tiny = TINY_MODELS["DiTTransformer2DModel"]
    assert "has no NoSuchModel" in check(type(tiny)("NoSuchModel", {}, tiny.inputs)).error
