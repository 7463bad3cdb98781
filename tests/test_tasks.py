"""ddpm/training: any task goes through the one trainer; steps of small ones against formulas, to the last digit."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm.data import Digits
from ddpm.data.batch import Batch, Condition
from ddpm.data.points import Points
from ddpm.diffusion import GaussianDiffusion
from ddpm.forward import q_sample
from ddpm.losses import L_0, L_0_density
from ddpm.randomness import Keyed
from ddpm.runs import checkpoint
from ddpm.runs.directory import Run, read_metrics
from ddpm.schedules import cosine
from ddpm.training.ranks import Ranks
from ddpm.training.step import Training
from ddpm.training.task import Drawn, Phase, Task, checksum, must_take, trial_loss
from ddpm.training.tasks.diffusion import Diffusion, Noised
from ddpm.training.trainer import Trainer
from models.mlp import MLP
from models.unet import UNet

CPU = torch.device("cpu")
sgd = functools.partial(torch.optim.SGD, lr=0.5)


@pytest.fixture
def data() -> Points:
    """20 labelled points, 4 of them held out."""
    return Points("points", torch.randn(20, 2, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3)


def trainer(**changed: object) -> Trainer:
    chosen = {"steps": 4, "batch_size": 8, "precision": "fp32", "previews": 0, "clip": None, "log_every": 1}
    return Trainer(**chosen | {"checkpoint_every": 2, "lr_schedule": "constant", "ema_decay": 0.5} | changed)


def training_of(task: Task, data: Points, optimizer: object = sgd, seed: int = 0, **changed: object) -> Training:
    return Training(trainer(**changed), task, data, optimizer, seed=seed, device=CPU)


@dataclass(frozen=True, kw_only=True)
class Noisy(Drawn):
    x: Tensor
    eps: Tensor


class Autoencoder(Task):
    """Two modules, one frozen, two parts of the loss, a state of its own."""

    def __init__(self, **options: object):
        torch.manual_seed(3)
        encoder, decoder, teacher = nn.Linear(2, 1), nn.Linear(1, 2), nn.Linear(2, 1)
        super().__init__({"encoder": encoder, "decoder": decoder}, {"teacher": teacher}, {"distance": 0.25}, **options)
        self.seen = 0

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Noisy:
        return Noisy(x=batch.x, eps=0.1 * torch.randn(len(batch), 1, generator=random("eps")))

    def losses(self, drawn: Noisy, progress: float) -> dict[str, Tensor]:
        z = self.modules["encoder"](drawn.x)
        x = self.modules["decoder"](z + drawn.eps)
        distance = (z - self.frozen["teacher"](drawn.x)).square().sum(1)
        return {"reconstruction": (x - drawn.x).square().sum(1), "distance": distance}

    def after_step(self, drawn: Noisy, losses: dict[str, Tensor]) -> None:
        assert losses.keys() == {"reconstruction", "distance"} and {len(x) for x in losses.values()} == {len(drawn.x)}
        self.seen += len(drawn.x)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state.get("seen", 0)


def weights(task: Task) -> dict[str, Tensor]:
    return {
        f"{name}.{k}": v.detach().clone() for name, module in task.modules.items() for k, v in module.named_parameters()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------- modules, parts and states


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_a_gradient_step_of_the_weighted_sum_of_all_parts(data, accumulate):
    task = Autoencoder()
    training = training_of(task, data, accumulate=accumulate)
    before, frozen = weights(task), checksum(task.frozen["teacher"])
    drawn = training.draw(1)
    parts = task.losses(drawn, 0.0)
    loss = (parts["reconstruction"] + 0.25 * parts["distance"]).mean()
    gradients = torch.autograd.grad(loss, [p for module in task.modules.values() for p in module.parameters()])
    taken = training.step(1)
    torch.testing.assert_close(taken.loss, loss.detach())
    torch.testing.assert_close(taken.grad_norm, torch.cat([g.flatten() for g in gradients]).norm())
    torch.testing.assert_close(taken.parts, {name: part.detach().mean() for name, part in parts.items()})
    for (name, weight), gradient in zip(weights(task).items(), gradients, strict=True):
        torch.testing.assert_close(weight, before[name] - 0.5 * gradient)
    assert checksum(task.frozen["teacher"]) == frozen and task.seen == 8
    assert same(weights(training.averaged), weights(task))  # an average begins with the weights after the first step


def fit(task: Task, data: Points, path: Path, resume: Path | None = None, **changed: object) -> Task:
    path.mkdir(exist_ok=True)
    adam = functools.partial(torch.optim.AdamW, lr=1e-2)
    return trainer(**changed).fit(Run(path), task, data, adam, seed=0, device=CPU, resume=resume)[1]


def test_each_module_and_its_average_have_their_files_and_a_resumed_run_ends_as_one_that_was_not_stopped(
    data, tmp_path
):
    whole = Autoencoder()
    averaged = fit(whole, data, tmp_path / "whole")
    fit(Autoencoder(), data, tmp_path / "parts", steps=2)
    last = checkpoint.last_whole(tmp_path / "parts" / "checkpoints")
    files = {"encoder.safetensors", "encoder.ema.safetensors", "decoder.safetensors", "decoder.ema.safetensors"}
    assert {path.name for path in last.iterdir()} == files | {"state.pt", "manifest.json"}
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["modules"] == ["encoder", "decoder"]
    assert manifest["frozen"] == {"teacher": checksum(Autoencoder().frozen["teacher"])}

    again = Autoencoder()
    for module in again.modules.values():
        nn.init.zeros_(module.weight)  # all must come from the checkpoint
    resumed = fit(again, data, tmp_path / "parts", last)
    assert same(weights(again), weights(whole)) and same(weights(resumed), weights(averaged)) and again.seen == 32
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(tmp_path / name)] for name in
             ("whole", "parts")]  # fmt: skip
    assert lines[0] == lines[1]


def test_the_parts_of_the_loss_are_logged_and_measured_beside_their_sum(data, tmp_path):
    fit(Autoencoder(), data, tmp_path)
    lines = read_metrics(tmp_path)
    assert {line["split"] for line in lines} == {"train", "held_out"}
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_reconstruction"] + 0.25 * line["loss_distance"], rel=1e-5)


def test_a_checkpoint_beside_another_frozen_module_is_refused(data, tmp_path):
    fit(Autoencoder(), data, tmp_path, steps=2)
    other = Autoencoder()
    nn.init.ones_(other.frozen["teacher"].weight)
    with pytest.raises(ValueError, match="was trained with another teacher"):
        fit(other, data, tmp_path, checkpoint.last_whole(tmp_path / "checkpoints"))


@pytest.mark.parametrize("modules", [None, [], ["../x"], "model", ["model", 1]])
def test_a_manifest_that_names_no_modules_is_damaged(data, tmp_path, modules):
    fit(Autoencoder(), data, tmp_path, steps=2)
    manifest = {"format": 2, "sha256": {}} | ({} if modules is None else {"modules": modules})
    (tmp_path / "checkpoints" / "2" / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(tmp_path / "checkpoints" / "2") is not None
    assert checkpoint.last_whole(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("name", ["Encoder", "a b", "ema", "../x", "1st", "_gen", "größe", "a" * 65])
def test_modules_have_names_that_can_be_files(name):
    with pytest.raises(ValueError, match="a module cannot be called"):
        super(Autoencoder, Autoencoder()).__init__({name: nn.Linear(1, 1)})


# ------------------------------------------------------------------------------------------------- what is trained


def test_only_what_is_selected_is_trained(data):
    task = Autoencoder(only=["decoder.*", "encoder.bias"])
    before = weights(task)
    training = training_of(task, data)
    training.step(1)
    moved = {name for name, weight in weights(task).items() if not torch.equal(weight, before[name])}
    assert moved == {"decoder.weight", "decoder.bias", "encoder.bias"}
    assert len(training.phases[0].parameters) == 3
    assert torch.equal(weights(training.averaged)["encoder.weight"], before["encoder.weight"])


def test_a_pattern_that_selects_nothing_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"no parameter matches 'decode\.\*'; there are decoder\.bias\.\*, decoder"):
        Autoencoder(only=["decode.*"])


# ------------------------------------------------------------------------------------------------- phases


class Adversarial(Task):
    """A number and its judge, in turn: g is stepped by d g, then d, which sees the new g, by -d g."""

    def __init__(self) -> None:
        super().__init__({"g": nn.Linear(1, 1, bias=False), "d": nn.Linear(1, 1, bias=False)})
        for module in self.modules.values():
            nn.init.constant_(module.weight, 2.0)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("generator", ("g",), functools.partial(self._product, 1.0)),
            Phase("judge", ("d",), functools.partial(self._product, -1.0), functools.partial(torch.optim.SGD, lr=0.1)),
        )

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Noisy:
        return Noisy(x=batch.x, eps=torch.ones(len(batch), 1))

    def losses(self, drawn: Noisy, progress: float) -> dict[str, Tensor]:
        return self._product(1.0, drawn, progress)

    def _product(self, sign: float, drawn: Noisy, progress: float) -> dict[str, Tensor]:
        return {"generator" if sign > 0 else "judge": sign * self.modules["d"](self.modules["g"](drawn.eps)).flatten()}


def test_phases_are_stepped_in_turn_each_by_its_own_optimizer(data, tmp_path):
    task = Adversarial()
    training = training_of(task, data)
    g = d = 2.0
    for step in (1, 2, 3):
        taken = training.step(step)
        assert taken.loss.item() == pytest.approx(g * d, rel=1e-5)
        before = (g, d)
        g -= 0.5 * d
        assert {name: part.item() for name, part in taken.parts.items()} == pytest.approx(
            {"generator": before[0] * d, "judge": -g * d}, rel=1e-5
        )
        d += 0.1 * g
        assert [task.modules[name].weight.item() for name in "gd"] == pytest.approx([g, d], rel=1e-5)
    state = training.state_dict()
    assert state["phases"].keys() == {"generator", "judge"} and state["ema_updates"] == {"g": 3, "d": 3}


def test_two_phases_are_resumed(data, tmp_path):
    whole = Adversarial()
    fit(whole, data, tmp_path / "whole")
    fit(Adversarial(), data, tmp_path / "parts", steps=2)
    again = Adversarial()
    fit(again, data, tmp_path / "parts", checkpoint.last_whole(tmp_path / "parts" / "checkpoints"))
    assert same(weights(again), weights(whole))


# ------------------------------------------------------------------------------------------------- whole batches


class Contrastive(Autoencoder):
    couples_batch = True

    def losses(self, drawn: Noisy, progress: float) -> dict[str, Tensor]:
        z = self.modules["encoder"](drawn.x) @ self.modules["decoder"](drawn.eps).mT[:1]
        return {"reconstruction": z.logsumexp(1), "distance": z.logsumexp(0)}


def test_a_loss_that_couples_the_batch_is_never_cut(data):
    with pytest.raises(ValueError, match="accumulate = 2: the loss of Contrastive needs the whole batch"):
        training_of(Contrastive(), data, accumulate=2)
    training = training_of(Contrastive(), data)
    training.ranks = Ranks()
    training.ranks.size = 2  # a share of rows would be half of them
    (rows,) = training.micro_batches(training.draw(1))
    assert len(rows.x) == 8


# ------------------------------------------------------------------------------------------------- conditions


class Tells(nn.Module):
    """Keeps what it was told."""

    num_classes = 3
    drop = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.told = nn.Parameter(torch.ones(())), []

    def forward(self, x: Tensor, t: Tensor, y: object = None) -> Tensor:
        self.told.append(y)
        return self.scale * x


def test_nulls_are_keyed_by_seed_and_step_and_leave_all_else_as_it_was(data):
    diffusion = GaussianDiffusion(cosine(20))

    def drawn(drop: float, seed: int = 0, step: int = 1) -> Drawn:
        return training_of(Diffusion(Tells(), diffusion, drop=drop), data, seed=seed, batch_size=4000).draw(step)

    plain, dropped = drawn(0.0), drawn(0.2)
    for name in ("x_0", "t", "eps"):
        assert torch.equal(getattr(plain, name), getattr(dropped, name))
    assert torch.equal(plain.condition.classes, dropped.condition.classes) and not plain.condition.null
    null = dropped.condition.null["classes"]
    assert null.float().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / 4000) ** 0.5)
    assert torch.equal(null, drawn(0.2).condition.null["classes"])
    assert not torch.equal(null, drawn(0.2, step=2).condition.null["classes"])
    assert not torch.equal(null, drawn(0.2, seed=1).condition.null["classes"])
    more = drawn(0.5).condition.null["classes"]
    assert (more >= null).all(), "those that a smaller share nulls are nulled by a larger one: arms stay paired"


def test_a_network_is_told_classes_as_a_tensor_and_as_a_condition_where_some_are_null(data):
    diffusion = GaussianDiffusion(cosine(20))
    for drop, kind in ((0.0, Tensor), (0.5, Condition)):
        network = Tells()
        training_of(Diffusion(network, diffusion, drop=drop), data).step(1)
        assert [type(y) for y in network.told] == [kind]
    held_out = Diffusion(network, diffusion, drop=0.5).draw_held_out(data.batch(data.held_out), Keyed(0))
    assert not held_out.condition.null, "held-out losses are those of the conditional network"


def test_dropping_conditions_needs_a_network_with_a_null(data):
    diffusion = GaussianDiffusion(cosine(20))
    with pytest.raises(ValueError, match="drop = 1 must lie in"):
        Diffusion(Tells(), diffusion, drop=1.0)
    with pytest.raises(ValueError, match=r"task\.drop = 0\.1 nulls conditions, but the network has no null"):
        Diffusion(MLP(num_classes=3), diffusion, drop=0.1).check(data)
    Diffusion(MLP(num_classes=3, drop=0.1), diffusion, drop=0.1).check(data)
    with pytest.raises(ValueError, match=r"task\.drop = 0\.1 nulls conditions, but the network takes no condition"):
        Diffusion(MLP(drop=0.1), diffusion, drop=0.1).check(data)


def test_the_last_step_of_the_bound_reads_bytes_of_images_and_a_density_of_points(data):
    diffusion = GaussianDiffusion(cosine(5), variance="learned", loss="vlb", clip_x_0=False)
    for chosen, network, read in (
        (data, MLP(2, width=8, depth=1, out_features=4), L_0_density),
        (Digits(), UNet(8, 1, 2, channels=4, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=2), L_0),
    ):
        task = Diffusion(network.eval(), diffusion)
        task.check(chosen)
        x_0 = chosen.batch(chosen.train[:3]).x
        last = Noised(x_0=x_0, condition=Condition(), t=torch.ones(3).long(), eps=torch.randn_like(x_0))
        x_1 = q_sample(diffusion.schedule, x_0, last.t, last.eps)
        expected = 5 * read(diffusion.schedule, diffusion.predictor(network)(x_1, last.t), x_0, x_1)
        torch.testing.assert_close(task.losses(last, 0.0)["loss"], expected)


def test_a_network_is_refused_where_the_data_do_not_have_what_it_takes(data):
    with pytest.raises(ValueError, match=r"samples of shape \(3,\), but those of points have \(2,\)"):
        must_take(MLP(features=3), data)
    with pytest.raises(ValueError, match=r"num_classes = 2, but the data have 3 classes"):
        must_take(MLP(num_classes=2), data)
    asks = nn.Linear(2, 2)
    asks.takes = ("image",)
    with pytest.raises(ValueError, match="must be given image, which points does not have"):
        must_take(asks, data)


# ------------------------------------------------------------------------------------------------- one step, counted


def test_a_trial_loss_is_that_of_a_step_on_every_device(data):
    task = Autoencoder()
    assert trial_loss(task, data, 3, CPU).shape == ()
    there = Diffusion(MLP(width=8).to("meta"), GaussianDiffusion(cosine(20)))
    loss = trial_loss(there, data, 2, torch.device("meta"))
    loss.backward()
    assert loss.device.type == "meta" and all(p.grad is not None for p in there.model.parameters())


# ------------------------------------------------------------------------------------------------- what changes between


def moments(training: Training) -> dict[str, Tensor]:
    (phase,) = training.phases
    return {
        name: phase.optimizer.state[p]["exp_avg"].clone()
        for name, p in zip(phase.names, phase.parameters, strict=True)
        if p in phase.optimizer.state
    }


@pytest.mark.parametrize("before", [None, ["decoder.bias", "encoder.weight"]])
@pytest.mark.parametrize("after", [None, ["decoder.*"], ["encoder.bias"]])
def test_moments_follow_their_parameters_when_others_are_trained_from_a_checkpoint_on(before, after, data):
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    first = training_of(Autoencoder(only=before), data, adam)
    first.step(1)
    second = training_of(Autoencoder(only=after), data, adam)
    second.load_state_dict(first.state_dict())
    known = moments(first)
    assert known and same(moments(second), {name: m for name, m in known.items() if name in second.phases[0].names})
    second.step(2)
    assert moments(second).keys() == set(second.phases[0].names)


class Odd(Autoencoder):
    """With phases that are given."""

    def __init__(self, *phases: Phase, **options: object):
        super().__init__(**options)
        self.given = phases

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.given


def test_phases_that_cannot_be_told_apart_or_train_nothing_are_refused(data):
    task = Autoencoder()
    one = Phase("a", ("encoder",), task.losses)
    for phases, told in [
        ((one, one._replace(trains=("decoder",))), "names of their own"),
        ((one, Phase("b", ("nope",), task.losses)), "train nope"),
    ]:
        with pytest.raises(ValueError, match=told):
            training_of(Odd(*phases), data)
    with pytest.raises(ValueError, match="'a' of Odd trains no parameter"):
        training_of(Odd(one, only=["decoder.*"]), data)


def test_phases_with_parts_of_one_name_are_logged_apart(data):
    task = Odd()
    task.given = (Phase("a", ("encoder",), task.losses), Phase("b", ("decoder",), task.losses))
    parts = training_of(task, data).step(1).parts
    assert parts.keys() == {f"{phase}_{part}" for phase in "ab" for part in ("reconstruction", "distance")}


def test_a_checkpoint_of_other_modules_or_phases_is_refused(data, tmp_path):
    fit(Autoencoder(), data, tmp_path, steps=2)
    last = checkpoint.last_whole(tmp_path / "checkpoints")
    other = Autoencoder()
    other.modules["coder"] = other.modules.pop("encoder")
    with pytest.raises(ValueError, match="has the modules encoder, decoder, but Autoencoder trains decoder, coder"):
        fit(other, data, tmp_path, last)
    odd = Odd()
    odd.given = (Phase("b", ("encoder", "decoder"), odd.losses),)
    with pytest.raises(ValueError, match="has the phases all, not b"):
        fit(odd, data, tmp_path, last)


@pytest.mark.parametrize("state", [{1, 2}, nn.Parameter(torch.ones(1)), [{"a": object()}]])
def test_a_state_that_could_not_be_read_back_is_refused_before_the_first_step(state, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Autoencoder, "state_dict", lambda self: {"seen": state})
    with pytest.raises(ValueError, match=r"the state of the task, seen.* can be stored"):
        fit(Autoencoder(), data, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_tied_weights_are_kept_and_come_back(data, tmp_path):
    def tied() -> Autoencoder:
        task = Autoencoder()
        task.modules["decoder"].weight = nn.Parameter(torch.ones(2, 1))
        task.modules["decoder"].register_parameter("again", task.modules["decoder"].weight)
        return task

    whole, parts = tied(), tied()
    fit(whole, data, tmp_path / "whole")
    fit(tied(), data, tmp_path / "parts", steps=2)
    fit(parts, data, tmp_path / "parts", checkpoint.last_whole(tmp_path / "parts" / "checkpoints"))
    assert same(weights(parts), weights(whole))


def test_held_out_losses_that_couple_rows_do_not_depend_on_the_batch(data):
    task = Contrastive()
    one, other = (trainer(batch_size=size).held_out_losses(task, data, CPU) for size in (2, 3))
    assert one == other


def test_modules_that_are_not_averaged_stay_as_they_are(data, monkeypatch):
    monkeypatch.setattr(Autoencoder, "averages", lambda self, name: name == "encoder")
    task = Autoencoder()
    training = training_of(task, data)
    for step in (1, 2, 3):
        training.step(step)
    raw, averaged = weights(task), weights(training.averaged)
    assert all(torch.equal(raw[name], averaged[name]) == name.startswith("decoder") for name in raw)


def test_a_loss_is_one_value_a_sample(data, monkeypatch):
    monkeypatch.setattr(Autoencoder, "losses", lambda self, drawn, progress: {"loss": drawn.x})
    with pytest.raises(ValueError, match=r"the loss 'loss' has the shape \(8, 2\), not one value a sample"):
        training_of(Autoencoder(), data).step(1)
