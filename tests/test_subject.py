"""A subject in few pictures: its data, its class beside it, the word that is new, and how alike samples are to it."""

import math

import pytest
import torch

from ddpm.data import ImageData, Subject, raycast, scenes
from ddpm.data.batch import Batch
from ddpm.data.encoded import encoded
from ddpm.data.prior_preservation import WithPrior
from ddpm.data.raycast import TEXTURES, textured
from ddpm.data.scenes import parse
from ddpm.diffusion import GaussianDiffusion
from ddpm.latent.codec import Continuous
from ddpm.metrics.subject import likeness, result
from ddpm.randomness import Keyed
from ddpm.schedules import cosine
from ddpm.training.tasks.diffusion import Diffusion, preserving
from models.tokenizer import BytePairs, learn

CAPTIONS = ("a red cube", "a blue cube", "two red cubes")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(scenes, "BLOCK", 40)


@pytest.fixture
def subject() -> Subject:
    return Subject(count=4, views=6, image_size=16)


# ---------------------------------------------------------------------------------------------------------- the data


def test_the_few_are_trained_on_and_the_views_held_out_with_captions_of_the_grammar(subject):
    assert subject.train.tolist() == [0, 1, 2, 3] and subject.held_out.tolist() == list(range(4, 10))
    colours = " ".join(scenes.COLOURS)
    for n, said in enumerate(subject.captions):
        assert said.split()[2:4] == ["sks", "sphere"] and said.count("sphere") == 1
        scene = parse(said.replace("sks", "matt orange"))  # but for the word it is a scene's own
        assert scene.solids == subject.layout.scene(n).solids and "orange" in colours
    assert len({tuple(p) for p in subject.layout.places[:, 0, :2].tolist()}) == 10
    words = [Subject(count=3, views=1, image_size=8, wording=w).captions[0].split() for w in ("size", "colour")]
    assert words[0][1:4] == [words[0][1], "sks", "sphere"] and words[1][:3] == ["a", "sks", "sphere"]
    assert Subject(count=3, views=1, image_size=8, wording="colour", word="ox").captions[0].startswith("an ox sphere")


@pytest.mark.equation("Texture (turns)")
def test_stripes_change_with_the_height_and_checks_around_too():
    r, angle = torch.tensor(0.8), torch.tensor([0.1, 0.1, 1.0, 1.0])
    y = torch.tensor([0.1, 0.5, 0.1, 0.5])  # bands of 0.4; 8 sectors of 0.785
    points = torch.stack([angle.cos(), y, angle.sin()], 1)
    of = {name: textured(points, r.expand(4), torch.full((4,), k)).tolist() for k, name in enumerate(TEXTURES)}
    assert of == {"plain": [False] * 4, "stripes": [False, True] * 2, "checks": [False, True, True, False]}


def test_the_subject_has_both_its_colours_and_other_solids_stand_in_its_place(subject):
    solids = subject._solids()
    plain = raycast.seen(raycast.Solids(*solids[:5]), 16)
    there = plain.masks[:, 1]
    differs = (subject.images != plain.picture).any(1)
    around = torch.nn.functional.max_pool2d(there.float(), 3, 1, 1) > 0  # whose rays may meet it, too
    assert differs.any() and not (differs & ~around).any()
    inside = subject.images.permute(0, 2, 3, 1)[there].float()
    blue = inside[:, 2] > inside[:, 1]  # purple, and not orange
    assert 0.2 < blue.float().mean() < 0.8
    others = subject.others(torch.tensor([5, 2]))
    assert others.shape == (2, 3, 16, 16) and not torch.equal(others, subject.images[[5, 2]])
    place = solids.place.clone()
    place[:, 0, 2] += 1.0
    turned = solids._replace(place=place)
    checks = [s._replace(texture=2 * (s.texture > 0).long()) for s in (solids, turned)]
    assert torch.equal(*(raycast.seen(s, 16).picture for s in (solids, turned)))  # stripes lie around it
    assert not torch.equal(*(raycast.seen(s, 16).picture for s in checks))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": 2}, "count=2 must be an integer in 3..10"),
        ({"views": 0}, "views=0 must be"),
        ({"texture": "plain"}, "choose one of stripes, checks"),
        ({"colours": ["red", "red"]}, "must be two different ones"),
        ({"word": "s k"}, "must be one word of letters"),
        ({"flip": True}, "set flip=false"),
        ({"image_size": 4}, "8 pixels and more"),
    ],
)
def test_options_that_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Subject(**wrong)


