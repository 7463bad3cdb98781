"""What is told in words: captions as tokens, the network that reads them, prompts, and what is not wanted."""

import sys

import pytest
import torch
from torch import Tensor

from ddpm import cli
from ddpm.commands.train.words import in_words, keep, must_have_a_reader, prompts_of
from ddpm.config import InvalidInput, compose, plain
from ddpm.data import ImageData
from ddpm.data.batch import Condition
from ddpm.data.encoded import encoded
from ddpm.diffusion import GaussianDiffusion
from ddpm.guidance.bound import ClassifierFree
from ddpm.latent.codec import Continuous
from ddpm.samplers import DDIM
from ddpm.schedules import cosine
from ddpm.sources.trained import TrainedSampler
from ddpm.training.task import must_take
from models.text import TextEncoder
from models.tokenizer import BytePairs, learn
from models.unet import UNet

CPU = torch.device("cpu")
WORDS = ("a red cube", "a blue cube", "two red cubes")


def captioned(n: int = 12, size: int = 4) -> ImageData:
    pixels = torch.randint(0, 256, (n, 1, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    data = ImageData("cubes", "all", pixels, validation=0.25)
    data.captions = tuple(WORDS[k % 3] for k in range(n))
    return data


def reading(tokenizer: BytePairs, drop: float = 0.1) -> UNet:
    """A network of 4x4 images with an encoder, of random weights throughout."""
    torch.manual_seed(0)
    text = TextEncoder(tokenizer.vocabulary, tokenizer.length, channels=8, layers=1, heads=2)
    model = UNet(4, 1, channels=8, channel_mults=(1,), blocks=1, attention_resolutions=(4,), groups=4, drop=drop,
                 dropout=0.0, text=text)  # fmt: skip
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> BytePairs:
    return learn(WORDS, length=12)


def test_samples_are_told_the_ids_of_their_captions(tokenizer):
    data = captioned().in_words(tokenizer)
    rows = torch.tensor([4, 0, 11])
    condition = data.batch(rows).condition
    assert condition.parts == ("tokens",)
    assert torch.equal(condition.tokens, tokenizer([data.captions[i] for i in rows.tolist()]))
    assert captioned().batch(rows).condition.parts == () and data.tokenizer is tokenizer
    must_take(reading(tokenizer), data)
    with pytest.raises(ValueError, match="must be given tokens"):
        must_take(reading(tokenizer), captioned())

    class Halves:
        shape, latent_shape = (1, 4, 4), (1, 2, 2)

        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :, ::2, ::2], x[:, :, ::2, ::2]

    of_latents = encoded(data, Continuous(Halves()), CPU)
    assert torch.equal(of_latents.batch(rows).condition.tokens, condition.tokens)


def test_a_network_with_an_encoder_reads_ids_as_it_does_what_the_encoder_makes_of_them(tokenizer):
    model, ids = reading(tokenizer), tokenizer(WORDS)
    x_t, t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 5, 9])
    of_ids = model(x_t, t, Condition(tokens=ids))
    torch.testing.assert_close(of_ids, model(x_t, t, Condition(tokens=model.text(ids))), rtol=0, atol=0)
    assert not torch.allclose(of_ids, model(x_t, t, Condition(tokens=ids.roll(1, 0))), atol=1e-3)
    first = torch.tensor([True, False, False])
    nulled = model(x_t, t, Condition(tokens=ids).nulled(first))
    others = model(x_t, t, Condition(tokens=ids.roll(1, 0)).nulled(first))
    assert torch.equal(nulled[0], others[0]) and torch.equal(nulled[1:], of_ids[1:])
    of_ids.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.text.blocks.parameters() if p.ndim > 1)
    with pytest.raises(ValueError, match="token_channels = 4, but text makes tokens of 8"):
        UNet(4, 1, channels=8, channel_mults=(1,), groups=4, token_channels=4, text=model.text)


def drawing(tokenizer: BytePairs, w: float | None = None, **asked: object) -> TrainedSampler:
    model, diffusion = reading(tokenizer), GaussianDiffusion(cosine(T=20), target="v", clip_x_0=False)
    guidance = None if w is None else ClassifierFree(w)
    return TrainedSampler(diffusion, model, DDIM(3), (1, 4, 4), 0, CPU, guidance=guidance, **asked)


