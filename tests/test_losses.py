"""ddpm/losses.py: the mean squared error of each sample, and its exact expectation on Gaussian data."""

import numpy as np
import pytest
import torch

from ddpm.diffusion import GaussianDiffusion
from ddpm.losses import L_simple


def test_L_simple_is_the_mean_over_pixels_of_each_sample():
    output, target = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    loss = L_simple(output, target)
    assert loss.shape == (3,)
    for i in range(3):
        a, b = output[i].flatten().tolist(), target[i].flatten().tolist()
        assert loss[i].item() == pytest.approx(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 40, rel=1e-13)
    assert torch.equal(L_simple(target, target), torch.zeros(3).double())


def test_gradient_of_L_simple():
    output, target = torch.randn(2, 3, 20, dtype=torch.float64)
    output.requires_grad_()
    L_simple(output, target).sum().backward()
    torch.testing.assert_close(output.grad, 2 * (output.detach() - target) / 20)


@pytest.mark.equation("DDPM (14)")
@pytest.mark.parametrize("t", [1, 100, 400, 1000])
def test_L_simple_of_the_best_denoiser_is_the_posterior_variance(oracle, t):
    """E over x_0, eps on Gauss-Hermite nodes, exact for squares: Var[eps | x_t] = alpha_bar c^2 / Var[x_t].

    For x_0 and v it is c^2 (1 - alpha_bar) / Var[x_t] and c^2 / Var[x_t].
    """
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(4))
    weights = weights / weights.sum()
    x_0, eps = torch.meshgrid(oracle.mean + oracle.variance**0.5 * nodes, nodes, indexing="ij")
    x_0, eps, weight = x_0.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(weights, weights).flatten()

    alpha_bar, (_, var_t) = oracle.schedule.alpha_bar[t].item(), oracle.marginal(t)
    share = oracle.variance / var_t
    for target, expected in {"eps": alpha_bar * share, "x_0": (1 - alpha_bar) * share, "v": share}.items():

        def model(x_t, t, target=target, alpha_bar=alpha_bar):
            pred = oracle.denoise(x_t, t)
            v = alpha_bar**0.5 * pred.eps - (1 - alpha_bar) ** 0.5 * pred.x_0
            return {"eps": pred.eps, "x_0": pred.x_0, "v": v}[target]

        diffusion = GaussianDiffusion(oracle.schedule, target)
        loss = diffusion.loss(model, x_0, t=torch.full((16,), t), eps=eps)
        assert (weight * loss).sum().item() == pytest.approx(expected, rel=1e-11)
        better = diffusion.loss(lambda x_t, t, m=model: m(x_t, t) + 0.1, x_0, t=torch.full((16,), t), eps=eps)
        assert (weight * better).sum().item() == pytest.approx(expected + 0.01, rel=1e-11)  # any other is worse
