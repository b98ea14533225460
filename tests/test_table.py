import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import CacheTable, EBCache, StepState, TableError, inspect
from sostenuto.plan import Action, Op, lower

C, A, M, B = StepState
GOOD = CacheTable(
    (C, B, A, M, C),
    eps_scale=(1.0, 0.99, 0.98, 0.97, 0.96),
    forecast_order=1,
    model={"class": "X", "num_blocks": 3, "fingerprint": "ab"},
    scheduler={"class": "DDPMScheduler", "timesteps": [800.0, 600.0, 400.0, 200.0, 0.0]},
    calibration={"seed": 0},
    macs_fraction=0.6,
)


@pytest.fixture
def content(tmp_path):
    GOOD.save(tmp_path / "table.json")
    return json.loads((tmp_path / "table.json").read_text())


def load(tmp_path, content):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return CacheTable.load(path)


def test_a_saved_table_loads_equal(tmp_path):
    GOOD.save(tmp_path / "table.json")
    assert CacheTable.load(tmp_path / "table.json") == GOOD


def test_the_file_has_the_documented_fields(content):
    assert content["format"] == "sostenuto-cache-table"
    assert (content["version"], content["order"], content["num_inference_steps"]) == (1, "sampling", 5)
    assert content["actions"] == ["compute", "reuse-both", "reuse-attn", "reuse-mlp", "compute"]


def test_every_step_may_have_a_forecast_of_its_own(tmp_path, content):
    table = CacheTable((C, B, C, A, B), forecast_order=(0, 0, 0, 2, 1))
    table.save(tmp_path / "orders.json")
    assert CacheTable.load(tmp_path / "orders.json") == table
    assert table.forecast_orders == (0, 0, 0, 2, 1)
    turned = dict(content, order="timestep_index", forecast_order=[1, 2, 0, 0, 0])
    assert load(tmp_path, turned).forecast_orders == (0, 0, 0, 2, 1)
    assert table.filled(1).forecast_orders == (1,) * 5
    assert table.resample(10).forecast_orders == (0, 0, 0, 0, 0, 0, 2, 2, 1, 1)


def test_the_plan_follows_the_forecast_of_every_step(tiny):
    table = CacheTable((C, C, C, B, B, C, B), forecast_order=(0, 0, 0, 2, 0, 0, 1))
    program = lower(table.plan(inspect(tiny)))
    assert [row[0] for row in program.history] == [(), (), (), (2, 1, 0), (2,), (), (5, 2)]
    assert table.plan(inspect(tiny)).num_slots == 3


