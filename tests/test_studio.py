"""The studio: what its server promises, and the page in a real browser."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

import sostenuto
from browser import open_page
from sostenuto import FORA, CacheTable, EBCache, StepState
from sostenuto.cli import main
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline
from sostenuto.engine import handle_of
from sostenuto.studio.catalogue import choose, predicted_speedup
from sostenuto.studio.session import EDITED, Session, Wish

pytest.importorskip("starlette", reason="the studio extra is not installed")

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "demo-10k.json"


@pytest.fixture(scope="module")
def pipe():
    return load_demo_pipeline()


@pytest.fixture
def session(pipe, tmp_path):
    return Session(pipe, tmp_path / "tables", RESULTS)


def wish(*sides, steps=6, **changed):
    content = {"subject": "3", "seed": 1, "num_inference_steps": steps, "guidance_scale": 1.0, "sides": list(sides)}
    return Wish.of(content | changed)


def timesteps(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    return tuple(map(float, pipe.scheduler.timesteps))


def test_both_sides_start_from_the_same_noise_and_tell_every_step(session, pipe):
    events = list(session.generate(wish({"method": "none"}, {"method": "fora", "speedup": 2})))
    images = [event for event in events if event["event"] == "image"]
    assert events[-1] == {"event": "done"}
    assert [sum(e["event"] == "step" and e["side"] == side for e in events) for side in (0, 1)] == [6, 6]
    again = [e for e in session.generate(wish({"method": "none"}, {"method": "none"})) if e["event"] == "image"]
    assert again[0]["image"] == again[1]["image"] == images[0]["image"] != images[1]["image"]
    assert images[1]["macs"] < images[1]["macs_uncached"] == images[0]["macs"]
    assert handle_of(pipe.transformer) is None


class Silent(DemoPipeline):
    """A pipeline that doesn't tell of its steps, as that of DiT."""

    def __call__(self, class_labels, num_inference_steps=50, generator=None, guidance_scale=1.0):
        return super().__call__(class_labels, num_inference_steps, guidance_scale=guidance_scale, generator=generator)


def test_a_pipeline_that_does_not_tell_of_its_steps_runs_and_stops_all_the_same(pipe, tmp_path):
    silent = Silent(pipe.transformer, pipe.scheduler)
    session = Session(silent, tmp_path)
    events = list(session.generate(wish({"method": "none"}, {"method": "fora", "speedup": 2})))
    assert events[-1] == {"event": "done"}
    steps = [(event["side"], event["step"], event["total"]) for event in events if event["event"] == "step"]
    assert steps == [(side, step, 6) for side in (0, 1) for step in range(6)]
    assert "step" not in vars(silent.scheduler)
    running = session.generate(wish({"method": "none"}, steps=40))
    next(running)
    running.close()
    assert not session._busy.acquire(timeout=30) or session._busy.release() is None


def test_a_saved_plan_has_the_timesteps_that_ran_also_of_shifted_schedules(pipe, tmp_path):
    class Shifted(FlowMatchEulerDiscreteScheduler):
        init_noise_sigma = 1.0

        def scale_model_input(self, sample, _):
            return sample

    other = DemoPipeline(pipe.transformer, Shifted(use_dynamic_shifting=True))
    asked = other.scheduler.set_timesteps

    def own(steps, device=None, **given):  # as FLUX's pipeline sets them
        asked(sigmas=[1 - i / steps for i in range(steps)], mu=given.get("mu", 0.7), device=device)

    other.scheduler.set_timesteps = own
    session = Session(other, tmp_path)
    plan = {"states": ["compute", "reuse-both", "compute", "reuse-both", "compute", "compute"]}
    session.save("before.json", plan)  # nothing ran: something near will do
    events = list(session.generate(wish({"method": "fora", "speedup": 2}, {"method": EDITED, "plan": plan})))
    assert events[-1] == {"event": "done"}
    session.save("after.json", plan)
    with sostenuto.enable(other, EBCache(tmp_path / "after.json")):
        other([3], 6, generator=torch.Generator().manual_seed(0))


