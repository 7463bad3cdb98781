"""`ddpm-read`: the source code as web pages, equations next to the code that computes them."""

from pathlib import Path
from typing import Any

from ddpm.commands.console import say
from ddpm.commands.launch import composed
from ddpm.commands.validate import trusted
from ddpm.config import InvalidInput, build

OWN = ("out", "open")
HELP = """ddpm-read: the source as pages to read, equation and code side by side; needs no network

  out=FOLDER    output folder (reference)
  open=true     open the first page in a browser
  WORDS         as ddpm-train takes them, such as experiment=mnist, for the network on the map"""


def read(words: list[str]) -> None:
    """Build the site and print which file to open.

    Args:
        words: out=, open=, and overrides of ddpm-train that choose a network.
    Raises: InvalidInput if the project or a package is missing, and for a mistake in its source, with its place.
    """
    own, others = _split(words)
    root = project()
    out = Path(own.get("out", "reference"))
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "site.css").is_file())):
        raise InvalidInput(
            f"out={out} exists and is not a reading site: name a new folder, or an older site to replace"
        )
    try:
        import latex2mathml.converter  # noqa: F401
        import pygments  # noqa: F401
    except ImportError as error:
        lacks = f"building the pages needs {error.name}, which is not installed"
        raise InvalidInput(f"{lacks}: pip install -c constraints.txt -e '.[reading]'") from error
    from ddpm.reading.mistakes import Mistake
    from ddpm.reading.site import build as build_site

    stages, description = network_of(others)
    try:
        page = build_site(root, out, stages, description)
    except (Mistake, SyntaxError) as error:
        raise InvalidInput(str(error)) from error
    say(f"open {page}")
    if own.get("open") == "true":
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split the words into this command's own options, by key, and the overrides that compose a network."""
    own: dict[str, str] = {}
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in OWN:
            own[key] = value
        else:
            others.append(word)
    if own.get("open", "false") not in ("true", "false"):
        raise InvalidInput(f"open={own['open']} must be true or false")
    if "out" in own and not own["out"]:
        raise InvalidInput("out= must name a folder, such as out=reference")
    return own, others


def project() -> Path:
    """Return the folder of the project whose modules are imported.

    Raises: InvalidInput where the package was installed without its tests.
    """
    import ddpm

    root = Path(ddpm.__file__).resolve().parents[1]
    if not (root / "tests").is_dir() or not (root / "notebooks").is_dir() or not (root / "models").is_dir():
        raise InvalidInput(
            f"{root} has no tests/ and notebooks/ next to ddpm/: the pages show both, so build them in a checkout of "
            "the project, with python experiments/read.py"
        )
    return root


def network_of(words: list[str]) -> tuple[list[Any], str]:
    """Return the stages of the network that the overrides compose, and a sentence that describes it.

    Raises: InvalidInput for words that do not compose, and for a network that is no U-Net.
    """
    import torch

    config = composed("train", words)
    with torch.device("meta"):
        model: Any = build(config.model, "model", trusted(config))
    if not all(hasattr(model, part) for part in ("down", "up", "middle_1", "image_size")):
        raise InvalidInput(f"{type(model).__name__} has no map: only U-Nets are drawn; leave {' '.join(words)} out")
    parameters = sum(p.numel() for p in model.parameters())
    description = f"The network of {' '.join(words) or 'the default configuration'}, {parameters:,} parameters."
    return stages_of(model), description


def stages_of(model: Any) -> list[Any]:
    """Return the stages of a U-Net in the order of a forward pass, recorded by hooks; works on the meta device too."""
    import torch

    from ddpm.reading.network_map import Stage

    stages: list[Any] = []

    def note(name: str, kind: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            stages.append(Stage(name, kind, tuple(output.shape)))

        return hook

    hooks = []
    for name, module in model.named_modules():
        if (kind := _kind(name)) is not None and type(module).__name__ not in ("Identity", "NoneType"):
            hooks.append(module.register_forward_hook(note(name, kind)))
    try:
        device = next(model.parameters()).device
        y = torch.zeros(1, dtype=torch.long, device=device) if getattr(model, "num_classes", None) else None
        with torch.no_grad():
            model.eval()(torch.zeros(1, *model.shape, device=device), torch.ones(1, device=device), y)
    except (ValueError, NotImplementedError) as error:
        raise InvalidInput(f"the map of this network cannot be drawn: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return stages


def _kind(name: str) -> str | None:
    """Return the kind of a U-Net module on the map, by its name; None for a module inside another stage."""
    parts = name.split(".")
    if name in ("conv_in", "conv_out"):
        return "conv"
    if name in ("middle_1", "middle_2"):
        return "middle"
    if name == "middle_attention":
        return "attention"
    if parts[0] in ("down", "up") and len(parts) == 3 and parts[2] == "resample":
        return parts[0]
    if parts[0] in ("down", "up") and len(parts) == 4 and parts[2] in ("residual", "attention"):
        return {"residual": "block"}.get(parts[2], parts[2])
    return None
