"""The page that shows how a method is written: its code runs as it stands and does what the page says."""

import re
from pathlib import Path

import pytest

import sostenuto
from sostenuto import EpsilonScaling, Forecast

PAGE = Path(__file__).parents[1] / "docs" / "write-a-method.md"


@pytest.fixture(scope="module")
def page():
    names = {"__name__": "page"}
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in code:
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_the_plan_has_two_speeds_between_its_ends(page):
    stats = page["handle"].stats
    front = [row[0] for row in stats.plan]
    rear = [row[-1] for row in stats.plan]
    assert front[:2] == ["compute"] * 2
    assert front[-5:] == ["compute"] * 5
    assert [step for step in range(2, 45) if front[step] == "compute"] == list(range(4, 45, 4))
    assert [step for step in range(2, 45) if rear[step] == "compute"] == list(range(2, 45, 2))


def test_it_is_faster_by_what_it_skips(page):
    computed = page["handle"].stats.actions["compute"] / (50 * len(page["handle"].sites))
    assert page["handle"].stats.ideal_speedup == pytest.approx(1 / computed, rel=0.1)


def test_it_is_proved_and_refuses_as_the_page_says(page):
    assert page["report"]
    two_speeds = page["TwoSpeeds"]
    with pytest.raises(sostenuto.MethodError, match="scales the noise"):
        two_speeds() | EpsilonScaling(1.01)
    assert (two_speeds() | Forecast(order=2)).skips
    with pytest.raises(sostenuto.MethodError, match="first must be 1"):
        two_speeds(first=0)
