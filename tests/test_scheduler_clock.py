"""Every scheduler of diffusers: every call of its sampling loop is placed, in any precision and from any beginning."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sostenuto
from conftest import build_tiny
from scheduler_cases import STEPPED_BY_HAND, draw, listed, rows, scheduler_class, step
from sostenuto.clock import Clock

pytestmark = pytest.mark.filterwarnings("ignore")


def ids(value):
    return getattr(value, "id", value)


CASTS = {
    "as it is": (lambda t: t, None),
    "a number": (lambda t: t.item(), None),
    "bfloat16": (lambda t: t.bfloat16(), None),
    "float16": (lambda t: t.half(), None),
    "int64": (lambda t: t.long(), None),
    "t / 1000": (lambda t: t / 1000, None),
    "bfloat16 / 1000": (lambda t: t.bfloat16() / 1000, None),
    "(t / 1000) in float16": (lambda t: (t / 1000).half(), None),
    "1 - t / 1000": (lambda t: 1 - t / 1000, lambda t: 1 - t / 1000),
    "1 - t / 1000 in bfloat16": (lambda t: 1 - t.bfloat16() / 1000, lambda t: 1 - t / 1000),
}
SMALL = ("EDM", "Cosine", "MiniMax", "IPNDM")  # their timesteps lie around 0 to 1: given as they are


def clocked(scheduler, cast, first=0, passes=1, calls=None):
    """Run a sampler's loop with one pixel; the ticks of all its calls."""
    convert, given_as = CASTS[cast]
    clock = Clock(lambda: scheduler, given_as)
    x, ticks = draw(0, 1, 1, 2, 2).float(), []
    for t in scheduler.timesteps[first:][:calls]:
        z = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        ticks += [clock.tick(convert(t), z, [torch.tensor(which)]) for which in range(passes)]
        x = step(scheduler, torch.tanh(z), t, x).float()
    return ticks


def check(ticks, num_steps, first=0, passes=1):
    expected = [(p, q, p == first and q == 0) for p in range(first, num_steps) for q in range(passes)]
    assert [(tick.step, tick.pass_index, tick.new_generation) for tick in ticks] == expected


def plain(row):
    """The kind that this scheduler has for certain."""
    return next((kind for kind, word in row.cells.items() if word == "yes"), "flow")


STEPPED = [row for row in rows() if row.name not in STEPPED_BY_HAND]


FEWEST = {"PNDMScheduler": 4, "KDPM2AncestralDiscreteScheduler": 3}  # below, they have no schedule


@pytest.mark.parametrize("row", STEPPED, ids=ids)
def test_every_call_of_a_loop_is_placed(row):
    scheduler = row.build(plain(row))
    small = row.name.startswith(SMALL) or "timestep_type" in row.options
    for num_steps in (2, 7, 40):
        for cast in ("as it is", "a number", "bfloat16", "float16") if small or num_steps == 40 else CASTS:
            row.restart(scheduler, max(num_steps, FEWEST.get(row.name, 0)))
            check(clocked(scheduler, cast, passes=2), len(scheduler.timesteps), passes=2)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_single_step_is_a_generation_every_time(name):
    row = next(row for row in rows() if row.name == name)
    for cast in CASTS:
        check(clocked(row.build(plain(row), 1), cast, passes=2), 1, passes=2)


@pytest.mark.parametrize(
    ("name", "cast"),
    [
        ("DDIMScheduler", "bfloat16"),
        ("HeunDiscreteScheduler", "float16"),
        ("EDMEulerScheduler", "bfloat16"),
        ("FlowMatchEulerDiscreteScheduler", "bfloat16 / 1000"),
        ("FlowMatchEulerDiscreteScheduler", "t / 1000"),
        ("FlowMatchEulerDiscreteScheduler", "int64"),
        ("SASolverScheduler", "1 - t / 1000 in bfloat16"),
    ],
)
def test_a_thousand_steps_are_told_apart_though_their_rounded_timesteps_are_not(name, cast):
    row = next(row for row in rows() if row.name == name)
    if name.startswith("FlowMatch"):
        row.options["shift"] = 12.0
    scheduler = row.build(plain(row), 1000)
    check(clocked(scheduler, cast), len(scheduler.timesteps))


