"""What the libraries that publish CLIP's text half make of odd texts and of ids: writes text.json beside this.

    pip install -c constraints.txt -e '.[peers]'
    python tests/published/make_text.py

No published vocabulary is needed: ours, learned from the names of emoji, is written in the published form and read by
both. The libraries are found by name, for no installation requires them.
"""

import importlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import emoji
import torch
from torch import Tensor

from models.pretrained import save_text_encoder, save_tokenizer
from models.text import TextEncoder
from models.tokenizer import BytePairs

HERE = Path(__file__).parent
SEPARATOR = "¦"
PLAIN = (  # one by one, for as a list it would have a line for each
    "a photograph of an astronaut riding a horse¦It's John's, they're ours; we've said I'm sure you'll see she'd go¦"
    "HELLO World¦x2 scale 1024x768 in 2024¦  double  spaces\tand\ntabs  ¦naïve café Ångström¦e\u0301 o\u0308 n\u0303¦"
    "&amp; &lt;b&gt; &quot;x&quot; &#39; &nbsp;¦中文字符 漢字かな交じり文¦한국어 조합 \u1112\u1161\u11ab¦"
    "مرحبا بالعالم¦हिन्दी¦ไทย¦"
    "👩\u200d👩\u200d👧 family¦🏳️\u200d🌈🇩🇪👍🏽¦zero\u200bwidth\u200cjoin\u200der¦soft\u00adhyphen¦nbsp\u00a0space¦"
    "ideographic\u3000space¦line\u2028sep\u2029par\u0085next¦bell\x07 null\x00 esc\x1b del\x7f¦\x1c\x1d\x1e\x1f¦"
    "\ufeffbom¦\ufffd replaced¦½ ² ⅷ ٣ ৪ 一二三¦don''t won’t ''s 'S 'T¦...!!!???¦a-b_c.d,e;f:g¦\\n \\t¦C++ & C# / F*¦"
    "<b>bold</b>¦[x](y) {z}¦100% $5 €7 £8 ¥9¦ΣΑΣ Σ ς¦İstanbul ı I¦ẞ ß ſ¦ǅ Ǆ ﬁ¦Ω K Å¦\u0301alone¦"
    "<|startoftext|>¦<|endoftext|> in the middle<|endoftext|>¦<|STARTOFTEXT|>!!¦a!<|EndOfText|>!!¦<|endof|> text¦"
    "</w>¦a</w> b¦!¦hello!!!¦a ! b¦tel +49-30/123456¦user@example.com https://example.com/a?b=c&d=%20¦"
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢¦Ｆｕｌｌｗｉｄｔｈ¦ｶﾀｶﾅ¦\U0001f1e6¦\U000e0067¦\ue000 private¦\U0010ffff¦¦   ¦'¦''¦'''s¦'re're¦s't¦it'sn't"
).split(SEPARATOR)
PIECES = [
    *"aeiostnrAEZz059!?.,'\"-&;<>|# \t\n",
    *"éÉßñÅıİΣςжЖ中文字あ한अ٣½²€’“…—",
    *"\u0301\u0308\u200d\u200b\u00ad\u00a0\u3000\x00\x07\x1f\x85\ufeff\ufffd",
    *"😀👩🏽🇩\U000e0067\U0001d518",
    *["'s", "'T", "'ll", "red", "Cat", "face", "with", "&amp;", "👩\u200d🚀", "<|endoftext|>", "</w>", "12", "  "],
]
SETTINGS = {  # as they were published: of Stable Diffusion 1, of 2, and as a newer version writes them
    "sd1": [
        {
            "add_prefix_space": False,
            "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False, "normalized": True,
                          "rstrip": False, "single_word": False},
            "do_lower_case": True,
            "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True,
                          "rstrip": False, "single_word": False},
            "errors": "replace",
            "model_max_length": 77,
            "name_or_path": "openai/clip-vit-large-patch14",
            "pad_token": "<|endoftext|>",
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True,
                          "rstrip": False, "single_word": False},
        },
        {
            "bos_token": {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False,
                          "single_word": False},
            "eos_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False,
                          "single_word": False},
            "pad_token": "<|endoftext|>",
            "unk_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False,
                          "single_word": False},
        },
    ],
}  # fmt: skip
SETTINGS["sd2"] = [SETTINGS["sd1"][0], SETTINGS["sd1"][1] | {"pad_token": "!"}]
SETTINGS["newer"] = [
    {
        "added_tokens_decoder": {
            str(number): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                          "single_word": False, "special": True}
            for number, token in ((0, "!"), (-2, "<|startoftext|>"), (-1, "<|endoftext|>"))
        },
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 20,
        "pad_token": "!",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    },
    None,
]  # fmt: skip


