"""ddpm/training/graph.py: a run whose gradients are replayed is the same run; where they cannot be, it says why."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ddpm.data.batch import on
from ddpm.data.points import Points
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs.directory import Run, read_metrics
from ddpm.runs.precision import computing
from ddpm.schedules import cosine
from ddpm.training.graph import WARM_UP, CUDAGraph, Graph, Replayed, graph_on
from ddpm.training.ranks import Ranks
from ddpm.training.step import Training
from ddpm.training.task import Drawn, Phase
from ddpm.training.tasks.consistency import Consistency
from ddpm.training.tasks.diffusion import Diffusion
from ddpm.training.tasks.score import Score
from ddpm.training.trainer import Trainer
from models.mlp import MLP

CPU, T, STEPS = torch.device("cpu"), 4, WARM_UP + 3
adamw = functools.partial(torch.optim.AdamW, lr=2e-3, fused=True)
OPTIONS = {
    "as it is": {},
    "micro-batches, without a bound of the gradient": {"accumulate": 2, "clip": None},
    "half precision and its loss scale": {"precision": "fp16", "accumulate": 2},
    "a learned variance": {"learned": True},
    "classes that are dropped": {"drop": 0.5},
    "dropout": {"dropout": 0.3},
    "all at once": {
        "learned": True, "drop": 0.3, "dropout": 0.2, "time_sampling": "loss_aware", "offset_noise": 0.1,
        "accumulate": 2, "ema_snapshots": 2,
    },
}  # fmt: skip
OWN = ("learned", "drop", "dropout", "time_sampling", "offset_noise")  # of the task


class Kept:
    """A graph for the CPU: it keeps a function, and calls it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        self.done.append("warm-up")
        function()

    def capture(self, function: Callable[[], None]) -> None:
        self.done.append("capture")
        self.function = function

    def replay(self) -> None:
        self.done.append("replay")
        self.function()


class Broken(Kept):
    """One whose capture fails, as that of a GPU does: by what was not allowed, and then because it cannot be ended."""

    def capture(self, function: Callable[[], None]) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def data() -> Points:
    """40 labelled points, 8 of them held out."""
    random = torch.Generator().manual_seed(1)
    return Points("points", torch.randn(40, 2, generator=random), torch.arange(40) % 3, validation=0.2)


def task(kind: type[Diffusion] = Diffusion, *, learned: bool = False, drop: float = 0.0, dropout: float = 0.0,
         **options: object) -> Diffusion:  # fmt: skip
    torch.manual_seed(0)
    model = MLP(2, 16, 1, out_features=4 if learned else 2, dropout=dropout, num_classes=3, drop=drop)
    diffusion = GaussianDiffusion(cosine(T), "v", **({"variance": "learned", "loss": "hybrid"} if learned else {}))
    made = kind(model, diffusion, drop=drop, **options)
    made.check(Points("points", torch.randn(4, 2), torch.arange(4) % 3))
    return made


def trainer(**changed: object) -> Trainer:
    chosen = {"steps": STEPS, "batch_size": 16, "precision": "fp32", "previews": 0, "log_every": 1}
    return Trainer(**chosen | {"checkpoint_every": STEPS, "ema_decay": 0.9} | changed)


def training(data: Points, graph: Graph | None, device: torch.device = CPU, **options: object) -> Training:
    """Of a task with these options, or by a trainer with the others of them."""
    own = {name: options.pop(name) for name in OWN if name in options}
    return Training(trainer(**options), task(**own), data.to(device), adamw, seed=0, device=device, graph=graph)


def steps(training: Training, numbers: range) -> list[tuple[Tensor, ...]]:
    """Loss and norm of the gradient of steps, at rates that differ."""
    told = []
    for step in numbers:
        training.scale_lr(1 / step)
        taken = training.step(step, (step - 1) / STEPS)
        told.append((taken.loss, taken.grad_norm))
    return told


def state(training: Training) -> list[tuple[str, object]]:
    """All that a checkpoint would hold."""

    def flat(name: str, node: object) -> list[tuple[str, object]]:
        if isinstance(node, dict):
            return [pair for key, inner in node.items() for pair in flat(f"{name}.{key}", inner)]
        return [(name, node)]

    return [
        *flat("", training.state_dict()),
        *training.task.modules["model"].state_dict().items(),
        *training.averaged.modules["model"].state_dict().items(),
    ]


