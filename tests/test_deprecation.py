"""What will go still works, says what to use and when it goes, and is gone from the release that it names."""

from dataclasses import dataclass

import pytest

import sostenuto
from sostenuto import deprecation
from sostenuto.deprecation import as_numbers, deprecated, due, renamed_field


@pytest.fixture(autouse=True)
def _own_list(monkeypatch):
    monkeypatch.setattr(deprecation, "_KNOWN", {})


def test_a_deprecated_function_works_and_warns_at_the_caller_s_line():
    @deprecated("sostenuto.enable", "1.0.0", name="sostenuto.attach")
    def attach(a, *, b):
        """Adds."""
        return a + b

    expected = r"^sostenuto.attach is deprecated and will be removed in sostenuto 1.0.0: use sostenuto.enable$"
    with pytest.warns(DeprecationWarning, match=expected) as caught:
        assert attach(1, b=2) == 3
    assert caught[0].filename == __file__
    assert (attach.__name__, attach.__doc__) == ("attach", "Adds.")


def renamed():
    @renamed_field("n", "interval", "0.4.0")
    @dataclass(frozen=True)
    class Cycle:
        interval: int = 2

    return Cycle


def test_an_old_name_of_a_parameter_is_taken_and_shown_with_a_warning():
    cycle = renamed()
    with pytest.warns(DeprecationWarning, match=r"Cycle\(n=…\) is deprecated .* 0.4.0: use interval=…") as caught:
        made = cycle(n=3)
    assert made == cycle(interval=3)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="use interval=…"):
        assert made.n == 3


def test_the_new_name_warns_of_nothing(recwarn):
    assert renamed()(interval=5).interval == renamed()(5).interval == 5
    assert not recwarn.list


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="was given interval and its old name n"):
        renamed()(interval=2, n=3)


@pytest.mark.parametrize(
    ("version", "is_due"), [("0.3.9", False), ("0.4.0rc1", True), ("0.4.0", True), ("0.10.0", True), ("0.1.0", False)]
)
def test_a_release_may_not_carry_what_it_said_it_removes(version, is_due):
    renamed()
    assert bool(due(version)) is is_due


def test_versions_compare_as_numbers_and_others_are_refused():
    assert as_numbers("0.10.0") > as_numbers("0.9.12")
    for wrong in ("1.2", "next", "1.x.0"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no version"):
            as_numbers(wrong)


def test_nothing_due_is_left_in_this_version(monkeypatch):
    monkeypatch.undo()
    assert due(sostenuto.__version__) == []