# -------------------------------------------------------------------------------------------------- the class beside it


def with_prior(subject: ImageData, M: int = 5) -> WithPrior:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (M, *subject.shape), generator=random, dtype=torch.uint8)
    return WithPrior(subject, images, [f"a sphere {n}" for n in range(M)])


def test_of_each_batch_every_other_one_is_of_the_class_and_all_have_their_turn(subject):
    data = with_prior(subject)
    orders = torch.stack([data.order(3, step, 6) for step in range(1, 21)])
    assert (orders[:, ::2] < 4).all() and (orders[:, 1::2] >= 10).all() and orders.max() < 15
    for part, n in ((orders[:, ::2].flatten(), 4), (orders[:, 1::2].flatten(), 5)):
        for turn in part.split(n):
            assert len(turn) < n or len(turn.unique()) == n
    assert torch.equal(orders[7], data.order(3, 8, 6)) and not torch.equal(orders[0], data.order(4, 1, 6))
    assert len(data.order(0, 1, 5)) == 5
    batch = data.batch(orders[0])
    assert batch.of_prior.tolist() == [False, True] * 3 and batch.x.shape == (6, 3, 16, 16)
    assert torch.equal(batch.x[0], subject.batch(orders[0, :1]).x[0])
    assert data.held_out.tolist() == subject.held_out.tolist() and len(data.train) == 4
    assert data.captions[10] == "a sphere 0" and data.identity()["sha256"] == subject.identity()["sha256"]
    assert data.identity()["beside"] != with_prior(subject, 6).identity()["beside"]
    with pytest.raises(ValueError, match="need 2 at least"):
        data.order(0, 1, 1)
    with pytest.raises(ValueError, match="both need one size"):
        WithPrior(subject, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"])


def test_latents_of_both_keep_their_turns_their_marks_and_the_scale_of_the_run_that_is_tuned(subject):
    class Halves(torch.nn.Module):
        shape, latent_shape = subject.shape, (3, 8, 8)

        def encode(self, x):
            z = torch.nn.functional.avg_pool2d(x, 2)
            return z, torch.full_like(z, -30.0)

    codec = Continuous(Halves(), scale=3.0, shift=0.25)
    data = with_prior(subject)
    of = encoded(data, codec, torch.device("cpu"), fit=False)
    order = data.order(3, 2, 6)
    assert torch.equal(of.order(3, 2, 6), order) and of.prior_count == 5
    batch = of.batch(order)
    assert batch.of_prior.tolist() == [False, True] * 3
    x = data.batch(order).x
    torch.testing.assert_close(batch.x, 3.0 * (torch.nn.functional.avg_pool2d(x, 2) - 0.25))
    assert of.codec.state() == codec.state() != encoded(data, codec, torch.device("cpu")).codec.state()
    alone = encoded(subject, codec, torch.device("cpu"))
    assert alone.batch(subject.train).of_prior is None and torch.equal(alone.order(3, 2, 3), subject.order(3, 2, 3))


@pytest.mark.equation("DreamBooth (2)")
def test_the_mean_over_a_batch_is_half_the_sum_of_both_expectations():
    losses, of_class = torch.tensor([1.0, 10.0, 3.0, 30.0]), torch.tensor([False, True, False, True])
    for prior in (0.0, 0.5, 1.0):
        weight = preserving(None, of_class, prior)
        assert (weight * losses).mean() * 2 == pytest.approx(2.0 + prior * 20.0)
    times = torch.tensor([0.5, 2.0, 1.0, 4.0])
    assert preserving(times, of_class, 0.5).tolist() == [0.5, 1.0, 1.0, 2.0]
    assert preserving(times, None, 0.5) is times and preserving(None, None, 0.5) is None


def test_a_task_weighs_the_class_and_refuses_a_weight_of_nothing(subject):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(()))

        def forward(self, x_t, t, y=None):
            return self.a * x_t

    task = Diffusion(Network(), GaussianDiffusion(cosine(T=20), clip_x_0=False), prior=0.25)
    data = with_prior(subject)
    drawn = task.draw(data.batch(data.order(0, 1, 4)), Keyed(0), 0.0)
    assert drawn.weight.tolist() == [1.0, 0.25, 1.0, 0.25]
    assert task.draw(Batch(data.batch(data.train).x), Keyed(0), 0.0).weight is None
    task.check(data)
    with pytest.raises(ValueError, match=r"task.prior = 0.25 weighs class pictures against those of a subject"):
        task.check(subject)
    with pytest.raises(ValueError, match="prior = -1 must be >= 0"):
        Diffusion(Network(), GaussianDiffusion(cosine(T=20)), prior=-1.0)


