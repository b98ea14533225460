"""DBCache and FirstBlockCache: decisions by hand, what they compute against an independent forward."""

import pytest
import torch

import block_oracle as oracle
import sostenuto
from conftest import build_tiny, sample_loop
from oracle import extrapolate
from sostenuto import DBCache, MethodError
from sostenuto.methods.base import Facts


@pytest.fixture
def four():
    return build_tiny(4)


def decisions(method, levels, first_step=0):
    """What the policy decides on front residuals that are constant, of these levels."""
    timesteps = tuple(range(first_step + len(levels), 0, -1))
    policy = method.policy(Facts((), timesteps, None, None, first_step))
    computed, skipped = [], []
    for step, level in enumerate(levels, first_step):
        skipped.append(policy.skips(step, len(levels), torch.full((1, 2, 3), float(level)), tuple(computed)))
        if not skipped[-1]:
            computed.insert(0, step)
    return "".join("s" if skip else "c" for skip in skipped)


LEVELS = (10, 11, 12, 13, 13, 12, 14)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # against the last computed: .1, .2, .3 → 13; 0, 1/13, 1/13
        (dict(threshold=0.25), "csscsss"),
        (dict(threshold=0.15), "cscsssc"),  # .1, .2 → 12; 1/12, 1/12, 0, 1/6
        # against the previous one: .1, .0909, .0833, 0, .0769, .1667
        (dict(threshold=0.15, compare_to="previous"), "csssssc"),
        (dict(threshold=0.095, compare_to="previous"), "ccssssc"),
        (dict(threshold=0.0), "ccccccc"),
        (dict(threshold=-1.0), "ccccccc"),
        (dict(threshold=1.0), "cssssss"),
        (dict(threshold=2.0, warmup=3), "cccssss"),
        (dict(threshold=2.0, max_consecutive=2), "csscssc"),
        (dict(threshold=2.0, max_cached=3), "csssccc"),
        (dict(threshold=2.0, max_cached=3, max_consecutive=1), "cscscsc"),
        (dict(threshold=2.0, max_cached=0), "ccccccc"),
        # against the last computed, summed: .1, .1 + .2 → 12; .0833, .1667, .1667, .3333
        (dict(threshold=2.0, max_accumulated=0.25), "cscsssc"),
        (dict(threshold=0.25, max_accumulated=0.4), "csscsss"),  # .1, .3, then .3 alone is too much
        # against the previous one, summed: .1, .1909 → 12; .0833, .0833, .1603, .327
        (dict(threshold=0.25, max_accumulated=0.19, compare_to="previous"), "cscsssc"),
        (dict(threshold=0.0, max_accumulated=9.0), "ccccccc"),
        (dict(threshold=2.0, warmup=5, warmup_interval=2), "cscscss"),
        (dict(threshold=0.0, warmup=5, warmup_interval=2), "ccccccc"),  # d decides about the steps in between
        (dict(threshold=2.0, warmup=5, warmup_interval=3, max_consecutive=1), "csccscs"),
    ],
)
def test_a_step_is_cached_while_the_front_residual_hardly_changes(options, expected):
    assert decisions(DBCache(1, 0, **{"warmup": 0, **options}), LEVELS) == expected


@pytest.mark.parametrize(
    ("mask", "options", "expected"),
    [
        ("1010011", dict(threshold=0.25), "cscsscc"),  # .1; against 12: .0833, .0833
        ("1000000", dict(threshold=0.25), "csscsss"),
        ("1111111", dict(threshold=2.0), "ccccccc"),
        ("1000000", dict(threshold=2.0, warmup=4), "cssssss"),  # the mask takes the place of the warm-up
        ("1000100", dict(threshold=2.0, max_consecutive=2), "cssccss"),
        ("1000100", dict(threshold=0.0, steps_computation_policy="static"), "cssscss"),
        ("1000100", dict(threshold=0.1, max_cached=1, steps_computation_policy="static"), "cssscss"),
    ],
)
def test_a_mask_says_which_steps_are_computed_and_its_policy_who_decides_about_the_others(mask, options, expected):
    method = DBCache(1, 0, **{"warmup": 0, **options}, steps_computation_mask=tuple(map(int, mask)))
    assert decisions(method, LEVELS) == expected


def test_the_mask_is_of_the_schedule_and_the_warm_up_of_the_generation():
    """A generation from the third step on: the mask's first two marks are for steps that it leaves out."""
    mask = (1, 1, 0, 0, 1, 0, 0)
    static = DBCache(1, 0, steps_computation_mask=mask, steps_computation_policy="static")
    assert decisions(static, LEVELS[2:], first_step=2) == "cscss"
    assert decisions(DBCache(1, 0, 2.0, warmup=3, warmup_interval=2), LEVELS[2:], first_step=2) == "cscss"