def test_the_steps_that_are_told_are_those_that_ran(session, pipe):
    events = list(session.generate(wish({"method": "fora", "speedup": 2})))
    rows = [event["row"] for event in events if event["event"] == "step"]
    with sostenuto.enable(pipe, FORA(3)) as handle:  # of six steps it computes three
        pipe([3], 6, generator=torch.Generator().manual_seed(1))
        expected = [{"attention": row[0], "mlp": row[1]} for row in handle.stats.plan]
    assert rows == expected


def test_an_edited_plan_runs_as_it_is_drawn_is_saved_and_loaded(session):
    plan = {"states": ["compute", "reuse-attn", "reuse-both", "compute", "reuse-mlp", "compute"], "eps_scale": 0.99}
    events = list(session.generate(wish({"method": EDITED, "plan": plan})))
    assert next(e for e in events if e["event"] == "image")["states"] == plan["states"]
    assert session.save("mine", plan) == "mine.json"
    assert session.saved() == ["mine"]
    table = CacheTable.load(session.tables / "mine.json")
    assert [state.value for state in table.actions] == plan["states"]
    assert session.load("mine")["states"] == plan["states"]
    with sostenuto.enable(session.pipe, EBCache(table)):  # made for this model and sampler
        session.pipe([3], 6, generator=torch.Generator().manual_seed(1))


def test_a_solver_of_second_order_is_loaded_with_its_steps_and_runs(pipe, tmp_path):
    heun = Session(DemoPipeline(pipe.transformer, HeunDiscreteScheduler.from_config(pipe.scheduler.config)), tmp_path)
    event = next(e for e in heun.generate(wish({"method": "fora", "speedup": 2}, steps=4)) if e["event"] == "image")
    assert len(event["states"]) == 7  # calls of the network
    heun.save("heun", event)
    loaded = heun.load("heun")
    assert loaded["num_inference_steps"] == 4
    fresh = Session(heun.pipe, tmp_path)
    assert fresh.load("heun") == loaded
    again = [
        e for e in fresh.generate(wish({"method": EDITED, "plan": loaded}, steps=loaded["num_inference_steps"]))
        if e["event"] == "image"
    ]  # fmt: skip
    assert again[0]["states"] == event["states"]


@pytest.mark.parametrize("fill", ["branches", "stack"])
def test_a_plan_that_is_taken_keeps_what_it_kept(session, fill):
    plan = {"states": ["compute", "compute", "reuse-both"], "fill": fill}
    events = session.generate(wish({"method": EDITED, "plan": plan}, steps=3))
    assert session.table_of(next(e for e in events if e["event"] == "image")).fill == fill


def test_what_a_plan_keeps_is_part_of_it(session):
    event = next(e for e in session.generate(wish({"method": "ab-sample", "speedup": 2})) if e["event"] == "image")
    table = session.table_of(event)
    assert table.fill == "sample"
    assert table.forecast_order == 1
    session.save("taken", event)
    assert session.load("taken")["fill"] == "sample"
    again = [e for e in session.generate(wish({"method": EDITED, "plan": session.load("taken")})) if "image" in e]
    assert again[0]["macs"] == event["macs"]
    assert again[0]["image"] == event["image"]


@pytest.mark.parametrize(
    "table",
    [
        CacheTable((StepState.COMPUTE, StepState.REUSE_ATTENTION), include_cross=False),
        CacheTable((StepState.COMPUTE, {"transformer_blocks.0.attn1": sostenuto.Action.REUSE})),
    ],
)
def test_a_table_that_states_can_not_draw_is_refused(session, table):
    session.tables.mkdir(exist_ok=True)
    table.save(session.tables / "odd.json")
    with pytest.raises(sostenuto.InputError, match="odd has actions of single sites, or of cross-attention apart"):
        session.load("odd")


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "x" * 65, "a\\b"])
def test_no_table_is_written_outside_of_its_folder(session, name):
    with pytest.raises(sostenuto.InputError, match="no name for a table"):
        session.save(name, {"states": ["compute", "compute"]})