def assert_same(one: list[tuple[str, object]], other: list[tuple[str, object]]) -> None:
    assert [name for name, _ in one] == [name for name, _ in other]
    different = [
        name
        for (name, a), (_, b) in zip(one, other, strict=True)
        if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
    ]
    assert not different


# ------------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replayed_steps_are_the_same_to_the_bit(options, data):
    graph = Kept()
    eager, replayed = training(data, None, **options), training(data, graph, **options)
    told = [steps(each, range(1, STEPS + 1)) for each in (eager, replayed)]
    assert graph.done == ["warm-up"] * WARM_UP + ["capture"] + ["replay"] * (STEPS - WARM_UP)
    assert told[0] == told[1] and replayed.eager is None
    assert_same(state(replayed), state(eager))
    assert replayed.report() == eager.report()


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_a_graph_and_without(first, data, tmp_path):
    """From the state of replayed steps, or of others, in the midst of what time sampler and averages know."""
    options, middle = OPTIONS["all at once"], WARM_UP + 1
    whole, part = training(data, None, **options), training(data, Kept() if first else None, **options)
    steps(whole, range(1, STEPS + 1 + middle))
    steps(part, range(1, middle + 1))
    torch.save(part.state_dict(), tmp_path / "state.pt")
    rest = training(data, None if first else Kept(), **options)
    for into, modules in ((rest.task, part.task.modules), (rest.averaged, part.averaged.modules)):
        into.modules["model"].load_state_dict(modules["model"].state_dict())
    rest.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(rest, range(middle + 1, STEPS + 1 + middle))
    assert_same(state(rest), state(whole))


def test_what_is_read_and_written_lies_in_the_same_place():
    """Each step's numbers are copied into what the graph reads, and what it writes is copied before it writes anew."""

    @dataclass(frozen=True, kw_only=True)
    class Number(Drawn):
        x: Tensor

    loss, read = torch.zeros(()), []

    def gradients(drawn: Number, progress: float) -> tuple[Tensor, list[dict[str, Tensor]]]:
        read.append(drawn.x.data_ptr())
        return loss.copy_(2 * drawn.x.sum()), [{"loss": loss}]

    replayed, given = Replayed(gradients, Kept()), [Number(x=torch.full((3,), float(n))) for n in range(STEPS)]
    results = [replayed(drawn, 0.0) for drawn in given][WARM_UP:]
    assert [value.item() for value, _ in results] == [6.0 * n for n in range(WARM_UP, STEPS)]
    assert [parts[0]["loss"].item() for _, parts in results] == [6.0 * n for n in range(WARM_UP, STEPS)]
    assert len({*read[WARM_UP:]}) == 1 and read[-1] not in [drawn.x.data_ptr() for drawn in given]


def test_weights_that_are_converted_are_not_kept_where_a_graph_reads_them():
    with computing(CPU, "bf16", cache=False):
        assert not torch.is_autocast_cache_enabled()
    with computing(CPU, "bf16"):
        assert torch.is_autocast_cache_enabled()


# ------------------------------------------------------------------------------------------- where it cannot be


def test_on_a_cpu_there_is_none():
    assert graph_on(CPU) is None


def test_a_capture_that_fails_changes_nothing(data):
    options, graph = OPTIONS["all at once"], Broken()
    eager, other = training(data, None, **options), training(data, graph, **options)
    told = [steps(each, range(1, STEPS + 1)) for each in (eager, other)]
    assert graph.done == ["warm-up"] * WARM_UP and told[0] == told[1]
    assert_same(state(other), state(eager))


def test_why_there_is_no_graph_is_told_once(data, tmp_path, capsys):
    trainer().fit(Run(tmp_path), task(), data, adamw, seed=0, device=CPU, graph=Broken())
    told = "steps are taken without a CUDA graph: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err.count(told) == 1
    assert len(read_metrics(tmp_path)) == STEPS + 1


