"""PixArt: its three sites are exact, and the methods on it run as an independent cache does."""

import pytest
import torch
from diffusers import DDIMScheduler

import sostenuto
from sostenuto import (
    FORA,
    PAB,
    CacheTable,
    EBCache,
    EBCalibration,
    FEBCache,
    FEBCalibration,
    SiteKind,
    StepState,
)
from tiny_pixart import build_pixart, naive_cached, sample_pixart


@pytest.fixture
def pixart():
    return build_pixart()


@pytest.fixture
def scheduler():
    return DDIMScheduler(num_train_timesteps=1000)


def test_the_sites_are_three_branches_a_block_and_cross_attention_has_no_norm(pixart):
    sites = sostenuto.inspect(pixart)
    assert len(sites) == 9
    assert [(s.id, s.kind, s.front) for s in sites[3:6]] == [
        ("transformer_blocks.1.attn1", SiteKind.SELF_ATTENTION, ("transformer_blocks.1.norm1",)),
        ("transformer_blocks.1.attn2", SiteKind.CROSS_ATTENTION, ()),
        ("transformer_blocks.1.ff", SiteKind.MLP, ("transformer_blocks.1.norm2",)),
    ]


@pytest.mark.parametrize("method", [FORA(2), PAB()])
def test_reuse_of_every_site_is_exact_and_the_plan_is_what_runs(pixart, scheduler, method):
    def sample(model, generator, num_inference_steps):
        return sample_pixart(model, scheduler, num_inference_steps)

    proved = sostenuto.verify(pixart, method, sample, scheduler=scheduler, num_inference_steps=6)
    assert (proved["sites"], proved["passes"], proved["steps"]) == (9, 1, 6)


def test_computing_everything_is_bit_identical(pixart, scheduler):
    stock = sample_pixart(pixart, scheduler)
    with sostenuto.enable(pixart, "none", scheduler=scheduler):
        assert torch.equal(stock, sample_pixart(pixart, scheduler))


def test_fora_is_the_naive_cache_of_all_three_branches(pixart, scheduler):
    expected = sample_pixart(naive_cached(pixart, lambda block, branch, call: call % 3 != 0), scheduler)
    with sostenuto.enable(pixart, FORA(3, anchor="start"), scheduler=scheduler) as handle:
        got = sample_pixart(pixart, scheduler)
        assert handle.stats.actions["reuse"] == 4 * 9
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_state_that_reuses_attention_covers_self_and_cross_attention(pixart, scheduler):
    states = (StepState.COMPUTE, StepState.REUSE_ATTENTION, StepState.REUSE_MLP)
    with sostenuto.enable(pixart, EBCache(CacheTable(states)), scheduler=scheduler) as handle:
        sample_pixart(pixart, scheduler, 3)
        assert handle.stats.plan[1][:3] == ["reuse", "reuse", "compute"]
        assert handle.stats.plan[2][:3] == ["compute", "compute", "reuse"]


@pytest.mark.parametrize("method", [EBCache, FEBCache])
def test_cross_attention_may_be_computed_at_every_step(pixart, scheduler, method, tmp_path):
    computed, attention, mlp, both = StepState
    table = CacheTable((computed, attention, both, mlp, attention, computed), include_cross=False)
    table.save(tmp_path / "apart.json")
    reused = {"attn1": (1, 2, 4), "attn2": (), "ff": (2, 3)}
    expected = sample_pixart(naive_cached(pixart, lambda block, branch, call: call in reused[branch]), scheduler)
    for made in (table, CacheTable.load(tmp_path / "apart.json"), table.filled(0)):
        with sostenuto.enable(pixart, method(made, eps_scale=1.0), scheduler=scheduler) as handle:
            torch.testing.assert_close(sample_pixart(pixart, scheduler), expected, rtol=1e-5, atol=1e-5)
            assert handle.stats.actions["reuse"] == 3 * (3 + 2)
    assert table.resample(12).include_cross is False


@pytest.mark.parametrize(("calibration", "method"), [(EBCalibration, EBCache), (FEBCalibration, FEBCache)])
def test_what_the_calibration_saw_is_what_its_table_makes(pixart, scheduler, calibration, method):
    seen, options = [], {"forecast_order": 0, "eps_scale_rule": "fixed", "max_consecutive_reuse": 1}

    def sample(model, generator, num_inference_steps):
        seen.append(sample_pixart(model, scheduler, num_inference_steps))

    def calibrated(**given):
        made = calibration((1e9, 0.0), None, **options, **given)
        return sostenuto.calibrate(pixart, made, sample, num_inference_steps=6, num_samples=2, scheduler=scheduler)

    apart, together = calibrated(include_cross=False), calibrated()
    assert (apart.include_cross, together.include_cross) == (False, True)
    assert apart.actions == together.actions
    assert StepState.REUSE_BOTH in apart.actions
    assert not torch.allclose(seen[0], seen[1])
    for table, saw in zip((apart, together), seen, strict=True):
        with sostenuto.enable(pixart, method(table), scheduler=scheduler) as handle:
            torch.testing.assert_close(sample_pixart(pixart, scheduler), saw)
            assert 1 / handle.stats.ideal_speedup == pytest.approx(table.macs_fraction)
    assert apart.macs_fraction > together.macs_fraction
