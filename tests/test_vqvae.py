"""models/vqvae.py: the codebook against loops, whom each loss reaches, k-means, and refusals."""

import math

import pytest
import torch
from torch import Tensor, nn

from ddpm.training.task import shape_of
from models.pixelcnn import PixelCNN
from models.vqvae import VQVAE, Codebook, Residual, straight_through

UPDATES = ["gradient", "average"]


def small(image_size: int | tuple[int, int] = (8, 4), **options) -> VQVAE:
    """In float64, with codes that are as far apart as what the encoder says."""
    net = VQVAE(
        **{"image_size": image_size, "in_channels": 2, "codes": 5, "code_channels": 3, "channels": 12} | options
    )
    nn.init.normal_(net.codebook.e, std=0.2)
    return net.double()


def codebook(update: str = "average", codes: int = 5, **options) -> Codebook:
    book = Codebook(codes, 3, update, **options).double()
    nn.init.normal_(book.e)
    return book


def said(n: int = 2) -> Tensor:
    """What an encoder may say, (n, 3, 4, 2)."""
    return torch.randn(n, 3, 4, 2, dtype=torch.float64)


def vectors(z: Tensor) -> Tensor:
    """(B, D, h, w) -> (B h w, D)."""
    return z.movedim(1, -1).flatten(0, -2)


# --- The codebook


@pytest.mark.equation("VQ-VAE (1)")
@pytest.mark.equation("VQ-VAE (2)")
@pytest.mark.parametrize("update", UPDATES)
def test_a_vector_becomes_the_nearest_code(update):
    book, z_e = codebook(update), 1000 + 0.01 * said()  # far from the origin and near to each other
    book.e.data.mul_(0.01).add_(1000)
    codes = book.nearest(z_e)
    for z, k in zip(vectors(z_e), codes.flatten().tolist(), strict=True):
        assert k == min(range(5), key=lambda j: (z - book.e[j]).norm().item())
    assert len(codes.unique()) > 2 and codes.shape == (2, 4, 2)
    z_q = book.embed(codes)
    assert torch.equal(vectors(z_q), book.e[codes.flatten()])
    assert torch.equal(book.nearest(z_q), codes)


def test_in_half_precision_the_nearest_is_found_as_in_full():
    book, z_e = codebook(codes=200).float(), said(20).float()
    expected = book.nearest(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(z_e), expected)


@pytest.mark.equation("VQ-VAE (straight-through)")
def test_straight_through_is_z_q_with_the_identity_for_a_gradient():
    z_e, z_q, weight = (said().requires_grad_() for _ in range(3))
    out = straight_through(z_e, z_q)
    assert torch.equal(out, z_q)  # not but for rounding
    (out.square() * weight.detach()).sum().backward()
    assert torch.equal(z_e.grad, 2 * z_q.detach() * weight.detach()) and z_q.grad is None


@pytest.mark.equation("VQ-VAE (3)")
@pytest.mark.parametrize("update", UPDATES)
def test_the_losses_are_distances_and_each_reaches_what_it_trains(update):
    book, z_e = codebook(update), said().requires_grad_()
    losses = book.losses(z_e, book.embed(book.nearest(z_e)))
    expected = [sum((z - e).square().sum() for z, e in zip(vectors(z), book.e[book.nearest(z).flatten()], strict=True))
                / z.numel() for z in z_e.detach().split(1)]  # fmt: skip
    assert losses.keys() == ({"codebook", "commitment"} if update == "gradient" else {"commitment"})
    for loss in losses.values():
        torch.testing.assert_close(loss, torch.stack(expected))

    grads = torch.autograd.grad(losses["commitment"].sum(), [z_e, *book.parameters()], allow_unused=True)
    assert grads[0].abs().min() > 0 and set(grads[1:]) <= {None}
    if update == "gradient":
        grads = torch.autograd.grad(losses["codebook"].sum(), [z_e, book.e], allow_unused=True)
        used = torch.zeros(5, dtype=torch.bool).index_fill(0, book.nearest(z_e).flatten(), True)
        assert grads[0] is None and torch.equal(grads[1].abs().amin(1) > 0, used)


@pytest.mark.equation("VQ-VAE (moving averages)")
def test_averages_without_a_past_are_a_step_of_k_means():
    book, z_e = codebook(decay=0.0, eps=0.0, codes=9), said()
    codes, before = book.nearest(z_e), book.e.clone()
    book.update(z_e, codes)
    unused = 0
    for k in range(9):
        own = vectors(z_e)[codes.flatten() == k]
        unused += len(own) == 0
        torch.testing.assert_close(book.e[k], own.mean(0) if len(own) else before[k], rtol=1e-13, atol=1e-13)
        assert book.N[k] == len(own)
    assert 0 < unused < 8