def test_the_last_timestep_of_a_flow_is_not_taken_for_its_first_over_1000():
    """t = 1000 is given as 1.0, which is also the last timestep on the list."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    assert listed(scheduler)[-1] == pytest.approx(1.0)
    check(clocked(scheduler, "t / 1000"), 5)
    scheduler.set_timesteps(5)
    check(clocked(scheduler, "as it is"), 5)


@pytest.mark.parametrize(
    "row",
    [
        row
        for row in STEPPED
        if hasattr(getattr(diffusers, row.name, None) and scheduler_class(row.name), "set_begin_index")
    ],
    ids=ids,
)
def test_a_schedule_that_begins_in_the_middle(row):
    scheduler = row.build(plain(row), 8)
    first = 4  # of second-order schedulers a place where a pair begins
    for cast in ("as it is", "bfloat16"):
        row.restart(scheduler, 8).set_begin_index(first)
        check(clocked(scheduler, cast, first), len(scheduler.timesteps), first)


def test_timesteps_and_sigmas_of_the_user_and_dynamic_shifting():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for mu in (0.5, 1.15, 3.0):
        flow.set_timesteps(sigmas=[1.0, 0.9, 0.9, 0.4, 0.39, 0.01], mu=mu)
        check(clocked(flow, "bfloat16 / 1000"), 6)
    lcm = diffusers.LCMScheduler()
    lcm.set_timesteps(timesteps=[999, 759, 499, 259])
    check(clocked(lcm, "bfloat16"), 4)
    euler = diffusers.EulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[14.6, 6.0, 5.999, 1.0, 0.0])
    check(clocked(euler, "float16"), 4)
    heun = diffusers.HeunDiscreteScheduler()
    heun.set_timesteps(timesteps=[901, 900, 300, 0])
    check(clocked(heun, "bfloat16"), 7)


def test_repaint_goes_back_and_forth_within_one_generation():
    scheduler = diffusers.RePaintScheduler()
    scheduler.set_timesteps(20, jump_length=3, jump_n_sample=3)
    assert (scheduler.timesteps.diff() > 0).any()
    for convert in (lambda t: t, lambda t: t.bfloat16()):
        clock = Clock(lambda: scheduler)
        ticks = [clock.tick(convert(t), draw(p, 1, 1, 2, 2)) for p, t in enumerate(scheduler.timesteps)]
        check(ticks, len(scheduler.timesteps))


@given(
    sigmas=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30, unique_by=lambda s: round(s, 5)),
    cast=st.sampled_from([cast for cast in CASTS if cast != "int64"]),
    first=st.integers(0, 29),
    passes=st.integers(1, 3),
    stop=st.integers(1, 30),
    rising=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_flow_schedule_in_any_precision_interrupted_and_begun_anew(sigmas, cast, first, passes, stop, rising):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=rising)
    first = min(first, len(sigmas) - 1)
    for calls in (stop, None):
        scheduler.set_timesteps(sigmas=sorted(sigmas, reverse=True))
        scheduler.set_begin_index(first)
        ticks = clocked(scheduler, cast, first, passes, calls)
        end = len(sigmas) if calls is None else min(first + calls, len(sigmas))
        check(ticks, end, first, passes)
        assert all(tick.num_steps == len(sigmas) for tick in ticks)


@pytest.mark.parametrize("row", STEPPED, ids=ids)
@torch.no_grad()
def test_the_tiny_network_runs_its_plan_under_every_scheduler(row):
    scheduler, model = row.build(plain(row)), build_tiny(num_layers=1)
    x, labels = draw(1, 1, 2, 8, 8).float(), torch.tensor([1])
    with sostenuto.enable(model, sostenuto.FORA(2, anchor="start"), scheduler=scheduler) as handle:
        for t in scheduler.timesteps:
            z = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = step(scheduler, 0.1 * model(z, t[None], labels).sample, t, x).float()
        plan = handle.stats.plan
    assert [row[0] for row in plan] == [("compute", "reuse")[p % 2] for p in range(len(scheduler.timesteps))]
