"""ddpm/training/muon.py: singular values in closed form, PyTorch's Muon and AdamW, and a run that is resumed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ddpm.training.muon import Muon, orthogonalised


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def with_gradients(shapes: list[tuple[int, ...]], seed: int) -> list[nn.Parameter]:
    parameters = [nn.Parameter(randn(*shape)) for shape in shapes]
    draw_gradients(parameters, seed)
    return parameters


def draw_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype)


@pytest.mark.equation("Muon (Newton-Schulz)")
@pytest.mark.parametrize("shape", [(16, 16), (8, 30), (30, 8), (3, 5, 9)])
def test_singular_vectors_stay_and_singular_values_come_close_to_one(shape):
    """Each value goes through s -> a s + b s^3 + c s^5 five times, whatever the vectors."""
    G = randn(*shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    s = S / S.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalised(G), U @ torch.diag_embed(s) @ Vh, rtol=0, atol=1e-12)
    assert s.min() > 0.65 and s.max() < 1.2


def test_a_matrix_of_zeros_stays_so():
    assert torch.equal(orthogonalised(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.equation("Muon (step)")
@pytest.mark.parametrize("shape", [(16, 24), (40, 16), (16, 4, 3, 3)])
def test_steps_are_the_formula(shape):
    (p,) = with_gradients([shape], 1)
    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.01)
    W, M = p.detach().reshape(shape[0], -1).clone(), 0
    for n in range(1, 4):
        draw_gradients([p], n)
        G = p.grad.reshape(W.shape)
        M = 0.9 * M + 0.1 * G
        O_n = orthogonalised(0.9 * M + 0.1 * G)
        W = (1 - 0.1 * 0.01) * W - 0.2 * 0.1 * max(W.shape) ** 0.5 * O_n
        optimizer.step()
        torch.testing.assert_close(p.detach().reshape(W.shape), W, rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
def test_matrices_move_as_by_the_muon_of_pytorch():
    """Which iterates in bfloat16."""
    ours = with_gradients([(16, 24), (40, 16)], 1)
    theirs = copy.deepcopy(ours)
    start = [p.detach().clone() for p in ours]
    one = Muon(ours, lr=0.1, weight_decay=0.01)
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for n in range(1, 6):
        draw_gradients(ours, n)
        draw_gradients(theirs, n)
        one.step()
        other.step()
    for p, q, p_0 in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.02 * (p - p_0).norm()


def test_all_else_moves_as_by_adamw():
    """Biases, and matrices that are too narrow."""
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = with_gradients([(24,), (4, 100), (100, 15), (1, 1, 3, 3)], 1)
    theirs = copy.deepcopy(ours)
    one, other = Muon(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for n in range(1, 6):
        draw_gradients(ours, n)
        draw_gradients(theirs, n)
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 24), (200, 30), (64, 64, 3, 3)])
def test_whatever_the_shape_a_step_is_a_fifth_of_the_rate(shape):
    (p,) = with_gradients([shape], 1)
    before = p.detach().clone()
    Muon([p], lr=1e-3).step()
    assert (p - before).square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.3)


def test_a_state_that_is_stored_goes_on_to_the_bit():
    ours = with_gradients([(16, 24), (16, 24), (24,)], 1)
    optimizer = Muon(ours, lr=0.1)
    optimizer.step()
    other = copy.deepcopy(ours)
    again = Muon(other, lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n in (2, 3):
        for parameters, made in ((ours, optimizer), (other, again)):
            draw_gradients(parameters, n)
            made.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, other, strict=True))


def test_parameters_without_a_gradient_stay():
    (p,) = with_gradients([(16, 24)], 1)
    p.grad, before = None, p.detach().clone()
    Muon([p], weight_decay=0.1).step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": -1.0}, r"lr = -1 must be >= 0"),
        ({"lr": float("nan")}, r"lr = nan must be >= 0"),
        ({"momentum": 1.0}, r"momentum = 1 must lie in \[0, 1\)"),
        ({"betas": (0.9, 1.5)}, r"betas\[1\] = 1.5 must lie in \[0, 1\)"),
        ({"eps": -1e-8}, r"eps = -1e-08 must be >= 0"),
        ({"weight_decay": -0.1}, r"weight_decay = -0.1 must be >= 0"),
        ({"least": 0}, r"least = 0 must be >= 1"),
    ],
)
def test_arguments_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(2, 2))], **changed)
