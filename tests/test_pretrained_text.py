"""models/pretrained/text.py and tokenizer.py: the published encoder written out, the library's ids, what is refused."""

import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published.make_text import IDS, PLAIN, SETTINGS, settle, small
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from models.pretrained import load_text_encoder, load_tokenizer, save_text_encoder, save_tokenizer
from models.pretrained.folder import CONFIG
from models.pretrained.text import WEIGHTS
from models.text import TextEncoder
from models.tokenizer import BytePairs

REFERENCE = json.loads((Path(__file__).parent / "published" / "text.json").read_text(encoding="utf-8"))


# --- The encoder


def config_of(**options) -> dict:
    """A config as published with Stable Diffusion 1, but for the sizes."""
    return {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 12,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 20,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 9,
        "model_type": "clip_text_model",
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "projection_dim": 12,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 40,
    } | options


def weights_of(config: dict) -> dict[str, Tensor]:
    """Every parameter of the published encoder, at random; none is zero, so that each matters."""
    width, hidden, weights = config["hidden_size"], config["intermediate_size"], {}

    def add(name: str, *shape: int):
        weights[f"text_model.{name}.weight"] = torch.randn(shape) / math.sqrt(shape[-1] if len(shape) > 1 else 10)
        if "embedding" not in name:
            weights[f"text_model.{name}.bias"] = 0.3 * torch.randn(shape[0])

    add("embeddings.token_embedding", config["vocab_size"], width)
    add("embeddings.position_embedding", config["max_position_embeddings"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for part in "qkv":
            add(f"{layer}.self_attn.{part}_proj", width, width)
        add(f"{layer}.self_attn.out_proj", width, width)
        add(f"{layer}.layer_norm1", width)
        add(f"{layer}.mlp.fc1", hidden, width)
        add(f"{layer}.mlp.fc2", width, hidden)
        add(f"{layer}.layer_norm2", width)
    add("final_layer_norm", width)
    return weights


def published(w: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """The published forward pass, from the names."""
    length, width = ids.shape[1], config["hidden_size"]

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"text_model.{name}.weight"].T + w[f"text_model.{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        weight, bias = w[f"text_model.{name}.weight"], w[f"text_model.{name}.bias"]
        return F.layer_norm(h, (width,), weight, bias, config["layer_norm_eps"])

    h = w["text_model.embeddings.token_embedding.weight"][ids]
    h = h + w["text_model.embeddings.position_embedding.weight"][:length]
    mask, size = torch.full((length, length), -math.inf).triu(1), width // config["num_attention_heads"]
    for i in range(config["num_hidden_layers"]):
        layer, heads = f"encoder.layers.{i}", []
        inner = norm(f"{layer}.layer_norm1", h)
        q, k, v = (linear(f"{layer}.self_attn.{part}_proj", inner) for part in "qkv")
        for n in range(0, width, size):
            scores = q[..., n : n + size] @ k[..., n : n + size].mT / math.sqrt(size)
            heads.append((scores + mask).softmax(-1) @ v[..., n : n + size])
        h = h + linear(f"{layer}.self_attn.out_proj", torch.cat(heads, -1))
        inner = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", h))
        inner = F.gelu(inner) if config["hidden_act"] == "gelu" else inner * torch.sigmoid(1.702 * inner)
        h = h + linear(f"{layer}.mlp.fc2", inner)
    return norm("final_layer_norm", h)


def write(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "encoder", config_of(), weights_of(config_of()))


@torch.no_grad()
def difference(encoder: TextEncoder, weights: dict[str, Tensor], config: dict) -> float:
    return (encoder(IDS) - published(weights, config, IDS)).abs().max().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 1, "layer_norm_eps": 0.1},
        {"num_hidden_layers": 3, "intermediate_size": 7, "max_position_embeddings": 77, "vocab_size": 41},
    ],
    ids=str,
)
def test_ours_is_the_published_encoder(tmp_path, options):
    config = config_of(**options)
    weights = weights_of(config)
    encoder = load_text_encoder(write(tmp_path, config, weights))
    assert difference(encoder, weights, config) < 1e-5
    assert not encoder.training and {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu"}, {"layer_norm_eps": 0.1}, {"num_attention_heads": 2}], ids=str
)
def test_every_detail_that_fits_all_weights_matters(folder, change):
    weights = load_file(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config_of(**change)))
    assert difference(load_text_encoder(folder), weights, config_of()) > 1e-3


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_vectors_are_those_of_the_library(tmp_path, activation):
    """What CLIPTextModel made of a folder that was written as here."""
    save_text_encoder(small(activation), tmp_path)
    ours, theirs = load_text_encoder(tmp_path)(IDS), torch.tensor(REFERENCE[activation]).reshape(2, 7, 12)
    assert (ours - theirs).abs().max() < 1e-5 and theirs.std() > 1


