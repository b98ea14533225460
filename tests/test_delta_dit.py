"""Δ-DiT: its schedule, its two ranges of blocks that may overlap, and what it computes, against an independent forward."""

import pytest
import torch

import block_oracle as oracle
import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import DeltaDiT, MethodError
from sostenuto.methods.base import Facts
from sostenuto.plan import Op


@pytest.fixture
def four():
    return build_tiny(4)


def schedule(model, method, num_steps):
    facts = Facts(method.sites(model), tuple(range(num_steps, 0, -1)), model, None)
    return ["".join(a.value[0] for a in row) for row in method.plan(facts).actions]


@pytest.mark.parametrize(
    ("num_steps", "interval", "switch", "front", "rear"),
    [
        (8, 2, 4, "cccccrcr", "crcrcccc"),
        (10, 3, 5, "cccccccrrc", "crrcrccccc"),  # step 5 is the switch, step 6 a multiple of the interval
        (6, 3, 0, "crrcrr", "cccccc"),
        (6, 3, 6, "cccccc", "crrcrr"),
        (6, 3, 0.5, "ccccrr", "crrccc"),
        (6, 1, 3, "cccccc", "cccccc"),
    ],
)
def test_rear_blocks_are_reused_early_and_front_blocks_late(four, num_steps, interval, switch, front, rear):
    found = schedule(four, DeltaDiT(interval, switch, 1), num_steps)
    assert found == [f + r for f, r in zip(front, rear, strict=True)]


@pytest.mark.parametrize(
    ("cached", "ids"),
    [
        (1, ["0-0", "3-3"]),
        (3, ["0-2", "1-3"]),
        (0.75, ["0-2", "1-3"]),
        (0.5, ["0-1", "2-3"]),
        (0.01, ["0-0", "3-3"]),
        (4, ["0-3"]),
        (1.0, ["0-3"]),
    ],
)
def test_the_ranges_lie_at_either_end_and_may_overlap(four, cached, ids):
    sites = DeltaDiT(num_cached_blocks=cached).sites(four)
    assert [site.id for site in sites] == [f"transformer_blocks.{i}" for i in ids]


def test_published_settings():
    for preset in (DeltaDiT.dit_xl_2(), DeltaDiT.pixart_alpha()):
        assert (preset.interval, preset.num_cached_blocks) == (2, 21)
        assert schedule(build_tiny(28), preset, 20)[11:14] == ["cr", "cc", "rc"]  # b = 12 of 20 steps


@pytest.mark.parametrize("cached", [1, 2, 3, 4])
def test_a_range_reused_with_identical_inputs_equals_the_full_computation(four, scheduler, cached):
    seen = []

    def driver(tick, prober):
        count = len(prober.handle.sites)
        full = prober.run([Op.COMPUTE] * count).sample
        stored = prober.run([Op.STORE] * count).sample  # both ranges at once: overlapping blocks belong to both
        assert torch.equal(full, stored)
        for reused in range(count):
            for other in (Op.COMPUTE, Op.SKIP):
                output = prober.run([Op.REUSE if site == reused else other for site in range(count)]).sample
                torch.testing.assert_close(output, full, rtol=1e-5, atol=1e-5)  # x + (y − x) is y but for rounding
            seen.append(reused)
        return prober.run([Op.COMPUTE] * count)

    method = DeltaDiT(num_cached_blocks=cached)
    with sostenuto.enable(four, method, scheduler=scheduler) as handle:
        handle.driver = driver
        sample_loop(four, scheduler, 1)
    assert len(seen) == len(method.sites(four))


def delta_dit(interval, switch, cached):
    def through(state, step, x, blocks, modulated):
        stage = "rear" if step < switch else "front"
        if stage == "rear":
            before, within, after = blocks[: len(blocks) - cached], blocks[len(blocks) - cached :], []
        else:
            before, within, after = [], blocks[:cached], blocks[cached:]
        for block in before:
            x = block(x)
        if step % interval == 0 or step == switch:
            start = x
            for block in within:
                x = block(x)
            state[stage] = x - start
        else:
            x = x + state[stage]
        for block in after:
            x = block(x)
        return x

    return through


