"""ddpm/data/mixture.py: moments and density in closed form, fresh points by key, identity, and every refusal."""

import math
from functools import partial
from inspect import signature
from pathlib import Path
from shutil import rmtree

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ddpm.config import build, compose
from ddpm.data import Mixture, Moons
from ddpm.diffusion import GaussianDiffusion
from ddpm.oracle import JointMixture
from ddpm.randomness import Keyed
from ddpm.runs import checkpoint
from ddpm.runs.directory import Run
from ddpm.runs.schema import check
from ddpm.schedules import cosine
from ddpm.training.ranks import Ranks
from ddpm.training.step import Training
from ddpm.training.tasks.diffusion import Diffusion
from ddpm.training.trainer import Trainer
from models.mlp import MLP

CONF = Path(__file__).parents[1] / "conf" / "data"
THREE = {  # components in the plane, of any form
    "means": [[0.0, 0.0], [3.0, 1.0], [-2.0, 2.0]],
    "covariances": [[[1.0, 0.8], [0.8, 1.0]], [[0.1, 0.0], [0.0, 2.0]], [[0.5, -0.3], [-0.3, 0.3]]],
    "weights": [0.5, 0.3, 0.2],
}
SIX = {"grid": [3, 1, 2], "spacing": 2.0, "std": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}


def close(found: Tensor, expected: Tensor, atol: float = 1e-9):
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=atol)


def given(**options) -> MixtureSameFamily:
    """The density by torch.distributions, in the coordinates that the components are given in."""
    m, C, w = (torch.tensor(options[key], dtype=torch.float64) for key in ("means", "covariances", "weights"))
    return MixtureSameFamily(Categorical(w), MultivariateNormal(m, C))


def seen(d: Mixture) -> MixtureSameFamily:
    """The density of what the network sees, by its attributes."""
    return MixtureSameFamily(Categorical(d.weights), MultivariateNormal(d.means, d.covariances))


# ---------------------------------------------------------------------------------------------- the density


def test_a_grid_lies_around_0_and_is_five_by_five_by_default():
    d = Mixture(standardise=False)
    assert d.shape == (2,) and d.num_classes == 25 and len(d) == 10_000 and d.holds == {"classes"}
    at = torch.arange(-2.0, 3)
    close(d.means, torch.cartesian_prod(at, at))
    close(d.covariances, 0.04 * torch.eye(2).expand(25, 2, 2), 1e-8)
    close(d.weights, torch.full((25,), 1 / 25))
    six = Mixture(**SIX, standardise=False)
    close(six.means, torch.cartesian_prod(torch.tensor([-2.0, 0, 2]), torch.zeros(1), torch.tensor([-1.0, 1])))
    close(six.covariances[3], 0.16 * torch.eye(3), 1e-8)


def test_all_that_the_network_sees_is_float64_and_standardised_exactly():
    d, p = Mixture(**THREE), given(**THREE)
    assert {x.dtype for x in (d.weights, d.means, d.covariances, d.mean, d.std)} == {torch.float64}
    close(d.mean, p.mean)
    close(d.std.square(), p.variance)
    close(seen(d).mean, torch.zeros(2))
    close(seen(d).variance, torch.ones(2))
    close(d.means * d.std + d.mean, torch.tensor(THREE["means"]))
    close(d.covariances * torch.outer(d.std, d.std), torch.tensor(THREE["covariances"]), 1e-7)


@pytest.mark.parametrize("standardise", [True, False])
def test_the_density_is_that_of_torch(standardise):
    d = Mixture(**THREE, standardise=standardise)
    x, exact = 2 * torch.randn(50, 2, dtype=torch.float64), JointMixture.of(cosine(), d)
    close(exact.log_prob(x, 0), seen(d).log_prob(x), 1e-10)
    close(exact.log_prob(x, 0), given(**THREE).log_prob(x * d.std + d.mean) + d.std.log().sum(), 1e-10)
    assert JointMixture.knows(d) and not JointMixture.knows(Moons())
    with pytest.raises(ValueError, match="the density of moons is not known; that of data=mixture is"):
        JointMixture.of(cosine(), Moons())


@pytest.mark.parametrize("options", [THREE, SIX, {"means": [[2.0]], "std": 3.0}], ids=["plane", "space", "line"])
@pytest.mark.parametrize("fresh", [False, True])
def test_points_have_the_moments_of_the_density(options, fresh):
    n = 40_000
    d = Mixture(**options, count=n, fresh=fresh)
    batch = d.batch(torch.arange(n), generator=torch.Generator().manual_seed(0))
    x, y = batch.x.double(), batch.y
    assert batch.x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (n, *d.shape)
    assert torch.equal(batch.x, d.points) == (not fresh)
    close(y.bincount() / n, d.weights, 4 * 0.5 / n**0.5)
    for k, (m, C) in enumerate(zip(d.means, d.covariances, strict=True)):
        own = x[y == k]
        spread = C.diagonal().sqrt()
        error = 5 / len(own) ** 0.5
        assert ((own.mean(0) - m).abs() < error * spread).all()
        assert ((own.T.cov().reshape(C.shape) - C).abs() < 1.5 * error * torch.outer(spread, spread)).all()
    close(x.mean(0), torch.zeros(d.shape), 5 / n**0.5)
    close(x.var(0), torch.ones(d.shape), 8 / n**0.5)


