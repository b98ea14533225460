"""What a tuning hands back: which plan serves which speed-up, what is saved, and how it is drawn."""

import json
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from sostenuto.plan import Action
from sostenuto.report.frontier import frontier_figure, plans_figure
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.tuning.result import Point, Tuned, answers, pareto

C, B = StepState.COMPUTE, StepState.REUSE_BOTH


def point(target, speedup, error, score=None, actions=(C, B, C, B)):
    table = CacheTable(actions, forecast_order=1, calibration={"target": target})
    return Point(target, speedup, speedup + 1, speedup + 2, error, score, table)


def tuned(*points, budget="macs"):
    frontier = pareto(points)
    found = answers(points, frontier)
    return Tuned(next(iter(found.values())), frontier, found, budget, 5.0, 9.0, (), 1.0, points[0].target)


def tuned_by_hand():
    """A tuning of three targets; the first one's plan lists its sites, the middle one's is beaten by a faster one."""
    by_site = ({"attn": Action.COMPUTE, "ff": Action.COMPUTE}, {"attn": Action.COMPUTE, "ff": Action.FORECAST}, C, B)
    return tuned(point(1.3, 1.31, 0.1, 3.0, by_site), point(1.5, 1.5, 0.5, 5.0), point(2.0, 2.1, 0.4, 4.0))


def test_a_target_whose_plan_is_beaten_is_served_by_a_plan_as_fast_and_no_worse():
    slow, beaten, fast = (point(1.3, 1.31, 0.1, 3.0), point(1.5, 1.5, 0.5, 5.0), point(2.0, 2.1, 0.4, 4.0))
    # Between them in speed, nearer than the beaten one and yet of a worse score: no answer for it.
    worse = point(1.75, 1.8, 0.3, 6.0)
    points = (fast, slow, worse, beaten)
    assert pareto(points) == (slow, worse, fast)
    assert answers(points, pareto(points)) == {1.3: slow, 1.5: fast, 1.75: worse, 2.0: fast}


def test_a_slower_plan_that_happens_to_be_as_fast_as_asked_serves_where_it_is_nearer():
    lucky, own = point(1.75, 2.01, 0.2), point(2.0, 2.05, 0.3)
    late = point(3.0, 2.99999, 0.9)  # a limit, but for rounding
    points = (lucky, own, late)
    assert answers(points, pareto(points)) == {1.75: lucky, 2.0: lucky, 3.0: late}


def test_every_target_has_its_table(tmp_path):
    found = tuned_by_hand()
    paths = found.save(tmp_path)
    names = ["frontier.json", "tuned-1.3x.json", "tuned-1.5x.json", "tuned-2x.json"]
    assert [path.name for path in paths] == names == sorted(path.name for path in tmp_path.iterdir())
    assert CacheTable.load(tmp_path / "tuned-1.5x.json") == found.answers[2.0].table
    assert [row["answers"] for row in found.as_dict()["frontier"]] == [[1.3], [1.5, 2.0]]
    assert "1.5× 2×" in str(found)


def test_what_was_asked_for_stays_until_it_is_asked_for_again(tmp_path):
    """For other targets less is tried: what a later call finds beside its own answer may be worse."""

    def save(asked, name):
        points = [
            replace(point(t, t, 1 / t), table=replace(point(t, t, 1).table, method=name)) for t in (1.5, 2.0, 4.0)
        ]
        own = next(one for one in points if one.target == asked)
        replace(tuned(*points), point=own, asked=asked).save(tmp_path)
        return [CacheTable.load(tmp_path / f"tuned-{target}x.json").method for target in ("1.5", "2", "4")]

    assert save(2.0, "first") == ["first", "first", "first"]
    assert save(4.0, "second") == ["second", "first", "second"]
    assert json.loads((tmp_path / "frontier.json").read_text())["tables_of_before"] == [2.0]
    assert save(1.5, "third") == ["third", "first", "second"]
    assert save(2.0, "fourth") == ["third", "fourth", "second"]
    (tmp_path / "tuned-2x.json").unlink()
    assert save(4.0, "fifth") == ["third", "fifth", "fifth"]
    (tmp_path / "frontier.json").write_text("{")
    assert save(4.0, "sixth") == ["sixth", "sixth", "sixth"]


def test_what_is_out_of_reach_has_the_table_of_the_limit(tmp_path):
    found = replace(tuned(point(2.0, 2.0, 0.1), point(3.25, 3.25, 0.2)), asked=9.0)
    assert found.target == 3.25
    assert (found.as_dict()["asked"], found.as_dict()["target"]) == (9.0, 3.25)
    found.save(tmp_path)
    assert (tmp_path / "tuned-3.25x.json").exists()


@pytest.mark.parametrize(("budget", "axis"), [("macs", "multiply-accumulates"), ("time", "measured time")])
def test_the_frontier_is_drawn_against_the_speed_that_was_asked_for(budget, axis):
    found = tuned(point(1.5, 1.6, 0.1, 2.0), point(2.0, 2.1, 0.4, 4.0), budget=budget)
    for axes in frontier_figure(found).axes:
        assert axes.get_xlabel() == f"speed-up by {axis}"
        assert list(axes.lines[0].get_xdata()) == [1.6, 2.1]
    labels = [label.get_text() for label in plans_figure(found).axes[0].get_yticklabels()]
    assert labels == ["1.60×", "2.10×"]


def test_steps_that_list_their_branches_are_drawn_by_the_share_that_they_reuse(tmp_path):
    found = tuned_by_hand()
    axes = plans_figure(found).axes[0]
    parts = {part.get_xy(): part for part in axes.patches if isinstance(part, Rectangle)}
    assert {place: part.get_height() for place, part in parts.items()} == {(0, 1.0): 0.0, (1, 0.5): 0.5}
    assert to_hex(parts[1, 0.5].get_facecolor()) == "#f1f3f8"  # as a step that reuses everything
    assert [text.get_position() for text in axes.texts] == [(1.5, 0.5), (3.5, 0.5), (1.5, 1.5), (3.5, 1.5)]
    assert "that share of the branches" in axes.get_xlabel()
    assert "share of the branches" not in plans_figure(tuned(point(2.0, 2.0, 0.1))).axes[0].get_xlabel()
    paths = found.draw(tmp_path / "new")
    assert {path.name for path in paths} == {"frontier.png", "frontier.pdf", "plans.png", "plans.pdf"}
    assert all(path.stat().st_size > 1000 for path in paths)