@pytest.mark.parametrize("cached", [1, 3, 4])
@pytest.mark.parametrize("separate", [False, True])
def test_it_computes_what_the_independent_forward_computes(four, scheduler, cached, separate):
    expected = oracle.oracle_loop(four, scheduler, delta_dit(3, 4, cached), 9, separate)
    with sostenuto.enable(four, DeltaDiT(3, 4, cached), scheduler=scheduler) as handle:
        got, _ = sample_loop(four, scheduler, 9, separate_guidance=separate)
        if cached < 4:
            assert oracle.rows(handle) == ["cc", "cr", "cr", "cc", "cc", "rc", "cc", "rc", "rc"]
        else:
            assert oracle.rows(handle) == ["c", "r", "r", "c", "c", "r", "c", "r", "r"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_computed_step_keeps_only_the_residual_that_is_read(four, scheduler):
    with sostenuto.enable(four, DeltaDiT(2, 4, 3), scheduler=scheduler) as handle:
        sample_loop(four, scheduler, 7)
        ops = [carried.ops for *_, carried in handle._record.calls]
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes == 2 * 16 * 32 * 4
    compute, store, reuse = Op.COMPUTE, Op.STORE, Op.REUSE
    assert ops == [
        (compute, store),
        (compute, reuse),
        (compute, store),
        (compute, reuse),
        (store, compute),
        (reuse, compute),
        (compute, compute),  # the last step: nobody reads what it adds
    ]


def test_skipping_three_of_four_blocks_leaves_a_quarter_of_them(four, scheduler):
    stats = oracle.check_macs(four, scheduler, DeltaDiT(2, 4, 3), 8)
    with sostenuto.enable(four, DeltaDiT(1), scheduler=scheduler) as handle:
        sample_loop(four, scheduler, 1)
        block = handle._dry_runs.cost(0).site_macs[0] // 3
    assert stats.macs_uncached - stats.macs == 4 * 3 * block
    oracle.check_macs(four, scheduler, DeltaDiT(2, 4, 1), 8, separate=True)


def test_a_generation_that_begins_in_the_middle_computes_first(four, scheduler):
    scheduler.set_timesteps(8)
    latents, labels = torch.randn(1, 2, 8, 8), torch.tensor([3])
    with torch.no_grad(), sostenuto.enable(four, DeltaDiT(2, 4, 3), scheduler=scheduler) as handle:
        for t in scheduler.timesteps[5:]:
            four(latents, t[None], labels)
        assert oracle.rows(handle) == ["cc", "rc", "cc"]  # the interval counts from where it begins


def test_promises_shared_by_all_methods(four, scheduler):
    oracle.check_identical_when_all_is_computed(four, scheduler, DeltaDiT(1))
    oracle.check_interruption_leaves_nothing(four, scheduler, DeltaDiT(2, 0.5, 3))


@pytest.mark.slow
def test_it_compiles_without_a_break_also_where_the_ranges_overlap(scheduler):
    oracle.check_compiles(build_tiny(3), scheduler, DeltaDiT(2, 2, 2), 4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(interval=0), "interval must be a whole number of 1 or more, not 0"),
        (dict(interval=2.0), "interval"),
        (dict(switch_step=-1), "switch_step must be a whole number of 0 or more"),
        (dict(switch_step=1.5), "as a fraction, must be a number of 0 or more and at most 1, not 1.5"),
        (dict(switch_step=True), "switch_step"),
        (dict(num_cached_blocks=0.0), "as a fraction, must be a number above 0 and at most 1, not 0.0"),
        (dict(num_cached_blocks=0), "num_cached_blocks must be a whole number of 1 or more"),
        (dict(num_cached_blocks=float("nan")), "num_cached_blocks"),
    ],
)
def test_parameters_without_meaning_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        DeltaDiT(**wrong)


def test_what_does_not_fit_the_network_or_sampler_is_refused(four, scheduler):
    with pytest.raises(MethodError, match="is 5, but the network has 4 blocks"):
        sostenuto.enable(four, DeltaDiT(num_cached_blocks=5), scheduler=scheduler)
    with (
        sostenuto.enable(four, DeltaDiT(switch_step=12), scheduler=scheduler),
        pytest.raises(MethodError, match="switch_step is 12, but the sampler runs 6 steps"),
    ):
        sample_loop(four, scheduler, 6)