# ---------------------------------------------------------------------------------------------- fresh points


def test_fresh_points_are_a_function_of_the_key_and_what_is_held_out_is_fixed():
    d = Mixture(**THREE, fresh=True, count=100)

    def drawn(step: int) -> tuple[Tensor, Tensor]:
        batch = d.batch(torch.arange(16), generator=Keyed(3, step)("flip"))
        return batch.x, batch.y

    (x, y), (x_again, y_again), (other, _) = drawn(1), drawn(1), drawn(2)
    assert torch.equal(x, x_again) and torch.equal(y, y_again) and not torch.isin(other, x).any()
    assert not torch.isin(x, d.points).any()
    assert torch.equal(d.batch(d.held_out).x, d.points[d.held_out])
    fixed = Mixture(**THREE, count=100)
    assert torch.equal(fixed.points, d.points) and torch.equal(fixed.held_out, d.held_out)
    assert torch.equal(fixed.batch(torch.arange(16), generator=Keyed(3, 1)("flip")).x, d.points[:16])


def test_points_of_some_classes_are_not_fresh():
    d = Mixture(**THREE, fresh=True, count=100).of_classes([1])
    assert not d.fresh and set(d.batch(d.train, generator=torch.Generator()).y.tolist()) == {1}


def options(**changed: object) -> dict:
    return {"steps": 6, "batch_size": 12, "checkpoint_every": 3, "previews": 0, "precision": "fp32"} | changed


def task() -> Diffusion:
    torch.manual_seed(0)
    return Diffusion(MLP(width=8, depth=1, num_classes=3), GaussianDiffusion(cosine(10), "v", clip_x_0=False))


def training(**changed: object) -> Training:
    """The steps of a small network on fresh points."""
    data, make = Mixture(**THREE, fresh=True, count=100), partial(torch.optim.Adam, lr=1e-2)
    return Training(Trainer(**options(**changed)), task(), data, make, seed=1, device=torch.device("cpu"))


def test_every_step_draws_anew_and_micro_batches_are_parts_of_it():
    whole, parts = training(), training(accumulate=3)
    first, again, second = whole.draw(1), parts.draw(1), whole.draw(2)
    assert torch.equal(first.x_0, again.x_0) and not torch.isin(second.x_0, first.x_0).any()
    assert not torch.isin(first.x_0, whole.data.points).any()
    cut = list(parts.micro_batches(again))
    assert [len(one.x_0) for one in cut] == [4, 4, 4]
    assert torch.equal(torch.cat([one.x_0 for one in cut]), first.x_0)
    assert torch.equal(torch.cat([one.condition.classes for one in cut]), first.condition.classes)


def test_every_process_draws_the_whole_batch_and_takes_its_share():
    shares = []
    for rank in range(2):
        one = training()
        one.ranks = Ranks(rank, 2)
        (rows,) = one.micro_batches(one.draw(1))
        shares.append(rows.x_0)
    assert torch.equal(torch.cat(shares), training().draw(1).x_0)


def fitted(path: Path, resume: Path | None = None) -> dict[str, Tensor]:
    """The weights and their averages after six steps, with a checkpoint after three."""
    path.mkdir(exist_ok=True)
    data, make = Mixture(**THREE, fresh=True, count=100), partial(torch.optim.Adam, lr=1e-2)
    begun = task()
    _, averaged = Trainer(**options()).fit(
        Run(path), begun, data, make, seed=1, device=torch.device("cpu"), resume=resume
    )
    both = {"raw": begun.model, "averaged": averaged.model}
    return {f"{name}.{key}": x for name, model in both.items() for key, x in model.state_dict().items()}


def test_a_resumed_run_ends_bit_for_bit_where_one_without_a_stop_does(tmp_path):
    whole = fitted(tmp_path / "run")
    rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = fitted(tmp_path / "run", checkpoint.last_whole(tmp_path / "run" / "checkpoints"))
    assert whole.keys() == again.keys() and all(torch.equal(x, again[key]) for key, x in whole.items())
    assert any((x != 0).any() for key, x in whole.items() if key.startswith("raw.linear_out"))


# ---------------------------------------------------------------------------------------------- a data set


def test_the_configuration_makes_the_defaults_and_what_is_typed():
    keys = yaml.safe_load((CONF / "mixture.yaml").read_text())
    check(keys)
    assert keys.pop("_target_") == "ddpm.data.Mixture"
    assert list(keys) == list(signature(Mixture).parameters)
    d = Mixture(**keys)
    assert d.identity() == Mixture().identity() and d.name == "mixture" and d.split == "all"
    typed = [f"data.{key}={value}".replace(" ", "") for key, value in THREE.items()]
    built = build(compose("train", ["experiment=points", "data=mixture", *typed]).data, "data")
    assert built.identity() == Mixture(**THREE).identity()


