"""L2C: what its router makes of the steps, and what the router's file refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import save_file

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import FORA, L2C, Action, MethodError, Router, TableError
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.methods.base import Facts
from sostenuto.router import FORMAT, cache_steps
from test_engine import run_oracle

SITES = tuple(f"transformer_blocks.{block}.{branch}" for block in range(3) for branch in ("attn1", "ff"))


@pytest.fixture
def scheduler():
    return DDIMScheduler(beta_schedule="linear", clip_sample=False)


def random_router(num_steps, seed=0, **made_for):
    logits = torch.randn(num_steps // 2, len(SITES), generator=torch.Generator().manual_seed(seed))
    return Router(tuple(tuple(row) for row in logits.tolist()), SITES, num_steps, **made_for)


def uniform_router(num_steps, logit):
    return Router(((logit,) * len(SITES),) * (num_steps // 2), SITES, num_steps)


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(2, (1,)), (3, (2,)), (5, (2, 4)), (6, (1, 3, 5)), (7, (2, 4, 6)), (8, (1, 3, 5, 7))]
)
def test_cache_steps_have_an_even_descending_index_and_follow_a_full_step(num_steps, expected):
    assert cache_steps(num_steps) == expected


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.9])
def test_a_branch_is_computed_where_its_gate_exceeds_the_threshold(threshold):
    router = random_router(6)
    gates = torch.tensor(router.logits, dtype=torch.float64).sigmoid() > threshold
    mask = router.mask(threshold)
    assert [list(mask[step]) for step in (1, 3, 5)] == gates.tolist()
    assert all(all(mask[step]) for step in (0, 2, 4))
    assert router.dropped(threshold) == pytest.approx(1 - gates.double().mean().item())


def test_a_mask_is_a_router_whatever_the_threshold():
    mask = random_router(5).mask(0.5)
    router = Router.from_mask(mask, SITES)
    assert router.mask(0.0) == router.mask(0.99) == mask
    assert Router.from_mask(mask[::-1], SITES, order="timestep_index") == router
    assert router.strip().splitlines() == ["".join("R·"[computed] for computed in mask[step]) for step in (2, 4)]
    with pytest.raises(TableError, match="step 3 of 5 is a full step"):
        Router.from_mask([*mask[:3], (False,) * len(SITES), mask[4]], SITES)


@pytest.mark.parametrize("num_steps", [5, 6])
def test_open_gates_are_bit_identical_to_the_stock_model(tiny, scheduler, num_steps):
    stock, _ = sample_loop(tiny, scheduler, num_steps)
    with sostenuto.enable(tiny, L2C(uniform_router(num_steps, 5.0)), scheduler=scheduler) as handle:
        cached, _ = sample_loop(tiny, scheduler, num_steps)
        assert handle.stats.ideal_speedup == 1.0
    assert torch.equal(stock, cached)


def test_closed_gates_reuse_every_second_step(tiny, scheduler):
    outputs = []
    for method in (L2C(uniform_router(6, -5.0)), FORA(2, anchor="start")):
        with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
            outputs.append(sample_loop(tiny, scheduler, 6)[0])
            assert handle.stats.actions["reuse"] == 3 * len(SITES)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("num_steps", [6, 7])
def test_outputs_are_those_of_the_mask_carried_out_from_scratch(tiny, scheduler, num_steps, separate):
    router = random_router(num_steps)
    mask = router.mask(0.5)

    def skip(site, step):
        return not mask[step][SITES.index(site)]

    expected, _ = run_oracle(tiny, scheduler, skip, num_steps, 0, separate)
    with sostenuto.enable(tiny, L2C(router, threshold=0.5), scheduler=scheduler) as handle:
        cached, _ = sample_loop(tiny, scheduler, num_steps, separate_guidance=separate)
        ran = handle.stats.plan
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-4)
    assert [[action == "compute" for action in row] for row in ran] == [list(row) for row in mask]


def test_counted_multiply_accumulates_fall_by_what_is_reused(tiny, scheduler):
    router = random_router(6)
    reused = {"attn1": 0, "ff": 0}
    for row in router.mask(0.5):
        for site, computed in zip(SITES, row, strict=True):
            reused[site.split(".")[-1]] += not computed
    batch, tokens, width = 2, 16, 32
    attention = batch * (4 * tokens * width**2 + 2 * tokens**2 * width)
    mlp = batch * 8 * tokens * width**2
    with sostenuto.enable(tiny, L2C(router, threshold=0.5), scheduler=scheduler) as handle:
        sample_loop(tiny, scheduler, 6, batch=batch)
        stats = handle.stats
    assert stats.macs_uncached - stats.macs == reused["attn1"] * attention + reused["ff"] * mlp


def test_an_interrupted_generation_leaves_nothing_behind(tiny, scheduler):
    with sostenuto.enable(tiny, L2C(random_router(6), threshold=0.5), scheduler=scheduler):
        fresh, _ = sample_loop(tiny, scheduler, 6)
        with pytest.raises(KeyboardInterrupt):
            sample_loop(tiny, scheduler, 6, seed=1, stop_at=3)
        again, _ = sample_loop(tiny, scheduler, 6)
    assert torch.equal(fresh, again)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-0.1, 1.0, True, "0.1", math.nan])
def test_a_threshold_that_is_no_gate_is_refused(threshold):
    with pytest.raises(MethodError, match="0 or more and below 1"):
        L2C(threshold=threshold)


def test_wrong_arguments_are_refused_with_the_value(tiny, scheduler):
    with pytest.raises(MethodError, match=r"Router or the path of one, not 3"):
        L2C(3)
    with pytest.raises(MethodError, match="not at 128"):
        L2C.dit_xl_2("router.safetensors", resolution=128)
    assert L2C.dit_xl_2("a", 512).threshold == 0.9
    assert L2C.dit_xl_2("a").threshold == L2C.dit_l_2("a").threshold == 0.1


def test_the_threshold_of_the_training_counts_unless_another_one_is_given(tiny, scheduler):
    def plan(method):
        with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
            sample_loop(tiny, scheduler, 6)
            return [[action == "compute" for action in row] for row in handle.stats.plan]

    router = random_router(6, training={"threshold": 0.6})
    assert plan(L2C(router)) == [list(row) for row in router.mask(0.6)] != [list(row) for row in router.mask(0.1)]
    assert plan(L2C(router, 0.1)) == plan(L2C(random_router(6))) == [list(row) for row in router.mask(0.1)]
    with pytest.raises(MethodError, match="was trained with must be a number"):
        plan(L2C(random_router(6, training={"threshold": "high"})))
    with pytest.raises(MethodError, match="no router ships"):
        sostenuto.enable(tiny, "l2c", scheduler=scheduler)


def test_another_network_scheduler_or_number_of_steps_is_refused(tiny, scheduler):
    router = random_router(6, scheduler={"class": "DDIMScheduler", "timesteps": [1, 2, 3, 4, 5, 6]})
    with pytest.raises(TableError, match=r"transformer_blocks\.3"):
        sostenuto.enable(build_tiny(num_layers=4), L2C(router), scheduler=scheduler)
    with pytest.raises(TableError, match="DDIMScheduler"):
        sostenuto.enable(tiny, L2C(router), scheduler=DDPMScheduler())
    for model in ({"class": "PixArtTransformer2DModel"}, {"class": "DiTTransformer2DModel", "num_blocks": 28}):
        with pytest.raises(TableError, match=r"router was made for (PixArt|28 blocks)"):
            sostenuto.enable(tiny, L2C(replace(router, model=model)), scheduler=scheduler)
    with sostenuto.enable(tiny, L2C(router), scheduler=scheduler):
        with pytest.raises(TableError, match="trained for 6 steps, the sampler runs 8"):
            sample_loop(tiny, scheduler, 8)
        with pytest.raises(TableError, match="timestep 1 at step 0"):
            sample_loop(tiny, scheduler, 6)


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_saved_router_loads_as_it_was(tmp_path):
    router = random_router(
        7,
        model={"class": "X", "fingerprint": "abc"},
        scheduler={"class": "DDIMScheduler", "timesteps": [float(t) for t in range(7)]},
        training={"penalty": 1e-6, "images": 3},
    )
    router.save(tmp_path / "r.safetensors")
    assert Router.load(tmp_path / "r.safetensors") == router
    decided = Router.from_mask(router.mask(), SITES)
    decided.save(str(tmp_path / "m.safetensors"))
    assert Router.load(tmp_path / "m.safetensors") == decided


def content(**changes):
    return {
        "format": FORMAT,
        "version": 1,
        "method": "l2c",
        "order": "sampling",
        "num_inference_steps": 6,
        "sites": list(SITES),
        "model": {},
        "scheduler": {"timesteps": [6, 5, 4, 3, 2, 1]},
        "training": {},
        **changes,
    }


def write(path, header, tensors):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={FORMAT: text})
    return path


def test_a_file_in_order_of_the_timestep_index_is_turned_around(tmp_path):
    logits = torch.arange(18.0).reshape(3, 6)
    path = write(tmp_path / "r", content(order="timestep_index", scheduler={"timesteps": [1, 2, 3, 4, 5, 6]}),
                 {"logits": logits})  # fmt: skip
    router = Router.load(path)
    assert router.logits[0] == tuple(logits[2].tolist())
    assert router.scheduler["timesteps"] == [6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "'format' must be"),
        ({"version": 2}, "version 2 is not known"),
        ({"method": "eb"}, "method must be 'l2c'"),
        ({"order": "backwards"}, "order must be"),
        ({"num_inference_steps": 8}, "3 cache steps, a sampler of 8 has 4"),
        ({"num_inference_steps": "6"}, "whole number from 2 to 10000"),
        ({"num_inference_steps": 10**9}, "whole number from 2 to 10000"),
        ({"sites": "all"}, "list the id of every site"),
        ({"sites": list(SITES[:5])}, "6 gates for 5 sites"),
        ({"sites": [*SITES[:5], SITES[0]]}, "a site twice"),
        ({"sites": [*SITES[:5], 7]}, "the id of every site"),
        ({"sites": []}, "the id of every site"),
        ({"model": []}, "'model' must be an object"),
        ({"model": {"fingerprint": 1}}, "fingerprint must be a text"),
        ({"scheduler": {"timesteps": [1, 2]}}, "one number per step"),
        ({"training": 1}, "'training' must be an object"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path / "r", content(**changes), {"logits": torch.zeros(3, 6)})
    with pytest.raises(TableError, match=message):
        Router.load(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gates": torch.zeros(3, 6)}, "one tensor, 'logits'"),
        ({"logits": torch.zeros(3, 6), "more": torch.zeros(1)}, "one tensor, 'logits'"),
        ({"logits": torch.zeros(3, 6, dtype=torch.int64)}, "float32 of shape"),
        ({"logits": torch.zeros(18)}, "float32 of shape"),
        ({"logits": torch.zeros(3, 0)}, "0 gates for 6 sites"),
        ({"logits": torch.full((3, 6), math.nan)}, "not a number"),
    ],
)
def test_a_wrong_tensor_is_refused(tmp_path, tensors, message):
    with pytest.raises(TableError, match=message):
        Router.load(write(tmp_path / "r", content(), tensors))


def test_what_is_no_router_is_refused_in_one_sentence(tmp_path, monkeypatch):
    torch.save({"logits": torch.zeros(3, 6)}, tmp_path / "pickle.pt")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "huge-header").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    save_file({"logits": torch.zeros(3, 6)}, tmp_path / "bare")
    write(tmp_path / "text", "{", {"logits": torch.zeros(3, 6)})
    write(tmp_path / "nested", "[" * 100_000, {"logits": torch.zeros(3, 6)})
    write(tmp_path / "list", [1], {"logits": torch.zeros(3, 6)})
    for path in [tmp_path, tmp_path / "missing", *tmp_path.iterdir()]:
        with pytest.raises(TableError) as refused:
            Router.load(path)
        assert path.name in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(TableError, match="from a path"):
        Router.load(None)
    monkeypatch.setattr("sostenuto.measured._MAX_BYTES", 10)
    with pytest.raises(TableError, match="bytes: that is no router"):
        Router.load(tmp_path / "bare")


def test_the_shipped_router_is_chosen_by_model_scheduler_and_steps(tiny, scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr("sostenuto.tables._FOLDER", tmp_path)
    for steps, class_name in ((4, "DDIMScheduler"), (6, "DDIMScheduler"), (8, "DDPMScheduler")):
        random_router(steps, scheduler={"class": class_name}).save(tmp_path / f"{steps}.safetensors")
    with sostenuto.enable(tiny, "l2c", scheduler=scheduler) as handle:
        for steps in (4, 6):
            sample_loop(tiny, scheduler, steps)
            mask = random_router(steps).mask(0.1)
            assert [[action == "compute" for action in row] for row in handle.stats.plan] == [list(row) for row in mask]
        with pytest.raises(MethodError, match="ship for 4, 6 steps, the sampler runs 8"):
            sample_loop(tiny, scheduler, 8)


@pytest.mark.parametrize(("steps", "share"), [(20, 0.475), (50, 0.48)])
def test_a_router_ships_for_the_demo_and_reuses_the_share_that_its_page_names(steps, share):
    pipe = load_demo_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(steps)
    with sostenuto.enable(pipe, "l2c") as handle:
        timesteps = tuple(pipe.scheduler.timesteps.tolist())
        plan = handle.method.plan(Facts(handle.sites, timesteps, pipe.transformer, pipe.scheduler))
    reused = [row.count(Action.REUSE) for row in plan.actions]
    computed = [row.count(Action.COMPUTE) for row in plan.actions]
    assert [r + c for r, c in zip(reused, computed, strict=True)] == [8 * 2] * steps  # branches of eight blocks
    assert not any(reused[0::2])  # for even numbers of steps, full and cache steps in turn
    assert sum(reused[1::2]) == round(share * (steps // 2) * 8 * 2)
    page = (Path(__file__).parents[1] / "docs" / "methods" / "l2c.md").read_text(encoding="utf-8")
    assert f"{100 * share:g} % ({steps} steps)" in page
