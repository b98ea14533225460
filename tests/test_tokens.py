"""Scores and choice of tokens, against the formulas written out and an independent ToCa."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

import sostenuto
from conftest import build_tiny, sample_loop
from naive_toca import naive_copy
from sostenuto import MethodError, RatioSchedule, ToCa
from sostenuto.attended import Attended, Listening
from sostenuto.state import Wanted
from sostenuto.tokens import ObservedScores, RandomScores, TokenSelector, column_sums, raise_best_of_tiles
from tiny_pixart import build_pixart, sample_pixart

EVEN = {"threshold_weight": 0.0, "middle_interval": None}
EVERYWHERE = RatioSchedule(cross_attention=1.0)
KINDS = "FCCFCCF"


@pytest.fixture
def chosen(monkeypatch):
    """The tokens of every call of the selection: (step, site, tokens)."""
    record = []
    select = TokenSelector.select

    def spy(self, step, wanted, device):
        tokens = select(self, step, wanted, device)
        record.extend((step, site.site, picked) for site, picked in zip(wanted, tokens, strict=True))
        return tokens

    monkeypatch.setattr(TokenSelector, "select", spy)
    return record


def same_choice(mine, naive, rows):
    assert len(mine) == len(naive) > 0
    for (step, _, tokens), (naive_step, _, _, expected) in zip(mine, naive, strict=True):
        assert step == naive_step
        assert [set(row.tolist()) for row in tokens.expand(rows, -1)] == [set(row.tolist()) for row in expected]


@pytest.mark.parametrize("selection", ["attention", "value-norm"])
@pytest.mark.parametrize("spatial_bonus", [0.0, 0.6])
def test_tokens_and_outputs_are_those_of_toca_written_out(tiny, scheduler, chosen, selection, spatial_bonus):
    method = ToCa(
        fresh_ratio=0.3,
        selection=selection,
        ratio_schedule=EVERYWHERE,
        spatial_bonus=spatial_bonus,
        staleness_weight=0.9,
        **EVEN,
    )
    naive = naive_copy(tiny, method, KINDS, lambda block, branch, step: 0.3 if branch == "ff" else 0.0)
    expected, _ = sample_loop(naive, scheduler, len(KINDS))
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        got, _ = sample_loop(tiny, scheduler, len(KINDS))
    same_choice(chosen, naive.chosen, rows=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_cross_attention_is_partial_by_the_entropy_of_the_unmasked_text(chosen):
    model, scheduler = build_pixart(), DDIMScheduler(num_train_timesteps=1000)
    schedule = RatioSchedule(mlp=1.0, cross_attention=0.5)
    method = ToCa(
        fresh_ratio=0.4, selection="cross-entropy", ratio_schedule=schedule, spatial_bonus=0.4, tile=4, **EVEN
    )
    mask = torch.ones(2, 5)
    mask[0, 3:] = 0  # as in sample_pixart
    shares = {"attn1": 0.0, "attn2": 0.2, "ff": 0.4}
    naive = naive_copy(model, method, KINDS, lambda block, branch, step: shares[branch], mask=mask)
    expected = sample_pixart(naive, scheduler, len(KINDS))
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        got = sample_pixart(model, scheduler, len(KINDS))
        assert handle.stats.plan[1][:3] == ["reuse", "partial", "partial"]
    same_choice(chosen, naive.chosen, rows=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def fused_pixart(model, scheduler, num_steps=4):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 2, 8, 8, generator=generator), torch.randn(4, 5, 12, generator=generator)
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        output = model(
            torch.cat([latents] * 2),
            encoder_hidden_states=text,
            timestep=timestep.expand(4),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :2]
        cond, uncond = output.chunk(2)
        latents = scheduler.step(uncond + 3 * (cond - uncond), timestep, latents).prev_sample


@pytest.mark.parametrize("selection", ["attention", "value-norm", "cross-entropy"])
def test_both_halves_of_fused_guidance_choose_alike_where_text_is_attended_to(chosen, selection):
    model, scheduler = build_pixart(), DDIMScheduler(num_train_timesteps=1000)
    method = ToCa(fresh_ratio=0.3, selection=selection, ratio_schedule=EVERYWHERE, **EVEN)
    with sostenuto.enable(model, method, scheduler=scheduler):
        fused_pixart(model, scheduler)
    assert chosen
    for _, _, tokens in chosen:
        assert tokens.shape[0] == 4
        assert torch.equal(tokens[:2], tokens[2:])


def test_entropy_is_of_the_map_averaged_over_both_halves_whatever_form_the_mask_has():
    model = build_pixart(num_layers=1)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 16, 16, generator=generator), torch.randn(4, 5, 16, generator=generator)
    seen = torch.tensor([[1, 1, 1, 0, 0]] * 4, dtype=torch.bool)  # of the text
    logits = torch.einsum("rqhd,rkhd->rhqk", query.reshape(4, 16, 2, 8), key.reshape(4, 5, 2, 8)) / 8**0.5
    maps = logits[..., :3].softmax(-1).mean(1)
    both = (maps[:2] + maps[2:]) / 2
    expected = 1 - (both * both.log()).sum(-1)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    query, key = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (query, key))
    bias = torch.zeros(4, 1, 1, 5).masked_fill(~seen[:, None, None], -torch.inf)
    for mask in (seen[:, None, None], bias, bias.clamp(min=-10000), bias.expand(-1, 2, 16, -1)):
        latents = torch.zeros(4, 2, 8, 8)
        scores = ObservedScores("cross-entropy", model, sostenuto.inspect(model), latents)
        scores.observe("transformer_blocks.0.attn2", None, [Attended(query, key, key, mask)])
        torch.testing.assert_close(scores.at(1, [1, 2], 16), torch.stack([expected] * 2))


def test_column_sums_are_those_of_torchs_attention_whatever_its_arguments(monkeypatch):
    """Of the map that attention applies to a unit matrix for values."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8, generator=generator), torch.randn(2, 2, 6, 8, generator=generator)
    unit = torch.eye(6).expand(2, 2, 6, 6)
    by_head = torch.randn(2, 4, 6, 6, generator=generator)
    hidden = torch.rand(2, 1, 6, 6, generator=generator) < 0.6
    hidden[1, 0, 3] = False  # a query that sees nothing
    monkeypatch.setattr("sostenuto.tokens._QUERIES_AT_ONCE", 4)
    for options in ({}, {"scale": 0.7}, {"is_causal": True}, {"attn_mask": by_head}, {"attn_mask": hidden}):
        with Listening() as listening:
            maps = F.scaled_dot_product_attention(query, key, unit, enable_gqa=True, **options)
        torch.testing.assert_close(column_sums(*listening.calls), maps.nan_to_num().mean(1).sum(1))