@pytest.mark.equation("VQ-VAE (moving averages)")
def test_averages_with_a_past_and_smoothing_are_the_formula():
    book, gamma, eps = codebook(decay=0.75, eps=0.1), 0.75, 0.1
    book.N.copy_(torch.arange(1.0, 6)), book.m.copy_(torch.randn(5, 3))
    N, m = book.N.tolist(), [list(row) for row in book.m.tolist()]
    for _ in range(3):
        z_e = said()
        codes = book.nearest(z_e)
        book.update(z_e, codes)
        pairs = list(zip(vectors(z_e).tolist(), codes.flatten().tolist(), strict=True))
        for i in range(5):
            own = [z for z, k in pairs if k == i]
            N[i] = gamma * N[i] + (1 - gamma) * len(own)
            m[i] = [gamma * m[i][d] + (1 - gamma) * sum(z[d] for z in own) for d in range(3)]
        n = sum(N)
        e = [[m[i][d] / ((N[i] + eps) / (n + 5 * eps) * n) for d in range(3)] for i in range(5)]
        torch.testing.assert_close(book.e, torch.tensor(e, dtype=torch.float64))


def test_averages_reach_the_means_of_clusters_by_steps_alone():
    centres = torch.tensor([[2.0, 0, 0], [-2, 0, 0], [0, 2, 0], [0, 0, 2], [0, -2, -2]], dtype=torch.float64)
    book = codebook(decay=0.9)
    book.e.copy_(centres + 0.5 * torch.randn(5, 3))
    book.m.copy_(book.e)
    z_e = centres.mT[None, :, :, None].expand(4, -1, -1, 2)
    for _ in range(200):
        book.update(z_e, book.nearest(z_e))
    torch.testing.assert_close(book.e, centres, rtol=0, atol=1e-4)


def test_a_gradient_moves_no_averages_and_counts_all_the_same():
    book, z_e = codebook("gradient", decay=0.0), said()
    before, codes = book.e.clone(), book.nearest(z_e)
    book.update(z_e, codes)
    assert torch.equal(book.e, before) and torch.equal(book.N, torch.bincount(codes.flatten(), minlength=5).double())


@pytest.mark.parametrize("update", UPDATES)
def test_dead_codes_take_the_given_vectors_and_no_others(update):
    book, z_e, chosen = codebook(update), said(), torch.tensor([7, 0, 15, 3, 3])
    book.N.copy_(torch.tensor([0, 1, 0.96875, 7.90625, 0.125]))  # 2 on average
    before = book.e.clone()
    dead = book.revive(z_e, chosen, least=0.5)
    assert dead.tolist() == [True, False, True, False, True] and book.N.tolist() == [2, 1, 2, 7.90625, 2]
    assert torch.equal(book.e[dead], vectors(z_e)[[7, 15, 3]]) and torch.equal(book.e[~dead], before[~dead])
    if book.m is not None:
        assert torch.equal(book.m[dead] / book.N[dead, None], book.e[dead])
    assert not book.revive(z_e, chosen, least=0.3).any()


def test_perplexity_is_the_number_of_codes_in_use():
    book = codebook()
    assert book.perplexity(torch.arange(5).repeat(2, 3)).item() == pytest.approx(5, rel=1e-12)
    assert book.perplexity(torch.full((2, 3), 4)).item() == 1
    assert book.perplexity(torch.tensor([0, 0, 0, 1])).item() == pytest.approx(4 / 3**0.75, rel=1e-12)


# --- The networks