def test_a_table_in_timestep_order_is_turned_around_with_all_it_holds(tmp_path, content):
    turned = dict(
        content, order="timestep_index", actions=content["actions"][::-1], eps_scale=content["eps_scale"][::-1]
    )
    turned["scheduler"] = dict(content["scheduler"], timesteps=content["scheduler"]["timesteps"][::-1])
    assert load(tmp_path, turned) == GOOD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version 2"),
        ({"version": True}, "version True"),
        ({"eps_scal": 0.9}, "no field 'eps_scal': did you mean 'eps_scale'"),
        ({"remark": ""}, "no field 'remark': leave it out"),
        ({"num_inference_steps": 4}, "4, but there are 5"),
        ({"actions": ["compute", "sleep", "compute", "compute", "compute"]}, "unknown action 'sleep' at step 1"),
        (
            {"actions": ["compute", *[{"blocks.0.ff": "partial"}] * 4]},
            "'partial'} at step 1 .*|step 1 must be .*partial",
        ),
        (
            {"actions": ["compute", *[{"blocks.0.ff": "skip"}] * 4]},
            "step 1 must be .* compute, reuse, forecast, window",
        ),
        ({"actions": ["reuse-both"] * 5}, "step 0"),
        ({"actions": []}, "actions"),
        ({"actions": "compute"}, "actions"),
        ({"eps_scale": [1.0, 1.0]}, "2 entries for 5"),
        ({"eps_scale": [1, 1, -1, 1, 1]}, "-1.0 at step 2"),
        ({"eps_scale": float("nan")}, "eps_scale: NaN is no finite number"),
        ({"eps_scale": [1, 1, float("inf"), 1, 1]}, r"eps_scale\[2\]: Infinity is no finite number"),
        ({"eps_scale": "0.9"}, "eps_scale"),
        ({"order": "backwards"}, "backwards"),
        ({"forecast_order": 1.5}, "forecast_order"),
        ({"forecast_order": 9}, "forecast_order"),
        ({"forecast_order": [1, 0]}, "2 entries for 5"),
        ({"forecast_order": [1, 0, 0, 0.5, 0]}, "forecast_order"),
        ({"macs_fraction": 2}, "macs_fraction"),
        ({"include_cross": 0}, "include_cross must be true or false, not 0"),
        ({"include_cross": False, "fill": "stack"}, "fill='stack' skips it with its block: use fill='branches'"),
        ({"method": 3}, "method"),
        ({"method": ""}, "method must be a name, not ''"),
        ({"calibration": []}, "'calibration' must be an object"),
        (
            {"calibration": {"num_samples": "eight"}},
            r"calibration\.num_samples must be a whole number of 1 or more, not 'eight'",
        ),
        ({"calibration": {"num_samples": 0}}, r"calibration\.num_samples"),
        ({"calibration": {"seed": 0.5}}, r"calibration\.seed must be a whole number"),
        ({"calibration": {"threshold": "low"}}, r"calibration\.threshold must be a number or a list of numbers"),
        ({"calibration": {"norm": 2}}, r"calibration\.norm must be a name"),
        ({"calibration": {"norms": 5}}, r"calibration\.norms must be an object or a list"),
        ({"model": []}, "model"),
        ({"model": {"fingerprint": 3}}, "fingerprint"),
        ({"model": {"class": ["DiT"]}}, r"model\.class must be a text"),
        ({"model": {"num_blocks": "8"}}, r"model\.num_blocks must be a whole number of 1 or more"),
        ({"scheduler": {"class": ""}}, r"scheduler\.class must be a text"),
        ({"scheduler": {"prediction_type": 1}}, r"scheduler\.prediction_type must be a text"),
        ({"scheduler": {"timesteps": [1, 2]}}, "timesteps"),
        ({"scheduler": {"timesteps": [1, 2, 3, 4, None]}}, "timesteps"),
    ],
)
def test_a_malformed_table_is_refused_with_the_field_and_value(tmp_path, content, change, words):
    with pytest.raises(TableError, match=words) as caught:
        load(tmp_path, content | change)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    GOOD.save(tmp_path / "table.json")
    text = (tmp_path / "table.json").read_text()
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    with pytest.raises(TableError, match=r"cut\.json can't be read .* cut short or damaged .*: make it again"):
        CacheTable.load(tmp_path / "cut.json")
    np.save(tmp_path / "whole.npy", np.array(AUTHORS))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-9])
    with pytest.raises(TableError, match=r"cut\.npy is cut short.*: save whole numbers") as caught:
        CacheTable.load(tmp_path / "cut.npy")
    assert "\n" not in str(caught.value)
    with pytest.raises(TableError, match=r"missing\.json"):
        CacheTable.load(tmp_path / "missing.json")


# The opening of the file that the EB-Cache authors ship: 0 compute, 1 attention, 2 both.
AUTHORS = [0, 2, 2, 0, 1, 2, 0, 0]


def test_the_authors_npy_loads_in_both_orders(tmp_path):
    np.save(tmp_path / "table.npy", np.array(AUTHORS))
    sampling = CacheTable.load(tmp_path / "table.npy", order="sampling")
    assert sampling.actions == (C, B, B, C, A, B, C, C)
    assert CacheTable.load(tmp_path / "table.npy").actions == sampling.actions[::-1]  # as their loop reads it


def test_the_authors_table_for_dit_xl_2_is_a_preset_in_both_orders(tmp_path):
    printed = "0 2 2 0 2 2 0 2 2 2 0 2 0 2 0 2 0 2 0 2 0 2 0 2 0 2 0 2" + 22 * " 0"
    sampling = EBCache.dit_xl_2("sampling").table
    assert [(C, A, B).index(state) for state in sampling.actions] == [int(state) for state in printed.split()]
    method = EBCache.dit_xl_2()
    assert method.table.actions == sampling.actions[::-1]
    assert (method.table.num_inference_steps, method.table.actions.count(C)) == (50, 34)
    assert (method.eps_scale, method.table.forecast_order) == (0.955, 0)
    assert EBCache.dit_xl_2(eps_scale=1 / 0.965).eps_scale == 1 / 0.965
    np.save(tmp_path / "table.npy", np.array([int(state) for state in printed.split()]))
    assert CacheTable.load(tmp_path / "table.npy").actions == method.table.actions
    with pytest.raises(TableError, match="unknown action 4 at entry 1"):
        CacheTable.from_numbers([0, 4])