def test_what_a_config_leaves_out_is_the_default_of_the_published_class(tmp_path):
    kept = {key: config_of()[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    config = kept | {"num_hidden_layers": 12, "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "hidden_act": ""}
    weights = weights_of(config)
    encoder = load_text_encoder(write(tmp_path, kept, weights))
    assert difference(encoder, weights, config) < 1e-5 and encoder.length == 77


def in_parts(folder: Path, weights: dict[str, Tensor], name: str, save: Callable) -> None:
    stem, dot, end = name.rpartition(".")
    files = [f"{stem}-0000{k}-of-00002{dot}{end}" for k in (1, 2)]
    parts = {key: files[k % 2] for k, key in enumerate(weights)}
    for file in files:
        save({key: weights[key] for key in weights if parts[key] == file}, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin"])
@pytest.mark.parametrize("parts", [False, True])
def test_other_files_of_weights(folder, name, parts):
    weights = {key: w.half() for key, w in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save = save_file if name.endswith("safetensors") else torch.save
    if parts:
        in_parts(folder, weights, name.replace(".fp16", ""), save)
    else:
        save(weights, folder / name)
    encoder = load_text_encoder(folder)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert difference(encoder, {key: w.float() for key, w in weights.items()}, config_of()) < 1e-5


def test_names_of_other_versions(folder):
    """A buffer that older ones have; names without the prefix."""
    weights = {name: w.clone() for name, w in load_file(folder / WEIGHTS).items()}  # of a file that is written anew
    positions = {"text_model.embeddings.position_ids": torch.arange(9)[None]}
    write(folder, config_of(), weights | positions)
    assert difference(load_text_encoder(folder), weights, config_of()) < 1e-5
    write(folder, config_of(), {name.removeprefix("text_model."): w for name, w in (weights | positions).items()})
    assert difference(load_text_encoder(folder), weights, config_of()) < 1e-5


def test_saved_loaded_and_saved_again(tmp_path):
    encoder = small("gelu").half()
    save_text_encoder(encoder, tmp_path / "a")
    again = load_text_encoder(tmp_path / "a")
    assert all(torch.equal(w.float(), again.state_dict()[name]) for name, w in encoder.state_dict().items())
    save_text_encoder(again.half(), tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    without_effect = {"_name_or_path", "dropout", "initializer_factor", "initializer_range", "transformers_version"}
    assert config.keys() == config_of().keys() - without_effect and config["eos_token_id"] == 39
    assert load_file(tmp_path / "a" / WEIGHTS).keys() == weights_of(config).keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"architectures": ["CLIPTextModelWithProjection"]},
            r'architectures = .*Projection"\] \(allowed: \["CLIPTextM',
        ),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, r'model_type = "clip" \(allowed: "clip_text_model"\)'),
        ({"hidden_act": "relu"}, r'hidden_act = "relu" \(allowed: "quick_gelu" or "gelu"\)'),
        ({"hidden_size": 0}, r"hidden_size = 0 \(allowed: an integer in 1\.\.65536\)"),
        ({"vocab_size": "40"}, r'vocab_size = "40" \(allowed: an integer in 1\.\.1048576\)'),
        (
            {"num_attention_heads": 5},
            r"num_attention_heads = 5 .* divides hidden_size = 12, such as \[3, 4, 6",
        ),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0.1 \(allowed: 0.0 or 0\)"),
        ({"layer_norm_eps": 0}, "layer_norm_eps = 0 "),
        ({"eos_token_id": -1}, "eos_token_id = -1"),
        ({"rope_theta": 1.0}, r'"rope_theta" = 1.0 is not a known key'),
    ],
    ids=str,
)
def test_configs_that_cannot_be_represented_are_refused(folder, options, words):
    (folder / CONFIG).write_text(json.dumps(config_of(**options)))
    with pytest.raises(ValueError, match=words):
        load_text_encoder(folder)


def test_weights_that_do_not_fit_are_listed(folder):
    weights = load_file(folder / WEIGHTS)
    weights["text_model.final_layer_norm.bias"] = torch.zeros(5)
    weights["text_model.final_layer_norm.weight"] = torch.ones(12, dtype=torch.int64)
    weights["vision_model.x"] = weights.pop("text_model.encoder.layers.1.mlp.fc1.bias")
    write(folder, config_of(), weights)
    with pytest.raises(ValueError) as error:
        load_text_encoder(folder)
    assert '1 missing: text_model.encoder.layers.1.mlp.fc1.bias; 1 unexpected: "vision_model.x"' in str(error.value)
    assert "2 of another shape or type: " in str(error.value) and "final_layer_norm.bias (5,), the" in str(error.value)
    assert "final_layer_norm.weight of type I64, not F64, F32, F16 or BF16" in str(error.value)


class Harm:
    def __reduce__(self):
        return print, ("harm",)


def test_damaged_and_missing_files_are_refused(folder, capsys):
    def refused(words: str):
        with pytest.raises(ValueError, match=words):
            load_text_encoder(folder)

    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-9])
    refused("model.safetensors is no whole safetensors file")
    (folder / WEIGHTS).unlink()
    refused(f"{folder} has no model.safetensors$")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harm()}, protocol=2))
    refused("pytorch_model.bin is no whole pickle of plain tensors by name")
    assert capsys.readouterr().out == ""
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    refused("pytorch_model.bin is no whole pickle of plain tensors by name")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    refused("has no weight_map from names to files next to it")
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    refused("names shards that are missing: b.safetensors")
    (folder / CONFIG).unlink()
    refused(f"has no {CONFIG}$")
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}$"):
        load_text_encoder(folder.parent)
    (folder.parent / "text_encoder").mkdir()
    write(folder.parent / "text_encoder", config_of(), {})
    with pytest.raises(ValueError, match="text_encoder has one"):
        load_text_encoder(folder.parent)
    with pytest.raises(ValueError, match="is no folder; a published text encoder is a folder with"):
        load_text_encoder(folder / "none")


