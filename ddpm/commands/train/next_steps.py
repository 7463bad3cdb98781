"""Commands to try after a run is done, as its settings allow."""

import shlex
from typing import Any

from omegaconf import OmegaConf

from ddpm.commands.launch import command, overrides, word
from ddpm.commands.train.prepare import Plan, built
from ddpm.commands.validate import trusted
from ddpm.config import InvalidInput, plain

STRIP = (1, 2, 3, 5, 10, 20, 50)  # steps of the proposed figure
DEFAULT_STEPS = 50  # of ddpm-sample
ATTENDED = (8, 16)  # sides of latents that the network of experiment=latent_diffusion takes
LINEAR = "ddpm.schedules.linear"  # swept together with cosine, which is legal for every T


def next_commands(plan: Plan, step: int) -> dict[str, str]:
    """Return the next steps after a run, each with its command.

    Args:
        step: last step of the run.
    """
    from ddpm.data.batch import classes_of, labels_of
    from ddpm.samplers import AnnealedLangevin, Consistency, Student

    trainer, names = plan.parts.trainer, trusted(plan.config)
    trust = [shlex.quote(f"trust=[{','.join(names)}]")] if names else []
    draw, again = f"{command('sample')} {word('run', plan.run.path)}", command("train")
    used = {"steps": step, "epochs": trainer.epochs, "seconds": trainer.seconds}
    longer = [f"trainer.{key}={2 * amount:g}" for key, amount in used.items() if getattr(trainer, key) is not None]
    found = {"train longer": [again, word("extend", plan.run.path), *longer, *trust]}
    if plan.parts.sampler is not None:
        T = plan.parts.task.diffusion.schedule.T
        distilled = isinstance(plan.parts.sampler, Consistency | Student)  # they have a sampler of their own
        by_moves = isinstance(plan.parts.sampler, AnnealedLangevin)  # other samplers begin in pure noise
        few = ["sampler=langevin"] if by_moves else [f"sampler.steps={T}"] if T < DEFAULT_STEPS else []
        few = [] if distilled else few
        strip = ",".join(str(steps) for steps in STRIP if steps <= T)
        found = {
            "more samples": [draw, "n=100 seed=1 out=samples.png", *few, *trust],
            "few steps": [draw, f"'steps_strip=[{strip}]' out=strip.png", *trust],
            **found,
        }
        if by_moves or distilled:
            del found["few steps"]
        if getattr(plan.parts.task.model, "drop", 0) and classes_of(plan.parts.task.model):
            labels = ["class=0", *["style=0"] * (len(labels_of(plan.parts.task.model)) > 1)]
            guided = ["guidance=classifier_free guidance.w=2", *labels, "out=guided.png"]
            found["guided"] = [draw, *guided, *few, *trust]
        if plan.data.tokens is not None:
            caption = plan.data.captions[int(plan.data.condition_rows([0])[0])]
            guided = ["guidance=classifier_free guidance.w=3"] if getattr(plan.parts.task.model, "drop", 0) else []
            found["a prompt"] = [draw, shlex.quote(f"prompt={caption}"), *guided, "n=16 out=prompt.png", *few, *trust]
    codec = plan.parts.task.codec()
    if codec is not None and (codec.kind == "codes" or max(codec.shape[1:]) in ATTENDED):
        prior = "pixelcnn" if codec.kind == "codes" else "latent_diffusion"
        of_data = [shlex.quote(one) for one in overrides() if one.startswith("data")]
        found["through it"] = [again, f"experiment={prior}", word("init_codec", plan.run.path), *of_data, *trust]
    if plan.config.extend is None:
        found["a sweep"] = [again, "-m", shlex.join(_around(plan))]
    return {what: " ".join(words) for what, words in found.items()}


def _around(plan: Plan) -> list[str]:
    """Return the overrides of a sweep around the run: its own, with two values each for network and schedule."""
    typed, model = overrides(), plan.config.model
    axes: dict[str, list[Any]] = {}
    distilled = plan.config.get("teacher") is not None
    if plan.config.init is None and not distilled:  # initial weights fit one network alone
        axes |= {f"model.{key}": [model[key], 2 * model[key]] for key in ("channels", "width") if key in model}
        if attention := plain(model.get("attention_resolutions")):
            axes["model.attention_resolutions"] = [[], attention]
    swept = {
        key: ",".join(str(value).replace(" ", "") for value in values)
        for key, values in axes.items()
        if all(_is_legal(plan, key, value) for value in values)
    }
    T = plan.config.schedule.get("T") if "schedule" in plan.config else None
    linear = {"_target_": LINEAR, "T": T}
    chosen = distilled or any(word.startswith("schedule") for word in typed)
    if T and not chosen and _is_legal(plan, "schedule", linear):
        swept["schedule"] = "linear,cosine"
    swept = swept or {"seed": "0,1,2"}
    own = [word for word in typed if word.partition("=")[0].lstrip("+") not in swept]
    return [*own, *(f"{key}={values}" for key, values in swept.items())]


def _is_legal(plan: Plan, key: str, value: Any) -> bool:
    """Whether the run could be trained with another value of one setting; builds the network on the meta device."""
    config = plan.config.copy()
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    try:
        built(config, trusted(config), plan.data, plan.device, on="meta")
    except InvalidInput:
        return False
    return True
