"""ddpm/metrics/retrieval.py: ranks by hand, chance in closed form, and what is said of both."""

import math

import pytest
import torch

from ddpm.metrics.retrieval import Found, chance, found, results

U = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.equation("Retrieval (rank)")
def test_the_rank_is_that_of_the_first_right_one_and_ties_count_against_it():
    v = torch.tensor([[0.9, 0.1], [0.8, 0.9], [0.5, 0.9], [0.8, 0.2]])
    calls = torch.tensor([5, 7, 7, 6])
    of_u = torch.tensor([6, 7])
    here = found(U, v, of_u, calls)
    # the first: 0.9 before its own 0.8, and another that is as similar; the second: both right ones come first
    assert here.ranks.tolist() == [3, 1] and here.right.tolist() == [1, 2] and here.among == 4
    many = found(U.repeat(300, 1), v, of_u.repeat(300), calls)  # block by block
    assert many.ranks.tolist() == [3, 1] * 300
    same = found(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4), torch.arange(4))
    assert same.ranks.tolist() == [4] * 4, "what says the same of everything finds nothing"


@pytest.mark.equation("Chance (retrieval)")
@pytest.mark.parametrize(("k", "right", "among"), [(1, 1, 10), (3, 1, 10), (2, 3, 7), (5, 2, 6), (9, 1, 5)])
def test_chance_is_the_share_of_choices_that_hold_a_right_one(k, right, among):
    from itertools import combinations

    choices = list(combinations(range(among), min(k, among)))
    share = sum(any(place < right for place in chosen) for chosen in choices) / len(choices)
    assert math.isclose(chance(k, right, among), share)


def test_shares_have_intervals_and_stand_beside_chance_and_the_ceiling():
    these = Found(torch.tensor([1, 4, 7, 40]), torch.ones(4).long(), 50)
    real = Found(torch.tensor([1, 1, 2, 3]), torch.ones(4).long(), 50)
    measured = results("drawn", these, real)
    assert {what: measured[what].value for what in ("first", "top5", "top10", "rank")} == {
        "first": 0.25, "top5": 0.5, "top10": 0.75, "rank": 5.5,
    }  # fmt: skip
    assert [measured[what].real_vs_real for what in ("first", "top5", "rank")] == [0.5, 1.0, 1.5]
    first = measured["first"]
    assert (
        first.interval == "wilson" and first.low < 0.25 < first.high and first.more["chance"] == pytest.approx(1 / 50)
    )
    assert "1 of 4, 25.0%" in first.words and "the ceiling: 2 of 4" in first.words and "by chance 2.00%" in first.words
    assert measured["rank"].more["chance"] == pytest.approx(25.5) and "by chance about 26" in measured["rank"].words
    alone = results("name", these)
    assert alone["first"].real_vs_real is None and "ceiling" not in alone["first"].words
    several = results("picture", Found(torch.tensor([1]), torch.tensor([4]), 9))
    assert several["rank"].more["chance"] == 2.0