def test_attention_that_is_itself_partial_is_not_scored():
    model, scheduler = build_pixart(), DDIMScheduler(num_train_timesteps=1000)
    method = ToCa(
        fresh_ratio=0.3,
        selection="cross-entropy",
        ratio_schedule=EVERYWHERE,
        cross_attention_every=2,
        anchor="start",
        **EVEN,
    )
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        sample_pixart(model, scheduler, 9)
        cross = [row[1] for row in handle.stats.plan]
    assert cross == ["compute", *["partial"] * 5, "compute", *["partial"] * 2]


def test_tokens_are_scored_only_where_partial_steps_follow_and_that_is_counted(tiny, scheduler):
    macs = {}
    for selection in ("random", "attention"):
        method = ToCa(fresh_ratio=0.3, selection=selection, ratio_schedule="constant", **EVEN)
        with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
            sample_loop(tiny, scheduler, len(KINDS))
            macs[selection] = handle.stats.macs
    maps = 3 * 2 * (16 * 16 * 32)  # blocks, rows, queries times keys times channels
    assert macs["attention"] - macs["random"] == 2 * maps  # not at the last full step


def test_random_tokens_are_one_draw_for_all_rows_and_for_separate_calls(tiny, scheduler, chosen):
    method = ToCa(fresh_ratio=0.3, selection="random", ratio_schedule="constant", **EVEN)
    before = torch.get_rng_state()
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        sample_loop(tiny, scheduler, separate_guidance=True)
        separate = chosen.copy()
        chosen.clear()
        sample_loop(tiny, scheduler, batch=4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    cond, uncond = separate[::6] + separate[1::6] + separate[2::6], separate[3::6] + separate[4::6] + separate[5::6]
    assert len(cond) == len(uncond) == len(chosen)
    for (step, site, a), (other_step, other_site, b) in zip(cond, uncond, strict=True):
        assert (step, site) == (other_step, other_site)
        assert a.ndim == 1
        assert torch.equal(a, b)
    assert all(
        torch.equal(a, b) for (_, _, a), (_, _, b) in zip(sorted(cond, key=lambda c: c[:2]), chosen, strict=True)
    )
    assert not torch.equal(chosen[0][2], chosen[1][2])


def test_a_random_draw_depends_on_seed_and_step_alone():
    scores = RandomScores(3, num_sites=4)
    late = scores.at(9, [2], 16)
    scores.at(8, [0, 1], 16)
    assert torch.equal(scores.at(9, [0, 2], 16)[1:], late)
    assert torch.equal(RandomScores(3, 4).at(9, [2], 16), late)
    assert not torch.equal(RandomScores(4, 4).at(9, [2], 16), late)
    assert not torch.equal(scores.at(8, [2], 16), late)
    assert late.min() >= 0
    assert late.max() < 1


def test_the_best_token_of_each_tile_is_raised_by_its_share_also_where_scores_are_negative():
    score = torch.tensor([[[1.0, 2, 3, 4, 8, 7, 6, 5, -4, -3, -2, -1]]])  # a grid of 3 by 4
    raised = raise_best_of_tiles(score, (3, 4), 2, 0.5)
    expected = torch.tensor([[[1.0, 2, 3, 4, 12, 7, 9, 5, -4, -1.5, -2, -0.5]]])
    torch.testing.assert_close(raised, expected)


def test_staleness_grows_in_partial_steps_alone():
    class Flat:
        macs = 0

        def at(self, step, sites, num_tokens):
            return torch.tensor([[[0.3, 0.2, 0.1, 0.0]]])

    def tokens(step):
        return selector.select(step, [Wanted(0, (1, 4, 8), 1)], torch.device("cpu"))[0].tolist()

    partial_before = [0, 0, 1, 1, 2, 3, 3, 4]  # F C A C C F C
    selector = TokenSelector(Flat(), partial_before, 0.15, 0.0, 2, torch.zeros(1, 1, 2, 2))
    selector.computed(0, 0)
    assert tokens(1) == [0]
    assert tokens(3) == [1]  # of 0.3, 0.2 + 0.15, 0.1 + 0.15, 0.15: the aggressive step in between aged nobody
    assert tokens(4) == [0]  # of 0.3 + 0.15, 0.2, 0.1 + 0.3, 0.3
    selector.computed(5, 0)
    assert tokens(6) == [0]  # all are fresh again


@pytest.mark.parametrize("latents", [torch.zeros(1, 16, 4), torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 5, 3)])
def test_tokens_without_a_grid_refuse_the_spatial_bonus(latents):
    selector = TokenSelector(RandomScores(0, 1), [0, 0, 1], 0.1, 0.5, 2, latents)
    selector.computed(0, 0)
    with pytest.raises(MethodError, match="spatial_bonus=0"):
        selector.select(1, [Wanted(0, (1, 16, 8), 2)], torch.device("cpu"))


