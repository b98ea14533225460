"""PAB: the plan by hand, end to end against an independent cache, and what is refused."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import sostenuto
from conftest import sample_loop
from sostenuto import PAB, MethodError, Site, SiteKind
from sostenuto.methods.base import Facts
from sostenuto.plan import Action
from sostenuto.zoo import TINY_MODELS
from tiny_pixart import build_pixart, naive_cached, sample_pixart

KINDS = (
    SiteKind.SELF_ATTENTION,
    SiteKind.JOINT_ATTENTION,
    SiteKind.TEMPORAL_ATTENTION,
    SiteKind.CROSS_ATTENTION,
    SiteKind.MLP,
)


def strips(method, timesteps, blocks=1):
    """Per site one letter a step: 1 computed, 0 reused."""
    sites = [Site(f"{block}.{kind.value}", kind, block, None, 0) for block in range(blocks) for kind in KINDS]
    plan = method.plan(Facts(sites, tuple(timesteps), torch.nn.Identity(), None))
    letters = {Action.COMPUTE: "1", Action.REUSE: "0"}
    return {site.id: "".join(letters[row[i]] for row in plan.actions) for i, site in enumerate(sites)}


def test_attention_is_computed_at_multiples_of_the_range_counted_from_the_first_step():
    timesteps = [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]  # in the window (100, 800): steps 2 to 7
    assert strips(PAB(2, 3, 6), timesteps) == {
        "0.self-attention": "1110101011",
        "0.joint-attention": "1110101011",
        "0.temporal-attention": "1101001011",  # step 2 reuses what step 1 computed outside of the window
        "0.cross-attention": "1100001011",
        "0.mlp": "1111111111",
    }


@pytest.mark.parametrize("num_steps", [7, 30, 50])
def test_the_plan_is_what_a_counter_in_each_layer_decides(num_steps):
    timesteps = torch.linspace(999, 0, num_steps).tolist()
    expected = ""
    count = 0
    for timestep in timesteps:  # the authors' rule, step by step
        expected += "0" if 450 < timestep < 930 and count % 4 != 0 else "1"
        count = (count + 1) % num_steps
    assert strips(PAB(2, 4, 6, (450, 930)), timesteps)["0.temporal-attention"] == expected


def test_mlps_are_computed_at_the_nearest_step_and_reused_for_the_next():
    timesteps = list(range(900, -1, -100))
    got = strips(PAB(mlp={720: ((0,), 2), 480: ((0, 1), 3), 310: ((0,), 1)}), timesteps, blocks=3)
    # 720 → step 2, 480 → step 4, 310 → step 6, which computes although it lies in the three after step 4
    assert got["0.mlp"] == "1110101011"
    assert got["1.mlp"] == "1111100011"
    assert got["2.mlp"] == "1111111111"


def test_no_mlp_is_reused_past_the_last_step():
    assert strips(PAB(mlp={0: ((0,), 5)}), range(900, -1, -100))["0.mlp"] == "1" * 10


def test_presets_are_the_published_ones():
    timesteps = [round(999 - 999 * p / 29) for p in range(30)]
    assert strips(PAB.pab_579(), timesteps)["0.self-attention"].startswith("1" * 6 + "0000")
    assert (PAB.pab_246().cross_range, PAB.pab_357().cross_range, PAB.pab_579().cross_range) == (6, 7, 9)
    assert sorted(PAB.open_sora().mlp) == [676, 788, 864]
    assert sorted(PAB.latte().mlp) == [400, 480, 560, 640, 720]
    plan = PAB.open_sora_plan()
    assert (max(plan.mlp), min(plan.mlp), len(plan.mlp)) == (738, 426, 14)
    assert all(list(blocks) == [0, 1, 2, 3, 4, 5, 6] and skipped == 2 for blocks, skipped in plan.mlp.values())
    assert PAB.open_sora_plan("1.2") == PAB(2, None, 6, (100, 850))
    with pytest.raises(MethodError, match=r"version must be one of 1\.1, 1\.2, not '1\.3'"):
        PAB.open_sora_plan("1.3")
    for preset in (PAB.cogvideox_2b(), PAB.cogvideox_5b()):
        assert (preset.spatial_range, preset.cross_range, preset.window) == (2, None, (100, 850))
    assert PAB.vchitect() == PAB.pab_246()


def test_a_shifted_flow_has_fewer_steps_in_the_window():
    counts = []
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(20)
        counts.append(strips(PAB(2), scheduler.timesteps.tolist())["0.self-attention"].count("0"))
    assert counts[0] > counts[1] > 0


def test_ranges_of_one_are_bit_identical_to_the_plain_model(tiny, scheduler):
    stock, _ = sample_loop(tiny, scheduler)
    for method in (PAB(1, 1, 1), PAB(None, None, None)):
        with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
            assert torch.equal(stock, sample_loop(tiny, scheduler)[0])
            assert handle.stats.ideal_speedup == 1.0


def test_on_a_network_with_cross_attention_pab_is_the_naive_cache():
    model, scheduler = build_pixart(), DDIMScheduler()
    method = PAB(2, None, 3, (150, 850), {700: ((1,), 2)})
    scheduler.set_timesteps(8)
    inside = [150 < t < 850 for t in scheduler.timesteps.tolist()]  # 875, 750, …, 0

    def skip(block, branch, call):
        if branch == "ff":
            return block == 1 and call in (2, 3)  # step 1 with t = 750 is the nearest to 700
        return inside[call] and call % {"attn1": 2, "attn2": 3}[branch] != 0

    expected = sample_pixart(naive_cached(model, skip), scheduler, 8)
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        got = sample_pixart(model, scheduler, 8)
        carried = handle.stats.plan
        macs = handle._dry_runs.cost(0).site_macs
        saved = sum(macs[site] for row in carried for site, action in enumerate(row) if action == "reuse")
        assert handle.stats.macs == handle.stats.macs_uncached - saved
    assert [[a == "reuse" for a in row] for row in carried] == [
        [skip(block, branch, call) for block in range(3) for branch in ("attn1", "attn2", "ff")] for call in range(8)
    ]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spatial_range": 0}, "spatial_range must be a whole number of 1 or more, or None, not 0"),
        ({"cross_range": 2.0}, "cross_range"),
        ({"temporal_range": True}, "temporal_range"),
        ({"window": (800, 100)}, "lo < hi"),
        ({"window": 100}, "window"),
        ({"mlp": [720]}, "mlp must be"),
        ({"mlp": {720: (range(5), 0)}}, "skip_count"),
        ({"mlp": {720: 2}}, "skip_count"),
    ],
)
def test_parameters_without_meaning_are_refused(arguments, words):
    with pytest.raises(MethodError, match=words):
        PAB(**arguments)


def test_what_would_be_a_silent_no_op_is_refused(tiny, scheduler):
    for method, words in (
        (PAB(None, None, 6), "no range for what this network has"),
        (PAB(window=(0.1, 0.8)), "none of the scheduler's timesteps"),
        (PAB(mlp={720: (range(5), 2)}), "block 3, but the network has 3"),
        (PAB(mlp={5000: ((0,), 2)}), "far from the scheduler's"),
    ):
        with sostenuto.enable(tiny, method, scheduler=scheduler), pytest.raises(MethodError, match=words):
            sample_loop(tiny, scheduler)


def test_blocks_are_counted_in_each_list_by_itself():
    """Latte's five blocks are five over space and five over time."""
    model = TINY_MODELS["LatteTransformer3DModel"].build()
    sites = [site for site in sostenuto.inspect(model) if site.kind is SiteKind.MLP]
    timesteps = tuple(range(900, -1, -100))
    plan = PAB(None, None, None, mlp={500: ((0,), 2)}).plan(Facts(sites, timesteps, model, None))
    reused = {site.id for site, action in zip(sites, plan.actions[5], strict=True) if action is Action.REUSE}
    assert len(sites) >= 4
    assert {name.rpartition(".ff")[0] for name in reused} == {"transformer_blocks.0", "temporal_transformer_blocks.0"}