class InTurns(Diffusion):
    """The same network, trained by the same loss twice a step."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(Phase(name, ("model",), self.losses) for name in ("first", "second"))


@pytest.mark.parametrize(
    ("made", "processes", "reason"),
    [
        (lambda: task(), 2, "2 processes share every batch"),
        (lambda: task(InTurns), 1, "InTurns has 2 phases, each with gradients of its own"),
        (lambda: task(Consistency, s_0=2, s_1=4), 1, "the losses of Consistency cannot be replayed"),
        (lambda: Score(task().model, GaussianDiffusion(cosine(T, beta_max=0.9)), "explicit"), 1,
         "the losses of Score cannot be replayed"),
        (lambda: task(Score, objective="sliced"), 1, None),
    ],
)  # fmt: skip
def test_what_is_known_to_keep_a_graph_away(made, processes, reason, data):
    make = functools.partial(Training, trainer(), data=data, optimizer=adamw, seed=0, device=CPU)
    graph, ranks = Kept(), Ranks(0, processes)
    asked, plain = make(made(), ranks=ranks, graph=graph), make(made(), ranks=ranks)
    assert asked.eager == reason and plain.eager is None  # where none is asked for there is nothing to tell
    assert [phase.gradients.graph for phase in asked.phases] == [None if reason else graph] * len(asked.phases)


# ------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.parametrize("device", ["cpu", "meta", CPU])
def test_what_moves_between_other_devices_moves_as_always(device):
    x = torch.arange(6).reshape(2, 3)
    assert on(device, x).device.type == torch.device(device).type
    assert on("cpu", x) is x


class Generator:
    """As torch's: a capture that fails leaves its state in it."""

    state = "as it was"

    def clone_state(self) -> str:
        return self.state

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


@pytest.mark.parametrize("ends", [True, False])
def test_the_generator_is_as_it_was_after_a_capture_that_fails(ends, monkeypatch):
    """With what stands for torch's own, which needs a GPU."""
    generator, entered = Generator(), []

    @contextlib.contextmanager
    def capturing(graph: str, stream: types.SimpleNamespace) -> Iterator[None]:
        generator.state = "captures"
        yield
        generator.state = "captured"

    @contextlib.contextmanager
    def on_stream(stream: types.SimpleNamespace) -> Iterator[None]:
        entered.append(stream)
        yield

    def function() -> None:
        if not ends:
            raise RuntimeError("a look at a value")

    stream = types.SimpleNamespace(device_index=0, wait_stream=entered.append)
    usual = types.SimpleNamespace(wait_stream=entered.append)
    stand_ins = {
        "Stream": lambda device: stream, "CUDAGraph": lambda: "graph", "graph": capturing, "stream": on_stream,
        "current_stream": lambda device: usual, "default_generators": [generator],
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graph = CUDAGraph(torch.device("cuda"))
    with contextlib.nullcontext() if ends else pytest.raises(RuntimeError, match="a look at a value"):
        graph.capture(function)
    assert generator.state == ("captured" if ends else "as it was") and entered == [stream]
    graph.warm_up(lambda: entered.append("run"))
    assert entered[1:] == [usual, stream, "run", stream]  # each waits for the other


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_gpu_replays_the_same_steps_but_for_rounding(options, precision, data):
    """Dropout too: its masks are those of the step, not of the capture."""
    options = options | {"precision": precision}
    runs = [training(data, graph, CUDA, **options) for graph in (None, graph_on(CUDA))]
    one, other = (torch.tensor(steps(run, range(1, STEPS + 1))) for run in runs)
    assert runs[1].eager is None
    torch.testing.assert_close(other, one, rtol=1e-4 if precision == "fp32" else 2e-2, atol=0)


class Looks(nn.Module):
    """Waits for the device."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() < 1e30 else 0 * x


@gpu
def test_after_a_capture_that_fails_a_gpu_goes_on(data):
    """Neither the generator of dropout nor the stream is left in it."""
    told, usual = [], torch.cuda.current_stream()
    for graph in (None, graph_on(CUDA)):
        run = training(data, graph, CUDA, dropout=0.3)
        run.task.modules["model"].register_forward_hook(lambda model, given, x: Looks()(x))
        told.append(torch.tensor(steps(run, range(1, STEPS + 1))))
        assert (run.eager is None) == (graph is None)
    torch.testing.assert_close(told[1], told[0])
    assert torch.cuda.current_stream() == usual


@gpu
def test_a_batch_reaches_a_gpu_whole_and_nobody_waits(data):
    here, indices = data.batch(data.train[:16]), data.train[:16]
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = data.batch(indices, CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.x.cpu(), here.x) and torch.equal(there.y.cpu(), here.y)
