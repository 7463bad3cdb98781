"""models/text.py: a token sees those before alone, the form of each part, what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.text import Block, CausalAttention, TextEncoder, quick_gelu

SMALL = {"vocabulary": 11, "length": 6, "channels": 8, "layers": 2, "heads": 2}


def small(**options) -> TextEncoder:
    return TextEncoder(**SMALL | options).double().eval()


@pytest.mark.equation("GELU (sigmoid)")
def test_quick_gelu_by_hand():
    x = torch.tensor([-2.0, 0, 1, 3], dtype=torch.float64)
    expected = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    torch.testing.assert_close(quick_gelu(x), torch.tensor(expected, dtype=torch.float64))
    assert (quick_gelu(x) - F.gelu(x)).abs().max() < 0.021  # what it stands for


@pytest.mark.equation("CLIP (causal)")
def test_attention_is_the_sum_over_what_came_before():
    attention, h = CausalAttention(6, 2).double().requires_grad_(False), torch.randn(2, 4, 6, dtype=torch.float64)
    q, k, v = attention.to_q(h), attention.to_k(h), attention.to_v(h)
    y = torch.zeros_like(h)
    for b in range(2):
        for i in range(4):
            for head in (slice(0, 3), slice(3, 6)):
                a = [math.exp(q[b, i, head] @ k[b, j, head] / math.sqrt(3)) for j in range(i + 1)]
                y[b, i, head] = sum(a[j] * v[b, j, head] for j in range(i + 1)) / sum(a)
    torch.testing.assert_close(attention(h), attention.to_out(y))


@pytest.mark.parametrize(("activation", "phi"), [("quick_gelu", quick_gelu), ("gelu", F.gelu)])
@pytest.mark.equation("CLIP (block)")
def test_a_block_adds_attention_and_then_an_mlp(activation, phi):
    block, h = Block(8, 2, 12, activation, 1e-3).double(), torch.randn(2, 5, 8, dtype=torch.float64)

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight + layer.bias

    for p in block.parameters():
        torch.nn.init.normal_(p)
    first = h + block.attention(norm(h, block.norm_1))
    inner = phi(norm(first, block.norm_2) @ block.linear_1.weight.T + block.linear_1.bias)
    torch.testing.assert_close(block(h), first + inner @ block.linear_2.weight.T + block.linear_2.bias)


@pytest.mark.equation("CLIP (text)")
def test_the_encoder_is_embeddings_blocks_and_a_norm():
    encoder, ids = small(), torch.tensor([[3, 1, 10], [0, 0, 5]])
    e, p = encoder.token_embedding.weight, encoder.position_embedding.weight
    h = torch.stack([torch.stack([e[c] + p[i] for i, c in enumerate(row)]) for row in ids.tolist()])
    for block in encoder.blocks:
        h = block(h)
    torch.testing.assert_close(encoder(ids), encoder.norm_out(h))
    assert encoder(ids).shape == (2, 3, 8) and not torch.equal(encoder(ids)[1, 0], encoder(ids)[1, 1])


def test_later_tokens_change_nothing():
    """The derivative of each vector by the embedded tokens is zero above the diagonal, and nowhere else."""
    encoder = small()
    h = torch.randn(5, 8, dtype=torch.float64)

    def blocks(h):
        h = h[None]
        for block in encoder.blocks:
            h = block(h)
        return encoder.norm_out(h)[0]

    size = torch.autograd.functional.jacobian(blocks, h).abs().amax((1, 3))
    assert torch.equal(size > 0, torch.ones(5, 5).tril().bool())
    ids = torch.tensor([[4, 7, 2, 9, 9, 9]])
    assert torch.equal(encoder(ids)[:, :4], encoder(torch.tensor([[4, 7, 2, 9, 0, 1]]))[:, :4])
    torch.testing.assert_close(encoder(ids)[:, :4], encoder(ids[:, :4]))


def test_a_text_is_pooled_at_its_first_end():
    encoder, ids = small(), torch.tensor([[8, 1, 9, 9, 9], [8, 9, 3, 9, 9], [8, 1, 2, 3, 9]])
    expected = torch.stack([encoder(ids)[0, 2], encoder(ids)[1, 1], encoder(ids)[2, 4]])
    assert torch.equal(encoder.pooled(ids, end=9), expected)
    assert torch.equal(encoder.pooled(ids[:1], end=1), encoder(ids)[:1, 1])  # the end need not be the largest id
    with pytest.raises(ValueError, match=r"rows \[0, 2\] have no token 9"):
        encoder.pooled(torch.tensor([[1, 2], [9, 2], [3, 3]]), end=9)


def test_the_counts_of_published_encoders():
    """Those of Stable Diffusion 1 and 2."""
    with torch.device("meta"):
        first = TextEncoder(49408, channels=768, layers=12, heads=12)
        second = TextEncoder(49408, channels=1024, layers=23, heads=16, activation="gelu")
    assert sum(p.numel() for p in first.parameters()) == 123_060_480
    assert sum(p.numel() for p in second.parameters()) == 340_387_840


def test_first_values_keep_the_size_of_what_passes():
    encoder = TextEncoder(100, 16, channels=64, layers=6, heads=4)
    for block in encoder.blocks:
        assert block.attention.to_q.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
        assert block.attention.to_out.weight.std().item() == pytest.approx((2 * 6 * 64) ** -0.5, rel=0.1)
        assert block.linear_1.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
        assert block.linear_2.weight.std().item() == pytest.approx((2 * 6 * 64) ** -0.5, rel=0.1)
        assert block.linear_1.bias.abs().max() == block.attention.to_v.bias.abs().max() == 0
    assert encoder.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert encoder.position_embedding.weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": 0}, "vocabulary = 0 must be an integer >= 1"),
        ({"length": 2.5}, "length = 2.5 must be"),
        ({"channels": True}, "channels = True must be"),
        ({"layers": 101}, "layers = 101 must be an integer >= 1, and at most 100"),
        ({"feed_forward": 0}, "feed_forward = 0 must be"),
        ({"heads": 3}, "heads = 3 does not divide the 8 channels .* nearest that do: 1, 2, 4"),
        ({"activation": "relu"}, "activation = 'relu' is not known; allowed: quick_gelu, gelu"),
        ({"norm_eps": 0.0}, r"norm_eps = 0 must lie in \(0, 1\)"),
    ],
    ids=str,
)
def test_encoders_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TextEncoder(**SMALL | options)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(1, 7, dtype=torch.long), r"shape \(1, 7\); this network takes integers .* L from 1 to 6"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
        (torch.zeros(1, 3), "ids are torch.float32"),
        (torch.tensor([[1, 11]]), "ids hold 11, beyond the 11 tokens .*; allowed: 0 to 10"),
        (torch.tensor([[1, -1]]), "ids hold -1, beyond"),
    ],
    ids=str,
)
def test_ids_that_it_cannot_take_are_refused(ids, words):
    with pytest.raises(ValueError, match=words):
        small()(ids)
