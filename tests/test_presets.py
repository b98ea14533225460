"""Presets for another model: what was measured on one network is refused elsewhere, mere settings run anywhere."""

from inspect import signature

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

import sostenuto
from conftest import build_tiny
from sostenuto import DiTFastAttn, EBCache, MagCache, SmoothCache, TableError, TeaCache
from sostenuto.methods import published
from test_engine import leftovers
from tiny_pixart import build_pixart

MEASURED = {  # on which network
    EBCache.dit_xl_2: published.DIT_XL_2,
    SmoothCache.dit_xl_2: published.DIT_XL_2,
    MagCache.flux_dev: published.FLUX_DEV,
} | {
    getattr(TeaCache, name): getattr(published, name.upper())
    for name, member in vars(TeaCache).items()
    if isinstance(member, classmethod)
}
SCHEDULERS = {EBCache: DDPMScheduler, SmoothCache: DDIMScheduler, MagCache: FlowMatchEulerDiscreteScheduler}
every_measured = pytest.mark.parametrize("preset", MEASURED, ids=lambda preset: preset.__qualname__)


def made(preset):
    """The method, and the scheduler that it was published with."""
    needs_threshold = preset.__self__ is TeaCache
    return preset(threshold=0.1) if needs_threshold else preset(), SCHEDULERS.get(preset.__self__, DDIMScheduler)()


def build(network):
    """A tiny DiT that is of that class, too."""
    model = build_tiny(1)
    model.__class__ = type("Tiny", (DiTTransformer2DModel, type(network["class"], (), {})), {})
    model.time_embedding = model.t_embedder = torch.nn.Identity()  # which some polynomials watch
    return model


@every_measured
def test_what_was_measured_on_one_network_is_refused_on_another_class(preset):
    method, scheduler = made(preset)
    model = build_pixart(1)
    with pytest.raises(TableError, match=f"made for {MEASURED[preset]['class']}, this is a PixArtTransformer2DModel"):
        sostenuto.enable(model, method, scheduler=scheduler)
    assert leftovers(model) == []


@every_measured
def test_it_is_taken_on_its_own_network(preset):
    method, scheduler = made(preset)
    sostenuto.enable(build(MEASURED[preset]), method, scheduler=scheduler).disable()


def test_ratios_measured_with_one_scheduler_are_refused_with_another():
    with pytest.raises(TableError, match="made with FlowMatchEulerDiscreteScheduler, this is DDIMScheduler"):
        sostenuto.enable(build(published.FLUX_DEV), MagCache.flux_dev(), scheduler=DDIMScheduler())


def test_settings_are_taken_by_any_network():
    model, taken = build_pixart(57), 0
    for kind in sostenuto.available_methods().values():
        for name, member in vars(kind).items():
            if (
                not isinstance(member, classmethod) or name.startswith("_") or kind is DiTFastAttn
            ):  # which needs a table
                continue
            preset = getattr(kind, name)
            if preset not in MEASURED and all(p.default is not p.empty for p in signature(preset).parameters.values()):
                preset().prepare(model, DDPMScheduler())
                taken += 1
    assert taken > 40
