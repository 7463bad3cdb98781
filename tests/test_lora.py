"""models/pretrained/lora.py: published adapters in each spelling, read, merged and written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipeline
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm import cli
from ddpm.data.batch import Condition
from models.adapters import adapt, adapt_layer, adapted, adapters
from models.pretrained import load_lora, load_unet, save_lora, save_unet, with_lora
from models.unet import UNet

OURS = "down.0.attention.0.blocks.0.cross_attention.to_out"
THEIRS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
SPELLINGS = {
    "today": (f"unet.{THEIRS}.lora_A.weight", f"unet.{THEIRS}.lora_B.weight", f"unet.{THEIRS}.alpha"),
    "named": (f"{THEIRS}.lora_A.default.weight", f"{THEIRS}.lora_B.default.weight", f"{THEIRS}.alpha"),
    "before": (f"unet.{THEIRS}.lora.down.weight", f"unet.{THEIRS}.lora.up.weight", f"unet.{THEIRS}.alpha"),
    "oldest": tuple(
        f"unet.{THEIRS.removesuffix('.to_out.0')}.{end}"
        for end in ("processor.to_out_lora.down.weight", "processor.to_out_lora.up.weight", "to_out.0.alpha")
    ),
    "kohya": tuple(
        f"lora_unet_{THEIRS.replace('.', '_')}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    ),
}


@pytest.fixture
def unet() -> UNet:
    model = tiny_pipeline.networks("1")["unet"]
    assert isinstance(model, UNet)
    return model.eval()


def answer(model: UNet) -> Tensor:
    random = torch.Generator().manual_seed(1)
    x_t, tokens = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, tiny_pipeline.WIDTH, generator=random)
    return model(x_t, torch.tensor([7]), Condition(tokens=tokens))


def matrices(r: int = 2, C: int = 16) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(r, C, generator=random), torch.randn(C, r, generator=random)


@pytest.mark.equation("LoRA (3)")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_changes_the_layer_by_the_scaled_product(spelling, unet, tmp_path):
    (A, B), file = matrices(), tmp_path / "x.safetensors"
    save_file(dict(zip(SPELLINGS[spelling], (A, B, torch.tensor(3.0)), strict=True)), file)
    before, plain = unet.get_submodule(OURS).weight.detach().clone(), answer(unet)
    assert load_lora(unet, file, 0.5) == [OURS]
    expected = before + 0.5 * 3.0 / 2 * B @ A
    torch.testing.assert_close(before + unet.get_submodule(OURS).delta(), expected)
    beside = answer(unet).detach()
    assert not torch.allclose(beside, plain, atol=1e-4)
    for _ in range(2):  # merged, and another one after it
        again = tiny_pipeline.networks("1")["unet"].eval()
        with_lora(with_lora(again, file, 0.25), file, 0.25)
        torch.testing.assert_close(again.get_submodule(OURS).weight, expected)
    torch.testing.assert_close(answer(again), beside, rtol=1e-4, atol=1e-4)


def test_without_alpha_it_is_the_rank_and_a_convolution_is_read_as_a_linear_layer(unet, tmp_path):
    (A, B), file = matrices(3), tmp_path / "x.safetensors"
    conv = torch.randn(2, 16, 3, 3), torch.randn(16, 2, 1, 1)
    held = dict(zip(SPELLINGS["kohya"], (A[..., None, None], B[..., None, None]), strict=False))
    held |= {f"lora_unet_down_blocks_0_resnets_0_conv1.lora_{w}.weight": x for w, x in zip(("down", "up"), conv)}  # noqa: B905
    save_file(held, file)
    before = {name: unet.get_submodule(name).weight.detach().clone() for name in (OURS, "down.0.residual.0.conv_1")}
    with_lora(unet, file)
    torch.testing.assert_close(unet.get_submodule(OURS).weight, before[OURS] + B @ A)
    expected = before["down.0.residual.0.conv_1"] + torch.einsum("or,rcij->ocij", conv[1][..., 0, 0], conv[0])
    torch.testing.assert_close(unet.get_submodule("down.0.residual.0.conv_1").weight, expected)


def test_what_is_written_is_read_back_by_published_names_with_the_text_encoder(tmp_path):
    made = tiny_pipeline.networks("1")
    unet, encoder, file = adapt(made["unet"].eval(), 2, 5.0), adapt(made["text_encoder"].eval(), 1), tmp_path / "x"
    for p in (*adapters(unet).values(), *adapters(encoder).values()):
        torch.nn.init.normal_(p, std=0.2)
    save_lora(unet, file, encoder)
    keys = set(load_file(file))
    assert f"unet.{THEIRS}.lora_A.weight" in keys and len(keys) == len(adapters(unet)) + len(adapters(encoder))
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in keys
    again = tiny_pipeline.networks("1")
    with_lora(again["unet"].eval(), file, encoder=again["text_encoder"].eval())
    torch.testing.assert_close(answer(again["unet"]), answer(unet), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again["text_encoder"](ids), encoder(ids), rtol=1e-4, atol=1e-4)


def test_a_network_that_was_loaded_takes_it(unet, tmp_path):
    save_unet(unet, tmp_path / "unet")
    save_file(dict(zip(SPELLINGS["today"], matrices(), strict=False)), tmp_path / "x.safetensors")
    loaded = load_unet(tmp_path / "unet")
    assert load_lora(loaded, tmp_path / "x.safetensors") == [OURS]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (
            dict(zip(SPELLINGS["today"], matrices(2, 8), strict=False)),
            rf"{OURS} maps 16 to 16, but here A is \(2, 8\)",
        ),
        ({"unet.nope.lora_A.weight": torch.ones(1, 2)}, 'changes "unet.nope", which is no layer of this unet'),
        ({"unet.conv_in.weight": torch.ones(1)}, '"unet.conv_in.weight" is none of its keys'),
        ({SPELLINGS["today"][0]: matrices()[0]}, f'has no matrix B of "unet.{THEIRS}"'),
        ({}, "holds nothing"),
        (dict(zip(SPELLINGS["today"], (matrices()[0] / 0, matrices()[1]), strict=False)), "not finite"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, "which is no layer of this unet"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_misfit(held, said, unet, tmp_path):
    file: Path = tmp_path / "x.safetensors"
    save_file(held, file)
    before = answer(unet)
    with pytest.raises(ValueError, match=said):
        load_lora(unet, file)
    assert torch.equal(answer(unet), before)


def others(r: int, spelling: str = "today") -> dict[str, Tensor]:
    """Of the same transformer's first projection, which comes before the last one by name and after it in a file."""
    names = [name.replace("to_out.0", "to_q").replace("to_out_0", "to_q") for name in SPELLINGS[spelling][:2]]
    return dict(zip(names, matrices(r), strict=True))


