"""models/embeddings.py: against a literal loop."""

import math

import pytest
import torch

from models.embeddings import FourierEmbedding, SinusoidalEmbedding, TimeEmbedding


def literal(t: float, dim: int, flip: bool, shift: float) -> list[float]:
    half = dim // 2
    sines, cosines = [], []
    for k in range(half):
        omega = 10000 ** (-k / (half - shift))
        sines.append(math.sin(omega * t))
        cosines.append(math.cos(omega * t))
    return (cosines + sines if flip else sines + cosines) + [0.0] * (dim % 2)


@pytest.mark.parametrize("dim", [4, 9, 32, 129])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_against_a_loop(dim, flip, shift):
    embedding = SinusoidalEmbedding(dim, flip, shift)
    times = [0.0, 1.0, 7.5, 1000.0]
    out = embedding(torch.tensor(times))
    assert out.shape == (4, dim)
    for t, row in zip(times, out.tolist(), strict=True):
        assert row == pytest.approx(literal(t, dim, flip, shift), abs=2e-7 + 1.2e-7 * t)  # float32: omega, product
    if dim % 2 == 0:
        half = out.reshape(4, 2, -1)
        torch.testing.assert_close((half**2).sum(1), torch.ones(4, dim // 2))


def test_freq_shift_1_ends_at_exactly_1_over_10000():
    assert SinusoidalEmbedding(32).omega[[0, -1]].tolist() == pytest.approx([1, 1e-4], rel=1e-7)
    assert SinusoidalEmbedding(32, freq_shift=0).omega[[0, -1]].tolist() == pytest.approx([1, 1e-4 ** (15 / 16)])


def test_integer_and_real_t_agree_and_the_frequencies_are_no_weights():
    embedding = SinusoidalEmbedding(16)
    assert torch.equal(embedding(torch.tensor([3, 999])), embedding(torch.tensor([3.0, 999.0])))
    assert embedding(torch.tensor([3])).dtype == torch.float32
    assert embedding.state_dict() == {} and list(embedding.parameters()) == []


@pytest.mark.parametrize(("dim", "shift", "smallest"), [(2, 1, 4), (3, 1, 4), (1, 0, 2)])
def test_too_narrow(dim, shift, smallest):
    with pytest.raises(ValueError, match=f"{dim} channels is too narrow .* at least {smallest}"):
        SinusoidalEmbedding(dim, freq_shift=shift)
    assert SinusoidalEmbedding(smallest, freq_shift=shift).omega.isfinite().all()


def test_the_mlp_of_the_time():
    embed, t = TimeEmbedding(8, 20, flip_sin_to_cos=True, freq_shift=0), torch.tensor([1, 500])
    (_, first, _, second), e = embed, torch.tensor([literal(n, 8, True, 0) for n in (1, 500)])
    h = e @ first.weight.mT + first.bias
    expected = (h / (1 + (-h).exp())) @ second.weight.mT + second.bias
    assert expected.shape == (2, 20) and sum(p.numel() for p in embed.parameters()) == 8 * 20 + 20 + 20 * 20 + 20
    torch.testing.assert_close(embed(t), expected, rtol=0, atol=1e-4)


# --- Random frequencies


def test_fourier_features_have_frequencies_of_the_scale_that_are_not_trained():
    torch.manual_seed(0)
    embed = FourierEmbedding(20_000, 0.25)
    assert embed.b.shape == (10_000,) and abs(float(embed.b.mean())) < 0.01 and abs(float(embed.b.std()) - 0.25) < 0.01
    assert list(embed.parameters()) == [] and embed.state_dict().keys() == {"b"}
    again = FourierEmbedding(20_000, 0.25)
    assert not torch.equal(again.b, embed.b)
    t = torch.tensor([0.0, 3.0, 7.5])
    angle = 2 * math.pi * t[:, None] * embed.b
    torch.testing.assert_close(embed(t), torch.cat([angle.sin(), angle.cos()], 1))
    torch.testing.assert_close(embed(torch.tensor([3])), embed(t)[1:2])


def test_an_odd_fourier_embedding_is_padded_and_what_is_none_is_refused():
    assert FourierEmbedding(5, 1.0)(torch.tensor([2.0]))[0, 4] == 0
    for dim, scale in ((1, 1.0), (4, 0.0), (4, math.inf), (4, math.nan)):
        with pytest.raises(ValueError, match="dim >= 2 and scale > 0"):
            FourierEmbedding(dim, scale)
