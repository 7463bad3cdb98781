"""ddpm/study/statistics.py: intervals, what is marked as a difference and how often wrongly, fronts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddpm.metrics.intervals import half_width
from ddpm.study.statistics import (
    BETTER,
    ENOUGH,
    LEVEL,
    NO_DIFFERENCE,
    NOT_DECIDED,
    WORSE,
    compare,
    estimate,
    front,
    holm,
    p_of_no_difference,
    student,
)

SEEDS = range(5)


def compared(arms, baseline, *options, **named):
    """All arms against one baseline."""
    return compare(arms, dict.fromkeys(arms, baseline), *options, **named)


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


# ----------------------------------------------------------------------------------------------------------- intervals


def test_an_interval_by_hand():
    """Of 1..5: s = sqrt(10 / 4), t(4, 0.975) = 2.7764."""
    mean, low, high = student([1, 2, 3, 4, 5])
    assert (mean, low, high) == pytest.approx((3, 3 - 1.96325, 3 + 1.96325), abs=1e-4)
    assert student([5, 3, 1, 4, 2]) == pytest.approx((mean, low, high), rel=1e-14)


@pytest.mark.equation("Normal (interval)")
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_so_many_errors_of_a_normal_distribution_lie_within_the_half_width(level):
    """By the error function: P(|x| < h) = erf(h / (sqrt(2) sigma))."""
    assert math.erf(half_width(0.3, level) / (math.sqrt(2) * 0.3)) == pytest.approx(level, rel=1e-12)
    assert half_width(2.0) == pytest.approx(2 * 1.959963984540054, rel=1e-14)


@pytest.mark.equation("Student (interval)")
@pytest.mark.parametrize("n", [2, 3, 5, 20])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_intervals_are_students(n, level):
    """By the distribution function: of its inverse scipy has nine digits in some versions."""
    x = np.random.default_rng(n).normal(3, 2, n)
    mean, low, high = student(list(x), level)
    assert mean == pytest.approx(x.mean(), rel=1e-12) and high - mean == pytest.approx(mean - low, rel=1e-12)
    t = (high - mean) / (x.std(ddof=1) / math.sqrt(n))
    assert stats.t.cdf(t, n - 1) == pytest.approx((1 + level) / 2, rel=1e-12)


def test_two_values_by_their_closed_form():
    """t of one degree of freedom is Cauchy: its quantile is a tangent."""
    mean, low, high = student([0.0, 2.0], 0.9)
    half = math.tan(math.pi * (0.95 - 0.5))
    assert (mean, low, high) == pytest.approx((1, 1 - half, 1 + half), rel=1e-12)


def test_a_single_value_has_no_interval():
    assert student([3.5]) == (3.5, None, None)
    found = estimate({7: 3.5})
    assert (found.mean, found.low, found.high, found.points) == (3.5, None, None, {7: 3.5})


def test_equal_values_have_an_interval_of_no_width():
    assert student([0.1] * 5) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_interval(odd):
    mean, low, high = student([1.0, odd, 2.0, -odd])
    assert math.isnan(mean) and low is high is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    x = np.random.default_rng(0).normal(2, 3, (4000, 5))
    found = [student(row) for row in x.tolist()]
    assert np.mean([low <= 2 <= high for _, low, high in found]) == pytest.approx(LEVEL, abs=0.01)


@pytest.mark.equation("Holm (step-down)")
def test_holm_by_hand():
    """4 * 0.01, 3 * 0.013, 2 * 0.03, 1 * 0.05: the second is raised to the first, the fourth to the third."""
    assert holm([0.03, 0.01, 0.05, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.4, 0.6, 0.01]) == pytest.approx([0.8, 0.8, 0.03])
    assert holm([0.02]) == [0.02] and holm([]) == []


P = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.025, 0.05, 1.0]), min_size=1, max_size=8)


@given(P, st.randoms(use_true_random=False))
def test_holm_keeps_the_order(p, random):
    corrected = holm(p)
    order = random.sample(range(len(p)), len(p))
    assert holm([p[i] for i in order]) == [corrected[i] for i in order]
    pairs = sorted(zip(p, corrected, strict=True))
    assert [c for _, c in pairs] == sorted(corrected)
    assert all(raw <= c <= min(1, len(p) * raw) for raw, c in pairs if raw == min(p))
    assert all(raw <= c <= 1 for raw, c in pairs)


# ---------------------------------------------------------------------------------------------------------- one p-value


def test_p_values_are_those_of_the_paired_t_test():
    random = np.random.default_rng(0)
    for n in (2, 5, 12):
        a, b = random.normal(0, 1, n), random.normal(0.5, 1, n)
        p = p_of_no_difference(list(a - b))
        assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-12)
        assert p == pytest.approx(stats.ttest_1samp(a - b, 0).pvalue, rel=1e-12)
        assert p_of_no_difference(list(b - a)) == p


def test_p_values_of_equal_differences():
    assert p_of_no_difference([0.0] * 5) == 1
    assert p_of_no_difference([0.25] * 5) == p_of_no_difference([-0.25] * 5) == 2 * 0.5**5  # by their sign alone
    assert p_of_no_difference([0.1, math.nan, 0.1, 0.1, 0.1]) == 1


# ------------------------------------------------------------------------------------------------------------- compare


def test_a_comparison_by_hand():
    """Differences 1, 2, 3, 4, 5: t = 3 / sqrt(2.5 / 5), p = 0.0132."""
    baseline = by_seed([10, 20, 30, 40, 50])
    (found,) = compared({"a": by_seed([11, 22, 33, 44, 55])}, baseline, "lower").values()
    assert found.points == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5} and found.verdict == WORSE
    assert (found.mean, found.low, found.high) == pytest.approx((3, 1.03675, 4.96325), abs=1e-4)
    assert found.p == pytest.approx(0.013236, abs=1e-5)


@pytest.mark.parametrize(("better", "shift", "verdict"), [("lower", -1, BETTER), ("lower", 1, WORSE),
                                                          ("higher", 1, BETTER), ("higher", -1, WORSE)])  # fmt: skip
def test_which_way_is_better(better, shift, verdict):
    baseline = by_seed(np.random.default_rng(0).normal(0, 1, 5))
    arm = {seed: value + shift * (1 + seed % 2 / 8) for seed, value in baseline.items()}
    assert compared({"a": arm}, baseline, better)["a"].verdict == verdict


def test_what_a_seed_does_to_all_arms_is_taken_out():
    """The spread between seeds is a hundred times the difference."""
    random = np.random.default_rng(0)
    baseline = by_seed(random.normal(0, 100, 5))
    arm = {seed: value - 1 + random.normal(0, 0.1) for seed, value in baseline.items()}
    found = compared({"a": arm}, baseline, "lower")["a"]
    assert found.verdict == BETTER and found.mean == pytest.approx(-1, abs=0.2)


def test_pairs_are_of_seeds_that_both_have():
    baseline = {1: 1.0, 2: 2.0, 3: 4.0}
    found = compared({"a": {3: 5.0, 2: 4.0, 9: 100.0}, "b": {7: 1.0}}, baseline, "lower")
    assert list(found) == ["a"]  # nothing can be said of b
    assert found["a"].points == {3: 1.0, 2: 2.0}
    assert found["a"].verdict == NOT_DECIDED and found["a"].p is None
    assert compared({}, baseline, "lower") == {} and compared({"a": {1: 1.0}}, {}, "lower") == {}


def test_each_arm_against_its_own_baseline_and_all_in_one_family():
    """p of 1, 2, 3, 4, 5 is 0.013236: twice that of two arms; of the third there is one pair, which does not count."""
    arms = {"a, x": by_seed([1, 2, 3, 4, 5]), "a, y": by_seed([99, 98, 97, 96, 95]), "a, z": {4: 7.0}}
    baselines = {"a, x": by_seed([0] * 5), "a, y": by_seed([100] * 5), "a, z": {4: 5.0, 5: 5.0}}
    x, y, z = compare(arms, baselines, "lower").values()
    assert x.points == {s: s + 1 for s in SEEDS} and y.points == {s: -s - 1 for s in SEEDS} and z.points == {4: 2}
    assert x.p == y.p == pytest.approx(2 * 0.013236, abs=2e-5) and z.p is None
    assert [of.verdict for of in (x, y, z)] == [WORSE, BETTER, NOT_DECIDED]


def test_fewer_pairs_are_not_decided_and_do_not_count():
    """However clear the difference; nor do they make it harder for the arms that are decided."""
    random = np.random.default_rng(0)
    baseline = by_seed(random.normal(0, 1, 5))
    full = {seed: value + random.normal(1, 0.5) for seed, value in baseline.items()}
    few = {seed: baseline[seed] - 1000 for seed in range(ENOUGH - 1)}
    alone = compared({"full": full}, baseline, "lower")
    found = compared({f"few {i}": few for i in range(30)} | {"full": full}, baseline, "lower")
    assert found["full"] == alone["full"]
    assert found["few 0"].verdict == NOT_DECIDED and found["few 0"].p is None and found["few 0"].low is not None
    one = compared({"one": {0: 3.0}}, baseline, "lower")["one"]
    assert one.low is one.high is None and one.verdict == NOT_DECIDED


def test_arms_after_the_first_that_is_not_marked_are_not_marked():
    """Four arms of p = 0.0132, and 4 * 0.0132 > 0.05: at the level of three, the second would be."""
    arm, baseline = by_seed([1, 2, 3, 4, 5]), by_seed([0] * 5)
    found = compared({label: arm for label in "abcd"}, baseline, "lower")
    assert {of.verdict for of in found.values()} == {NO_DIFFERENCE}
    assert all(of.low < 0 < of.high and of.p == pytest.approx(4 * 0.013236, abs=1e-4) for of in found.values())
    assert {of.verdict for of in compared({label: arm for label in "abc"}, baseline, "lower").values()} == {WORSE}


def test_an_arm_that_is_not_finite_does_not_touch_the_others():
    baseline = by_seed([1, 2, 3, 4, 5])
    good = by_seed([0, 1.1, 2, 3, 4])
    for odd in (math.nan, math.inf):
        bad = by_seed([odd, 2, 3, 4, 5])
        found = [compared(arms, baseline, "lower") for arms in ({"bad": bad, "good": good}, {"good": good, "bad": bad})]
        for either in found:
            assert either["good"].verdict == BETTER and either["bad"].verdict not in (BETTER, WORSE)
    found = compared({"a": by_seed([math.inf, 1, 1, 1, 1])}, by_seed([1, math.inf, 1, 1, 1]), "lower")
    assert found["a"].verdict == NOT_DECIDED


def test_an_arm_of_which_seeds_failed_is_not_decided():
    """With no difference in truth, and the worst three of eight seeds gone, one study in eight would call it better."""
    baseline, arm = by_seed([5.0, 5.1, 4.9, 5.0, 5.2]), by_seed([1.0, 1.2, 0.9, 1.0, 1.1])
    assert compared({"a": arm, "b": arm}, baseline, "lower")["a"].verdict == BETTER
    found = compared({"a": arm, "b": arm}, baseline, "lower", survivors={"a"})
    assert found["a"].verdict == NOT_DECIDED and found["a"].p is None and found["b"].verdict == BETTER


VALUES = st.one_of(
    st.integers(-3, 3).map(float),  # ties, equal differences and differences of nothing
    st.floats(-10, 10).map(lambda x: round(x, 3)),
    st.floats(50, 60).map(lambda x: round(x, 3)),
)
ARMS = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.one_of(
        st.dictionaries(st.integers(0, 8), VALUES, min_size=1),
        st.floats(-60, 60).flatmap(
            lambda shift: st.fixed_dictionaries({s: st.floats(-1, 1).map(lambda x, m=shift: m + x) for s in range(7)})
        ),
    ),
    max_size=8,
)


@pytest.mark.slow
@given(ARMS, st.fixed_dictionaries({seed: VALUES for seed in range(7)}), st.sampled_from(["lower", "higher"]))
def test_an_interval_excludes_zero_exactly_where_the_arm_is_marked(arms, baseline, better):
    for label, found in compared(arms, baseline, better).items():
        common = arms[label].keys() & baseline.keys()
        assert found.points == {seed: arms[label][seed] - baseline[seed] for seed in common}
        if len(common) < ENOUGH:
            assert found.verdict == NOT_DECIDED and found.p is None
            continue
        excludes = found.low > 0 or found.high < 0
        assert (found.verdict in (BETTER, WORSE)) == excludes == (found.p <= 1 - LEVEL)
        assert found.low <= found.mean <= found.high
        if excludes:
            assert (found.verdict == BETTER) == ((found.mean < 0) == (better == "lower"))
        else:
            assert found.verdict == NO_DIFFERENCE


@pytest.mark.slow
@given(ARMS, st.fixed_dictionaries({seed: VALUES for seed in range(7)}))
def test_the_order_of_the_arms_decides_nothing(arms, baseline):
    backwards = dict(reversed(arms.items()))
    found, again = compared(arms, baseline, "lower"), compared(backwards, baseline, "lower")
    assert {label: of.verdict for label, of in found.items()} == {label: of.verdict for label, of in again.items()}


# --------------------------------------------------------------------------------------------------- how often it errs


def any_marked(values: np.ndarray) -> np.ndarray:
    """Whether any arm of studies with values (studies, 1 + arms, seeds) is marked: the smallest p-value decides."""
    d = values[:, 1:] - values[:, :1]
    n, m = d.shape[2], d.shape[1]
    t = np.abs(d.mean(2)) / (d.std(2, ddof=1) / np.sqrt(n))
    return (m * 2 * stats.t.sf(t, n - 1)).min(1) <= 1 - LEVEL


def marked(study: np.ndarray) -> list[str]:
    baseline, *arms = map(by_seed, study)
    found = compared({str(i): arm for i, arm in enumerate(arms)}, baseline, "lower")
    return [label for label, of in found.items() if of.verdict in (BETTER, WORSE)]


def studies(count: int, m: int, n: int, skewed: bool = False) -> np.ndarray:
    """(studies, 1 + arms, seeds) without any difference between arms: a seed's luck, and that of each run."""
    random = np.random.default_rng(1000 * m + n)
    draw = (lambda *shape: random.exponential(size=shape)) if skewed else (lambda *shape: random.normal(size=shape))
    return 3 * draw(count, 1, n) + draw(count, 1 + m, n)


