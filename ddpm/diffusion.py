"""The mathematics bound to one schedule, one target and one variance; the network is an argument."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm.checks import check_one_of
from ddpm.forward import q_sample
from ddpm.losses import LOSSES, OF_ERRORS, WEIGHTINGS, L_hybrid, L_simple, L_vlb, weighted
from ddpm.preconditioning import Preconditioning, edm, must_be_preconditioning
from ddpm.reverse import VARIANCES
from ddpm.schedules import NoiseSchedule, Time, is_integer
from ddpm.targets import TARGETS, Denoise, Pair, Prediction, eps_from_x_0, from_prediction, to_prediction


class GaussianDiffusion:
    """A diffusion: noise schedule, prediction target, training loss, and the variance of the reverse process.

    Args:
        schedule: the constants.
        target: the network's output: "eps" (DDPM), "x_0", "v", or "flow": eps - x_0 (flow matching).
        variance: sigma_t squared of the reverse process: "beta", "beta_tilde", or "learned": the network has twice the
            channels, and (output + 1) / 2 of the second half lies between beta_tilde (0) and beta (1).
        clip_x_0: clip the predicted x_0 to [-1, 1] and derive eps from it anew, so that the pair stays consistent.
        dynamic_threshold: with clip_x_0, a share such as 0.995: where that quantile of an image's |x_0| is above 1,
            clip to it and divide by it, instead of to [-1, 1]; None for the plain clip.
        loss: "simple" (the target's own squared error); "x_0", "snr", "min_snr", "truncated_snr", "snr_plus_one" or
            "p2", w(SNR) times the squared error of x_0; "vlb", T times the bound's term; "hybrid", simple plus a little
            of the bound for the variance.
        loss_options: gamma of min_snr (5), k (1) and gamma (1) of p2, weight of hybrid (0.001); None for that default.
        preconditioning: None, or "edm": the network is F, given the scaled x_t, in the D of `ddpm.preconditioning.edm`,
            whose output, x_0, takes the place of `target`. The loss "simple" is then the squared error of F.
        sigma_data: the standard deviation of the data, > 0, for the preconditioning; not used without one.
    Raises:
        ValueError: an unknown name, with the known ones; target eps where alpha_bar_T = 0, as x_T then has no
            x_0 to solve for.
    Source: DDPM (arXiv 2006.11239); Improved DDPM (arXiv 2102.09672), section 3.1; dynamic thresholding: Imagen (arXiv
        2205.11487), section 2.3.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        target: str = "eps",
        variance: str = "beta",
        clip_x_0: bool = True,
        dynamic_threshold: float | None = None,
        loss: str = "simple",
        loss_options: dict[str, float | None] | None = None,
        preconditioning: str | None = None,
        sigma_data: float = 0.5,
    ):
        allowed = {"target": TARGETS, "variance": (*VARIANCES, "learned"), "loss": LOSSES}
        for name, value in {"target": target, "variance": variance, "loss": loss}.items():
            check_one_of(name, value, allowed[name])
        must_be_preconditioning(preconditioning, sigma_data)
        target = target if preconditioning is None else "x_0"
        if target == "eps" and schedule.alpha_bar[-1] == 0:
            others = ", ".join(name for name in TARGETS if name != "eps")
            raise ValueError(
                f"target = 'eps' does not determine x_0 at T where alpha_bar_T = 0; allowed there: {others}"
            )
        if dynamic_threshold is not None and not (clip_x_0 and 0 < dynamic_threshold <= 1):
            raise ValueError(f"dynamic_threshold = {dynamic_threshold!r} must lie in (0, 1], with clip_x_0 = true")
        self.preconditioning, self.sigma_data = preconditioning, sigma_data
        self.schedule, self.target, self.variance = schedule, target, variance
        self.clip_x_0, self.dynamic_threshold = clip_x_0, dynamic_threshold
        self.loss_name, self.loss_options = loss, _checked(loss, loss_options or {})

    def output(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, y: object | None
    ) -> tuple[Tensor, float | Tensor]:
        """Return the network's estimate of the target, (B, *), and the frac of its variance, a number or (B, *).

        Raises:
            ValueError: the output has other channels than the target, and a learned variance, need.
        """
        c = self._preconditioning(x_t, t)
        scaled = x_t if c is None else c.c_in * x_t
        output = (model(scaled, t) if y is None else model(scaled, t, y)).to(x_t.dtype)
        parts = 2 if self.variance == "learned" else 1
        if output.shape[1] != parts * x_t.shape[1]:
            raise ValueError(
                f"the network's output has {output.shape[1]} channels, but variance = {self.variance!r} with "
                f"{x_t.shape[1]} channels of x takes {parts * x_t.shape[1]}; set model.out_channels"
            )
        output, *o = output.chunk(parts, dim=1)
        if c is not None:
            output = c.c_skip * x_t + c.c_out * output
        return output, (o[0] + 1) / 2 if o else VARIANCES[self.variance]

    def _preconditioning(self, x_t: Tensor, t: Time) -> Preconditioning | None:
        return None if self.preconditioning is None else edm(self.schedule, x_t, t, self.sigma_data)

    def must_be_trainable(self) -> None:
        """Raise ValueError where the loss would not train a learned variance; sampling needs no loss."""
        if self.variance == "learned" and self.loss_name not in ("vlb", "hybrid"):
            raise ValueError(
                f"variance = 'learned' is not trained by loss = {self.loss_name!r}; allowed with it: hybrid, vlb"
            )

    def predictor(self, model: Callable[..., Tensor], condition: object | None = None) -> Denoise:
        """Return the first stage of a denoiser: a network's raw prediction, never clipped.

        The order is prediction, guidance, clip, sampler: what combines predictions, Denoise in and Denoise out, goes
        between this and `clipped`.

        Args:
            model: (x_t, t) or (x_t, t, condition) -> (B, *), in evaluation mode.
            condition: the network's condition, such as classes, integers (B,); None for nothing.
        """

        def predict(x_t: Tensor, t: Time) -> Prediction:
            t = _of_each(t, x_t)
            output, frac = self.output(model, x_t, t, condition)
            return to_prediction(self.schedule, self.target, output, x_t, t, frac)

        return predict

    def pair(self, model: Callable[..., Tensor], condition: Any, null: Any) -> Pair:
        """Return the raw predictions with and without a condition, as a pair for guidance.

        Where both are needed they are evaluated as one batch, of twice the rows.

        Args:
            model: as in `predictor`.
            condition, null: the two conditions: classes (B,), or conditions whose `concat` appends the rows of another,
                such as `ddpm.data.batch.Condition`.
        """

        mixed = isinstance(condition, Tensor) != isinstance(null, Tensor)
        if mixed or null is None or condition is None:
            raise ValueError("a pair needs two conditions of one kind, classes (B,) both or `Condition` both")

        def both(x_t: Tensor, t: Time) -> tuple[Prediction, Prediction]:
            t = _of_each(t, x_t)
            tensors = isinstance(condition, Tensor) and isinstance(null, Tensor)
            both_conditions = torch.cat([condition, null]) if tensors else condition.concat(null)
            pred = self.predictor(model, both_conditions)(torch.cat([x_t, x_t]), torch.cat([t, t]))
            eps, x_0 = pred.eps.chunk(2), pred.x_0.chunk(2)
            frac_1, frac_2 = pred.frac.chunk(2) if isinstance(pred.frac, Tensor) else (pred.frac, pred.frac)
            one = Prediction(eps[0], x_0[0], frac_1, pred.target)
            return one, Prediction(eps[1], x_0[1], frac_2, pred.target)

        return Pair(self.predictor(model, condition), self.predictor(model, null), both)

    def clipped(self, denoise: Denoise) -> Denoise:
        """Return the last stage of a denoiser: x_0 clipped, and eps derived anew, so that the pair composes x_t.

        Args:
            denoise: a raw prediction, possibly guided. With clip_x_0 = False it is returned unchanged.
        """
        if not self.clip_x_0:
            return denoise

        def clip(x_t: Tensor, t: Time) -> Prediction:
            t = _of_each(t, x_t)
            pred = denoise(x_t, t)
            x_0 = self._clip(pred.x_0)
            return replace(pred, eps=eps_from_x_0(self.schedule, x_t, t, x_0), x_0=x_0)

        return clip

    def denoiser(self, model: Callable[..., Tensor], y: object | None = None) -> Denoise:
        """Return the denoiser that a sampler needs: a network's prediction for a condition, clipped.

        Guidance goes between the two: `clipped(guidance(predictor(model, y), ...))`.

        Args:
            model: (x_t, t) or (x_t, t, y) -> (B, *), in evaluation mode.
            y: the condition, as in `predictor`: the class of each sample, integers (B,), or whatever the network takes.
        """
        return self.clipped(self.predictor(model, y))

    def _clip(self, x_0: Tensor) -> Tensor:
        if self.dynamic_threshold is None:
            return x_0.clamp(-1, 1)
        size = x_0.abs().flatten(1)
        limit = size.kthvalue(math.ceil(self.dynamic_threshold * size.shape[1]), dim=1).values.clamp(min=1)
        limit = limit.reshape(-1, *[1] * (x_0.ndim - 1))
        return x_0.clamp(-limit, limit) / limit

    def loss(
        self,
        model: Callable[..., Tensor],
        x_0: Tensor,
        y: object | None = None,
        *,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        discrete: bool = True,
    ) -> Tensor:
        r"""Return the loss of each image, at its own t and eps; draws only those that are not given.

        With a preconditioning "simple" is the squared error of D times lambda = 1 / c_out^2: that of F, with weight 1.

        .. math:: \lambda\, \| D_\theta - x_0 \|^2 = \lambda\, c_\text{out}^2 \left\|
            F_\theta(c_\text{in}\, x; c_\text{noise}) - \frac{1}{c_\text{out}} (x_0 - c_\text{skip}\, x) \right\|^2
            \qquad \text{[EDM (8)]}

        Args:
            x_0: data, (B, *), in [-1, 1], or real numbers.
            y: the condition, as in `predictor`: the class of each image, integers (B,), or whatever the network takes.
            t: integers (B,) in 1..T; drawn uniformly if None.
            eps: standard normal noise, (B, *); drawn if None.
            generator: on x_0's device, for what is drawn.
            discrete: for "vlb" and "hybrid": x_0 are bytes; False: real numbers, as in `L_vlb`.
        Returns:
            (B,).
        Raises:
            ValueError: as `must_be_trainable`.
        """
        if t is None:
            t = torch.randint(1, self.schedule.T + 1, (len(x_0),), device=x_0.device, generator=generator)
        if eps is None:
            eps = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device, generator=generator)
        x_t, output, frac = self._outputs(model, x_0, y, t, eps)
        return self._loss_of(output, frac, Prediction(eps, x_0), x_t, t, discrete)

    def loss_and_prediction(
        self,
        model: Callable[..., Tensor],
        x_0: Tensor,
        y: object | None = None,
        *,
        t: Tensor,
        eps: Tensor,
        discrete: bool = True,
    ) -> tuple[Tensor, Prediction]:
        """Return the loss, and the raw prediction that it was computed from, for further losses of x_0.

        Args:
            x_0, y, t, eps, discrete: as in `loss`.
        Returns:
            (B,), and the raw prediction, with its gradient.
        Raises:
            ValueError: as `loss`.
        """
        x_t, output, frac = self._outputs(model, x_0, y, t, eps)
        pred = to_prediction(self.schedule.to(x_0.device), self.target, output, x_t, t, frac)
        return self._loss_of(output, frac, Prediction(eps, x_0), x_t, t, discrete), pred

    def _outputs(
        self, model: Callable[..., Tensor], x_0: Tensor, y: object | None, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return x_t, and the network's output and frac at it, see `output`."""
        self.must_be_trainable()
        x_t = q_sample(self.schedule.to(x_0.device), x_0, t, eps)
        return x_t, *self.output(model, x_t, t, y)

    def _loss_of(
        self, output: Tensor, frac: float | Tensor, true: Prediction, x_t: Tensor, t: Tensor, discrete: bool
    ) -> Tensor:
        """Return the loss of an output where eps and x_0 are known, (B,)."""
        if self.loss_name not in ("hybrid", "vlb"):
            return self._squared_error(output, true, x_t, t)
        schedule = self.schedule.to(x_t.device)
        pred = to_prediction(schedule, self.target, output, x_t, t, frac)
        if self.loss_name == "vlb":
            return schedule.T * L_vlb(schedule, pred, true.x_0, x_t, t, discrete)
        simple = self._simple(output, true, x_t, t)
        return L_hybrid(simple, schedule, pred, true.x_0, x_t, t, **self.loss_options, discrete=discrete)

    def loss_towards(
        self, model: Callable[..., Tensor], x_0: Tensor, x_t: Tensor, t: Tensor, y: object | None = None
    ) -> Tensor:
        """Return the loss towards a given x_0 at any x_t, such as the prediction of a teacher.

        A learned variance is not trained by it.

        Args:
            x_0, x_t: (B, *).
            t: (B,), integer or real, in (0, T].
            y: the condition, as in `predictor`.
        Returns:
            (B,).
        Raises:
            ValueError: the losses "vlb" and "hybrid", which are of data.
        """
        if self.loss_name in ("hybrid", "vlb"):
            raise ValueError(
                f"loss = {self.loss_name!r} needs data, not a given answer; allowed: {', '.join(OF_ERRORS)}"
            )
        schedule = self.schedule.to(x_0.device)
        output, _ = self.output(model, x_t, t, y)
        return self._squared_error(output, Prediction(eps_from_x_0(schedule, x_t, t, x_0), x_0), x_t, t)

    def _squared_error(self, output: Tensor, true: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of the output, in its own coordinate or weighted as by the loss, (B,)."""
        if self.loss_name == "simple":
            return self._simple(output, true, x_t, t)
        schedule = self.schedule.to(x_t.device)
        pred = to_prediction(schedule, self.target, output, x_t, t)
        return weighted(schedule, self.loss_name, pred, true.x_0, t, **self.loss_options)

    def _simple(self, output: Tensor, true: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of the output in its own coordinate, with a preconditioning that of F, (B,)."""
        simple = L_simple(output, from_prediction(self.schedule.to(x_t.device), self.target, true, t))
        c = self._preconditioning(x_t, t)
        return simple if c is None else simple / c.c_out.flatten() ** 2


def _of_each(t: Time, x_t: Tensor) -> Tensor:
    """Return t for each sample, (B,), on x_t's device: integers, or float64 for a real number."""
    dtype = None if isinstance(t, Tensor) or is_integer(t) else torch.float64
    return torch.as_tensor(t, dtype=dtype, device=x_t.device).expand(len(x_t))


def _checked(loss: str, options: dict[str, float | None]) -> dict[str, float]:
    """Return the options that are set; ValueError for one that the loss does not have."""
    function = {"min_snr": WEIGHTINGS["min_snr"], "p2": WEIGHTINGS["p2"], "hybrid": L_hybrid}.get(loss)
    parameters = inspect.signature(function).parameters.values() if function else ()
    known = [p.name for p in parameters if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]
    if not isinstance(options, dict):
        raise ValueError(f"loss_options = {options!r} must map names to numbers, such as {{gamma: 5}}")
    chosen = {name: value for name, value in options.items() if value is not None}
    for name, value in chosen.items():
        if name not in known:
            raise ValueError(
                f"loss_options has {name!r}; loss = {loss!r} has the options: {', '.join(known) or 'none'}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"loss_options.{name} = {value!r} must be a number > 0")
    return chosen