def test_each_sample_is_told_its_prompt_whatever_is_drawn_with_it(tokenizer):
    ids = tokenizer(WORDS)
    together = drawing(tokenizer, prompts=ids).draw(range(6))
    for i, sample in enumerate(together):
        alone = drawing(tokenizer, prompts=ids[i % 3 :][:1]).draw([i])
        torch.testing.assert_close(alone[0], sample, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], drawing(tokenizer, prompts=ids[1:2]).draw([0])[0], atol=1e-2)
    data = captioned().in_words(tokenizer)
    of_data = drawing(tokenizer, data=data).draw(range(3))
    held_out = tokenizer([data.captions[i] for i in data.held_out.tolist()])
    torch.testing.assert_close(of_data, drawing(tokenizer, prompts=held_out).draw(range(3)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no data to take it from"):
        drawing(tokenizer)


def test_a_negative_prompt_is_what_guidance_leads_away_from(tokenizer):
    ids = tokenizer(WORDS)
    asked, other = ids[:1], ids[1:2]
    plain = drawing(tokenizer, prompts=asked).draw(range(2))
    for w in (0.0, 3.0):  # away from what is asked for: w has no say
        same = drawing(tokenizer, w, prompts=asked, negative=asked).draw(range(2))
        torch.testing.assert_close(same, plain, rtol=0, atol=1e-4)
    ignored = drawing(tokenizer, 0.0, prompts=asked, negative=other).draw(range(2))
    torch.testing.assert_close(ignored, drawing(tokenizer, prompts=other).draw(range(2)), rtol=0, atol=1e-4)
    away = drawing(tokenizer, 3.0, prompts=asked, negative=other).draw(range(2))
    assert not torch.allclose(away, drawing(tokenizer, 3.0, prompts=asked).draw(range(2)), atol=1e-2)


def test_data_without_captions_and_runs_without_words_are_refused(tmp_path):
    config = compose("train", ["experiment=text_scenes"])
    with pytest.raises(InvalidInput, match="cubes has no captions; data=scenes"):
        in_words(ImageData("cubes", "all", torch.zeros(4, 1, 4, 4, dtype=torch.uint8)), config, [])
    for words, said in (
        ("prompt=12", "was trained without words"),
        ("prompt=true", "must be a text, or a list"),
        ("prompt=[]", "must be a text"),
    ):
        with pytest.raises(InvalidInput, match=said):
            prompts_of(compose("sample", ["run=x", words]), tmp_path, "prompt", print)
    assert prompts_of(compose("sample", ["run=x"]), tmp_path, "prompt", print) is None
    with pytest.raises(InvalidInput, match=r"negative=\['a', 'b'\] must be one text"):
        prompts_of(compose("sample", ["run=x", "negative=[a,b]"]), tmp_path, "negative", print)


def test_a_network_without_an_encoder_is_refused_before_data_are_drawn_and_recipes_say_of_data_what_is_theirs():
    with pytest.raises(InvalidInput, match=r"tokenizer: models.dit.DiT reads no words; allowed: model=unet"):
        must_have_a_reader(compose("train", ["experiment=text_scenes", "model=dit"]), [])
    for words, without in (
        (["experiment=text_scenes"], ["red cube", "blue sphere", "green cone", "yellow cylinder"]),
        (["experiment=text_scenes", "data=emoji"], 100),
        (["experiment=contrastive_scenes", "data.without=[]"], []),
    ):
        config = compose("train", words)
        assert plain(config.data.without) == without and config.data.image_size == 32
        must_have_a_reader(config, [])
    must_have_a_reader(compose("train", ["model=dit"]), [])


def test_a_tokenizer_that_is_kept_is_taken_and_texts_without_bytes_are_refused(tokenizer, tmp_path):
    config = compose("train", ["experiment=text_scenes"])
    keep(tokenizer, tmp_path)
    data = captioned()
    data.captions = ("other words altogether",) * len(data)
    anew, kept = in_words(data, config, []), in_words(data, config, [], tmp_path)
    assert torch.equal(kept.tokens, tokenizer(data.captions)) and anew.tokenizer.merges != tokenizer.merges
    data.captions = (*data.captions[:-1], "half \ud800")
    with pytest.raises(InvalidInput, match="tokenizer: a text holds half of a surrogate pair"):
        in_words(data, config, [], tmp_path)
    assert data.identity()["captions"]
    asked = compose("sample", ["run=x"])
    asked.prompt = "\udcff"
    with pytest.raises(InvalidInput, match="prompt: a text holds half"):
        prompts_of(asked, tmp_path, "prompt", print)


@pytest.mark.parametrize(
    "text", ["a, (b) [c] {d}", "it's", "'hello' said 'x'", '"', "a\\b", "a\\'b", "ends\\", "50% = $5", "naïve: é", "[x"]
)
def test_a_prompt_reaches_its_command_as_it_is_typed(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ddpm-sample"])
    word = cli._typed_in_quotes(f"prompt={text}")
    assert compose("sample", ["run=x", word]).prompt == text