@pytest.mark.parametrize(
    ("sides", "changed", "message"),
    [
        ([{"method": "none"}], {"num_inference_steps": 1}, "number of steps"),
        ([], {}, "one or two sides"),
        ([{"method": "none"}], {"seed": "x"}, "can't be read"),
    ],
)
def test_a_wish_without_meaning_is_refused(sides, changed, message):
    with pytest.raises(sostenuto.InputError, match=message):
        wish(*sides, **changed)


@pytest.mark.parametrize(
    ("side", "changed", "message"),
    [
        ({"method": "nothing"}, {}, "no method of the studio"),
        ({"method": "fora", "speedup": 0.5}, {}, "budget"),
        ({"method": EDITED, "plan": {"states": ["compute"] * 3}}, {}, "3 steps, the generation 6"),
        ({"method": EDITED, "plan": {"states": ["reuse-both"] * 6}}, {}, "step 0 must be 'compute'"),
        ({"method": EDITED}, {}, "no plan yet"),
        ({"method": "none"}, {"subject": "trouser"}, "no class label"),
        ({"method": "none"}, {"subject": "99"}, "99"),
    ],
)
def test_a_side_that_cannot_run_says_why_and_leaves_the_model_free(session, side, changed, message):
    (event,) = [e for e in session.generate(wish(side, **changed)) if e["event"] == "error"]
    assert message in event["message"]
    assert [e["event"] for e in session.generate(wish({"method": "none"}, steps=2))][-1] == "done"


def test_a_page_that_goes_away_stops_the_generation(session, pipe):
    events = session.generate(wish({"method": "none"}, steps=1000))
    assert next(events)["event"] == "step"
    events.close()
    deadline = time.monotonic() + 20
    while not session._busy.acquire(blocking=False):
        assert time.monotonic() < deadline, "the generation goes on"
        time.sleep(0.05)
    session._busy.release()
    assert handle_of(pipe.transformer) is None


def test_a_second_generation_at_the_same_time_is_refused(session):
    first = session.generate(wish({"method": "none"}, steps=50))
    next(first)
    assert "under way" in next(session.generate(wish({"method": "none"})))["message"]
    first.close()


@pytest.mark.parametrize("name", ["fora", "fora-linear", "taylorseer", "ab", "ab-sample", "eb"])
@pytest.mark.parametrize("speedup", [1.5, 2.5])
def test_the_settings_nearest_to_the_budget_are_chosen(pipe, name, speedup):
    steps = timesteps(pipe, 50)
    method = choose(name, speedup, pipe.transformer, pipe.scheduler, steps)
    predicted = predicted_speedup(method, pipe.transformer, pipe.scheduler, steps)
    assert predicted == pytest.approx(speedup, rel=0.35)


@pytest.mark.parametrize("fill", ["branches", "stack", "sample"])
def test_what_is_kept_for_a_whole_step_is_not_counted_as_one_more_branch(pipe, fill):
    states = (StepState.COMPUTE, StepState.COMPUTE, StepState.REUSE_ATTENTION, StepState.REUSE_BOTH)
    method = EBCache(CacheTable(states, fill=fill))
    assert predicted_speedup(method, pipe.transformer, pipe.scheduler, timesteps(pipe, 4)) == 4 / 2.5


def test_points_of_the_frontier_bring_their_plans(session):
    points = {point["name"]: point for point in session.frontier()}
    states = points["EB-Cache 2.5×"]["states"]
    shipped = json.loads(Path(sostenuto.__file__).with_name("tables").joinpath("demo-ddpm50-2.5x.json").read_text())
    assert states == shipped["actions"]
    assert {StepState(state) for state in points["uncached"]["states"]} == {StepState.COMPUTE}


