"""ddpm/runs/preflight.py: what a run is going to need, against what it does need."""

import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ddpm.config import InvalidInput, build, compose
from ddpm.data import ImageData
from ddpm.runs import checkpoint, preflight
from ddpm.runs.preflight import Memory, activations, available, available_on_linux, in_words, memory, moments_of
from models.unet import UNet

REPOSITORY = Path(__file__).parents[1]
GB = 10**9


def stepped(kind: type[torch.optim.Optimizer], **options: object) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.ones(2, 3)
    optimizer = kind([weight], **options)
    optimizer.step()
    return optimizer


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("kind", "options", "moments"),
    [
        (torch.optim.Adam, {"fused": True}, 2),
        (torch.optim.AdamW, {"foreach": True}, 2),
        (torch.optim.Adam, {"amsgrad": True}, 3),
        (torch.optim.SGD, {"lr": 0.1}, 0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
        (torch.optim.RMSprop, {}, 1),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, 3),
    ],
)
def test_moments_are_those_that_the_optimizer_keeps(kind, options, moments):
    assert moments_of(stepped(kind, **options)) == moments


def test_the_memory_of_a_step_is_counted():
    network = nn.Linear(9, 4, bias=False)
    data = ImageData("black", "all", torch.zeros(50, 3, 2, 2, dtype=torch.uint8))
    found = memory([network], 2, data, batch_size=8, accumulate=2, activations=5)
    assert found == Memory(144, 144, 288, 144, 600, 2 * (8 + 4) * 12 * 4, 5)
    assert str(found).startswith("144 B weights, 144 B gradients, 288 B moments, 144 B average")


def test_activations_of_layers_that_can_be_counted_by_hand():
    first, second = nn.Linear(10, 20), nn.Linear(20, 30)

    def loss(n: int) -> Tensor:
        return second(first(torch.zeros(n, 10)).relu()).square().mean()  # keeps both inputs, relu's, and square's

    parameters = [*first.parameters(), *second.parameters()]
    for n in (1, 2, 7):
        assert activations(loss, parameters, n) == 4 * n * (10 + 20 + 30)


def test_what_is_kept_once_is_not_multiplied():
    weight, table = nn.Parameter(torch.ones(10)), torch.ones(1000)

    def loss(n: int) -> Tensor:
        return (torch.ones(n, 10) * weight).sum() + (weight[:1] * table).sum()

    assert activations(loss, [weight], 5) == 4 * (5 * 10 + 1000)


def test_weights_that_the_first_loss_lays_out_anew_are_no_activations():
    layer = nn.Conv2d(3, 5, 3, padding=1)

    def loss(n: int) -> Tensor:
        x = torch.zeros(n, 3, 4, 4).to(memory_format=torch.channels_last)
        return layer.to(memory_format=torch.channels_last)(x).sum()

    assert activations(loss, layer.parameters(), 6) == 4 * 6 * 3 * 4 * 4


def test_what_is_computed_again_counts_once_and_what_is_forgotten_does_not():
    weight = nn.Parameter(torch.ones(10))

    def three(x: Tensor) -> Tensor:
        return x.tanh().tanh().tanh()

    def loss(n: int, forgetting: bool) -> Tensor:
        x = torch.ones(n, 10) * weight
        for _ in range(5):
            x = torch_checkpoint(three, x, use_reentrant=False) if forgetting else three(x)
        return x.sum()

    for n in (1, 2, 7):
        assert activations(partial(loss, forgetting=False), [weight], n) == 4 * n * 10 * (1 + 15)  # that of the product
        assert activations(partial(loss, forgetting=True), [weight], n) == 4 * n * 10 * (1 + 5 + 3)
    assert weight.grad is None


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_network_with_checkpointing_needs_less(precision):
    counted = []
    for checkpointing in (False, True):
        network = UNet(16, 1, None, 8, (1, 2), 2, (8,), groups=4, checkpointing=checkpointing)

        def loss(n: int, network: UNet = network) -> Tensor:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                return network(torch.zeros(n, 1, 16, 16), torch.ones(n)).square().mean()

        counted.append(activations(loss, network.parameters(), 50))
    assert counted[1] < 0.5 * counted[0]


