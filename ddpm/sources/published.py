"""Published schedulers: a scheduler_config.json as our schedule, diffusion and sampler.

The format is that of the schedulers of the diffusers library: a class for each sampler, whose settings define the
process too. Differences:

* Their t is counted from 0, ours from 1: ours = theirs + 1.
* Their last step goes to data, or with set_alpha_to_one = false to their first alpha_bar, which is our t = 1: there our
sampler ends (`Sampler.ending_at`).
* DDIM, PNDM, DPM-Solver++ and UniPC give the same numbers over the same noise; so do Euler and Heun with leading times.
  With the others these two and LMS start from x_T times sigma / sqrt(1 + sigma^2), nearly 1, and at real times
  (linspace) theirs interpolate sigma, ours lambda: some percent of a standard deviation at 10 steps. The last steps to
  data of LMS and of PNDM with set_alpha_to_one = true are of higher order there, and D(x_t, t) here: a thousandth.
* DDPM draws noise in each step, here keyed by the sample.
* Their DDIM keeps the network's eps where clip_sample clips x_0; ours derives it anew from the clipped x_0.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm.checks import is_whole
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs.files import read_json
from ddpm.samplers.ancestral import Ancestral
from ddpm.samplers.base import Sampler
from ddpm.samplers.ddim import DDIM
from ddpm.samplers.dpm_solver import DPMSolverPP
from ddpm.samplers.edm import Euler, Heun
from ddpm.samplers.lms import LMS
from ddpm.samplers.plms import PLMS
from ddpm.samplers.unipc import UniPC
from ddpm.schedules import MOST, NoiseSchedule, cosine, linear, scaled_linear, zero_terminal_snr

FILE = "scheduler_config.json"
STEPS = 50  # by default
TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
VARIANCES = {"fixed_small": "beta_tilde", "fixed_large": "beta"}  # of DDPM's steps

Key = tuple[Any, Callable[[Any], bool], str]  # the default, a value's test, the test in words


def _one_of(*values: object) -> Key:
    """Return the `Key` of a setting with these values; the first is the default. JSON's true is not 1 here."""
    words = " or ".join("null" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    return values[0], lambda v: (type(v), v) in [(type(a), a) for a in values], words


def _number(default: float, low: float, high: float) -> Key:
    return default, lambda v: type(v) in (int, float) and low < v < high, f"a number in ({low:g}, {high:g})"


PROCESS: dict[str, Key] = {  # of every class
    "num_train_timesteps": (1000, lambda v: type(v) is int and 1 <= v <= MOST, f"an integer in 1..{MOST}"),
    "beta_start": _number(1e-4, 0, 1),
    "beta_end": _number(0.02, 0, 1),
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (
        None,
        lambda v: v is None or (isinstance(v, list) and len(v) > 0 and all(type(b) in (int, float) for b in v)),
        "null or a list of numbers",
    ),
    "prediction_type": _one_of(*TARGETS),
    "timestep_spacing": _one_of("linspace", "leading", "trailing"),
    "steps_offset": (0, lambda v: type(v) is int and 0 <= v <= MOST, f"an integer in 0..{MOST}"),
}
RESCALED: dict[str, Key] = {"rescale_betas_zero_snr": _one_of(False, True)}
CLIPPED: dict[str, Key] = {
    "clip_sample": _one_of(False, True),
    "clip_sample_range": (1.0, lambda v: v in (None, 1), "1"),
}
SIGMAS: dict[str, Key] = {
    key: _one_of(False, None) for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
}
SOLVER: dict[str, Key] = {
    "thresholding": _one_of(False),
    **{key: _one_of(False, None) for key in ("use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting")},
    "final_sigmas_type": _one_of("zero"),
}
ENDS: dict[str, Key] = {"sigma_min": _one_of(None), "sigma_max": _one_of(None)}
WITHOUT_EFFECT = {  # while the feature that they belong to is off
    *("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "variance_type", "lambda_min_clipped"),
    *("time_shift_type", "clip_sample_range"),
}


@dataclass(frozen=True)
class _Method:
    """A published class: its own defaults and rules, and the equivalent sampler of ours."""

    make: Callable[[dict[str, Any], Sequence[int | float]], Sampler]
    keys: dict[str, Key]
    real: bool = False  # whether linspace has real times
    after_all: int = 0  # how many more times are spaced than are used
    all_steps: bool = False  # whether the default is as many steps as the process has


def _ends(config: dict[str, Any], sampler: Sampler) -> Sampler:
    return sampler if config["set_alpha_to_one"] else sampler.ending_at(1)


def _of_dpm_solver(config: dict[str, Any], times: Sequence[int | float]) -> Sampler:
    kind = "multistep" if config["algorithm_type"] == "dpmsolver++" else "sde"
    return DPMSolverPP(order=min(config["solver_order"], len(times)), kind=kind, times=times)


def _real(make: Callable[..., Sampler], **settings: Any) -> Callable[[dict[str, Any], Sequence[int | float]], Sampler]:
    return lambda config, times: make(times=times, grid="continuous", **settings)


_LEADING: dict[str, Key] = {"timestep_spacing": _one_of("leading", "trailing")}  # linspace has steps of another length
METHODS = {
    "DDIMScheduler": _Method(
        lambda config, times: _ends(config, DDIM(times=times)),
        _LEADING
        | RESCALED
        | CLIPPED
        | {
            "clip_sample": _one_of(True, False),
            "set_alpha_to_one": _one_of(True, False),
            "thresholding": _one_of(False),
        },
    ),
    "DDPMScheduler": _Method(
        lambda config, times: Ancestral(times=times),
        _LEADING
        | RESCALED
        | CLIPPED
        | {"clip_sample": _one_of(True, False), "variance_type": _one_of(*VARIANCES), "thresholding": _one_of(False)},
        all_steps=True,
    ),
    "PNDMScheduler": _Method(
        lambda config, times: _ends(config, PLMS(order=min(4, len(times)), times=times)),
        _LEADING
        | {"set_alpha_to_one": _one_of(False, True), "skip_prk_steps": (False, lambda v: v is True, "true: PLMS")},
    ),
    "LMSDiscreteScheduler": _Method(
        lambda config, times: LMS(order=min(4, len(times)), times=times, grid="continuous"), SIGMAS, real=True
    ),
    "EulerDiscreteScheduler": _Method(
        _real(Euler),
        SIGMAS
        | RESCALED
        | ENDS
        | {"interpolation_type": _one_of("linear"), "timestep_type": _one_of("discrete")}
        | {"final_sigmas_type": _one_of("zero")},
        real=True,
    ),
    "EulerAncestralDiscreteScheduler": _Method(_real(DDIM, eta=1.0), RESCALED, real=True),
    "HeunDiscreteScheduler": _Method(
        _real(Heun),
        SIGMAS | CLIPPED | {"beta_start": _number(0.00085, 0, 1), "beta_end": _number(0.012, 0, 1)},
        real=True,
    ),
    "DPMSolverMultistepScheduler": _Method(
        _of_dpm_solver,
        SIGMAS
        | RESCALED
        | SOLVER
        | {"algorithm_type": _one_of("dpmsolver++", "sde-dpmsolver++"), "solver_type": _one_of("midpoint")}
        | {"solver_order": _one_of(2, 1)}  # its third order is another formula than ours, and of second order
        | {"lower_order_final": _one_of(True, False), "euler_at_final": _one_of(False, True)},  # to data it always is
        after_all=1,
    ),
    "UniPCMultistepScheduler": _Method(
        lambda config, times: UniPC(
            order=min(config["solver_order"], len(times)), variant=config["solver_type"], times=times
        ),
        SIGMAS
        | RESCALED
        | SOLVER
        | ENDS
        | {"solver_type": _one_of("bh2", "bh1"), "solver_order": _one_of(2, 1), "predict_x0": _one_of(True)}
        | {"disable_corrector": ([], lambda v: v == [], "[]"), "solver_p": _one_of(None)}
        | {"lower_order_final": _one_of(True), "shift_terminal": _one_of(None)},
        after_all=1,
    ),
}
KNOWN = PROCESS.keys() | WITHOUT_EFFECT | {key for method in METHODS.values() for key in method.keys}


@dataclass(frozen=True)
class Scheduler:
    """A published scheduler.

    Attributes:
        name: the name of its class.
        diffusion: schedule, target and clip.
        config: all settings, defaults included.
    """

    name: str
    diffusion: GaussianDiffusion
    config: dict[str, Any]

    @property
    def usual(self) -> int:
        """The default number of steps: all T of DDPM, else 50, or T if it is less."""
        T = self.diffusion.schedule.T
        return T if METHODS[self.name].all_steps else min(T, STEPS)

    def times(self, steps: int = STEPS) -> list[int] | list[float]:
        r"""Return the times at which so many steps evaluate, falling, in our count: theirs and 1.

        With T = num_train_timesteps and N steps theirs are: "leading" floor(T / N) i + steps_offset for i < N;
        "trailing" T - i T / N - 1; "linspace" N even ones from T - 1 to 0. DPM-Solver++ and UniPC space N + 1 of the
        first and of the last, and leave out the lowest.

        Raises: ValueError for steps < 1, or so many that times repeat or leave 1..T, with the most that do not.
        """
        T = self.diffusion.schedule.T
        if not is_whole(steps, 1, T):
            raise ValueError(f"steps = {steps!r}: the number of sampling steps must be an integer in 1..{T}")
        times = self._spaced(steps)
        if _legal(times, T):
            return times
        most = next((n for n in range(steps - 1, 0, -1) if _legal(self._spaced(n), T)), None)
        how = f"timestep_spacing = {self.config['timestep_spacing']}, steps_offset = {self.config['steps_offset']}"
        allowed = "no number of steps is possible" if most is None else f"nearest that is possible: {most}"
        raise ValueError(f"steps = {steps} of {self.name} ({how}) have times beyond 1..{T}, or one twice; {allowed}")

    def _spaced(self, N: int) -> list[int] | list[float]:
        """Return `times` without checking that they are legal."""
        T, spacing, method = self.diffusion.schedule.T, self.config["timestep_spacing"], METHODS[self.name]
        points = N + method.after_all
        if spacing == "leading":
            ascending = [T // points * i + self.config["steps_offset"] for i in range(points)]
            return [t + 1 for t in ascending[::-1][:N]]
        if spacing == "trailing":
            return [round(T - i * T / N) for i in range(N)]
        even = torch.linspace(T - 1, 0, points, dtype=torch.float64).tolist()[:N] if points > 1 else [0.0]
        return [t + 1 for t in even] if method.real else [round(t) + 1 for t in even]

    def sampler(self, steps: int = STEPS) -> Sampler:
        """Return our sampler that is equivalent to the scheduler, over its own times; ValueError as `times`."""
        return METHODS[self.name].make(self.config, self.times(steps))


def _legal(times: Sequence[int | float], T: int) -> bool:
    return times[-1] >= 1 and times[0] <= T and all(s < t for t, s in itertools.pairwise(times))


def read_scheduler(path: str | Path) -> Scheduler:
    """Return the scheduler that a file of settings describes.

    Args:
        path: of a scheduler_config.json, or the folder that has one.
    Raises:
        ValueError: no such file or damage; a class or a value that has no equivalent here, each by name with what is
            allowed.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is no file; a published scheduler is a {FILE}")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a JSON {type(settings).__name__}, not an object with a scheduler's settings")
    return of_config(settings, str(path))


def of_config(settings: dict[str, Any], where: str = "the scheduler") -> Scheduler:
    """Return the scheduler of settings; arguments and errors as in `read_scheduler`."""
    name = settings.get("_class_name")
    if name not in METHODS:
        raise ValueError(f"{where}: _class_name = {name!r} has no counterpart here; allowed: {', '.join(METHODS)}")
    keys = PROCESS | METHODS[name].keys  # those of other classes are without effect on this one, there as here
    config: dict[str, Any] = {k: settings.get(k, default) for k, (default, *_) in keys.items()}
    wrong = [f"{k} = {config[k]!r} (allowed: {words})" for k, (_, legal, words) in keys.items() if not legal(config[k])]
    wrong += [f"{k} = {settings[k]!r} is not a known key" for k in settings if k not in KNOWN and not k.startswith("_")]
    if wrong:
        raise ValueError(
            f"{where} has settings that {name} does not support here: {'; '.join(w[:200] for w in wrong[:10])}"
        )
    try:
        clip = config.get("clip_sample", False)
        variance = VARIANCES.get(config.get("variance_type", ""), "beta")
        diffusion = GaussianDiffusion(_schedule(config), TARGETS[config["prediction_type"]], variance, clip_x_0=clip)
    except ValueError as error:
        raise ValueError(f"{where} describes an impossible process: {error}") from error
    return Scheduler(name, diffusion, config)


def _schedule(config: dict[str, Any]) -> NoiseSchedule:
    T, ends = config["num_train_timesteps"], (config["beta_start"], config["beta_end"])
    if config["trained_betas"] is not None:
        schedule = NoiseSchedule([float(beta) for beta in config["trained_betas"]])
        if schedule.T != T:
            raise ValueError(f"trained_betas are {schedule.T}, but num_train_timesteps = {T}")
    elif config["beta_schedule"] == "squaredcos_cap_v2":
        schedule = cosine(T)
    else:
        schedule = (linear if config["beta_schedule"] == "linear" else scaled_linear)(T, *ends, rescale=False)
    return zero_terminal_snr(schedule) if config.get("rescale_betas_zero_snr") else schedule