# --- over the network ----------------------------------------------------------------------------------------------


@pytest.fixture
def client(session):
    from starlette.testclient import TestClient

    from sostenuto.studio.server import app

    return TestClient(app(session), base_url="http://127.0.0.1")


def test_other_hosts_origins_and_sizes_are_refused(client):
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "[::1]:7870"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    plan = {"states": ["compute", "compute"]}
    assert (
        client.post("/api/tables/a", content=json.dumps(plan), headers={"content-type": "text/plain"}).status_code
        == 400
    )
    assert client.post("/api/tables/a", json=plan | {"more": "x" * 2**20}).status_code == 400
    assert client.post("/api/tables/a", content="[", headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/api/tables/..%2Fa", json=plan).status_code in (400, 404)
    assert client.get("/api/tables").json() == []
    assert client.post("/api/tables/a", json=plan).json() == {"saved": "a.json"}
    assert client.get("/api/tables/none").status_code == 400


def test_only_this_machine_may_reach_it_unless_asked(capsys):
    assert main(["studio", "--host", "0.0.0.0"]) == 1
    assert "--allow-remote" in capsys.readouterr().err


def test_a_results_file_that_cannot_be_read_is_told_at_once(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    assert main(["studio", "--results", str(tmp_path / "bad.json")]) == 1
    assert "no results file" in capsys.readouterr().err


@pytest.fixture
def address(session):
    import uvicorn

    from sostenuto.studio.server import app

    server = uvicorn.Server(uvicorn.Config(app(session), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


def test_generate_slide_edit_save_and_reload_in_a_browser(address, session):
    with open_page(address) as (page, faults):
        page.get_by_text("ready").wait_for()
        page.fill("#steps", "8")
        page.select_option("#method1", "fora")
        page.click("#go")
        page.get_by_role("status").filter(has_text="done").wait_for(timeout=60_000)
        method = choose("fora", 2.5, session.pipe.transformer, session.pipe.scheduler, timesteps(session.pipe, 8))
        reused = sum(step > 0 and (7 - step) % method.interval != 0 for step in range(8))  # counted from the clean end
        assert page.locator("#strip1 [data-group=attention] .reuse").count() == reused
        assert page.locator("#strip0 .reuse").count() == 0
        assert "PSNR" in page.inner_text("#difference-text")
        page.focus("#wipe")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.getElementById('left').style.clipPath") == "inset(0px 49% 0px 0px)"
        # The plan, by mouse and by keyboard.
        assert page.locator("#plan button").count() == 16
        drawn = page.evaluate("[...plan.states]")
        cell = page.locator('#plan [data-row="1"][data-step="2"]')
        was = cell.get_attribute("aria-pressed")
        cell.click()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Space")
        edited = page.evaluate("[...plan.states]")
        assert page.locator('#plan [data-row="1"][data-step="2"]').get_attribute("aria-pressed") != was
        assert [i for i in range(8) if drawn[i] != edited[i]] == [2, 3]
        page.fill("#name", "from-browser")
        page.click("#save")
        page.get_by_role("status").filter(has_text="saved from-browser.json").wait_for()
        assert [s.value for s in CacheTable.load(session.tables / "from-browser.json").actions] == edited
        page.click("#go")
        page.get_by_role("status").filter(has_text="done").wait_for(timeout=60_000)
        assert page.evaluate("ran[1].states") == edited
        # A new visit: the table is there, and so is the frontier.
        page.reload()
        page.get_by_text("ready").wait_for()
        assert page.locator("#plan button").count() == 0
        page.select_option("#saved", "from-browser")
        page.click("#load")
        page.get_by_role("status").filter(has_text="loaded from-browser").wait_for()
        assert page.evaluate("[...plan.states]") == edited
        page.get_by_role("button", name="EB-Cache 1.5×").focus()
        page.keyboard.press("Enter")
        assert page.input_value("#steps") == "50"
        assert page.input_value("#method1") == EDITED
        assert faults == []
