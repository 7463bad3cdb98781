"""models/gan.py and models/discriminator.py: forward passes written out, patches, penalties, rows left alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data import Digits
from ddpm.data.batch import Condition
from ddpm.training.task import must_take
from models.discriminator import PatchDiscriminator, fitted_layers
from models.gan import Discriminator, Generator

SIZES = [8, 16, 28, 64, (12, 8), 9, 1]


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def group_normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    grouped = x.reshape(len(x), norm.num_groups, -1)
    unit = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    return unit.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


def randomised(network: nn.Module) -> nn.Module:
    """Norms and biases of all values, so that none hides."""
    for p in network.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 0.5, 0.5)
    return network


# --- The generator


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_generator_is_what_it_says(num_classes):
    net = randomised(Generator((12, 16), 2, codings=5, channels=4, num_classes=num_classes, groups=2))
    z, y = torch.randn(3, 5), None if num_classes is None else torch.tensor([2, 0, 1])
    told = z if y is None else torch.cat([z, net.class_embedding.weight[y]], 1)
    h = (told @ net.from_z.weight.T + net.from_z.bias).reshape(3, 16, 3, 4)
    h = F.silu(group_normalised(h, net.norms[0]))
    for up, norm in zip(net.up, net.norms[1:], strict=True):
        h = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), up.conv.weight, up.conv.bias, padding=1)
        h = F.silu(group_normalised(h, norm))
    x = F.conv2d(h, net.conv_out.weight, net.conv_out.bias, padding=1).tanh()
    torch.testing.assert_close(net.decode(z, y), x, atol=1e-5, rtol=1e-5)
    assert [up.conv.weight.shape[:2] for up in net.up] == [(8, 16), (4, 8)] and x.shape == (3, *net.shape)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_and_every_row_for_itself(size):
    options = {"channels": 8, "num_classes": 4}
    generator, judge = Generator(size, 1, **options), Discriminator(size, 1, **options)
    z, y = torch.randn(3, 64), torch.tensor([0, 3, 1])
    x = generator.decode(z, y)
    logits = judge(x, y)
    assert x.shape == (3, *generator.shape) and logits.shape == (3,)
    torch.testing.assert_close(generator.decode(z[1:2], y[1:2]), x[1:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(judge(x[1:2], y[1:2]), logits[1:2], atol=1e-5, rtol=0)


def test_classes_reach_both():
    generator, judge = Generator(8, num_classes=10, channels=8), Discriminator(8, num_classes=10, channels=8)
    z, y = torch.randn(4, 64), torch.arange(4)
    x = generator.decode(z, y)
    assert (generator.decode(z, y.roll(1)) - x).abs().amax((1, 2, 3)).min() > 1e-3
    assert (judge(x, y.roll(1)) - judge(x, y)).abs().min() > 1e-4
    assert torch.equal(judge(x, Condition(classes=y)), judge(x, y))
    for call in (lambda: generator.decode(z), lambda: judge(x), lambda: Discriminator(8, channels=8)(x, y)):
        with pytest.raises(ValueError, match="y must be given exactly when"):
            call()


def test_they_take_the_data_that_they_say():
    data = Digits()
    made = [
        Generator(8, num_classes=10), Discriminator(8, num_classes=10), Discriminator(8),
        PatchDiscriminator(1, layers=None, image_size=8), PatchDiscriminator(1, layers=1),
    ]  # fmt: skip
    for network in made:
        must_take(network, data)
    assert [network.takes for network in made] == [("classes",), ("classes",), (), (), ()]
    for network, words in [
        (Generator(16), "the model takes images"), (Discriminator(8, num_classes=9), "the data have 10 classes"),
        (PatchDiscriminator(3, layers=None, image_size=8), "the model takes images"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            must_take(network, data)


def test_counts_at_28_pixels():
    counts = [sum(p.numel() for p in network.parameters()) for network in (Generator(28), Discriminator(28))]
    assert counts == [1_185_665, 1_312_321]


# --- The discriminator


@pytest.mark.equation("cGAN (projection)")
def test_a_class_is_told_by_projection():
    torch.manual_seed(0)
    judge = randomised(Discriminator(8, 2, channels=4, num_classes=3))
    x, y = torch.randn(5, *judge.shape), torch.tensor([2, 0, 1, 1, 2])
    phi, V = judge.features(x), judge.class_embedding.weight  # (5, 16), (3, 16)
    one_hot = torch.eye(3)[y]
    psi = phi @ judge.psi.weight[0] + judge.psi.bias
    torch.testing.assert_close(judge(x, y), torch.einsum("bk,kf,bf->b", one_hot, V, phi) + psi)


@torch.no_grad()
def test_the_features_of_a_discriminator_are_what_they_say():
    judge = randomised(Discriminator((14, 12), 2, channels=4))
    x = h = torch.randn(3, *judge.shape)
    for i, conv in enumerate(judge.convolutions):
        h = leaky(F.conv2d(h, conv.weight, conv.bias, stride=2 if i else 1, padding=1))
    assert [conv.weight.shape for conv in judge.convolutions] == [(4, 2, 3, 3), (4, 4, 4, 4), (8, 4, 4, 4)]
    assert h.shape == (3, 8, 3, 3)
    torch.testing.assert_close(judge.features(x), leaky(judge.to_features(h.flatten(1))))


@pytest.mark.parametrize(
    "judge",
    [Discriminator(8, 1, channels=4, num_classes=2), PatchDiscriminator(1, 4, 1, groups=None, image_size=8)],
    ids=["images", "patches"],
)
def test_a_penalty_on_gradients_has_its_gradient(judge):
    """With biases 0 the logits are of degree 1 in every weight, so |grad_x f|^2 is of degree 2: w . dR/dw = 2 R.

    The class vectors and the last layer are one weight in this, for their products with the features are summed.
    """
    x, y = torch.randn(4, *judge.shape, requires_grad=True), torch.tensor([0, 1, 0, 1]) if judge.num_classes else None
    (gradient,) = torch.autograd.grad(judge(x, y).sum(), x, create_graph=True)
    R = gradient.square().sum()
    R.backward()
    along = {name: (p * p.grad).sum() for name, p in judge.named_parameters() if p.ndim > 1}
    if y is not None:
        along["psi.weight"] = along["psi.weight"] + along.pop("class_embedding.weight")
    assert R > 0 and len(along) >= 3
    for name, value in along.items():
        torch.testing.assert_close(value, 2 * R.detach(), rtol=1e-3, atol=0, msg=name)


@pytest.mark.parametrize(
    "judge", [Discriminator(32), PatchDiscriminator(1, groups=None, layers=2)], ids=["images", "patches"]
)
@torch.no_grad()
def test_logits_are_of_order_one_at_first(judge):
    """Nothing but the first weights keeps the scale where there are no norms."""
    logits = judge(torch.randn(64, 1, 32, 32))
    assert 0.3 < logits.square().mean().sqrt() < 4


# --- The discriminator of patches


@pytest.mark.equation("PatchGAN (patch)")
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_output_sees_its_patch_and_all_of_it(layers):
    size = 16 * 2**layers
    judge = PatchDiscriminator(1, channels=2, layers=layers, groups=None).double()
    x = torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    out = judge(x)
    middle = out.shape[2] // 2
    out[0, 0, middle, middle].backward()
    r = {1: 16, 2: 34, 3: 70}[layers]
    assert judge.patch == r == 1 + 3 * sum(2**i for i in range(layers)) + 2 * 3 * 2**layers
    for rows in (x.grad[0, 0].abs().sum(1), x.grad[0, 0].abs().sum(0)):
        seen = rows.nonzero().flatten()
        assert (seen[-1] - seen[0] + 1, len(seen)) == (r, r)


@torch.no_grad()
@pytest.mark.parametrize("groups", [2, None])
def test_the_patch_discriminator_is_the_published_one_but_for_its_norms(groups):
    judge = randomised(PatchDiscriminator(2, channels=4, layers=2, groups=groups))
    x = h = torch.randn(3, 2, 20, 16)
    widths = []
    for i, (conv, norm) in enumerate(zip(judge.convolutions, judge.norms, strict=True)):
        h = F.conv2d(h, conv.weight, conv.bias, stride=1 if i == 2 else 2, padding=1)
        h = leaky(group_normalised(h, norm) if groups and i else h)
        widths.append(conv.weight.shape[:2])
        assert (conv.bias is None) == (groups is not None and i > 0)
    out = F.conv2d(h, judge.conv_out.weight, judge.conv_out.bias, padding=1)
    assert widths == [(4, 2), (8, 4), (16, 8)] and out.shape == (3, 1, 3, 2)
    torch.testing.assert_close(judge(x), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(judge(x[1:2]), out[1:2], atol=1e-5, rtol=1e-5)  # no row knows of another


def test_the_count_of_the_published_one():
    """pix2pix's, of image and label side by side; of each norm, whether of batches or groups, the same parameters."""
    assert sum(p.numel() for p in PatchDiscriminator(6).parameters()) == 2_768_705


