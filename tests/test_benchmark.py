"""experiments/benchmark.py: what it counts, tells and keeps; what it times is timed with a network of a few weights."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import kernels

SCRIPT = Path(__file__).parents[1] / "experiments" / "benchmark.py"
COUNTS = {"devanagari": 77_357_825, "cifar10": 35_746_307, "class_mnist": 1_708_289, "butterflies": 18_536_323,
          "cars": 26_623_363}  # fmt: skip
TINY = {"image_size": 8, "in_channels": 1, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4,
        "attention_resolutions": (4,), "head_channels": 8, "dropout": 0.0, "time_offset": -1}  # fmt: skip
TOLD_TINY = {"image_size": 8, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "attention_resolutions": (8,),
             "heads": 2, "token_channels": 8, "groups": 4}  # fmt: skip
ENCODER_TINY = {"vocabulary": 40, "length": 8, "channels": 8, "layers": 1, "heads": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark() -> dict:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def tiny(benchmark, monkeypatch) -> dict:
    """The script with two tiny configurations, and no peers to be found."""
    small = {
        "CONFIGS": {"plain": TINY, "classes": TINY | {"num_classes": 3}},
        "BATCHES": {"plain": 2, "classes": 3},
        "GROWTH": {"batch": (1, 2), "channels": (8, 16), "sampling steps": (1, 2)},
        "SIZES": (16,),
        "COPIED": 2**12,
        "AT_LEAST": 0.0,
        "find_spec": lambda name: None,
    }
    for name, value in small.items():
        monkeypatch.setitem(benchmark["main"].__globals__, name, value)
    return benchmark


def run(script: dict, out: Path, *words: str) -> int:
    return script["main"]([*words, "--rounds", "1", "--ddim", "2", "--out", str(out)])


def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "benchmark.json").read_text())


# ----------------------------------------------------------------------------------------------------------- counts


def test_parameters_of_the_configurations(benchmark):
    with torch.device("meta"):
        networks = {name: benchmark["UNet"](**network) for name, network in benchmark["CONFIGS"].items()}
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()} == COUNTS
    assert benchmark["BATCHES"].keys() == benchmark["BATCHES_CUDA"].keys() == COUNTS.keys()


def test_a_step_costs_three_times_a_forward_pass_and_a_batch_as_its_images(benchmark):
    network = benchmark["CONFIGS"]["class_mnist"]
    told = benchmark["on_paper"](lambda: benchmark["UNet"](**network), network, 4)
    assert told["parameters"] == COUNTS["class_mnist"]
    assert 2.9 < told["gflop_step"] / (4 * told["gflop_image_forward"]) < 3


# ------------------------------------------------------------------------------------------------------------- time


def test_what_fails_is_told_and_the_others_go_on(tiny):
    def no_compiler() -> None:
        raise RuntimeError("no compiler\nand a long story")

    calls = []
    told = tiny["in_turns"]({"a": lambda: calls.append("a"), "b": no_compiler, "c": lambda: calls.append("c")}, 3, CPU)
    assert told["b"] == {"failed": "no compiler"}
    assert calls[-6:] == ["a", "c"] * 3 and len(told["a"]["rounds"]) == len(told["c"]["rounds"]) == 3
    assert told["a"]["low"] <= told["a"]["median"] <= told["a"]["high"] and told["a"]["first"] >= 0


def test_another_network_that_takes_no_such_images_is_told(tiny, monkeypatch):
    class Odd(nn.Conv2d):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.shape[-1] % 8 == 0 and len(x) == 2, "divisible by 8"
            return super().forward(x)

    monkeypatch.setitem(tiny["timings"].__globals__, "other", lambda network: Odd(1, 1, 3, padding=1))
    given = tiny["arguments"](["--what", "training", "--ours", "none", "--peers", "other", "--rounds", "1"])
    name = "denoising-diffusion-pytorch"
    told = tiny["timings"](TINY | {"image_size": 4, "attention_resolutions": []}, 2, given, CPU)["training"]
    assert told["settings"][name] == {"failed": "divisible by 8"} and told["ratios"].keys() == {"ours"}
    monkeypatch.setitem(tiny["timings"].__globals__, "on_paper", lambda *of: {"gflop_step": 0.5})
    told = tiny["timings"](TINY, 2, given, CPU)["training"]
    assert told["settings"][name]["gflop_step"] == 0.5 and told["ratios"][name]["median"] > 0
    assert told["best_peer"] is None, "it is another network, and no goal"


def test_ratios_are_those_of_the_same_rounds(benchmark):
    """The second round was twice as slow for all: of that the ratios show nothing."""
    settings = {
        name: {"rounds": rounds, **benchmark["summary"](rounds)}
        for name, rounds in {"ours": [1.0, 2.0], "peer default": [3.0, 6.0], "peer bf16": [2.0, 4.0]}.items()
    }
    told = benchmark["compared"](settings | {"peer compiled bf16": {"failed": "why"}})
    assert told["ratios"]["peer default"] == {"median": 3, "low": 3, "high": 3} and told["best_peer"] == "peer bf16"
    assert told["ratios"].keys() == settings.keys()
    assert benchmark["compared"]({"ours": {"failed": "why"}})["ratios"] == {}


def test_growth_is_an_exponent_and_a_small_picture(tiny, tmp_path, monkeypatch):
    def timed(runs: dict, rounds: int, device: torch.device) -> dict:
        assert all(callable(run) for run in runs.values())
        return {name: {"median": 0.1 * int(name) ** 2} for name in runs}

    monkeypatch.setitem(tiny["growth"].__globals__, "in_turns", timed)
    told = tiny["growth"](1, CPU)
    assert [curve["exponent"] for curve in told.values()] == pytest.approx([2, 2, 2])
    tiny["draw"](told, tmp_path / "growth.png")
    assert 2_000 < (tmp_path / "growth.png").stat().st_size < 100_000


@pytest.mark.parametrize("means", ["kernels", "norm", "winograd", "attention"])
def test_what_is_measured_without_a_means_differs_by_rounding(means, benchmark, monkeypatch):
    monkeypatch.setattr(kernels, "WIDE_ENOUGH", dict.fromkeys(kernels.WIDE_ENOUGH, 1))
    called, call = [], kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *rest: (called.append(name), call(name, *rest)))
    contender = benchmark["Ours"](TINY, 2, CPU)
    losses = []
    for setting in ("ours", f"ours without {means}"):
        called.clear()
        way = benchmark["Way"](contender, benchmark["SETTINGS"][setting], CPU)
        torch.manual_seed(0)
        with way.as_set():
            losses.append(contender.loss(way.forward).item())
        if kernels.available():
            parts = {"norm": "norm_forward", "winograd": "tiles_in", "attention": "attend"}
            missing = set(parts.values()) - set(called)
            assert missing == ({parts[means]} if means in parts else set(parts.values())) or setting == "ours"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_checkpointing_is_on_for_a_step_alone(benchmark):
    contender = benchmark["Ours"](TINY, 2, CPU)
    way = benchmark["Way"](contender, benchmark["SETTINGS"]["ours checkpointing"], CPU)
    with way.as_set():
        assert contender.model.checkpointing
    assert not contender.model.checkpointing


class Kept:
    """A graph for the CPU: it calls the function again, and puts the gradients where they were when it was recorded."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> None:
        function()
        self.function, self.places = function, [p.grad for p in self.parameters]

    def replay(self) -> None:
        self.function()
        for place, p in zip(self.places, self.parameters, strict=True):
            place.copy_(p.grad)
            p.grad = None