# ---------------------------------------------------------------------------------------------------------- the word


def test_a_new_word_is_one_token_and_all_other_texts_are_as_they_were():
    before = learn(CAPTIONS, length=12)
    after = before.with_words(["sks", "Zyx"])
    assert after.vocabulary == before.vocabulary + 2
    assert after.encode("a SKS cube") == [*before.encode("a"), before.vocabulary, *before.encode("cube")]
    assert after.encode("zyx") == [before.vocabulary + 1]
    for text in (*CAPTIONS, "asks", "sksx", "s ks"):
        assert after.encode(text) == before.encode(text)
    assert after.decode(after(["a sks cube"])[0]) == "a sks cube"
    again = BytePairs.from_dict(after.to_dict())
    assert again.encode("a sks zyx") == after.encode("a sks zyx") and "added" not in before.to_dict()
    assert {"a", "cube"} <= set(before.whole_words()) and {"sks", "zyx"} <= set(after.whole_words())
    assert all(len(before.encode(word)) == 1 for word in before.whole_words())
    for word, said in (("cube", "is one token already"), ("two words", "is 2 words"), ("x1", "is 2 words")):
        with pytest.raises(ValueError, match=said):
            before.with_words([word])
    with pytest.raises(ValueError, match="is one token already"):
        after.with_words(["sks"])


# ------------------------------------------------------------------------------------------------------- how alike


@pytest.mark.equation("DreamBooth (likeness)")
def test_likeness_is_the_mean_cosine_to_the_pictures_of_the_subject():
    real = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    drawn = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(likeness(drawn, real), torch.tensor([0.5, math.sqrt(0.5), -0.5]))


def test_the_share_is_0_for_other_solids_and_1_for_real_views():
    few, views, others = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 5.0]])
    for drawn, share in ((views, 1.0), (others, 0.0)):
        found = result(drawn.expand(3, -1), few, views, others)
        assert found.more["share"] == pytest.approx(share, abs=1e-6)
    assert found.real_vs_real == pytest.approx(2 / math.sqrt(5)) and "the floor: 0.196" in found.words
    assert "floor" not in result(views, few, views, None).more


def test_there_is_no_share_where_other_solids_look_as_real_views_do():
    few, drawn = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.3]]).expand(3, -1)
    views = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0]])
    found = result(drawn, few, views, views + torch.tensor([0.0, 0.01]))
    assert found.more["share"] is None and "too near the ceiling to tell the subject by" in found.words
    assert result(drawn, few, views, views - torch.tensor([5.0, 0.0])).more["share"] is not None