def test_layers_are_fitted_so_that_a_patch_is_no_larger_than_the_image():
    expected = {6: 1, 15: 1, 16: 1, 33: 1, 34: 2, 69: 2, 70: 3, 512: 3}
    assert {size: fitted_layers(size) for size in expected} == expected
    assert PatchDiscriminator(1, 2, None, 2, image_size=(70, 40)).layers == 2


# --- Refused


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: Generator(8, codings=0), "codings = 0 must be an integer >= 1"),
     (lambda: Generator(8, channels=12, groups=5), "groups = 5 does not divide"),
     (lambda: Generator((8, 8, 8)), "must be one integer >= 1, or two"),
     (lambda: Generator(8, num_classes=0), "num_classes = 0 must be"),
     (lambda: Generator(8).decode(torch.zeros(2, 3)), r"z has shape \(2, 3\); this network takes \(B, 64\)"),
     (lambda: Discriminator(8, channels=0), "channels = 0 must be"),
     (lambda: Discriminator(8)(torch.zeros(2, 1, 8, 9)), r"\(2, 1, 8, 9\); this network takes \(B, 1, 8, 8\)"),
     (lambda: PatchDiscriminator(layers=None), "fitted to an image_size, which is missing; or set layers"),
     (lambda: PatchDiscriminator(layers=0), "layers = 0 must be an integer >= 1"),
     (lambda: PatchDiscriminator(layers=4, image_size=28), "of 28x28 pixels; allowed: layers of at most 3, or images "
      "of at least 48 pixels"),
     (lambda: PatchDiscriminator(image_size=5), "of 5x5 pixels; allowed: images of at least 6 pixels"),
     (lambda: PatchDiscriminator(1, 2, 1, 2)(torch.zeros(2, 1, 5, 9)), "layers = 1 leaves nothing of an image of 5x9"),
     (lambda: PatchDiscriminator(1, 2, 1, 2)(torch.zeros(2, 3, 8, 8)), r"takes \(B, 1, H, W\)"),
     (lambda: PatchDiscriminator(1, 2, 1, 2, 8)(torch.zeros(2, 1, 8, 9)), r"takes \(B, 1, 8, 8\)"),
     (lambda: PatchDiscriminator(1, 2, 1, 2)(torch.zeros(2, 1, 8, 8), torch.zeros(2).long()), "y must be given")],
    ids=range(15),
)  # fmt: skip
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
