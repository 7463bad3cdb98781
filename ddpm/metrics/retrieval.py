"""Retrieval of pictures by their names, and of names by their pictures: ranks, top-k shares and chance."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.metrics.intervals import share_in_words, wilson
from ddpm.metrics.quality import Result

NAME = "retrieval"
TOP = {"first": 1, "top5": 5, "top10": 10}  # name of a share -> k of the k likeliest
WAYS = {"name": "a picture's own name", "picture": "a name's own picture", "drawn": "the prompt of a sample"}
AT_A_TIME = 256  # queries that are compared with all candidates at once


class Found(NamedTuple):
    """The ranks of queries among M candidates.

    Args:
        ranks: integers (Q,), 1 for the first.
        right: the number of correct candidates of each, (Q,).
        among: M.
    """

    ranks: Tensor
    right: Tensor
    among: int


def found(u: Tensor, v: Tensor, of_u: Tensor, of_v: Tensor) -> Found:
    r"""Return the rank of the first correct candidate of each query.

    .. math:: r_i = 1 + \#\{j : c_j \ne c_i,\; u_i \cdot v_j \ge \max_{k : c_k = c_i} u_i \cdot v_k\}
        \qquad \text{[Retrieval (rank)]}

    so that a wrong one that is as similar ranks first: an encoder with constant output retrieves nothing.

    Args:
        u: queries, (Q, d).
        v: candidates, (M, d), at least one correct one for each query.
        of_u, of_v: their labels, integers (Q,) and (M,).
    """
    ranks, right = [], []
    for queries, label in zip(u.split(AT_A_TIME), of_u.split(AT_A_TIME), strict=True):
        z, same = queries @ v.mT, label[:, None] == of_v
        best = z.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~same & (z >= best)).sum(1))
        right.append(same.sum(1))
    return Found(torch.cat(ranks), torch.cat(right), len(v))


def chance(k: int, right: int, among: int) -> float:
    r"""Return the probability that one of the correct candidates is among the first k of M by chance.

    .. math:: P = 1 - \binom{M - m}{k} \Big/ \binom{M}{k} \qquad \text{[Chance (retrieval)]}

    Args:
        k: number of candidates considered.
        right: m, the number of correct ones.
        among: M.
    """
    return 1 - math.comb(among - right, k) / math.comb(among, k) if k <= among else 1.0


def results(way: str, these: Found, real: Found | None = None) -> dict[str, Result]:
    """Return top-k shares by name, with Wilson's interval and the share by chance, and the median rank.

    Args:
        way: what is retrieved, of `WAYS`.
        these: the ranks of the queries.
        real: those of held-out pictures, the ceiling of samples; None for none.
    """
    measured = {what: _share(way, what, these, real) for what in TOP}
    median, of_real = (None if one is None else one.ranks.double().quantile(0.5).item() for one in (these, real))
    assert median is not None
    expected = [_expected_rank(m, these.among) for m in these.right.tolist()]
    by_chance = sum(expected) / len(expected)
    words = f"median rank of {WAYS[way]}: {median:g} of {these.among:,}"
    words += ("" if of_real is None else f"; of held-out pictures {of_real:g}") + f"; by chance about {by_chance:,.0f}"
    more = {"among": these.among, "chance": by_chance}
    return measured | {"rank": Result(median, of_real, words, more=more)}


def _share(way: str, what: str, these: Found, real: Found | None) -> Result:
    """Return the share of queries with a correct candidate among the first k."""
    k = TOP[what]
    right = [rank <= k for rank in these.ranks.tolist()]
    low, high = wilson(sum(right), len(right))
    by_chance = sum(chance(k, m, these.among) for m in these.right.tolist()) / len(right)
    words = f"{WAYS[way]} among the first {k} of {these.among:,}: {share_in_words(sum(right), len(right))}"
    more: dict[str, object] = {"cases": len(right), "among": these.among, "chance": by_chance}
    ceiling = None
    if real is not None:
        of_real = [rank <= k for rank in real.ranks.tolist()]
        ceiling, (real_low, real_high) = sum(of_real) / len(of_real), wilson(sum(of_real), len(of_real))
        words += f"; of held-out pictures, the ceiling: {share_in_words(sum(of_real), len(of_real))}"
        more |= {"real_n": len(of_real), "real_low": real_low, "real_high": real_high}
    return Result(sum(right) / len(right), ceiling, f"{words}; by chance {by_chance:.2%}", low, high, more, "wilson")


def _expected_rank(right: int, among: int) -> float:
    """Return the mean rank of the first of m correct candidates in random order: (M + 1) / (m + 1)."""
    return (among + 1) / (right + 1)
