"""ddpm/checks.py: what counts as a whole number, and what is told of what is not."""

import numpy as np
import pytest

from ddpm.checks import check_one_of, check_whole, is_whole


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, [1], float("nan"), np.float64(1)])
def test_only_integers_are_whole_numbers(value):
    assert not is_whole(value) and not is_whole(value, 0, 2)
    with pytest.raises(ValueError, match=r"must be an integer >= 0$"):
        check_whole("n", value, 0)


def test_both_ends_are_in_the_range():
    assert is_whole(-(10**30)) and [n for n in range(-5, 6) if is_whole(n, -2, 3)] == [-2, -1, 0, 1, 2, 3]
    assert is_whole(10**30, 3) and not is_whole(2, 3) and is_whole(-9, most=3) and not is_whole(4, most=3)


def test_what_is_told_names_the_setting_the_value_and_what_is_allowed():
    check_whole("steps", 1, 1, 1000)
    check_whole("steps", 1000, 1, 1000)
    with pytest.raises(ValueError, match=r"^steps = 0 must be an integer >= 1$"):
        check_whole("steps", 0, 1, 1000)
    with pytest.raises(ValueError, match=r"^steps = 1001 must be at most 1,000$"):
        check_whole("steps", 1001, 1, 1000)
    check_one_of("order", 2, (1, 2))
    with pytest.raises(ValueError, match=r"^kind = 'third' is not known; allowed: first, second$"):
        check_one_of("kind", "third", {"first": 0, "second": 1})