def test_an_npy_that_is_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "object.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    for name in ("raw.npy", "object.npy"):
        with pytest.raises(TableError, match=r"never opened.*: save whole numbers"):
            CacheTable.load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "array", [np.array([0, 7]), np.array([0.0, 1.0]), np.zeros((2, 2), int), np.array([2, 0]), np.array([], int)]
)
def test_an_npy_with_other_content_is_refused(tmp_path, array):
    np.save(tmp_path / "table.npy", array)
    with pytest.raises(TableError):
        CacheTable.load(tmp_path / "table.npy", order="sampling")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_do_more_than_be_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("table.json", "table.npy"):
        (folder / name).write_bytes(data)
        with pytest.raises(TableError):
            CacheTable.load(folder / name)


def test_per_site_actions_become_the_plan_and_survive_the_file(tmp_path):
    sites = inspect(build_tiny(num_layers=1))
    compute = {site.id: Action.COMPUTE for site in sites}
    table = CacheTable((compute, compute | {sites[1].id: Action.REUSE}))
    table.save(tmp_path / "sites.json")
    plan = CacheTable.load(tmp_path / "sites.json").plan(sites)
    assert plan.actions[1] == (Action.COMPUTE, Action.REUSE)
    with pytest.raises(TableError, match="disagree"):
        CacheTable((compute, {"elsewhere": Action.COMPUTE})).plan(sites)


def test_resampling_keeps_the_stages_and_computes_the_first_step():
    half = GOOD.resample(10)
    assert half.actions == (C, C, B, B, A, A, M, M, C, C)
    assert half.eps_scale[-1] == 0.96
    assert "timesteps" not in half.scheduler
    assert GOOD.resample(1).actions == (C,)
    with pytest.raises(TableError):
        GOOD.resample(0)


def test_other_timesteps_are_refused_with_the_step():
    with pytest.raises(TableError, match="step 1"):
        GOOD.check_steps([800.0, 610.0, 400.0, 200.0, 0.0])
    GOOD.check_steps([800.0, 600.0, 400.0, 200.0, 0.0])


def test_a_stack_filled_table_keeps_one_tensor_and_costs_less(tiny, scheduler):
    actions = (C, C, B, B, A, C, B, C)
    results = {}
    for fill in ("branches", "stack"):
        with sostenuto.enable(tiny, EBCache(CacheTable(actions, fill=fill)), scheduler=scheduler) as handle:
            latents, _ = sample_loop(tiny, scheduler, len(actions))
            results[fill] = latents, handle.stats
    (_, branches), (latents, stack) = results["branches"], results["stack"]
    assert stack.macs < branches.macs
    assert stack.cache_bytes_peak < branches.cache_bytes_peak
    assert torch.isfinite(latents).all()
    assert [row[-1] for row in stack.plan] == [
        "compute",
        "compute",
        "reuse",
        "reuse",
        "compute",
        "compute",
        "reuse",
        "compute",
    ]
    assert stack.plan[2][:-1] == ["skip"] * 6


def test_a_stack_filled_step_is_exact_up_to_rounding_with_identical_inputs(tiny, scheduler):
    gaps = []

    def driver(tick, prober):
        *branches, _ = prober.handle.sites
        fresh = prober.run([Op.COMPUTE] * len(branches) + [Op.STORE]).sample
        filled = prober.run([Op.SKIP] * len(branches) + [Op.REUSE]).sample
        gaps.append((fresh - filled).abs().max() / fresh.abs().max())
        return (fresh,)

    with sostenuto.enable(tiny, EBCache(CacheTable((C, B, C), fill="stack")), scheduler=scheduler) as handle:
        handle.driver = driver
        scheduler.set_timesteps(3)
        for timestep in scheduler.timesteps:
            tiny(torch.randn(2, 2, 8, 8), timestep.expand(2), torch.tensor([1, 2]))
    assert len(gaps) == 3
    assert max(gaps) < 1e-5


def test_a_table_that_finds_no_room_leaves_the_one_before(tmp_path, monkeypatch):
    path, other = tmp_path / "table.json", CacheTable((StepState.COMPUTE,) * 3)
    CacheTable((StepState.COMPUTE, StepState.REUSE_BOTH)).save(path)
    before = path.read_bytes()

    def full(self, text, **_):
        self.write_bytes(text[:9].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(type(path), "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            other.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
