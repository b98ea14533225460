"""Networks that are not in the table: what is found by structure is right, or it is refused with what to write."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sostenuto
from sostenuto import AnatomyError, SiteKind, discovery, source
from sostenuto.families import ANATOMIES
from sostenuto.sites import anatomy_of, has_stack, inspect
from sostenuto.zoo import TINY_MODELS
from sostenuto.zoo.check import check

QUICK = (
    "AuraFlowTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "Kandinsky5Transformer3DModel",
    "LatteTransformer3DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
    "ZImageTransformer2DModel",
)
REFUSED = {
    "Cosmos3OmniTransformer",
    "HiDreamImageTransformer2DModel",
    "Kandinsky6Transformer3DModel",
    "MiniMaxMusic3Transformer1DModel",
    "PRXTransformer2DModel",
    "RFD4ProteinaTransformer",
}
# Its blocks have audio branches that it never runs: an engine's first call refuses them.
UNREACHED = "SanaWMLTX2RefinerTransformer3DModel"


@contextmanager
def unknown(model_class):
    """Without the rows of a class and of its bases."""
    rows = {base.__name__: ANATOMIES.pop(base.__name__) for base in model_class.__mro__ if base.__name__ in ANATOMIES}
    try:
        yield
    finally:
        ANATOMIES.update(rows)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TINY_MODELS if n != UNREACHED]
)
def test_structure_claims_nothing_that_the_table_does_not(name):
    model = TINY_MODELS[name].build()
    row = anatomy_of(model)
    known = {path for site in inspect(model) for path in (site.id, *site.hollow)}
    with unknown(type(model)):
        if name in REFUSED:
            with pytest.raises(AnatomyError, match="register_anatomy"):
                inspect(model)
            return
        found, sites = anatomy_of(model), inspect(model)
    assert {site.id for site in sites} <= known
    assert not any(site.front or site.optional or site.tokenwise for site in sites)
    places = {place.path: place for place in row.blocks}
    for place in found.blocks:
        if place.whole:  # one stream, and a range of any blocks
            assert places[place.path].whole
            assert not places[place.path].long_skips
            assert place.streams == places[place.path].streams
    assert found.timestep == row.timestep


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in REFUSED])
def test_what_structure_tells_of_every_class_is_proved_or_refused(name):
    model = TINY_MODELS[name].build()
    row = anatomy_of(model)
    with unknown(type(model)):
        error = check(TINY_MODELS[name]).error
    # What the structure doesn't tell is refused where it matters.
    told = not (row.reversed_timestep or row.timestep_offset or row.stepwise or row.prefill or name == UNREACHED)
    plain = not any(branch.calls > 1 or branch.optional for place in row.blocks for branch in place.branches)
    if told and plain:
        assert not error, error


def test_what_structure_tells_is_proved():
    name = "PixArtTransformer2DModel"
    with unknown(type(TINY_MODELS[name].build())):
        support = check(TINY_MODELS[name])
    assert not support.error
    assert support.macs["branches"] < 0.5
    assert support.macs["stack"] < 0.5


# --- networks of one's own ------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x, c=None):
        x = x + self.attn(self.norm1(x), x, x)[0]
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """The base of those below: one tensor goes from block to block."""

    def __init__(self, block=Block, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x, t):
        for index, block in enumerate(self.blocks):
            if self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            x = block(x, c=t + index)
        return x


class Collecting(Plain):
    def forward(self, x, t):
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return sum(kept)


class Aliasing(Plain):
    def forward(self, x, t):
        for block in self.blocks:
            before = x
            x = block(x)
            x = x + before
        return x


class Twice(Plain):
    def forward(self, x, t):
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return x


class Indexed(Plain):
    def forward(self, x, t):
        early = self.blocks[0](x)
        for block in self.blocks:
            x = block(x)
        return x + early


class Handing(Plain):
    def forward(self, x, t):
        for block in self.blocks:
            x = self.run(block, x)
        return x

    def run(self, block, x):
        self.seen = block(x)
        return self.seen


class Either(Plain):
    def forward(self, x, t):
        if t is None:
            for block in self.blocks:
                x = self._checkpointed(block, x)
        else:
            for block in self.blocks:
                x = block(x)
        return x


class After(Plain):
    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            x = block(x)
        return x


class Chain(Plain):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)

    def forward(self, x, t):
        return self.blocks(x)


class TwoStreams(Block):
    def forward(self, x, context):
        x = x + self.attn(self.norm1(x), context, context)[0]
        return x + self.mlp(self.norm2(x)), context


class Paired(Plain):
    def __init__(self):
        super().__init__(TwoStreams)

    def forward(self, x, t, context):
        for block in self.blocks:
            x, context = block(x, context)
        return x


def run(model, method, num_steps=4):
    """A generation with steps on the way from noise to nothing."""
    scheduler = SimpleNamespace(timesteps=torch.linspace(1000, 0, num_steps + 1)[:-1])
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sostenuto.enable(model, method, scheduler=scheduler):
        for timestep in scheduler.timesteps:
            x = x - model(x, timestep) / num_steps
    return x


def test_a_branch_that_no_call_reaches_is_refused():
    class WithAudio(Block):
        def __init__(self):
            super().__init__()
            self.audio_attn = nn.MultiheadAttention(8, 2, batch_first=True)

    model = Plain(WithAudio).eval()
    with pytest.raises(sostenuto.EngineError, match=r"never reached blocks.0.audio_attn"):
        run(model, "fora")


def test_a_module_that_is_called_twice_is_refused_instead_of_reused_for_both_calls():
    for interval in (1, 2):  # computed only, and kept
        with pytest.raises(sostenuto.EngineError, match=r"calls blocks.0.attn (2|more than 1) times?:.*calls=1"):
            run(Twice().eval(), sostenuto.FORA(interval))


@pytest.mark.parametrize(
    ("network", "whole"),
    [
        (Plain, True),
        (Either, True),
        (Chain, True),
        (Collecting, False),
        (Aliasing, False),
        (Twice, False),
        (Indexed, False),
        (Handing, False),
        (After, False),
        (Paired, False),
    ],
)
def test_a_range_of_blocks_is_claimed_only_where_nothing_else_reads_what_a_block_returns(network, whole):
    model = network()
    assert [site.id for site in inspect(model)] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert has_stack(model) == whole


def test_kinds_are_told_by_what_a_block_gives_its_attention():
    assert {site.kind for site in inspect(Plain())} == {SiteKind.SELF_ATTENTION, SiteKind.MLP}
    assert inspect(Paired())[0].kind is SiteKind.JOINT_ATTENTION
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2)
    model = Plain()
    model.blocks = decoder
    assert [(site.id, site.kind, site.front) for site in inspect(model)][:3] == [
        ("blocks.layers.0.self_attn", SiteKind.SELF_ATTENTION, ("blocks.layers.0.norm1",)),
        ("blocks.layers.0.multihead_attn", SiteKind.CROSS_ATTENTION, ("blocks.layers.0.norm2",)),
        ("blocks.layers.0.linear2", SiteKind.MLP, ("blocks.layers.0.norm3",)),
    ]


def test_a_layer_of_torch_with_code_of_its_own_is_not_taken_for_torchs():
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src):
            return self.norm1(src) + src

    model = Plain(lambda: Layer(8, 2, 16))
    with pytest.raises(AnatomyError, match="no attention and MLP"):
        inspect(model)


def test_recognition_is_logged_once_for_a_class_with_what_was_left_out(caplog):
    class Seen(Plain):
        def __init__(self):
            super().__init__()
            self.context_refiner = nn.ModuleList(Block() for _ in range(2))

    with caplog.at_level(logging.INFO, logger="sostenuto.discovery"):
        for _ in range(2):
            inspect(Seen())
    (record,) = caplog.records
    assert "Seen" in record.getMessage()
    assert "sostenuto.verify" in record.getMessage()
    assert "context_refiner" in record.getMessage()


def test_the_snippet_of_a_refusal_runs_and_teaches_the_network():
    class Nameless(Plain):
        def forward(self, x, moment):
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(AnatomyError, match=r"forward\(x, moment\) has no timestep") as caught:
        inspect(Nameless())
    snippet = str(caught.value).partition(": ")[2].replace("timestep=…", "timestep='moment'")
    snippet = snippet[snippet.index("sostenuto.register_anatomy(") :]
    exec(snippet, {"sostenuto": sostenuto, "Nameless": Nameless})
    try:
        assert len(inspect(Nameless())) == 4
        assert anatomy_of(Nameless()).timestep == "moment"
    finally:
        del ANATOMIES["Nameless"]


def test_a_cache_of_the_networks_own_is_refused_when_it_is_used():
    class Caching(Plain):
        def forward(self, x, t, kv_cache=None):
            return super().forward(x, t)

    prefill = discovery.discover(Caching()).prefill
    assert not prefill({"kv_cache": None})
    with pytest.raises(AnatomyError, match="kv_cache"):
        prefill({"kv_cache": {}, "x": 1} | {"kv_cache": [1]})


class _Unselfish(nn.Module):
    def forward(this, x, t, self=None):
        return x


class _Static(nn.Module):
    @staticmethod
    def forward(x, t):
        return x


def test_the_module_itself_is_no_argument_whatever_it_is_called():
    assert source.argument_names(_Unselfish) == ("x", "t", "self")
    assert source.argument_names(_Static) == ("x", "t")