def test_a_step_by_a_graph_is_the_same_step(benchmark, monkeypatch):
    one, other = (benchmark["Ours"](TINY, 2, CPU) for _ in range(2))
    plain, beside, graph = (
        benchmark["Way"](contender, benchmark["SETTINGS"][name], CPU)
        for contender, name in ((one, "ours"), (other, "ours"), (other, "ours graph"))
    )
    with pytest.raises(RuntimeError, match="only a GPU has CUDA graphs"):
        graph.step()
    monkeypatch.setitem(benchmark["Way"].step.__globals__, "graph_on", lambda device: Kept(other.parameters))
    assert graph.gradients is graph.gradients  # recorded once, before the steps that are compared
    for ways in ((plain, beside), (plain, graph), (plain, beside), (plain, graph)):
        for way in ways:
            torch.manual_seed(0)
            way.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))


# ------------------------------------------------------------------------------------------------------ the whole of it


@pytest.mark.slow
def test_all_of_it_without_peers(tiny, tmp_path, capsys):
    """Limits, training and sampling of both, then growth: the second run keeps what the first one found."""
    words = "--what", "training,sampling,limits", "--ours", "fp32,bf16"
    assert run(tiny, tmp_path, *words, "--configs", "plain") == 0
    assert "pip install -c constraints.txt -e '.[peers]'" in capsys.readouterr().out
    first = found(tmp_path)
    plain = first["configs"]["plain"]
    training, sampling = plain["training"], plain["sampling"]
    assert plain["batch"] == 2 and plain["gflop_step"] > plain["gflop_image_forward"] > 0
    assert training["settings"].keys() == {"ours", "ours fp32", "ours bf16", "denoising-diffusion-pytorch"}
    assert training["settings"]["denoising-diffusion-pytorch"] == {"failed": "not installed"}
    assert sampling["steps"] == 2 and sampling["settings"].keys() == {"ours", "ours fp32", "ours bf16"}
    for part in (training, sampling):
        assert part["ratios"]["ours"]["median"] == 1 and part["best_peer"] is None
        assert part["settings"]["ours"]["median"] > 0 and len(part["settings"]["ours"]["rounds"]) == 1

    assert run(tiny, tmp_path, "--what", "training,growth", "--ours", "none", "--peers", "none") == 0
    second = found(tmp_path)
    assert second["limits"] == first["limits"] and second["configs"].keys() == {"plain", "classes"}
    assert second["configs"]["plain"]["sampling"] == sampling
    assert second["configs"]["plain"]["training"]["settings"].keys() == {"ours"}
    assert all(math.isfinite(curve["exponent"]) for curve in second["growth"].values())
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out and text.count("| plain: ") == text.count("| classes: ") == 1
    assert (tmp_path / "growth.png").exists()


