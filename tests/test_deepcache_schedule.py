"""DeepCache's parameters and full steps, against values computed by hand and by another formula."""

import cmath

import pytest

from sostenuto import DeepCache, MethodError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(interval=0), "interval"),
        (dict(interval=2.0), "interval"),
        (dict(branch_id=-1), "branch_id"),
        (dict(center=True), "center"),
        (dict(schedule="quadratic"), "schedule must be one of uniform, non-uniform"),
        (dict(power=1), "power"),
        (dict(power=float("nan")), "power"),
        (dict(power="2"), "power"),
    ],
)
def test_parameters_out_of_range_are_refused(settings, words):
    with pytest.raises(MethodError, match=words):
        DeepCache(**settings)


def test_uniform_full_steps():
    assert DeepCache(5).full_steps(12) == [0, 5, 10]
    assert DeepCache(5).full_steps(4) == [0]
    assert DeepCache(1, schedule="non-uniform").full_steps(4) == [0, 1, 2, 3]


def test_non_uniform_full_steps_by_hand():
    # S = 25, c = 9, p = 2, n = 7: the square roots run from −3 to 4 in steps of 1, squared with sign −9 −4 −1 0 1 4 9 16;
    # the interior shifted by 9, the first one replaced by 0.
    assert DeepCache(4, schedule="non-uniform", center=9, power=2).full_steps(25) == [0, 5, 8, 9, 10, 13, 18]
    # c = 0: from 0 to 4 in steps of 1 for S = 16, n = 4.
    assert DeepCache(4, schedule="non-uniform", center=0, power=2).full_steps(16) == [0, 1, 4, 9]
    assert DeepCache(4, schedule="non-uniform", center=0, power=2, parity=True).full_steps(16) == [0, 1, 4, 9]


def by_formula(num_steps, wanted, center, power, complex_grid):
    """The same by scalar arithmetic of its own, in polar form on the complex plane."""
    while power > 1:
        low = center ** (1 / power) * (cmath.exp(1j * cmath.pi / power) if complex_grid else -1)
        high, values = (num_steps - center) ** (1 / power), set()
        for j in range(wanted + 1):
            z = low + (high - low) * j / wanted
            if complex_grid:
                value = cmath.rect(abs(z) ** power, power * cmath.phase(z)).real
            else:
                value = abs(z) ** power * (1 if z > 0 else -1)
            values.add(int(value + (1e-9 if value > 0 else -1e-9)))  # exact whole numbers stay whole
        inner = sorted(values)[1:-1]
        if len(inner) + 1 == wanted:
            return [0, *(center + v for v in inner)], power
        power -= 0.02
    return None, power


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize(
    ("steps", "interval", "center", "power"),
    [(50, 5, 15, 1.4), (50, 10, 15, 1.2), (50, 3, 15, 1.4), (100, 5, 20, 1.4), (20, 4, 5, 1.2), (10, 2, 3, 1.2)],
)
def test_non_uniform_full_steps_by_another_formula(steps, interval, center, power, parity):
    expected, found = by_formula(steps, -(-steps // interval), center, power, parity)
    method = DeepCache(interval, schedule="non-uniform", center=center, power=power, parity=parity)
    assert method.full_steps(steps) == expected
    if (steps, center, parity) == (10, 3, False):
        assert found == pytest.approx(1.08)  # lowered six times until five steps differ


def test_a_non_uniform_schedule_that_does_not_exist_is_refused():
    with pytest.raises(MethodError, match="not among the 8 steps"):
        DeepCache(2, schedule="non-uniform", center=8).full_steps(8)
    # S = 6, c = 3, n = 3: the middle points are ±3/3^p, which lose their whole part for every p above 1.
    with pytest.raises(MethodError, match=r"no power of 1\.2 or less puts 3 different"):
        DeepCache(2, schedule="non-uniform", center=3).full_steps(6)


def test_published_settings():
    assert DeepCache.sd15() == DeepCache(5, 1)
    assert DeepCache.sdxl() == DeepCache(3, 1)
    assert DeepCache.ldm() == DeepCache(5, 0)
    assert DeepCache.cifar10() == DeepCache(5, 3)
