"""models/adapters.py: what low-rank adapters add, and what they leave as it is, to the bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ddpm.data.batch import Condition
from models.adapters import (
    TARGETS,
    AdaptedConv2d,
    AdaptedLinear,
    AddedWords,
    adapt,
    adapted,
    adapters,
    begin,
    merge,
    unmerge,
    with_words,
)
from models.text import TextEncoder
from models.unet import UNet

IDS = torch.tensor([[3, 1, 4, 2], [5, 1, 2, 2]])


def network() -> UNet:
    """A network that reads 6 tokens, of random weights throughout."""
    torch.manual_seed(0)
    text = TextEncoder(6, 4, channels=8, layers=1, heads=2)
    model = UNet(4, 1, channels=8, channel_mults=(1, 2), blocks=1, attention_resolutions=(4,), groups=4, dropout=0.0,
                 text=text)  # fmt: skip
    for name, p in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def answer(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    random = torch.Generator().manual_seed(2)
    return model(torch.randn(2, 1, 4, 4, generator=random), torch.tensor([1, 5]), Condition(tokens=ids))


def trained(model: nn.Module) -> nn.Module:
    """The same with adapters of some values."""
    random = torch.Generator().manual_seed(3)
    for p in adapters(model).values():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=random))
    return model


EVERYWHERE = (*TARGETS, "*conv_1", "*conv_2", "*conv", "*shortcut", "*proj_in", "conv_in")


@pytest.mark.equation("LoRA (3)")
def test_a_linear_layer_answers_its_weight_and_a_scaled_product():
    W, b = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0.5, 0.0, -1.0])
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(W), model[0].bias.copy_(b)
    adapt(model, rank=2, alpha=3.0, targets=["*"])
    A, B = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([[1.0, 0.0], [2.0, -1.0], [0.0, 4.0]])
    layer = model[0]
    assert isinstance(layer, AdaptedLinear)
    layer.put(A, B)
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.25]])
    expected = torch.stack([W @ row + b + 1.5 * (B @ (A @ row)) for row in x])
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(layer.delta(), 1.5 * B @ A)


@pytest.mark.equation("LoRA (3)")
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_a_convolution_answers_as_one_with_the_sum_of_both_weights(kernel, stride, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, stride, padding).double()
    model = trained(adapt(nn.Sequential(conv), 2, 1.0, ["*"]))
    layer, x = model[0], torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert isinstance(layer, AdaptedConv2d)
    A, B = layer.lora_A.reshape(2, -1), layer.lora_B.reshape(4, 2)
    weight = conv.weight + 0.5 * (B @ A).reshape(conv.weight.shape)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, weight, conv.bias, stride, padding))


def test_layers_that_are_left_out_stay_as_they_are():
    every = {name for name, _ in adapted(adapt(network()))}
    left = {name for name, _ in adapted(adapt(network(), without=["text.*", "*to_k"]))}
    assert left == {name for name in every if not name.startswith("text.") and not name.endswith("to_k")} != every
    with pytest.raises(ValueError, match=r"without = \['\*'\] leaves none of the layers"):
        adapt(network(), without=["*"])
    with pytest.raises(ValueError, match=r"without: no layer matches 'txt\.\*'; there are "):
        adapt(network(), without=["txt.*"])


def test_an_adapted_network_is_the_first_one_to_the_bit_and_trains_nothing_else():
    plain, model = network(), adapt(network(), 2, 4.0, EVERYWHERE)
    names = [name for name, _ in adapted(model)]
    assert {"down.0.attention.0.blocks.0.cross_attention.to_k", "text.blocks.0.attention.to_q"} < set(names)
    assert {"middle_1.conv_1", "up.1.residual.0.shortcut", "down.0.resample.conv", "up.0.resample.conv"} < set(names)
    before = answer(model)
    assert torch.equal(before, answer(plain))
    own = adapters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own.keys() and len(own) == 2 * len(
        names
    )
    answer(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in own.items() if name.endswith("_B"))
    whole = answer(trained(model)).detach()
    assert not torch.equal(whole, before)
    ends = {name.rpartition(".")[2]: layer for name, layer in adapted(model)}  # and each kind of layer has a say:
    with torch.no_grad():
        for end, layer in ends.items():
            B = layer.lora_B.clone()
            layer.lora_B.zero_()
            assert not torch.equal(answer(model), whole), end
            layer.lora_B.copy_(B)
    kept = {name: x for name, x in model.state_dict().items() if name not in own}
    assert kept.keys() == plain.state_dict().keys()
    assert all(torch.equal(x, kept[name]) for name, x in plain.state_dict().items())


def test_merging_is_the_same_network_and_unmerging_is_the_same_bits():
    plain, model = network(), trained(adapt(network(), 2, 3.0, EVERYWHERE))
    apart, before = answer(model), copy.deepcopy(model.state_dict())
    merge(model)
    assert not list(adapted(model)) and model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(answer(model), apart, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer(model), answer(plain), atol=1e-2)
    unmerge(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(answer(model), apart)
    merge(adapt(merge(model), 1, targets=["*to_q"]))  # again, on what is merged
    torch.testing.assert_close(answer(model), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [6, 4])  # after the vocabulary, and in its place
def test_of_added_words_the_vectors_alone_are_trained_and_begin_like_others(first):
    plain, model = network(), with_words(network(), first, 2, like=(3, 5))
    begin(model)
    assert model.text.vocabulary == max(6, first + 2)
    assert torch.equal(answer(model, IDS.clamp(max=3)), answer(plain, IDS.clamp(max=3)))
    table = plain.text.token_embedding.weight
    for word in (first, first + 1):
        torch.testing.assert_close(model.text.token_embedding(torch.tensor([word]))[0], table[[3, 5]].mean(0))
    before = copy.deepcopy(model.state_dict())
    told = torch.tensor([[3, first, 2, 2], [3, 1, 2, 2]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    answer(model, told).square().sum().backward()
    optimizer.step()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"text.token_embedding.added"} == adapters(model).keys()
    assert torch.equal(answer(model, IDS.clamp(max=3)), answer(plain, IDS.clamp(max=3)))
    assert isinstance(model.text.token_embedding, AddedWords)


def test_words_that_are_not_trained_yet_differ_from_what_they_stand_in_for():
    model = with_words(network(), 6)
    begin(model)
    told = torch.tensor([[3, 6, 2, 2], [3, 1, 2, 2]])
    assert not torch.equal(answer(model, told)[0], answer(model, told.clamp(max=5))[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: adapt(m, 0), "rank = 0 must be an integer >= 1"),
        (lambda m: adapt(m, 9), "rank = 9 is more than .*to_q has, 8 to 8; allowed: 1 to 8"),
        (lambda m: adapt(m, 2, float("nan")), "alpha = nan must be a finite number"),
        (lambda m: adapt(m, targets=["*to_x"]), r"no layer matches '\*to_x'; there are .*did you mean \*to_"),
        (lambda m: adapt(m, targets=[]), "adapts nothing"),
        (lambda m: adapt(adapt(m)), "adapted already"),
        (lambda m: with_words(adapt(m), 6), "adapted already"),
        (lambda m: with_words(m, 7), "first = 7 is no id of 6 tokens; allowed: 0 to 6"),
        (lambda m: with_words(m, 6, like=(6,)), "like = 6 is no id of 6 tokens; allowed: 0 to 5"),
        (lambda m: with_words(m, 6, 0), "words = 0 must be an integer >= 1"),
        (lambda m: with_words(nn.Linear(2, 2), 6), "reads no texts"),
    ],
)
def test_what_cannot_be_put_in_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make(network())