def test_another_batch_drops_what_was_measured_at_the_first(tiny, tmp_path):
    words = "--configs", "plain", "--ours", "none", "--peers", "none"
    assert run(tiny, tmp_path, *words, "--what", "training") == 0
    assert run(tiny, tmp_path, *words, "--what", "sampling", "--batch", "1") == 0
    entry = found(tmp_path)["configs"]["plain"]
    assert entry["batch"] == 1 and "sampling" in entry and "training" not in entry


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"machine": {"name": "another"}}, "was measured with name = 'another'"),
        ([], "is no benchmark"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_that_another_machine_or_program_wrote_is_left_alone(tiny, tmp_path, capsys, content, told):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "benchmark.json").write_text(text)
    assert run(tiny, tmp_path, "--what", "limits") == 2 and told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]
    assert (tmp_path / "benchmark.json").read_text() == text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--configs", "cifar"], "--configs has 'cifar', which is not known; allowed: devanagari, cifar10"),
        (["--what", "speed"], "allowed: training, sampling, memory, limits, growth"),
        (["--peers", "default,fastest"], "--peers has 'fastest'"),
        (
            ["--ours", "fp16"],
            "allowed: fp32, bf16, compiled, graph, checkpointing, no_kernels, no_norm, no_winograd, no_attention, none",
        ),
        (["--batch", "0"], "--batch = 0 must be an integer in 1..1000000"),
    ],
)
def test_what_is_not_allowed_is_told_in_one_line(benchmark, tmp_path, capsys, words, told):
    assert benchmark["main"]([*words, "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert told in output.err and output.err.count("\n") == 1 and output.out == ""
    assert not (tmp_path / "out").exists()


def test_groups_of_settings(benchmark):
    chosen = benchmark["arguments"](["--ours", "none", "--peers", "best"]).labels
    assert chosen == ["ours", "peer bf16", "peer fp32 channels_last", "peer compiled fp32", "peer compiled bf16"]
    assert benchmark["arguments"](["--ours", "none", "--peers", "none"]).labels == ["ours"]
    means = [f"ours without {means}" for means in benchmark["WITHOUT"]]
    words = ["--ours", "no_kernels,no_norm,no_winograd,no_attention", "--peers", "none"]
    assert benchmark["arguments"](words).labels == ["ours", *means]
    apart = [*means, "ours graph", "ours checkpointing"]
    assert benchmark["arguments"]([]).labels == [label for label in benchmark["SETTINGS"] if label not in apart]


def test_the_table(benchmark):
    def timed(median: float, **more: float) -> dict:
        return {"median": median, "low": median / 2, "high": 2 * median, "rounds": [median], "first": 9.0, **more}

    training = {
        "ours": timed(2.0),
        "peer default": timed(4.0),
        "peer compiled bf16": {"failed": "no compiler"},
        "denoising-diffusion-pytorch": timed(1.0, gflop_step=50.0),
    }
    entry = {
        "batch": 8,
        "parameters": 2_500_000,
        "gflop_step": 100.0,
        "gflop_image_forward": 4.0,
        "training": {"precision": "fp32", **benchmark["compared"](training)},
        "sampling": {"steps": 50, "precision": "fp32", **benchmark["compared"]({"ours": timed(4.0)})},
        "memory": {"peer default": {"bytes": 123_400_000}},
    }
    machine = {"name": "a machine", "device": "cpu", "threads": 2, "torch": "2.6", "diffusers": None}
    told = {"machine": machine, "limits": {"fp32": 100.0, "bf16": 200.0, "copy": 12.3}, "configs": {"net": entry}}
    text = benchmark["table"](told)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {len(head)} == {11}
    assert rows == [
        ["net: batch 8, 2.50 M parameters, GFLOP 100 a step, 4 an image forward", "ours (fp32)", "2 (1 to 4)",
         "1.00 (1.00 to 1.00)", "9", "20", "50%", "2 (1 to 4)", "1.00 (1.00 to 1.00)", "9", "-"],
        ["", "peer default", "**4** (2 to 8)", "2.00 (2.00 to 2.00)", "9", "40", "25%", "-", "-", "-", "123"],
        ["", "peer compiled bf16", "failed: no compiler", *["-"] * 8],
        ["", "denoising-diffusion-pytorch", "1 (0.5 to 2)", "0.50 (0.50 to 0.50)", "9", "20", "50%", *["-"] * 4],
    ]  # fmt: skip
    assert "fp32 100 GFLOP/s, bf16 200 GFLOP/s; copy: 12.3 GB/s" in text and "diffusers not installed" in text
    assert benchmark["table"]({"machine": machine}).count("\n") == 1, "nothing was measured yet"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.slow
def test_memory_holds_weights_average_gradients_and_two_moments(benchmark):
    network = TINY | {"channels": 64, "channel_mults": (1, 4)}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in benchmark["UNet"](**network).parameters())
    told = benchmark["memory"](network, 1, ["ours"], CPU)
    assert 0.9 * 20 * parameters < told["ours"]["bytes"] < 2 * 20 * parameters
    wrong = benchmark["memory"](network | {"image_size": 9}, 1, ["ours"], CPU)
    assert "image_size = 9x9" in wrong["ours"]["failed"]


# ------------------------------------------------------------------------------------------------------------ the peer


@pytest.mark.parametrize("classes", [None, 3])
def test_the_peer_says_what_ours_says(benchmark, classes):
    pytest.importorskip("diffusers")
    peer = benchmark["twin"](TINY | {"num_classes": classes})  # compares
    ours = benchmark["built"](TINY | {"num_classes": classes})
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    assert all(p.any() for p in ours.parameters())


def test_a_peer_that_says_something_else_is_not_timed(benchmark):
    x = torch.ones(2, 1, 8, 8)
    benchmark["must_agree"](x, x + 5e-5)
    for different in (x + 1e-3, x * float("nan")):
        with pytest.raises(RuntimeError, match="outputs differ"):
            benchmark["must_agree"](x, different)


@pytest.mark.parametrize("network", [TINY, TINY | {"num_classes": 3}])
def test_the_peer_trains_and_samples(tiny, network, monkeypatch):
    pytest.importorskip("diffusers")
    given = tiny["arguments"](["--what", "training,sampling", "--ours", "none", "--peers", "default,bf16",
                               "--ddim", "2", "--rounds", "1"])  # fmt: skip
    told = tiny["timings"](network, 2, given, CPU)
    for part in ("training", "sampling"):
        assert all("median" in what for what in told[part]["settings"].values()), told[part]
        assert told[part]["ratios"].keys() == {"ours", "peer default", "peer bf16"}
        assert told[part]["best_peer"] in ("peer default", "peer bf16")


def test_text_conditional_networks_are_timed_without_peers_and_has_rows_of_its_own(tiny, tmp_path, capsys, monkeypatch):
    assert {"words_32", "words_64"} == tiny["TEXT_CONDITIONAL"].keys()
    for name, value in {"TEXT_CONDITIONAL": {"words_64": tiny["LATENT"] | TOLD_TINY}, "ENCODER": ENCODER_TINY}.items():
        monkeypatch.setitem(tiny["main"].__globals__, name, value)
    assert run(tiny, tmp_path, "--what", "text") == 0
    said = capsys.readouterr().out
    assert "diffusers and transformers not installed: text-conditioned networks are timed without their peers" in said
    told = found(tmp_path)["text"]
    passes = {f"{what}, {how}" for what in ("forward", "forward and backward") for how in ("fp32", "bf16")}
    assert told.keys() == {"words_64", "encoder"}
    for its in told.values():
        assert its.keys() == {"parameters", *passes}
        assert all(its[what]["settings"].keys() == {"ours"} for what in passes)
    assert sum("| - | - | - | - |" in line for line in said.splitlines()) == 8
    times = {"median": 2.0, "low": 1.0, "high": 4.0, "rounds": [2.0], "first": 9.0}
    part = tiny["compared"]({"ours": times, "peer": times | {"median": 3.0, "rounds": [3.0]}})
    machine = {"name": "a machine", "device": "cpu", "threads": 1, "torch": "2.6"}
    told = {"encoder": {"parameters": 1_500_000, "forward, fp32": part, "forward, bf16": part}}
    rows = [line for line in tiny["table"]({"machine": machine, "text": told}).splitlines() if "forward" in line]
    assert rows == [
        "| encoder: 1.50 M parameters | forward, fp32 | 2 (1 to 4) | **3** (1 to 4) | 1.50 (1.50 to 1.50) | - | - |",
        "|  | forward, bf16 | 2 (1 to 4) | **3** (1 to 4) | 1.50 (1.50 to 1.50) | - | - |",
    ]


@pytest.mark.slow
def test_text_conditional_networks_are_timed_beside_their_peers(benchmark, monkeypatch):
    for library in ("diffusers", "transformers"):
        pytest.importorskip(library)
    scope = benchmark["main"].__globals__
    for name, value in {
        "TEXT_CONDITIONAL": {"words": benchmark["LATENT"] | TOLD_TINY},
        "ENCODER": ENCODER_TINY,
        "AT_LEAST": 0.0,
    }.items():
        monkeypatch.setitem(scope, name, value)
    noted: list[dict] = []
    benchmark["text"](1, CPU, noted.append)  # compares the outputs before anything is timed
    told = noted[-1]
    assert told.keys() == {"words", "encoder"} and len(told["words"]) == 5
    assert told["words"]["forward, fp32"]["settings"].keys() == {"ours", "peer", "peer channels_last"}
    assert told["encoder"]["forward and backward, bf16"]["ratios"]["ours"]["median"] == 1