def test_points_are_the_same_everywhere_and_whatever_the_seed():
    d = Mixture(count=100)
    close(d.points[:2], torch.tensor([[0.6206182, -1.4183701], [-1.4185054, 0.1218990]]), 2e-6)
    torch.manual_seed(5)
    assert torch.equal(Mixture(count=100).points, d.points)
    assert d.origin is not None and not d.origin.changed()


def test_identity_is_the_density_too_and_whether_points_are_fresh():
    nearly = THREE | {"weights": [0.5, 0.3 + 1e-6, 0.2 - 1e-6]}  # by which no point of a hundred changes
    others = [
        Mixture(**THREE, count=100),
        Mixture(**THREE, count=100, fresh=True),
        Mixture(**THREE, count=100, standardise=False),
        Mixture(**THREE, count=101),
        Mixture(**nearly, count=100, standardise=False),
    ]
    assert len({str(d.identity()) for d in others}) == len(others)
    sums = [d.identity()["sha256"] for d in others]
    assert sums[0] == sums[1] and sums[2] == sums[4]
    same = Mixture(**THREE, count=100, validation=0.5)
    assert same.identity() == others[0].identity()


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": [2], "means": [[0.0]]}, "grid and means .* give one of them"),
        ({"grid": []}, r"grid=\[\]: whole numbers >= 1"),
        ({"grid": [2, 0]}, r"grid=\[2, 0\]: whole numbers >= 1"),
        ({"grid": [2.0]}, "whole numbers >= 1"),
        ({"grid": [100, 100, 100]}, "has 1,000,000 components; at most 10,000"),
        ({"spacing": 0}, "spacing=0: .* > 0"),
        ({"spacing": math.inf}, "spacing=inf"),
        ({"spacing": 1e300}, "numbers up to 1e"),
        ({"means": []}, r"means of shape \(0,\): K components of d numbers, \(K, d\)"),
        ({"means": [[0.0, 1.0], [2.0]]}, "means: K components .* each list as long as the others"),
        ({"means": [0.0, 1.0]}, r"means of shape \(2,\)"),
        ({"means": [[math.nan]]}, "means .* numbers up to"),
        ({"std": 0.0}, r"std=0\.0: the standard deviation of a component is > 1e-09"),
        ({"std": -1.0}, "is > 1e-09"),
        ({"grid": [2], "std": [0.1, 0.0]}, r"std=\[0\.1, 0\.0\]"),
        ({"grid": [2], "std": [0.1] * 3}, "std has 3 numbers, but there are 2 components"),
        ({"std": [[0.1]]}, "std of shape"),
        ({**THREE, "std": 0.1}, "std and covariances .* give one of them"),
        ({"means": [[0.0]], "covariances": [[[1.0, 0], [0, 1]]]}, r"\(1, 2, 2\), but 1 means of 1 take \(1, 1, 1\)"),
        ({"means": [[0.0, 0]], "covariances": [[1.0, 0], [0, 1]]}, r"a matrix a component, \(1, 2, 2\)"),
        ({"means": [[0.0, 0]], "covariances": [[[1.0, 0.5], [0.4, 1]]]}, "covariance 0 is not symmetric"),
        ({"means": [[0.0, 0]], "covariances": [[[1.0, 2], [2, 1]]]}, "covariance 0 is not positive definite: its"),
        ({"means": [[0.0, 0]], "covariances": [[[1.0, 1], [1, 1]]]}, "covariance 0 is not positive definite"),
        ({"means": [[0.0, 0]], "covariances": [[[0.0, 0], [0, 0]]]}, "covariance 0 is not positive definite"),
        ({**THREE, "weights": [0.5, 0.5]}, "weights has 2 numbers, but there are 3 components"),
        ({**THREE, "weights": [0.5, 0.3, 0.1]}, r"add up to 0\.9, not to 1"),
        ({**THREE, "weights": [0.5, 0.7, -0.2]}, "each is > 0"),
        ({**THREE, "weights": [0.5, 0.5, 0.0]}, "leave out a component that never occurs"),
        ({"count": 1}, "count=1: .* 2 <= count"),
        ({"count": 10**7 + 1}, "count <= 10,000,000"),
        ({"split": "train"}, "split='train': mixture has no published split"),
        ({"validation": 1.0}, "0 <= validation < 1"),
    ],
)  # fmt: skip
def test_what_makes_no_density_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Mixture(**options)
    assert "\n" not in str(raised.value)


def test_narrow_and_distant_components_are_exact_still():
    d = Mixture(means=[[1e9, 0.0], [1e9, 1.0]], covariances=[[[1e-4, 0], [0, 1e4]]] * 2)
    assert all(x.isfinite().all() for x in (d.points, d.means, d.covariances))
    close(d.batch(torch.arange(10_000)).x.double().var(0), torch.ones(2), 0.1)