def test_what_can_not_be_compared_is_computed():
    levels = (0, 1, 1, float("nan"), 1, 1)
    assert decisions(DBCache.first_block_cache(0.5), levels) == "ccsccs"
    assert decisions(DBCache(1, 0, 2.0, warmup=0, max_accumulated=0.5), levels) == "ccsccs"


def test_the_residual_is_compared_in_float32():
    policy = DBCache.first_block_cache(0.0079).policy(Facts((), (), None, None))
    signals = [torch.full((4096,), value, dtype=torch.bfloat16) for value in (256.0, 258.0)]
    assert not policy.skips(0, 3, signals[0], ())
    assert policy.skips(1, 3, signals[1], (0,))  # 2/256 = 0.0078, where bfloat16 would sum up 4096 of them wrongly
    assert policy.num_bytes == 2 * 4096


def test_published_settings():
    assert DBCache() == DBCache(8, 0, 0.08, 8, None, None, 0, "last_computed")
    first = DBCache.first_block_cache()
    assert (first.front_blocks, first.back_blocks, first.threshold, first.warmup) == (1, 0, 0.05, 0)
    assert DBCache.first_block_cache(0.12).threshold == 0.12
    assert DBCache.flux_dev() == DBCache(8, 0, 0.08, 4)
    for front, in_a_row in ((8, 2), (8, 3), (4, 3), (4, 4)):  # F8B0_W4MC2_R0.12, …
        assert DBCache.flux_dev(front, in_a_row) == DBCache(front, 0, 0.12, 4, max_consecutive=in_a_row)
    with pytest.raises(MethodError, match=r"published as \(8, None\), .* not \(4, None\)"):
        DBCache.flux_dev(4)
    lightning = DBCache.qwen_image_lightning()
    assert (lightning.front_blocks, lightning.back_blocks, lightning.max_consecutive) == (16, 16, 1)


def dbcache(front, back, threshold, order=0):
    def through(state, step, x, blocks, modulated):
        start = x
        for block in blocks[:front]:
            x = block(x)
        r, past = x - start, state.setdefault("past", [])
        if past and (r - state["r"]).abs().sum() < threshold * state["r"].abs().sum():
            x = x + extrapolate(past[: order + 1], step)
        else:
            state["r"], start = r, x
            for block in blocks[front : len(blocks) - back]:
                x = block(x)
            past.insert(0, (step, x - start))
        for block in blocks[len(blocks) - back :] if back else []:
            x = block(x)
        return x

    return through