def test_a_residual_block_is_the_formula():
    block, x = Residual(3).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    inner = nn.functional.conv2d(x.clamp(min=0), block[1].weight, block[1].bias, padding=1).clamp(min=0)
    outer = torch.einsum("oi,bihw->bohw", block[3].weight[:, :, 0, 0], inner) + block[3].bias[:, None, None]
    torch.testing.assert_close(block(x), x + outer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_images_become_grids_of_codes_and_the_same_image_by_either_road(factor):
    net = small((16, 8), factor=factor)
    x = torch.randn(3, 2, 16, 8, dtype=torch.float64)
    out = net(x)
    assert net.grid == (16 // factor, 8 // factor) and net.shape == shape_of(net) == (2, 16, 8)
    assert out.x.shape == x.shape and out.codes.shape == (3, *net.grid) and out.z_e.shape == (3, 3, *net.grid)
    assert torch.equal(out.codes, net.encode(x)) and torch.equal(out.z_q, net.embed(out.codes))
    assert torch.equal(out.x, net.decode(net.embed(net.encode(x))))
    assert small(28, codes=8).grid == (7, 7)
    logits = PixelCNN(5, net.grid, channels=4, layers=2)(out.codes)
    assert logits.shape == (3, 5, *net.grid)


def test_it_has_the_layers_of_the_paper():
    net = VQVAE(32, codes=512, code_channels=64, channels=256)
    strided = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m.stride == (2, 2)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in strided] == [
        (3, 256, (4, 4)), (256, 256, (4, 4)), (256, 256, (4, 4)), (256, 3, (4, 4))
    ]  # fmt: skip
    assert sum(isinstance(m, Residual) for m in net.modules()) == 4


@pytest.mark.parametrize("update", UPDATES)
def test_the_reconstruction_trains_encoder_and_decoder_and_no_codes(update):
    net = small(update=update)
    x = torch.randn(3, 2, 8, 4, dtype=torch.float64)
    out = net(x)
    (out.x - x).square().sum().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {name for name, _ in net.named_parameters() if not name.startswith("codebook")}


@pytest.mark.parametrize("update", UPDATES)
def test_forward_changes_nothing_and_a_checkpoint_carries_the_averages(update):
    net, other, x = small(update=update), small(update=update), torch.randn(3, 2, 8, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    out = net.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.codebook.update(out.z_e, out.codes)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"codebook.{name}" for name in ("N", "m", "e")[: None if update == "average" else 1]}
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x).x, net(x).x)


@pytest.mark.parametrize("update", UPDATES)
def test_it_learns_four_images_by_heart(update):
    net = VQVAE(4, 1, codes=8, code_channels=4, channels=16, blocks=1, factor=2, update=update, decay=0.9)
    x = torch.randn(4, 1, 4, 4).sign()
    optimizer, errors = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for step in range(60):
        out = net(x)
        error, parts = (out.x - x).square().mean(), net.codebook.losses(out.z_e, out.z_q)
        loss = error + parts.get("codebook", torch.zeros(4)).mean() + 0.25 * parts["commitment"].mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        net.codebook.update(out.z_e, out.codes)
        if step % 10 == 9:
            net.codebook.revive(out.z_e, torch.randint(out.codes.numel(), (8,)))
        errors.append(error.item())
    assert errors[-1] < errors[0] / 2 and net.codebook.perplexity(out.codes) > 2


# --- Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 30}, ["30x30 with factor = 4", "30 is not divisible by 4", "nearest legal sizes: 28, 32"]),
        ({"image_size": (8, 3), "factor": 8}, ["8x3", "nearest legal sizes: 8"]),
        ({"image_size": (8,)}, ["image_size = (8,)"]),
        ({"image_size": 0}, ["image_size[0] = 0"]),
        ({"factor": 3}, ["factor = 3", "2, 4, 8"]),
        ({"in_channels": 0}, ["in_channels = 0"]),
        ({"codes": 0}, ["codes = 0"]),
        ({"code_channels": 1.5}, ["code_channels = 1.5"]),
        ({"channels": True}, ["channels = True"]),
        ({"blocks": 101}, ["blocks = 101", "at most 100"]),
        ({"update": "ema"}, ["update = 'ema'", "gradient, average"]),
        ({"decay": 1.0}, ["decay = 1 must lie in [0, 1)"]),
        ({"eps": math.nan}, ["eps = nan"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_does(options, words):
    with pytest.raises(ValueError) as error:
        VQVAE(**{"image_size": 8, "channels": 4} | options)
    for word in words:
        assert word in str(error.value)


def test_inputs_that_do_not_fit_are_refused():
    net, x = small(), torch.zeros(3, 2, 4, 8, dtype=torch.float64)
    for refused in (net, net.encode):
        with pytest.raises(ValueError, match=r"x has shape \(3, 2, 4, 8\); this network takes \(B, 2, 8, 4\)"):
            refused(x)
    with pytest.raises(ValueError, match=r"codes have shape \(3, 1, 2\); this network takes \(B, 2, 1\)"):
        net.embed(torch.zeros(3, 1, 2).long())