@pytest.mark.parametrize(
    ("held", "scale", "said"),
    [
        (others(99), 1.0, "rank = 99 is more than .*to_q has, 16 to 16; allowed: 1 to 16"),
        (others(2) | others(2, "kohya"), 1.0, "changes .*to_q twice"),
        (others(2), float("nan"), "scale = nan must be a finite number"),
        (others(2), 1.0, "to_q is a AdaptedLinear"),
    ],
)
def test_of_a_file_of_which_one_layer_is_refused_nothing_is_put_in(held, scale, said, unet, tmp_path):
    file: Path = tmp_path / "x.safetensors"
    save_file(dict(zip(SPELLINGS["today"], matrices(), strict=False)) | held, file)
    if "Adapted" in said:
        adapt_layer(unet, OURS.replace("to_out", "to_q"), 2, 2.0)
    before = {name: type(module) for name, module in unet.named_modules()}
    trained = [p.requires_grad for p in unet.parameters()]
    with pytest.raises(ValueError, match=said):
        load_lora(unet, file, scale)
    assert before == {name: type(module) for name, module in unet.named_modules()}
    assert trained == [p.requires_grad for p in unet.parameters()]


def test_a_rank_that_a_later_layer_has_not_leaves_a_network_plain():
    model = UNet(8, channels=8, channel_mults=(1, 2), blocks=1, groups=4, attention_resolutions=(4,))
    with pytest.raises(ValueError, match="rank = 9 is more than conv_out has"):
        adapt(model, 9, targets=["down.1.residual.0.conv_2", "conv_out"])
    assert not list(adapted(model))


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [(0, torch.tensor(1.0), "is one number, and no matrix"), (2, torch.zeros(3), r"is a tensor \(3,\); allowed: one")]
    + [(2, torch.tensor(value), f"is {value}; allowed: one finite number") for value in (torch.nan, torch.inf)],
)
def test_a_matrix_or_a_strength_that_is_none_is_refused(what, value, said, unet, tmp_path):
    held = [*matrices(), torch.tensor(2.0)]
    held[what] = value
    save_file(dict(zip(SPELLINGS["today"], held, strict=True)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=said):
        load_lora(unet, tmp_path / "x.safetensors")


def test_what_holds_no_adapter_is_refused(unet, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load_lora(unet, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no low-rank adapters to write"):
        save_lora(unet, tmp_path / "y.safetensors")


@pytest.mark.slow
def test_a_pipeline_is_drawn_from_with_adapters(tmp_path, monkeypatch, capsys):
    folder, file = tiny_pipeline.write(tmp_path / "pipeline"), tmp_path / "x.safetensors"
    save_file(dict(zip(SPELLINGS["today"], matrices(), strict=False)), file)

    def drawn(*words: str) -> np.ndarray | int:
        out = tmp_path / "x.npy"
        asked = [f"pipeline={folder}", "prompt=a cat", "sampler.steps=2", "device=cpu", f"out={out}"]
        monkeypatch.setattr(sys, "argv", ["ddpm-sample", *asked, *words])
        try:
            cli.sample()
        except SystemExit as end:
            if end.code:
                return int(end.code)
        return np.load(out).astype(int)

    plain, adapted_, twice = drawn(), drawn(f"lora={file}"), drawn(f"lora=[{file},{file}]", "lora_scale=[0.5,0.5]")
    assert not np.array_equal(plain, adapted_) and np.abs(adapted_ - twice).max() <= 1
    assert np.array_equal(plain, drawn(f"lora={file}", "lora_scale=0"))
    capsys.readouterr()
    for words, said in (
        (["lora=nowhere"], "lora"),
        (["lora=5"], "lora=5 must be a file of safetensors"),
        ([f"lora={file}", "lora_scale=[1,2]"], "or one for each of 1 files"),
    ):
        assert drawn(*words) == 2
        assert said in capsys.readouterr().err