def test_a_tokenizer_of_another_network_is_told_of(folder):
    with pytest.raises(ValueError, match=r"ids hold 7\d\d, beyond the 40 tokens that this network knows"):
        load_text_encoder(folder)(ours()(["x"])[:, :9])


# --- The tokenizer


def ours() -> BytePairs:
    return BytePairs([merge.split(" ") for merge in REFERENCE["merges"]])


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """A folder with vocabulary and merges; each test writes settings."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(ours(), folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_are_those_of_the_library(vocabulary, name):
    settle(vocabulary, name, 714)
    tokenizer, rows = load_tokenizer(vocabulary), REFERENCE[name]
    assert {text: ids for text, ids in rows if tokenizer.encode(text) != ids} == {}
    assert len(rows) == 1000 if name == "sd1" else len(rows) > 8
    known = [tokenizer.decode(ids) for _, ids in rows[: len(PLAIN)]]
    assert known == REFERENCE[f"{name} decoded"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tokenizer([PLAIN[0], "a red face " * 100]).tolist() == REFERENCE[f"{name} rows"]


def test_settings_are_honoured(vocabulary):
    found = {}
    for name in SETTINGS:
        settle(vocabulary, name, 714)
        tokenizer = load_tokenizer(vocabulary)
        found[name] = tokenizer.start, tokenizer.end, tokenizer.padding, tokenizer.length
    assert found == {"sd1": (712, 713, 713, 77), "sd2": (712, 713, 0, 77), "newer": (712, 713, 0, 20)}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (vocabulary / file).unlink(missing_ok=True)
    tokenizer = load_tokenizer(vocabulary)
    assert (tokenizer.start, tokenizer.end, tokenizer.padding, tokenizer.length) == (712, 713, 713, 77)


def whole_of(tokenizer: BytePairs) -> dict:
    """A tokenizer.json, as newer versions write it."""
    split = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    steps = [{"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}, {"type": "Lowercase"}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": 712, "content": "<|startoftext|>"} | flags],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, *steps]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Removed", "invert": True}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "end_of_word_suffix": "</w>",
            "vocab": tokenizer.ids,
            "merges": [list(pair) for pair in tokenizer.merges],
        },
    }


def test_a_whole_file_does_where_the_two_are_missing(tmp_path):
    whole, texts = whole_of(ours()), [text for text, _ in REFERENCE["sd1"][:100]]
    for merges in (whole["model"]["merges"], [" ".join(pair) for pair in whole["model"]["merges"]]):
        whole["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.folded == ("<|startoftext|>",)  # as it says of what was added
        assert [tokenizer.encode(text) for text in texts] == [ids for _, ids in REFERENCE["sd1"][:100]]
    changes = [
        (("model", "end_of_word_suffix"), "@@", r'model.end_of_word_suffix = "@@" \(allowed: "</w>"\)'),
        (("model", "type"), "Unigram", 'model.type = "Unigram"'),
        (("model", "vocab"), [], "has no model.vocab, an object"),
        (("normalizer", "normalizers"), [], "normalizer.normalizers = "),
        (
            ("pre_tokenizer", "pretokenizers"),
            [{"pattern": {"Regex": "x"}}],
            "pre_tokenizer.pretokenizers.0.pattern.Regex = ",
        ),
        (("added_tokens",), [3], "adds .3.; allowed: tokens with ids, lstrip, rstrip"),
        (("added_tokens",), [{"id": 714, "content": "<new>"}], 'adds the token "<new>" to its vocabulary'),
    ]
    for (*path, key), value, words in changes:
        changed = json.loads(json.dumps(whole))
        place = changed[path[0]] if path else changed
        place[key] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            load_tokenizer(tmp_path)


def test_saved_and_read_again(tmp_path):
    for k, options in enumerate(({}, {"length": 16, "padding": "!", "folded": ["<|endoftext|>"]})):
        tokenizer = BytePairs(ours().merges, **options)
        save_tokenizer(tokenizer, tmp_path / str(k))
        again = load_tokenizer(tmp_path / str(k))
        assert again.ids == tokenizer.ids and again.merges == tokenizer.merges and again.length == tokenizer.length
        assert again.padding == tokenizer.padding and again.folded == tokenizer.folded
        save_tokenizer(again, tmp_path / "again")
        for path in (tmp_path / "again").iterdir():
            assert path.read_bytes() == (tmp_path / str(k) / path.name).read_bytes()


def test_damaged_vocabularies_are_refused(tmp_path):
    save_tokenizer(ours(), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(words: str, changed: dict[str, bytes | None]):
        for name, data in (files | changed).items():
            (tmp_path / name).unlink(missing_ok=True)
            if data is not None:
                (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            load_tokenizer(tmp_path)

    merges, ids = files["merges.txt"], ours().ids
    first = "".join(ours().merges[0])
    refused(f"{re.escape(str(tmp_path))} has no merges.txt, and no tokenizer.json in their place", {"merges.txt": None})
    refused("has no vocab.json and no merges.txt, and", {"merges.txt": None, "vocab.json": None})
    refused("vocab.json is not JSON", {"vocab.json": b"{"})
    refused("vocab.json holds a JSON list", {"vocab.json": b"[]"})
    refused("vocab.json is not JSON", {"vocab.json": b"\xff"})
    refused('merges.txt, line 3: "a" is no merge', {"merges.txt": b"#version: 0.2\nk i\na\nt o\n"})
    refused('merges.txt, line 1: "a b c" is no merge', {"merges.txt": b"a b c\n"})
    refused("merge 1, .* occurs twice", {"merges.txt": b"#version: 0.2\nk i\nk i\n"})
    lacking = json.dumps({token: k for token, k in ids.items() if token != first}).encode()
    refused(f"the vocabulary has no '{first}', which merge 0", {"vocab.json": lacking})
    refused("the id of 'a' is 'x'", {"vocab.json": json.dumps(ids | {"a": "x"}).encode()})
    refused("have the id 1, among them", {"vocab.json": json.dumps(ids | {"a": 1}).encode()})
    refused("adds the token", {"added_tokens.json": b'{"<cat>": 714}'})
    (tmp_path / "added_tokens.json").unlink()
    for name, data in (files | {"merges.txt": merges.split(b"\n", 1)[1]}).items():  # without a version
        (tmp_path / name).write_bytes(data)
    assert load_tokenizer(tmp_path).merges == ours().merges


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_lower_case": False}, r"do_lower_case = false \(allowed: true\)"),
        ({"model_max_length": 10**30}, r"model_max_length = 10+ \(allowed: an integer in 1\.\.65536\)"),
        ({"model_max_length": 1}, "holds no tokenizer of this kind: length = 1"),
        ({"tokenizer_class": "T5Tokenizer"}, 'tokenizer_class = "T5Tokenizer"'),
        ({"padding_side": "left"}, 'padding_side = "left"'),
        ({"unk_token": {"content": "!", "lstrip": True}}, "unk_token = .* lstrip, rstrip, single_word false"),
        ({"additional_special_tokens": ["<a>"]}, r'additional_special_tokens = \["<a>"\] \(allowed: nothing\)'),
        ({"added_tokens_decoder": {"x": {"content": "!"}}}, "added_tokens_decoder = "),
        ({"added_tokens_decoder": {"714": {"content": "<cat>"}}}, 'adds the token "<cat>"'),
        ({"added_tokens_decoder": {}, "pad_token": "<pad>"}, "no '<pad>', which is the token padding"),
        ({"dropout": 0.1}, '"dropout" = 0.1 is not a known key'),
    ],
    ids=str,
)
def test_settings_that_it_cannot_have_are_refused(vocabulary, options, words):
    settle(vocabulary, "sd1", 714)
    path = vocabulary / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(ValueError, match=words):
        load_tokenizer(vocabulary)
