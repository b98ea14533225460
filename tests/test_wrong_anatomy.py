"""Networks that don't fit: every refusal says what was looked for, what is there and what to write."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sostenuto
from sostenuto import Anatomy, AnatomyError, BlockList, Branch, EngineError, SiteKind
from sostenuto.families import ANATOMIES
from sostenuto.sites import stack
from unets import build_plain

ATTENTION, MLP = Branch(SiteKind.SELF_ATTENTION, "mix"), Branch(SiteKind.MLP, "feed")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.feed = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        tokens = tokens + self.mix(tokens)
        return tokens + self.feed(tokens)


class TupleBlock(Block):
    def forward(self, tokens):
        return super().forward(tokens), None


class ConditionedBlock(Block):
    def forward(self, tokens, channels):
        return super().forward(tokens + channels)


class ConditionedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(ConditionedBlock() for _ in range(2))

    def forward(self, x, moment):
        for stage in self.stages:
            x = stage(x, moment.expand(1, 4).to(x.dtype))
        return x


class Net(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.stages = nn.ModuleList(block() for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x, moment, cond=None):
        for stage in self.stages:
            x = stage(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.norm(x)


def _list(path="stages", branches=(ATTENTION, MLP), streams=("tokens",), **more):
    return BlockList(path, branches, streams, **more)


def _anatomy(*lists, timestep="moment", **more):
    return Anatomy(lists, timestep=timestep, **more)


@pytest.fixture
def taught():
    yield lambda anatomy: sostenuto.register_anatomy(Net, anatomy)
    ANATOMIES.pop("Net", None)


class Stack(sostenuto.FORA):
    """Reuses the whole stack."""

    def sites(self, denoiser):
        return [stack(denoiser)]


def generate(model, method, num_steps=4):
    scheduler = SimpleNamespace(timesteps=torch.linspace(1000, 0, num_steps + 1)[:-1])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sostenuto.enable(model, method, scheduler=scheduler):
        for timestep in scheduler.timesteps:
            x = x - model(x, timestep) / num_steps
    return x


@pytest.mark.parametrize("method", [sostenuto.FORA(2), Stack(2)])
def test_the_right_anatomy_works(taught, method):
    taught(_anatomy(_list()))
    assert generate(Net(), method).isfinite().all()


@pytest.mark.parametrize(
    ("anatomy", "method", "error", "words"),
    [
        (_anatomy(_list("blocks")), "fora", AnatomyError, r"no submodule 'blocks'.*in it there is stages, norm"),
        (
            _anatomy(_list(branches=(Branch(SiteKind.MLP, "ff"),))),
            "fora",
            AnatomyError,
            r"no submodule 'stages.0.ff'.*in stages.0 there is mix, feed; correct 'ff'",
        ),
        (
            _anatomy(_list(branches=(Branch(SiteKind.MLP, "feed", ("norm.inner",)),))),
            "fora",
            AnatomyError,
            r"no submodule 'stages.0.norm'",
        ),
        (_anatomy(_list("norm")), "fora", AnatomyError, "no blocks in norm: there is nothing to cache"),
        (
            _anatomy(_list(), timestep="t"),
            "fora",
            AnatomyError,
            r"no argument 't' for the timestep, only x, moment, cond",
        ),
        (_anatomy(_list(), latents="z"), "fora", AnatomyError, r"no argument 'z' for the latents, .*latents=…"),
        (_anatomy(_list(streams=("x",))), Stack(2), AnatomyError, r"stages.0.forward has no argument 'x', only tokens"),
        (
            _anatomy(_list(branches=(ATTENTION, Branch(SiteKind.MLP, "mix")))),
            "fora",
            AnatomyError,
            "stages.0.mix serves stages.0.mix and stages.0.mix: .* one branch",
        ),
        (
            _anatomy(_list(branches=(ATTENTION, Branch(SiteKind.MLP, "feed", calls=2)))),
            sostenuto.FORA(2),
            EngineError,
            r"calls stages.0.feed 1 time: its anatomy is wrong, correct Branch\(…, calls=2\)",
        ),
    ],
)
def test_an_anatomy_that_does_not_match_is_refused(taught, anatomy, method, error, words):
    model = Net()
    taught(anatomy)
    with pytest.raises(error, match=words):
        generate(model, method)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("block", "streams", "words"),
    [
        (TupleBlock, ("tokens",), r"stages.1 returns 2 values where its anatomy says tokens: correct streams"),
        (Block, ("tokens", "tokens"), r"stages.1 returns a Tensor where its anatomy says tokens, tokens"),
    ],
)
def test_a_wrong_number_of_returned_streams_is_refused(taught, block, streams, words):
    taught(_anatomy(_list(streams=streams)))
    with pytest.raises(EngineError, match=words):
        generate(Net(block), Stack(2))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Branch("mlp", "feed"), "Branch's kind must be a SiteKind, not 'mlp'"),
        (lambda: Branch(SiteKind.MLP, None), "Branch's module must be a str"),
        (
            lambda: Branch(SiteKind.MLP, "feed", "norm"),
            r"Branch's front must be a tuple of str, such as \(…,\), not 'norm'",
        ),
        (lambda: Branch(SiteKind.MLP, "feed", calls=0), "calls must be a whole number of 1 or more, not 0"),
        (lambda: BlockList("stages", MLP), "BlockList's branches must be a tuple of Branch"),
        (lambda: BlockList("stages", (MLP,), "tokens"), "BlockList's streams must be a tuple of str"),
        (lambda: BlockList("stages", (MLP,), ()), "streams must name"),
        (lambda: Anatomy(BlockList("stages", (MLP,))), "Anatomy's blocks must be a tuple of BlockList"),
        (lambda: Anatomy((), stepwise="cond"), "Anatomy's stepwise must be a tuple of str"),
        (lambda: sostenuto.register_anatomy(Net, None), "takes an Anatomy, not None"),
        (lambda: sostenuto.register_anatomy(Net(), Anatomy(())), "takes a class of torch.nn.Module"),
    ],
)
def test_words_of_the_wrong_type_are_refused_where_they_are_written(wrong, words):
    with pytest.raises(AnatomyError, match=words):
        wrong()


def test_an_argument_that_is_not_there_can_not_change_from_step_to_step(taught):
    with pytest.raises(
        AnatomyError, match=r"no argument 'y' that could change from step to step, only x, moment, cond"
    ):
        taught(_anatomy(_list(), stepwise=("y",)))
    assert "Net" not in ANATOMIES


def test_a_conditioning_that_is_called_a_stream_is_refused_since_nothing_is_added_to_it():
    sostenuto.register_anatomy(ConditionedNet, _anatomy(_list(streams=("channels",))))
    try:
        with pytest.raises(
            EngineError, match=r"is given a stream \[1, 4\] and returns \[.*, 4\], which is no sum with it"
        ):
            generate(ConditionedNet(), Stack(2))
    finally:
        ANATOMIES.pop("ConditionedNet")


@pytest.mark.parametrize("method", ["fora", "taylorseer", "teacache", "pab", "delta-dit", "dbcache"])
def test_a_unet_given_to_a_method_for_transformers_is_refused(scheduler, method):
    model = build_plain(1)
    with pytest.raises(AnatomyError, match=r"UNet2DModel is a U-Net.*DeepCache"):
        sostenuto.enable(model, method, scheduler=scheduler)


def test_an_unknown_denoiser_is_refused_with_what_is_there_and_what_to_write():
    with pytest.raises(AnatomyError) as caught:
        sostenuto.inspect(Net())
    message = str(caught.value)
    assert "looked for a ModuleList" in message
    assert "stages (2 × Block: no attention and MLP among mix, feed)" in message
    assert (
        "sostenuto.register_anatomy(Net, sostenuto.Anatomy((sostenuto.BlockList('stages', (…,), ('tokens',)" in message
    )
    with pytest.raises(AnatomyError, match=r"found no such list, only 0 \(Linear\)"):
        sostenuto.inspect(nn.Sequential(nn.Linear(2, 2)))


def test_a_pipeline_without_denoiser_is_refused_with_what_it_has(scheduler):
    pipe = SimpleNamespace(vae=nn.Linear(1, 1), scheduler=scheduler, transformer=None)
    with pytest.raises(AnatomyError, match=r"no transformer or unet to cache, only vae \(Linear\).*scheduler="):
        sostenuto.enable(pipe, "fora")
    with pytest.raises(AnatomyError, match="nor any other network"):
        sostenuto.enable(object(), "fora")