@pytest.mark.parametrize("m", [1, 4, 20])
def test_few_studies_without_a_difference_show_one(m):
    values = studies(20_000, m, n=5)
    wrong = any_marked(values)
    for study, expected in zip(values[:200], wrong[:200], strict=True):
        assert bool(marked(study)) == expected
    assert wrong.mean() <= 0.06
    assert wrong.mean() > 0.02  # it is not that nothing is ever marked


@pytest.mark.parametrize("m", [1, 4, 20])
def test_nor_do_many_more_where_runs_are_skewed(m):
    """A baseline of exponential luck is shared by all arms; the t-test is then not exact."""
    assert any_marked(studies(20_000, m, n=5, skewed=True)).mean() <= 0.08


def test_a_difference_that_is_there_is_found():
    """Three standard deviations of a run, five seeds."""
    values = studies(300, 1, n=5)
    values[:, 1] -= 3
    assert np.mean([marked(study) == ["0"] for study in values]) > 0.8
    more = studies(300, 4, n=8)
    more[:, 2] -= 3
    found = [marked(study) for study in more]
    assert np.mean(["1" in labels for labels in found]) > 0.9
    assert np.mean([len(labels) > 1 for labels in found]) < 0.08


def test_three_seeds_mark_nothing():
    values = studies(200, 4, n=3)
    values[::2, 1:] += 1000
    assert not any(marked(study) for study in values)


# -------------------------------------------------------------------------------------------------------------- fronts

POINTS = st.dictionaries(
    st.sampled_from("abcdefghij"),
    st.tuples(st.integers(1, 4).map(float) | st.floats(0, 9), st.integers(-2, 2).map(float) | st.floats(-9, 9)),
)


@given(POINTS, st.sampled_from(["lower", "higher"]))
def test_the_front_is_what_nothing_beats(points, better):
    def beats(a, b):
        sign = 1 if better == "lower" else -1
        a, b = (a[0], sign * a[1]), (b[0], sign * b[1])
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    found = front(points, better)
    expected = {label for label, p in points.items() if not any(beats(q, p) for q in points.values())}
    assert set(found) == expected and len(found) == len(expected)
    assert [points[label][0] for label in found] == sorted(points[label][0] for label in found)


def test_a_front_by_hand():
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (3.0, 6.0), "d": (2.0, 7.0), "e": (4.0, 1.0), "f": (2.0, 5.0)}
    assert front(points, "lower") == ("a", "b", "f", "e")
    assert front(points, "higher") == ("a",)
    assert front(points | {"nan": (2.0, math.nan), "inf": (0.5, math.inf)}, "lower") == ("a", "b", "f", "e")
    assert front({}, "lower") == ()