def settle(folder: Path, name: str, vocabulary: int) -> None:
    """Write the settings of that name into a folder with a vocabulary of so many ids."""
    config, special = json.loads(json.dumps(SETTINGS[name]))
    listed = config.get("added_tokens_decoder")
    if listed:
        config["added_tokens_decoder"] = {str(int(k) % vocabulary): token for k, token in listed.items()}
    for file, said in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / file).unlink(missing_ok=True)
        if said is not None:
            (folder / file).write_text(json.dumps(said, indent=2), encoding="utf-8")


def odd_texts(n: int) -> list[str]:
    """So many texts: those above, one of 300 words, and others put together at random."""
    chosen = random.Random(0)
    texts = [*PLAIN, "a red face " * 100]
    while len(texts) < n:
        texts.append("".join(chosen.choices(PIECES, k=chosen.randint(1, 6))))
    return texts[:n]


def vocabulary() -> BytePairs:
    """Learned from the English names of emoji."""
    names = [data["en"].strip(":").replace("_", " ") for data in emoji.EMOJI_DATA.values()]
    return BytePairs.train(names, vocabulary=514 + 200)


def waves(encoder: TextEncoder) -> None:
    """Weights that need no random numbers: parameter k is a sine of its own frequency, about one at norms."""
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(encoder.state_dict().items()), 1):
            wave = torch.sin((0.37 + 0.61 * k) * torch.arange(1, p.numel() + 1, dtype=torch.float64) + k)
            p.copy_((0.6 * wave + ("norm" in name and name.endswith("weight"))).reshape(p.shape))


def small(activation: str) -> TextEncoder:
    """A small encoder with weights of waves; no head or norm of it is like another."""
    encoder = TextEncoder(40, 9, 12, 2, 3, activation, feed_forward=20, norm_eps=1e-3)
    waves(encoder)
    return encoder.eval()


IDS = torch.tensor([[38, 0, 5, 17, 39, 39, 3], [38, 12, 12, 1, 30, 22, 39]])


def theirs_of_ids(transformers: Any, activation: str) -> Tensor:
    """The last hidden state of the published class."""
    with tempfile.TemporaryDirectory() as folder:
        save_text_encoder(small(activation), folder)
        model = transformers.CLIPTextModel.from_pretrained(folder).eval()
        with torch.no_grad():
            return model(IDS).last_hidden_state


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    ours = vocabulary()
    told: dict[str, Any] = {"transformers": transformers.__version__}
    told["tokenizers"] = importlib.import_module("tokenizers").__version__
    told["merges"] = [" ".join(pair) for pair in ours.merges]
    texts = odd_texts(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(ours, folder)
        for name in SETTINGS:
            settle(Path(folder), name, ours.vocabulary)
            theirs = transformers.CLIPTokenizer.from_pretrained(folder)
            most = theirs.model_max_length
            few = texts if name == "sd1" else [text for text in PLAIN if "!" in text or "<|" in text]
            told[name] = [[text, theirs(text, add_special_tokens=False)["input_ids"]] for text in few]
            told[f"{name} rows"] = [
                theirs(text, padding="max_length", truncation=True, max_length=most)["input_ids"]
                for text in (texts[0], texts[len(PLAIN)])
            ]
            decoded = [theirs.decode(ids, skip_special_tokens=True) for _, ids in told[name][: len(PLAIN)]]
            told[f"{name} decoded"] = decoded
    for name in ("quick_gelu", "gelu"):
        told[name] = [round(value, 6) for value in theirs_of_ids(transformers, name).flatten().tolist()]
    lines = [f"{json.dumps(k)}: {shown(v)}" for k, v in told.items()]
    (HERE / "text.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def shown(value: Any) -> str:
    """JSON with a line for each text."""
    dense = (",", ":")
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False, separators=dense) for entry in value) + "\n]"
    return json.dumps(value, ensure_ascii=False, separators=dense)


if __name__ == "__main__":
    main()