@pytest.mark.parametrize(
    ("front", "back", "threshold", "order"), [(1, 0, 0.6, 0), (2, 1, 0.7, 0), (1, 1, 0.6, 1), (1, 2, 0.6, 2)]
)
@pytest.mark.parametrize("separate", [False, True])
def test_it_computes_what_the_independent_forward_computes(four, scheduler, front, back, threshold, order, separate):
    shrink(four)
    expected = oracle.oracle_loop(four, scheduler, dbcache(front, back, threshold, order), 10, separate)
    method = DBCache(front, back, threshold, warmup=0, forecast_order=order)
    with sostenuto.enable(four, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(four, scheduler, 10, separate_guidance=separate)
        assert len(set(oracle.rows(handle))) > 1  # some steps are computed, some are not
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def shrink(model):
    """Make the front residual change slowly, so that thresholds below 1 have something to decide."""
    for block in model.transformer_blocks:
        block.norm1.linear.weight.mul_(0.3)


@pytest.mark.parametrize("separate", [False, True])
def test_the_steps_that_a_mask_marks_run_and_no_others(four, scheduler, separate):
    """Independently of the policy: a hook on a middle block sees the steps."""
    ran, step = [], [0]
    four.transformer_blocks[1].attn1.register_forward_hook(lambda *_: ran.append(step[0]))
    four.transformer_blocks[0].attn1.register_forward_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    mask = (1, 0, 0, 1, 1, 0)
    method = DBCache(1, 1, 0.0, steps_computation_mask=mask, steps_computation_policy="static")
    with sostenuto.enable(four, method, scheduler=scheduler):
        sample_loop(four, scheduler, 6, separate_guidance=separate)
        expected = [call + 1 for call, mark in enumerate(mask) if mark]
        if separate:
            expected = [call for p, mark in enumerate(mask) if mark for call in (2 * p + 1, 2 * p + 2)]
        assert ran == expected
        with pytest.raises(MethodError, match="has 6 steps, the sampler runs 7: give one mark per step"):
            sample_loop(four, scheduler, 7)
        assert ran == expected  # nothing was computed


@pytest.mark.parametrize("keep", ["residual", "hidden"])
def test_a_cached_step_gets_the_middle_blocks_residual_or_their_hidden_states(four, scheduler, keep):
    given, returned = [], []
    four.transformer_blocks[1].register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    four.transformer_blocks[3].register_forward_pre_hook(lambda _, args: returned.append(args[0].clone()))
    method = DBCache(1, 1, steps_computation_mask=(1, 1, 0), steps_computation_policy="static", keep=keep)
    with sostenuto.enable(four, method, scheduler=scheduler):
        sample_loop(four, scheduler, 3)
    expected = returned[1] + given[2] - given[1] if keep == "residual" else returned[1]
    assert not torch.equal(given[1], given[2])
    torch.testing.assert_close(returned[2], expected, rtol=1e-5, atol=1e-5)


def test_every_pass_decides_for_itself(four, scheduler):
    shrink(four)
    for block in four.transformer_blocks:  # so that the two labels differ
        block.norm1.emb.class_embedder.embedding_table.weight.mul_(6)
    method = DBCache(1, 1, 0.6, warmup=0)

    def run(labels):
        decided = dict.fromkeys(labels, "")
        scheduler.set_timesteps(10)
        with torch.no_grad(), sostenuto.enable(four, method, scheduler=scheduler) as handle:
            for index, t in enumerate(scheduler.timesteps):
                latents = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(index // 3))
                for label in labels:
                    four(latents, t[None], torch.tensor([label]))
            for _, pass_index, _, carried in handle._record.calls:
                decided[labels[pass_index]] += "s" if carried.ops[0].is_filled else "c"
        return decided

    together = run((3, 10))
    assert together == run((3,)) | run((10,))
    assert together[3] != together[10]


def test_counted_macs_are_those_of_the_real_run(four, scheduler):
    stats = oracle.check_macs(four, scheduler, DBCache(1, 1, 2.0, warmup=2, forecast_order=1), 8, separate=True)
    assert stats.actions == {"compute": 4, "reuse": 0, "forecast": 12, "partial": 0}
    assert stats.cache_bytes_peak == 2 * 3 * (2 * 16 * 32 * 4)  # two passes, two residuals and a signal each
    computed = oracle.check_macs(four, scheduler, DBCache(1, 0, 0.0), 3)
    assert computed.macs == computed.macs_uncached  # the front runs in any case: its signal costs nothing


def test_the_front_and_back_blocks_always_run(four, scheduler):
    calls = [0, 0, 0, 0]
    for index, block in enumerate(four.transformer_blocks):
        block.attn1.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    with sostenuto.enable(four, DBCache(1, 1, 1.0, warmup=2), scheduler=scheduler):
        sample_loop(four, scheduler, 6)
    assert calls[0] == calls[3] == calls[1] + 4 == calls[2] + 4


def test_a_bound_on_bytes_that_leaves_no_room_computes_everything(four, scheduler):
    with sostenuto.enable(four, DBCache.first_block_cache(1.0), scheduler=scheduler, max_cache_bytes=4096) as handle:
        sample_loop(four, scheduler)
        assert handle.stats.actions["compute"] == 6
        assert handle.stats.cache_bytes_peak == 0


def test_promises_shared_by_all_methods(four, scheduler):
    oracle.check_identical_when_all_is_computed(four, scheduler, DBCache(1, 1, 0.0))
    oracle.check_interruption_leaves_nothing(four, scheduler, DBCache(2, 1, 1.0, warmup=1, max_consecutive=2))
    oracle.check_refused_when_compiled(four, scheduler, DBCache.first_block_cache())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(front_blocks=0), "front_blocks must be a whole number of 1 or more, not 0"),
        (dict(back_blocks=-1), "back_blocks"),
        (dict(threshold=float("nan")), "threshold must be a finite number, not nan"),
        (dict(warmup=1.5), "warmup"),
        (dict(max_cached=-1), "max_cached must be a whole number of 0 or more"),
        (dict(max_consecutive=0), "max_consecutive must be a whole number of 1 or more"),
        (dict(forecast_order=9), "forecast_order"),
        (dict(compare_to="first"), "compare_to must be 'last_computed' or 'previous'"),
        (dict(max_accumulated=0.0), "max_accumulated must be a number above 0, not 0.0"),
        (dict(warmup_interval=0), "warmup_interval must be a whole number of 1 or more, not 0"),
        (dict(steps_computation_mask=(1, 2)), r"steps_computation_mask must be a tuple of 0 and 1, .* not \(1, 2\)"),
        (dict(steps_computation_mask=()), r"not \(\)"),
        (dict(steps_computation_mask=(0, 1)), "must begin with 1"),
        (dict(steps_computation_mask=(1, 0), steps_computation_policy="slow"), "must be one of dynamic, static"),
        (dict(steps_computation_policy="static"), "'static' needs a steps_computation_mask"),
        (dict(keep="both"), "keep must be one of residual, hidden, not 'both'"),
    ],
)
def test_parameters_without_meaning_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        DBCache(**wrong)


@pytest.mark.parametrize(("front", "back"), [(4, 0), (2, 2), (8, 8)])
def test_a_network_without_a_block_between_front_and_back_is_refused(four, scheduler, front, back):
    with pytest.raises(MethodError, match=f"{front} and {back}, but the network has 4 blocks"):
        sostenuto.enable(four, DBCache(front, back), scheduler=scheduler)
    assert not any("forward" in vars(module) for module in four.modules())
