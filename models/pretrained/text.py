"""The published form of CLIPTextModel, the text encoder of text-to-image pipelines, read and written as ours.

A folder has config.json and model.safetensors. What comes out is the last hidden state, after the last norm, which is
what Stable Diffusion 1 and 2 attend to. The projection of CLIPTextModelWithProjection belongs to a comparison with
images, and models that draw by it take the state before the last layer: that form is refused by name.
"""

import re
from pathlib import Path
from typing import Any

import torch

from models.pretrained.folder import CONFIG, LAYERS, Rule, a_count, a_number, checked, fitting, only, write
from models.pretrained.weights import names, weights_in
from models.text import TextEncoder

STEMS = ("model", "pytorch_model")  # of names of safetensors, and of pickles
WEIGHTS = "model.safetensors"
LARGEST_VOCABULARY = 2**20
NAMES = [  # ours -> published, each applied in turn
    (r"^(token|position)_embedding\.", r"embeddings.\1_embedding."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm_(\d)\.", r".layer_norm\1."),
    (r"\.attention\.to_(q|k|v|out)\.", r".self_attn.\1_proj."),
    (r"\.linear_(\d)\.", r".mlp.fc\1."),
    (r"^norm_out\.", "final_layer_norm."),
]
PREFIX = "text_model."  # of every name; some files leave it out
COUNTED = f"{PREFIX}embeddings.position_ids"  # 0, 1, 2, ..: a buffer of older files, without information

anything: Rule = None, lambda v: True, "anything"
an_id: Rule = (
    None,
    lambda v: v is None or (type(v) is int and 0 <= v < LARGEST_VOCABULARY),
    f"an integer in 0..{LARGEST_VOCABULARY - 1} or null",
)
KEYS: dict[str, Rule] = {
    "architectures": only(["CLIPTextModel"], None),
    "model_type": only("clip_text_model"),
    "vocab_size": a_count(49408, top=LARGEST_VOCABULARY),
    "hidden_size": a_count(512),
    "intermediate_size": a_count(2048),
    "num_hidden_layers": a_count(12, top=LAYERS),
    "num_attention_heads": a_count(8),
    "max_position_embeddings": a_count(77),
    "hidden_act": only("quick_gelu", "gelu"),
    "layer_norm_eps": a_number(1e-5, 1e-30, 1),
    "attention_dropout": only(0.0, 0),
    # Of the tokenizer, which has its own settings:
    "bos_token_id": an_id,
    "eos_token_id": an_id,
    "pad_token_id": an_id,
    # Without effect on what comes out:
    "projection_dim": a_count(512),
    "dropout": a_number(0.0, 0, 1),  # of no layer of this form
    "initializer_range": anything,
    "initializer_factor": anything,
    "gradient_checkpointing": anything,
    "torch_dtype": anything,
    "dtype": anything,
    "transformers_version": anything,
    "use_cache": anything,
    "return_dict": anything,
    "output_attentions": anything,
    "output_hidden_states": anything,
    "tie_word_embeddings": anything,
}


def load_text_encoder(folder: str | Path, variant: str | None = None) -> TextEncoder:
    """Load the text encoder in a folder of published weights, on the CPU, in float32 and in evaluation mode.

    Args:
        folder: with config.json and model.safetensors (or pytorch_model.bin), whole or in shards; see `load_unet`.
        variant: as in `load_unet`.
    Returns: the encoder; ids (B, L) become vectors (B, L, D), as the published one's last hidden state.
    Raises:
        ValueError: a missing or damaged file; a config that says what this encoder cannot do, with the key, its value
            and what is allowed; weights that do not fit the config, with the names that are missing, unexpected or of
            another shape. All is checked before any weight is read.
    Source: CLIP (arXiv 2103.00020).
    """
    folder = Path(folder)
    path = _file_of_weights(folder, variant)
    config = checked(folder / CONFIG, KEYS, "this text encoder", contradictions)
    with torch.device("meta"):
        on_paper = TextEncoder(**arguments(config))
    shapes = {name: tuple(p.shape) for name, p in on_paper.state_dict().items()}
    weights = fitting(path, shapes, published_name, current_name)
    model = on_paper.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval()


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `TextEncoder` that a config describes."""
    return {
        "vocabulary": config["vocab_size"],
        "length": config["max_position_embeddings"],
        "channels": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "activation": config["hidden_act"],
        "feed_forward": config["intermediate_size"],
        "norm_eps": config["layer_norm_eps"],
    }


def contradictions(config: dict[str, Any]) -> list[str]:
    """Return messages about values that contradict each other."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads == 0:
        return []
    near = sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))[:3]
    return [f"num_attention_heads = {heads} (allowed: what divides hidden_size = {width}, such as {sorted(near)})"]


def published_name(name: str) -> str:
    """Return the published name of a parameter, given ours."""
    for ours, published in NAMES:
        name = re.sub(ours, published, name)
    return PREFIX + name


def current_name(name: str) -> str | None:
    """Return a published name with its prefix, given one with it or without; None for a buffer of older files."""
    name = PREFIX + name.removeprefix(PREFIX)
    return None if name == COUNTED else name


def _file_of_weights(folder: Path, variant: str | None) -> Path:
    """Return the file of weights of a folder that has a config too; else ValueError, with what there is instead."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; a published text encoder is a folder with {CONFIG} and {WEIGHTS}")
    weights, inner = weights_in(folder, variant, STEMS), folder / "text_encoder"
    if weights is None or not (folder / CONFIG).is_file():
        lacks = CONFIG if weights is not None else names(variant, STEMS)[0]
        hint = f"; {inner} has one" if (inner / CONFIG).is_file() else ""
        raise ValueError(f"{folder} has no {lacks}{hint}")
    return weights


def save_text_encoder(model: TextEncoder, folder: str | Path) -> None:
    """Write a text encoder as config.json and model.safetensors; `load_text_encoder` reads it back.

    Args:
        model: parameters keep their dtype.
        folder: as in `save_unet`.
    """
    weights = {published_name(name): p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    write(Path(folder), describe(model), weights, WEIGHTS)


def describe(model: TextEncoder) -> dict[str, Any]:
    """Return the config.json of a text encoder; start and end are its last two ids, as in every vocabulary of ours."""
    first: Any = model.blocks[0]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": model.vocabulary,
        "hidden_size": model.channels,
        "intermediate_size": first.linear_1.out_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": first.attention.heads,
        "max_position_embeddings": model.length,
        "hidden_act": model.activation,
        "layer_norm_eps": model.norm_out.eps,
        "attention_dropout": 0.0,
        "projection_dim": model.channels,
        "bos_token_id": max(model.vocabulary - 2, 0),
        "eos_token_id": model.vocabulary - 1,
        "pad_token_id": model.vocabulary - 1,
        "torch_dtype": str(model.norm_out.weight.dtype).removeprefix("torch."),
    }
