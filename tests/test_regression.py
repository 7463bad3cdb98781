"""ddpm/training/tasks/regression.py: the loss by hand, least squares, what is refused, what is shown."""

import pytest
import torch
from torch import nn

from ddpm.data import Scenes, scenes
from ddpm.data.conditions import LUMA
from ddpm.data.dataset import ImageData
from ddpm.data.scenes import FAR, NEAR
from ddpm.randomness import Keyed
from ddpm.sources.predicted import Predicted, predicted_in_batches
from ddpm.training.task import trial_loss
from ddpm.training.tasks.regression import Pair, Regression
from models.unet import UNet

CPU = torch.device("cpu")
PIXELS = torch.randint(0, 256, (12, 3, 4, 6), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


class Linear(nn.Module):
    """Each pixel of y is linear in that pixel of x; whatever t."""

    takes, num_classes = (), None

    def __init__(self, c_in: int = 3, c_out: int = 1) -> None:
        super().__init__()
        self.shape, self.out_channels = (c_in, 4, 6), c_out
        self.conv = nn.Conv2d(c_in, c_out, 1)
        self.times: set[int] = set()

    def forward(self, x, t):
        self.times |= set(t.tolist())
        return self.conv(x)


def pictures(condition: str | None = "gray", channels: int = 3) -> ImageData:
    return ImageData("pictures", "all", PIXELS[:, :channels], condition=condition, validation=0.25)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Scenes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "BLOCK", 10)
        return Scenes(tmp_path_factory.mktemp("data"), count=10, image_size=8, condition="depth", validation=0.3)


def task(model: nn.Module | None = None, **parts: float) -> Regression:
    return Regression(model or Linear(), parts or {"squared": 1.0})


@pytest.mark.equation("Regression (loss)")
def test_the_loss_by_hand():
    model = Linear(1, 2)
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([2.0, -1.0])[:, None, None, None])
        model.conv.bias.copy_(torch.tensor([0.5, 0.0]))
    x, y = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[2.0, -1.5]], [[-1.05, 0.0]]]])
    # f = (2.5, -1.5) and (-1, 1): errors 0.5, 0 and 0.05, 1
    of = task(model, squared=1.0, absolute=0.5, huber=2.0)
    of.unit = 10.0
    losses = of.losses(Pair(x=x, y=y), 0.0)
    expected = {
        "squared": (0.25 + 0.0025 + 1) / 4,
        "absolute": 1.55 / 4,
        "huber": (0.1 * 0.45 + 0.05**2 / 2 + 0.1 * 0.95) / 4,
        "error": 10 * 1.55 / 4,
    }
    assert {name: part.item() for name, part in losses.items()} == pytest.approx(expected, rel=1e-5)
    sum_ = expected["squared"] + 0.5 * expected["absolute"] + 2 * expected["huber"]
    assert of.total(losses).item() == pytest.approx(sum_, rel=1e-5)  # the error is not trained
    assert not losses["error"].requires_grad and model.times == {0}
    assert list(task(model, squared=0.0, huber=1.0).losses(Pair(x=x, y=y), 0.0)) == ["huber", "error"]


@pytest.mark.parametrize("kind", ["gray", "edges"])
def test_a_linear_network_reaches_the_least_squares(kind):
    torch.manual_seed(0)
    data, of = pictures(kind), task()
    of.check(data)
    drawn = of.draw(data.batch(data.train), Keyed(0), 0.0)
    search = torch.optim.LBFGS(of.model.parameters(), max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = of.total(of.losses(drawn, 0.0)).mean()
        loss.backward()
        return loss

    search.step(closure)
    X = torch.cat([drawn.x.movedim(1, -1).reshape(-1, 3), torch.ones(len(drawn.x) * 24, 1)], 1).double()
    exact = torch.linalg.lstsq(X, drawn.y.movedim(1, -1).reshape(-1, 1).double()).solution[:, 0].float()
    found = torch.cat([of.model.conv.weight.detach().flatten(), of.model.conv.bias.detach()])
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    if kind == "gray":
        torch.testing.assert_close(found, torch.tensor([*LUMA, 0.0]), atol=1e-4, rtol=0)


def test_a_depth_is_learned_from_its_picture_and_its_error_is_a_length(few):
    torch.manual_seed(0)
    unet = UNet(8, 3, 1, channels=4, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=2)
    of = task(unet, absolute=1.0)
    of.check(few)
    assert of.unit == few.condition_unit == (FAR - NEAR) / 2
    batch = few.batch(few.train)
    drawn = of.draw(batch, Keyed(0), 0.0)
    depth, _ = few.surfaces(few.train)
    with torch.no_grad():
        for p in unet.conv_out.parameters():
            p.zero_()
        far = of.losses(drawn, 0.0)["error"]  # of a network that says the middle, whatever it sees
    torch.testing.assert_close(far, (depth - (NEAR + FAR) / 2).abs().mean((1, 2, 3)))
    assert torch.equal(drawn.y, batch.condition.image) and drawn.y.shape == (7, 1, 8, 8)
    loss = trial_loss(of, few, 2, CPU)
    loss.backward()
    assert loss > 0 and any(p.grad.abs().sum() > 0 for p in unet.parameters() if p.grad is not None)


def test_what_is_shown_are_pictures_what_is_true_and_what_is_predicted(few, tmp_path):
    unet = UNet(8, 3, 1, channels=4, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=2)
    with torch.no_grad():
        unet.conv_out.bias.fill_(0.25)
    of = task(unet)
    tiles = of.preview(3, few, 0, "fp32")
    assert tiles.shape == (3, 3, 24, 8) and (tiles[:, :, 16:] == 0.25).all()
    batch = few.batch(few.held_out)
    assert torch.equal(tiles[:, :, :8], batch.x) and torch.equal(tiles[:, 1, 8:16], batch.condition.image[:, 0])
    source = of.source(few, 0, CPU)
    assert isinstance(source, Predicted) and not source.like_data and source.classes([0]) is None
    assert torch.equal(source.condition_images(range(2)), batch.x[:2]) and (source.draw(range(4)) == 0.25).all()
    assert torch.equal(predicted_in_batches(unet, batch.x, CPU, batch=2), torch.full((3, 1, 8, 8), 0.25))
    assert of.source(None, 0, CPU) is None
    of.draw_results(tmp_path, few)
    assert (tmp_path / "predictions.png").stat().st_size > 0


def test_what_means_nothing_is_refused():
    for parts, said in (
        ({"ssim": 1.0}, "'ssim' is not known; allowed: squared, absolute, huber"),
        ({"squared": -1.0}, "parts.squared = -1.0 must be >= 0"),
        ({"squared": 0.0}, "nothing is trained"),
    ):
        with pytest.raises(ValueError, match=said):
            Regression(Linear(), parts)
    for model, data, said in (
        (Linear(), pictures(None), "data.condition=null needs the image .* allowed: low_resolution, gray, edges$"),
        (Linear(3, 4), pictures("mask"), "data.condition=mask is impossible: holes are drawn by chance"),
        (Linear(1, 1), pictures(), r"takes images of \(C, H, W\) = \(1, 4, 6\), but the data are \(3, 4, 6\)"),
        (Linear(3, 2), pictures(), "model.out_channels = 2, but data.condition=gray has 1; set model.out_channels=1"),
    ):
        with pytest.raises(ValueError, match=said):
            task(model).check(data)
    told = Linear()
    told.takes = ("image",)
    with pytest.raises(ValueError, match="takes nothing but the picture, not image"):
        task(told).check(pictures())