def without_to_v(model):
    del model.transformer_blocks[1].attn1.to_v


@pytest.mark.parametrize(
    ("change", "selection", "words"),
    [
        (without_to_v, "value-norm", r"blocks\.1\.attn1 has no to_v.*selection=\"random\""),
        (lambda model: None, "cross-entropy", r"block 0 has no cross-attention.*selection=\"random\""),
    ],
)
def test_attention_that_cannot_be_read_is_refused_by_name(scheduler, change, selection, words):
    model = build_tiny()
    change(model)
    with pytest.raises(MethodError, match=words):
        sostenuto.enable(model, ToCa(selection=selection), scheduler=scheduler)
    assert "_sostenuto_handle" not in vars(model)


def fuse(model):
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    model.transformer_blocks[2].attn1.fuse_projections(fuse=True)
    model.transformer_blocks[2].attn1.set_processor(FusedAttnProcessor2_0())


def without_torchs_attention(model):
    from diffusers.models.attention_processor import AttnProcessor

    model.transformer_blocks[2].attn1.set_processor(AttnProcessor())


@pytest.mark.parametrize(
    ("change", "selection", "words"),
    [
        (fuse, "value-norm", r"blocks\.2\.attn1 ran without its to_v.*\"random\""),
        (without_torchs_attention, "attention", r"2\.attn1 calls .* 0 times, not once.*\"random\" or \"value-norm\""),
    ],
)
def test_what_cannot_be_scored_is_noticed_when_it_runs(tiny, scheduler, change, selection, words):
    method = ToCa(fresh_ratio=0.3, selection=selection, ratio_schedule="constant", **EVEN)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        change(tiny)
        with pytest.raises(MethodError, match=words):
            sample_loop(tiny, scheduler)


def test_the_map_is_seen_with_fused_projections_too(tiny, scheduler):
    method = ToCa(fresh_ratio=0.3, ratio_schedule="constant", **EVEN)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        plain, _ = sample_loop(tiny, scheduler)
        fuse(tiny)
        fused, _ = sample_loop(tiny, scheduler)
    torch.testing.assert_close(fused, plain)
