"""task=contrastive: its loss in closed form, the space that two encoders share, and what it refuses."""

import math

import pytest
import torch
from test_words import WORDS, captioned

from ddpm.randomness import Keyed
from ddpm.sources.base import Silent
from ddpm.training.step import renormalise
from ddpm.training.tasks.contrastive import Contrastive, Pairs, contrastive
from models.dual_encoder import DualEncoder
from models.text import TextEncoder
from models.tokenizer import END, START, BytePairs, learn

ALL = torch.ones(3, 3, dtype=torch.bool)


def unit(*degrees: float) -> torch.Tensor:
    """Vectors of length 1 in the plane, (B, 2), float64."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def encoders(tokenizer: BytePairs, size: int = 4) -> DualEncoder:
    torch.manual_seed(0)
    text = TextEncoder(tokenizer.vocabulary, tokenizer.length, channels=8, layers=1, heads=2)
    model = DualEncoder(size, text, 1, features=4, channels=8, channel_mults=(1,), groups=4)
    for name, p in model.named_parameters():
        if "norm" not in name and "scale" not in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> BytePairs:
    return learn(WORDS, length=12)


@pytest.mark.equation("CLIP (loss)")
def test_the_loss_is_the_cross_entropy_both_ways_by_hand():
    u, v, s = unit(0, 90, 180), unit(30, 50, 240), 2.0
    z = [[s * math.cos(math.radians(a - b)) for b in (30, 50, 240)] for a in (0, 90, 180)]
    of_picture = [math.log(sum(map(math.exp, z[i]))) - z[i][i] for i in range(3)]
    of_text = [math.log(sum(math.exp(z[j][i]) for j in range(3))) - z[i][i] for i in range(3)]
    expected = torch.tensor(of_picture, dtype=torch.float64) / 2 + torch.tensor(of_text, dtype=torch.float64) / 2
    torch.testing.assert_close(contrastive(u, v, torch.tensor(s), ALL), expected)
    assert not math.isclose(sum(of_picture), sum(of_text), rel_tol=1e-2), "else one way alone would pass"
    swapped = contrastive(v, u, torch.tensor(s), ALL)
    torch.testing.assert_close(swapped, expected)


@pytest.mark.equation("CLIP (loss)")
def test_what_cannot_be_told_apart_costs_the_logarithm_of_the_batch_and_what_can_nothing():
    same = unit(20, 20, 20)
    torch.testing.assert_close(contrastive(same, same, torch.tensor(7.0), ALL), same.new_full((3,), math.log(3)))
    far = unit(0, 120, 240)
    assert contrastive(far, far, torch.tensor(100.0), ALL).max() < 1e-20


@pytest.mark.equation("CLIP (loss)")
def test_equal_captions_are_no_wrong_answers():
    apart = torch.tensor([[False, False, True], [False, False, True], [True, True, False]])
    same = unit(20, 20, 20)
    expected = same.new_tensor([math.log(2), math.log(2), math.log(3)])  # the first two do not compete
    torch.testing.assert_close(contrastive(same, same, torch.tensor(7.0), apart), expected)
    alike = contrastive(same, same, torch.tensor(7.0), ~ALL)
    assert alike.eq(0).all() and alike.isfinite().all()


@pytest.mark.equation("CLIP (loss)")
def test_its_gradient_moves_a_picture_from_the_texts_that_it_could_be_taken_for_to_its_own():
    u, v, s = unit(0, 90, 180).requires_grad_(), unit(30, 60, 240), torch.tensor(2.0, dtype=torch.float64)
    contrastive(u, v, s, ALL).sum().backward()
    z = s * u.detach() @ v.mT
    p, q = z.softmax(1), z.softmax(0)  # of a picture's text, of a text's picture
    expected = s / 2 * (p + q - 2 * torch.eye(3, dtype=torch.float64)) @ v
    torch.testing.assert_close(u.grad, expected)


@pytest.mark.equation("CLIP (similarity)")
def test_both_encoders_end_on_the_sphere_and_texts_are_read_to_their_end(tokenizer):
    model, ids = encoders(tokenizer), tokenizer(WORDS)
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    u, v = model(x, ids)
    torch.testing.assert_close(torch.stack([u, v]).norm(dim=2), torch.ones(2, 3))
    f = model.image(x, torch.zeros(3))
    torch.testing.assert_close(u, f / f.norm(dim=1, keepdim=True))
    ends = [row.index(tokenizer.end) for row in ids.tolist()]
    g = torch.stack([model.text(ids)[i, end] for i, end in enumerate(ends)]) @ model.project.weight.mT
    torch.testing.assert_close(v, g / g.norm(dim=1, keepdim=True))
    assert len(set(ends)) > 1, "else any one place would do"
    assert model.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    renormalise(model)
    assert model.scale.item() == pytest.approx(100)
    with pytest.raises(ValueError, match="features = 1: in a space of one dimension"):
        DualEncoder(4, model.text, features=1, channels=8, channel_mults=(1,), groups=4)


def test_a_step_is_computed_from_pictures_and_their_captions_and_equal_ones_are_found(tokenizer):
    data = captioned().in_words(tokenizer)
    task = Contrastive(encoders(tokenizer))
    task.check(data)
    batch = data.batch(torch.tensor([0, 1, 3]))  # 0 and 3 say the same
    drawn = task.draw(batch, Keyed(0), 0.0)
    losses = task.losses(drawn, 0.0)["loss"]
    u, v = task.model(batch.x, tokenizer([data.captions[i] for i in (0, 1, 3)]))
    apart = torch.tensor([[False, True, False], [True, False, True], [False, True, False]])
    torch.testing.assert_close(losses, contrastive(u, v, task.model.scale, apart))
    assert not torch.allclose(losses, contrastive(u, v, task.model.scale, ALL))
    twice = Pairs(x=batch.x[:1].expand(3, -1, -1, -1), ids=drawn.ids[:1].expand(3, -1))
    assert task.losses(twice, 0.0)["loss"].eq(0).all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrastive(u, v, task.model.scale, apart), losses, rtol=0, atol=1e-6)


def test_it_draws_nothing_and_says_what_it_needs(tokenizer):
    data, task = captioned(), Contrastive(encoders(tokenizer))
    with pytest.raises(ValueError, match="task=contrastive reads captions, and cubes has none as tokens"):
        task.check(data)
    swapped = tokenizer.ids | {START: tokenizer.end, END: tokenizer.start}
    with pytest.raises(ValueError, match="is not the highest of its ids"):
        task.check(data.in_words(BytePairs(tokenizer.merges, swapped, length=12)))
    with pytest.raises(ValueError, match="the model takes images"):
        Contrastive(encoders(tokenizer, 8)).check(data.in_words(tokenizer))
    source = task.source(data, 0, torch.device("cpu"))
    assert isinstance(source, Silent) and not source.draws and source.measures == ("retrieval",)
    assert task.preview(2, data, 0, "fp32") is None
    with pytest.raises(ValueError, match="DualEncoder draws no samples"):
        source.draw([0])
    assert task.couples_batch
