"""ddpm/latent/adversarial.py: losses and their optima by hand, penalties of discriminators whose gradient is known."""

import math

import pytest
import torch
from torch import Tensor

from ddpm.latent.adversarial import (
    GAMES,
    adaptive_weight,
    hinge,
    hinge_generator,
    non_saturating,
    non_saturating_generator,
    r1,
)

P_DATA, P_G = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.3, 0.7]).double()  # of two points


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(loss: object, logits: Tensor) -> Tensor:
    """Of a discriminator, over the two points: rows of one number each, weighted by how often they are met."""
    only_real = loss(logits[:, None], torch.full((2, 1), -math.inf).double())  # what is made costs nothing
    only_made = loss(torch.full((2, 1), math.inf).double(), logits[:, None])
    return (P_DATA * only_real + P_G * only_made).sum()


@pytest.mark.equation("GeometricGAN (hinge)")
def test_hinge_by_hand_is_a_mean_over_patches_and_least_at_the_sign_of_the_difference():
    real, made = torch.tensor([[[0.5, 3.0]], [[-1.0, 1.0]]]).double(), torch.tensor([[[0.0, -2.0]], [[1.0, -0.5]]])
    torch.testing.assert_close(hinge(real, made.double()), torch.tensor([0.25 + 0.5, 1.0 + 1.25]).double())
    best = expected(hinge, (P_DATA - P_G).sign())
    torch.testing.assert_close(best, 2 * torch.minimum(P_DATA, P_G).sum())
    for change in ([0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]):
        assert expected(hinge, (P_DATA - P_G).sign() + torch.tensor(change)) > best


@pytest.mark.equation("GeometricGAN (generator)")
def test_the_generator_against_hinge_raises_the_mean_logit():
    torch.testing.assert_close(hinge_generator(torch.tensor([[1.0, 2.0], [-3.0, 0.0]])), torch.tensor([-1.5, 1.5]))


@pytest.mark.equation("GAN (1)")
def test_non_saturating_is_the_cross_entropy_of_real_and_made():
    real, made = drawn(3, 2, 2), drawn(3, 2, 2, seed=1)
    nats = -torch.sigmoid(real).log().mean((1, 2)) - (1 - torch.sigmoid(made)).log().mean((1, 2))
    torch.testing.assert_close(non_saturating(real, made), nats)
    assert non_saturating(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4  # finite where the sigmoid is 0 or 1


@pytest.mark.equation("GAN (2)")
def test_the_best_logit_is_the_logarithm_of_the_ratio_of_densities():
    logits = (P_DATA / P_G).log().requires_grad_()
    loss = expected(non_saturating, logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.zeros(2).double(), atol=1e-12, rtol=0)
    middle = (P_DATA + P_G) / 2  # 2 log 2 - 2 JSD, as in theorem 1
    jsd = ((P_DATA * (P_DATA / middle).log()).sum() + (P_G * (P_G / middle).log()).sum()) / 2
    torch.testing.assert_close(loss.detach(), 2 * math.log(2) - 2 * jsd)


@pytest.mark.equation("GAN (non-saturating)")
def test_the_generator_against_cross_entropy_moves_most_where_it_is_found_out():
    made = torch.tensor([-20.0, 0.0, 20.0], dtype=torch.float64, requires_grad=True)
    loss = non_saturating_generator(made)
    torch.testing.assert_close(loss, -torch.sigmoid(made).log())
    (gradient,) = torch.autograd.grad(loss.sum(), made)
    torch.testing.assert_close(gradient, torch.sigmoid(made) - 1)
    torch.testing.assert_close(non_saturating_generator(made.detach()[None]), loss.detach().mean()[None])


def test_games_have_both_sides():
    assert GAMES["hinge"] == (hinge, hinge_generator)
    assert GAMES["non_saturating"] == (non_saturating, non_saturating_generator)


@pytest.mark.parametrize("game", GAMES)
def test_logits_of_two_shapes_are_refused(game):
    with pytest.raises(ValueError, match=r"have one shape \(B, \*\), not \(2, 1\) and \(2, 3\)"):
        GAMES[game].discriminator(torch.zeros(2, 1), torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------------------------- R1


@pytest.mark.equation("R1 (9)")
def test_r1_of_a_linear_and_of_a_quadratic_discriminator():
    x, a = drawn(3, 1, 2, 2).requires_grad_(), drawn(1, 2, 2, seed=1)
    linear = (a * x).sum((1, 2, 3))
    torch.testing.assert_close(r1(linear, x, gamma=10.0), (5 * a.square().sum()).expand(3))
    quadratic = x.square().sum((1, 2, 3)) / 2  # gradient x: rows have penalties of their own
    torch.testing.assert_close(r1(quadratic, x), x.detach().square().sum((1, 2, 3)) / 2)


def test_r1_of_patches_is_that_of_their_mean_and_can_be_differentiated():
    x, a = drawn(2, 4).requires_grad_(), torch.tensor([3.0, 0.5], dtype=torch.float64, requires_grad=True)
    penalty = r1(a * x.unflatten(1, (2, 2)), x)  # four patches, each a multiple of its own pixel
    torch.testing.assert_close(penalty, (a.square().sum() * 2 / 16 / 2).expand(2))
    (gradient,) = torch.autograd.grad(penalty[0], a)
    torch.testing.assert_close(gradient, a.detach() / 8)


def test_r1_without_a_gradient_is_refused():
    x = drawn(2, 3)
    with pytest.raises(ValueError, match=r"x\.requires_grad_\(\) before"):
        r1(x.sum(1).requires_grad_(), x)
    with torch.no_grad(), pytest.raises(ValueError, match=r"no torch\.no_grad"):
        r1(x.requires_grad_().sum(1), x)


# ------------------------------------------------------------------------------------------------- the adaptive weight


@pytest.mark.equation("VQGAN (7)")
def test_the_adaptive_weight_of_a_linear_decoder_by_hand():
    """Decoder W z, z = (1, 2): by W the squared error has the gradient 2 (W z - x) z^T, and D(x) = d x has d z^T."""
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    z, x, d = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0], [4.0, -2.0], [0.6, 0.8]))
    made = W @ z
    reconstruction, adversarial = (made - x).square().sum(), -(d @ made)
    weight = adaptive_weight(reconstruction, adversarial, W)
    norm = 2 * (9 + 16) ** 0.5 * 5**0.5
    assert weight.item() == pytest.approx(norm / (5**0.5 + 1e-6), rel=1e-12)
    assert not weight.requires_grad
    assert adaptive_weight(reconstruction, adversarial, W, most=3.0) == 3
    assert adaptive_weight(reconstruction, 0 * adversarial, W) == 1e4
    rows = [part.expand(4) * torch.tensor([0.0, 0, 0, 4]) for part in (reconstruction, adversarial)]
    torch.testing.assert_close(adaptive_weight(*rows, W), weight)  # the means of rows
    (reconstruction + weight * adversarial).backward()  # the graphs are there still


def test_an_adaptive_weight_without_gradients_is_refused():
    W = torch.ones(2, requires_grad=True)
    with torch.no_grad(), pytest.raises(ValueError, match="gradients of both parts by the last layer"):
        adaptive_weight(W.sum(), W.sum(), W)