def saved_by(loss: Tensor) -> int:
    """Bytes of the distinct tensors in a graph of autograd, by what its nodes say that they saved."""
    found, seen, left = {}, set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [after for after, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(value := getattr(node, name), Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("attention", ["full", "linear"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_activations_of_a_network_are_those_of_its_graph(attention, precision):
    network = UNet(8, 1, None, 8, (1, 2), 1, (4,), attention=attention, groups=4)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def loss(n: int) -> Tensor:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            return F.mse_loss(network(torch.zeros(n, 1, 8, 8), torch.ones(n)), torch.zeros(n, 1, 8, 8))

    whole = loss(6)
    weights = sum(p.nbytes for p in network.parameters() if p.untyped_storage().data_ptr() in own)
    counted = activations(loss, network.parameters(), 6)
    assert saved_by(whole) - weights <= counted * 1.05 and counted <= 1.05 * saved_by(whole)


STEP = """
import sys
import torch
from ddpm.config import build, compose
def most():  # not ru_maxrss: a process inherits that of the one that started it
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
config = compose("train", sys.argv[1:])
data, model = build(config.data, "data"), build(config.model, "model")
model.to(memory_format=torch.channels_last)
diffusion = build(config.diffusion, "diffusion", schedule=build(config.schedule, "schedule"))
optimizer = build(config.optimizer, "optimizer", params=list(model.parameters()))
def step(n):
    diffusion.loss(model, data.batch(data.train[:n]).x).mean().backward()
    optimizer.step()
step(2)  # all is loaded, gradients and moments are there
before = most()
step(config.trainer.batch_size)
print(most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_process_grows_by_about_the_activations():
    words = ["model.channels=32", "trainer.batch_size=1000", "device=cpu"]
    command = [sys.executable, "-c", STEP, *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    settings = compose("train", words)
    data, model = build(settings.data, "data"), build(settings.model, "model")
    diffusion = build(settings.diffusion, "diffusion", schedule=build(settings.schedule, "schedule"))
    counted = activations(
        lambda n: diffusion.loss(model, data.batch(data.train[:n]).x).mean(), model.parameters(), 1000
    )
    assert counted / 2 < int(done.stdout) < 2 * counted


# ---------------------------------------------------------------------------------------------- what is there


def test_what_is_available_here():
    there = available(torch.device("cpu"))
    assert there is None or there > 10**6
    if torch.cuda.is_available():
        assert 0 < available(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


@pytest.fixture
def system(tmp_path) -> Callable[..., int | None]:
    """What is available on a made-up machine with 8 GB available, by its control groups."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo=f"MemTotal: 16000000 kB\nMemAvailable: {8 * 10**6} kB\n")

    def system(cgroup: str, **of_groups: dict[str, str]) -> int | None:
        write(proc / "self", cgroup=cgroup)
        for path, files in of_groups.items():
            write(groups / path.replace("_", "/"), **files)
        return available_on_linux(proc, groups)

    return system


STAT = "anon 5\n" + "".join(
    f"{total}{kind}_file {GB // 2}\n" for total in ("", "total_") for kind in ("inactive", "active")
)


def test_without_limits_it_is_what_the_kernel_says(system, tmp_path):
    assert system("0::/\n") == 8 * 1024 * 10**6
    unlimited = {"memory__max": "max\n", "memory__current": "5\n", "memory__stat": STAT}
    assert system("0::/\n", **{"": unlimited}) == 8 * 1024 * 10**6
    assert system("garbage") is None
    assert available_on_linux(tmp_path / "nowhere") is None


def test_a_control_group_leaves_its_limit_and_what_files_take_of_it(system):
    limited = {"memory__max": f"{4 * GB}\n", "memory__current": f"{3 * GB}\n", "memory__stat": STAT}
    assert system("0::/a/b\n", a_b=limited) == 2 * GB


def test_the_limit_of_an_outer_group_counts_too(system):
    inner = {"memory__max": f"{4 * GB}\n", "memory__current": f"{GB}\n", "memory__stat": STAT}
    outer = {"memory__max": f"{4 * GB}\n", "memory__current": f"{4 * GB}\n", "memory__stat": STAT}
    assert system("0::/a/b\n", a_b=inner, a=outer) == GB


def test_control_groups_of_version_1(system):
    limited = {"memory__limit_in_bytes": f"{4 * GB}\n", "memory__usage_in_bytes": f"{3 * GB}\n", "memory__stat": STAT}
    assert system("4:cpu:/\n5:memory,hugetlb:/a\n", memory_a=limited) == 2 * GB


def test_a_group_over_its_limit_leaves_nothing(system):
    over = {"memory__max": "5\n", "memory__current": f"{3 * GB}\n", "memory__stat": STAT}
    assert system("0::/a\n", a=over) == 0


# ---------------------------------------------------------------------------------------------- weights


def test_large_weights_are_noticed_on_the_way():
    with preflight.few_weights(1000):
        nn.Linear(10, 10)
    with pytest.raises(preflight.ManyWeights), preflight.few_weights(1000):
        nn.Sequential(*(nn.Linear(10, 10) for _ in range(3)))
    nn.Linear(100, 100)  # outside all is let through


def test_a_network_that_was_counted_first_is_the_same(monkeypatch):
    node, few_weights, ends = compose("train", []).model, preflight.few_weights, []
    for limit in (preflight.FEW, 1000):
        monkeypatch.setattr(preflight, "few_weights", lambda limit=limit: few_weights(limit))
        torch.manual_seed(3)
        ends.append((build(node, "model").state_dict(), torch.get_rng_state()))
    (one, random_1), (other, random_2) = ends
    assert all(torch.equal(one[k], v) for k, v in other.items()) and torch.equal(random_1, random_2)


def test_weights_beyond_memory_are_refused_before_they_are_there(monkeypatch):
    monkeypatch.setattr(preflight, "available", lambda device: 2 * GB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidInput, match=r"model: the weights of [\d,]+ parameters take .* GB, but 2 GB of"):
        build(compose("train", ["model.channels=2000"]).model, "model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GB // 1024


# ---------------------------------------------------------------------------------------------- disk


def test_a_checkpoint_has_the_size_that_is_foreseen(tmp_path):
    network = UNet(8, 1, channels=16, channel_mults=(1, 2), blocks=1, attention_resolutions=(4,), groups=8)
    optimizer = torch.optim.AdamW(network.parameters())
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    folder = checkpoint.save(
        tmp_path, 1, {"model": network}, {"model": network}, {"optimizer": optimizer.state_dict()["state"]}, None
    )
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert preflight.checkpoint([network], 2) == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize(
    ("steps", "every", "keep", "count"),
    [(None, 100, 2, 4), (1000, 100, 2, 4), (1000, 100, 1, 3), (150, 100, 2, 2), (100, 100, 2, 1), (1, 100, 2, 1)],
)
def test_how_many_checkpoints_there_are_at_once(steps, every, keep, count):
    assert preflight.checkpoints(steps, every, keep) == count


@pytest.mark.parametrize(
    ("steps", "keep_every", "count"), [(1000, 500, 6), (1000, 100, 10), (1000, 5000, 4), (300, 200, 3), (None, 100, 4)]
)
def test_stages_are_counted_with_the_other_checkpoints(steps, keep_every, count):
    """All of them, of a run that has no more."""
    assert preflight.checkpoints(steps, 100, 2, keep_every) == count


def test_what_is_on_disk_already_is_not_needed_again(tmp_path):
    run = tmp_path / "runs" / "run"
    assert preflight.disk(10**6, 4, run) == 24 * 10**6
    run.mkdir(parents=True)
    (run / "checkpoint").write_bytes(bytes(3 * 10**6))
    assert preflight.disk(10**6, 4, run) == 21 * 10**6
    (run / "pictures").write_bytes(bytes(25 * 10**6))
    assert preflight.disk(10**6, 4, run) == 10**6  # one more is written before one is deleted
    assert preflight.free(tmp_path / "not" / "there" / "yet") > 0


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (24_100_000_000, "24.1 GB"), (10**18, "1 EB")],
)
def test_bytes_in_words(size, words):
    assert in_words(size) == words
