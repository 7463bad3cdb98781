"""models/pretrained/weights.py: which files of weights are read, and which are refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_pretrained import Bomb, random_weights, tiny
from torch import Tensor

from models.pretrained import CONFIG, WEIGHTS, load_unet

HALF, BIN, INDEX = (f"diffusion_pytorch_model.{end}" for end in ("fp16.safetensors", "bin", "safetensors.index.json"))
HALF_BIN = "diffusion_pytorch_model.fp16.bin"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / CONFIG).write_text(json.dumps(tiny()))
    return tmp_path


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(tiny())


def scaled(weights: dict[str, Tensor], bias: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same, told apart by the bias of the output."""
    return {name: x.to(dtype) for name, x in (weights | {"conv_out.bias": torch.full((3,), bias)}).items()}


def told_apart(folder: Path, **options) -> float:
    net = load_unet(folder, **options)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    return net.conv_out.bias[0].item()


def test_full_precision_is_preferred_then_safetensors(folder, weights):
    torch.save(scaled(weights, 4, torch.float16), folder / HALF_BIN)
    assert told_apart(folder) == 4
    save_file(scaled(weights, 3, torch.float16), folder / HALF)
    assert told_apart(folder) == 3 == told_apart(folder, variant="fp16")
    torch.save(scaled(weights, 2), folder / BIN)
    assert told_apart(folder) == 2
    save_file(scaled(weights, 1), folder / WEIGHTS)
    assert told_apart(folder) == 1 and told_apart(folder, variant="fp16") == 3


def test_a_variant_that_is_not_there_is_named(folder, weights):
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"has no {HALF}; it has {WEIGHTS}, but"):
        load_unet(folder, variant="fp16")
    with pytest.raises(ValueError, match=r"variant = '../x' is no part of a file's name; allowed: a word"):
        load_unet(folder, variant="../x")


def sharded(folder: Path, weights: dict[str, Tensor], end: str = "safetensors", variant: str = "") -> dict[str, str]:
    shards = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002.{end}" for i in (1, 2)]
    of = {name: shards[i % 2] for i, name in enumerate(weights)}
    for shard in shards:
        held = {name: x for name, x in weights.items() if of[name] == shard}
        (save_file if end == "safetensors" else torch.save)(held, folder / shard)
    (folder / f"diffusion_pytorch_model.{end}.index{variant}.json").write_text(json.dumps({"weight_map": of}))
    return of


@pytest.mark.parametrize(("end", "variant"), [("safetensors", ""), ("safetensors", ".fp16"), ("bin", "")])
def test_shards_are_one_network(folder, weights, end, variant):
    sharded(folder, scaled(weights, 7), end, variant)
    net = load_unet(folder, variant="fp16" if variant else None)
    assert net.conv_out.bias[0] == 7 and torch.equal(net.conv_in.weight, weights["conv_in.weight"])


def test_shards_that_are_missing_or_lack_weights_are_named(folder, weights):
    of = sharded(folder, weights)
    index = {"weight_map": of | {"conv_in.bias": of["conv_in.weight"], "conv_in.weight": of["conv_in.bias"]}}
    (folder / INDEX).write_text(json.dumps(index))  # in each other's shards
    with pytest.raises(ValueError, match=f"{INDEX} does not fit its config.json: 2 missing: conv_in.weight, conv_in.b"):
        load_unet(folder)
    (folder / of["conv_in.bias"]).unlink()
    with pytest.raises(ValueError, match=f"{INDEX} names shards that are missing: {of['conv_in.bias']}$"):
        load_unet(folder)
    of["conv_in.bias"] = "../elsewhere.safetensors"
    for text in ({"weight_map": of}, {"weight_map": {}}, {}, {"weight_map": [1]}, {"weight_map": {"a": 1}}):
        (folder / INDEX).write_text(json.dumps(text))
        with pytest.raises(ValueError, match="has no weight_map from names to files next to it"):
            load_unet(folder)
    (folder / INDEX).write_text("[1]")
    with pytest.raises(ValueError, match="holds a JSON list, not an object with the shards of weights"):
        load_unet(folder)


def test_a_damaged_shard_is_named(folder, weights):
    shard = folder / sharded(folder, weights)["conv_in.bias"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} is no whole safetensors file"):
        load_unet(folder)


def test_of_a_pickle_tensors_by_name_are_read_and_nothing_else(folder, weights):
    torch.save({name: torch.nn.Parameter(x) for name, x in scaled(weights, 5).items()}, folder / BIN)
    assert told_apart(folder) == 5
    whole = (folder / BIN).read_bytes()
    exploded = folder / "exploded"
    for held in (
        {"conv_in.bias": Bomb(exploded)},
        {"state_dict": {"conv_in.bias": torch.zeros(8)}},
        [torch.zeros(8)],
        {"conv_in.bias": torch.zeros(8), "conv_out.bias": 1},
        {"conv_in.bias": torch.zeros(8), 3: torch.zeros(1)},
        {"conv_in.bias": torch.zeros(8).to_sparse()},
        {"conv_in.bias": torch.zeros(8, device="meta")},
    ):
        torch.save(held, folder / BIN)
        with pytest.raises(
            ValueError, match=f"{BIN} is no whole pickle of plain tensors by name, .* can run code"
        ) as error:
            load_unet(folder)
        assert "\n" not in str(error.value)
    for data in (pickle.dumps(Bomb(exploded)), b"", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-30]):
        (folder / BIN).write_bytes(data)
        with pytest.raises(ValueError, match="is no whole pickle of plain tensors"):
            load_unet(folder)
    assert not exploded.exists()


def test_a_pickle_must_fit_its_config_too(folder, weights):
    torch.save(
        weights | {"conv_out.bias": torch.zeros(4), "conv_in.bias": torch.zeros(8, dtype=torch.int64)}, folder / BIN
    )
    with pytest.raises(ValueError, match=f"{BIN} does not fit its {CONFIG}: 2 of another .*torch.int64.*") as error:
        load_unet(folder)
    assert "conv_out.bias (4,), the config's is (3,)" in str(error.value)
