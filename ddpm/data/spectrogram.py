"""Mel spectrograms of sound clips, and their inversion: the layout of published audio diffusion.

A picture has a row a band, the lowest first, and a column a frame; its bytes are decibels below the loudest. The phase,
and within a band the frequency, are lost: `Mel.decode` finds a sound of the same magnitudes.

All of it is torch, a batch at once. librosa, whose definitions these are, compiles itself for a minute when it is first
used; where it is installed, the tests compare both.
"""

import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.randomness import generator
from ddpm.runs.files import read_json

LINEAR = 200 / 3  # hertz a mel up to BREAK, above which mels are logarithmic
BREAK = 1000.0
LOG_STEP = math.log(6.4) / 27
FLOOR = 1e-10  # of power: silence has a logarithm too
UNMIXING = 64  # steps of `unmixed`
MOMENTUM = 0.99
SETTINGS = ("sample_rate", "n_fft", "hop", "n_mels", "frames", "top_db", "n_iter")
PUBLISHED = {  # their names in a published mel_config.json
    "sample_rate": "sample_rate",
    "n_fft": "n_fft",
    "hop": "hop_length",
    "n_mels": "y_res",
    "frames": "x_res",
    "top_db": "top_db",
    "n_iter": "n_iter",
}
MEL_CONFIG = "mel_config.json"


def mel_of_hz(f: Tensor) -> Tensor:
    r"""Return the pitch in mels, as in Slaney's Auditory Toolbox (Interval Research technical report 1998-010).

    .. math::
        m(f) = \begin{cases} 3 f / 200 & f < 1000 \\ 15 + 27 \log(f / 1000) / \log 6.4 & \text{else} \end{cases}
        \qquad \text{[Slaney (mel)]}

    Args:
        f: hertz, >= 0.
    """
    return torch.where(f < BREAK, f / LINEAR, BREAK / LINEAR + (f / BREAK).clamp(min=FLOOR).log() / LOG_STEP)


def hz_of_mel(m: Tensor) -> Tensor:
    """Return the frequency in hertz of a pitch in mels: the inverse of `mel_of_hz`."""
    above = m - BREAK / LINEAR
    return torch.where(above < 0, m * LINEAR, BREAK * (LOG_STEP * above).exp())


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    r"""Return triangular filters over Fourier frequencies, evenly spaced in mels, each of area 1 in hertz.

    .. math::
        A_{kj} = \frac{2}{f_{k+1} - f_{k-1}} \max\left(0, \min\left(
        \frac{f_j - f_{k-1}}{f_k - f_{k-1}}, \frac{f_{k+1} - f_j}{f_{k+1} - f_k}\right)\right)
        \qquad \text{[Slaney (filters)]}

    Args:
        sample_rate: samples a second; f_0 = 0 and f_{K+1} is half of it.
        n_fft: samples of a window.
        n_mels: K, the number of bands.

    Returns: float64 (K, n_fft // 2 + 1).

    Raises: ValueError if a band is too narrow to hold any of the frequencies.
    """
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    top = mel_of_hz(torch.tensor(sample_rate / 2, dtype=torch.float64))
    f = hz_of_mel(torch.linspace(0, float(top), n_mels + 2, dtype=torch.float64))
    low, middle, high = (rearrange(part, "k -> k 1") for part in (f[:-2], f[1:-1], f[2:]))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    filters = 2 / (high - low) * torch.minimum(rising, falling).clamp(min=0)
    if empty := int((filters.sum(1) == 0).sum()):
        raise ValueError(
            f"n_mels={n_mels}: {empty} of the bands lie between the frequencies of n_fft={n_fft} samples; take fewer "
            f"bands, or n_fft={2 * n_fft}"
        )
    return filters


class Mel:
    """Conversion of clips of one length to mel spectrograms, and back.

    Args:
        sample_rate: samples a second.
        n_fft: samples of a window, an even number.
        hop: samples from one window to the next, at most half of n_fft.
        n_mels: bands, the rows of a picture.
        frames: windows, its columns.
        top_db: decibels from the loudest to what counts as silence.
        n_iter: rounds of Griffin-Lim in decoding.

    Raises: ValueError for values that are no positive whole numbers, or do not fit together.
    """

    def __init__(
        self,
        sample_rate: int = 22050,
        n_fft: int = 2048,
        hop: int = 512,
        n_mels: int = 256,
        frames: int = 256,
        top_db: float = 80,
        n_iter: int = 32,
    ):
        numbers = {"sample_rate": sample_rate, "n_fft": n_fft, "hop": hop, "n_mels": n_mels, "frames": frames}
        for name, value in (numbers | {"n_iter": n_iter}).items():
            if not is_whole(value, 1):
                raise ValueError(f"{name}={value!r} must be a whole number >= 1")
        if isinstance(top_db, bool) or not isinstance(top_db, int | float) or not 0 < top_db <= 200:
            raise ValueError(f"top_db={top_db!r}: decibels below the loudest, such as 80; above 0 and up to 200")
        if n_fft % 2 or hop > n_fft // 2:
            raise ValueError(
                f"n_fft={n_fft}, hop={hop}: windows of an even number of samples, each overlapping half of the next or "
                f"more; take hop={max(n_fft // 4, 1)}, or n_fft={4 * hop}"
            )
        if frames < 2 or (frames * hop - 1) < n_fft // 2:
            least = max(2, -(-(n_fft // 2 + 1) // hop))
            raise ValueError(f"frames={frames}: a clip is no shorter than half a window; at least {least}")
        self.sample_rate, self.n_fft, self.hop, self.n_mels, self.frames = numbers.values()
        self.top_db, self.n_iter = top_db, n_iter
        self.filters = mel_filters(sample_rate, n_fft, n_mels).float()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mel) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(tuple(self.settings().items()))

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def slice_size(self) -> int:
        """The samples of a clip: one less than `frames` hops, as windows are centred and the first is at its start."""
        return self.frames * self.hop - 1

    @property
    def seconds(self) -> float:
        """The length of a clip in seconds."""
        return self.slice_size / self.sample_rate

    def columns(self, start: float, end: float) -> tuple[int, int]:
        """Return the range of frames, at least one, whose centres lie between two times in seconds."""
        first = math.ceil(start * self.sample_rate / self.hop - 1e-9)
        return first, max(first + 1, math.ceil(end * self.sample_rate / self.hop - 1e-9))

    # ------------------------------------------------------------------------------------------------------ encoding

    @cached_property
    def _window(self) -> Tensor:
        return torch.hann_window(self.n_fft)

    def transform(self, y: Tensor) -> Tensor:
        """Return the short-time Fourier transform of sounds float (B, n), complex (B, n_fft // 2 + 1, n // hop + 1)."""
        return torch.stft(y, self.n_fft, self.hop, window=self._window, pad_mode="constant", return_complex=True)

    def power(self, y: Tensor) -> Tensor:
        """Return the power in each band: float32 (B, n_mels, frames) of sounds float32 (B, slice_size)."""
        return self.filters @ self.transform(y).abs() ** 2

    def loudest(self, power: Tensor) -> Tensor:
        """Return the largest power of each of (B, n_mels, frames): (B,), the reference of decibels."""
        return power.flatten(1).amax(1).clamp(min=FLOOR)

    def bytes_of(self, power: Tensor, reference: Tensor) -> Tensor:
        r"""Return loudness in 256 steps: 255 is that of the reference, and 0 is D decibels below it or more.

        .. math::
            b = \left\lfloor 255 \left(1 + \frac{10}{D} \log_{10} \frac{P}{P_\text{ref}}\right) + \frac12 \right\rfloor
            \qquad \text{[Decibels (bytes)]}

        Args:
            power: (B, n_mels, frames); D is `top_db`.
            reference: (B,).

        Returns: uint8 (B, 1, n_mels, frames).
        """
        P, P_ref = power.clamp(min=FLOOR), rearrange(reference.to(power.dtype), "b -> b 1 1")
        b = 255 * (1 + 10 / self.top_db * (P / P_ref).log10()) + 0.5
        return rearrange(b.floor().clamp(0, 255).to(torch.uint8), "b k n -> b 1 k n")

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return pictures uint8 (B, 1, n_mels, frames) of sounds float32 (B, slice_size), and their references (B,)."""
        power = self.power(y)
        reference = self.loudest(power)
        return self.bytes_of(power, reference), reference

    # -------------------------------------------------------------------------------------------------- decoding

    def power_of(self, pictures: Tensor, reference: Tensor | None = None) -> Tensor:
        r"""Return the power that `bytes_of` was given, up to half a step; the quietest byte stands for silence.

        .. math:: P = P_\text{ref} 10^{\frac{D}{10} \left(\frac{b}{255} - 1\right)} \qquad \text{[Decibels (power)]}

        Args:
            pictures: uint8 (B, 1, n_mels, frames).
            reference: (B,); None for 1.

        Returns: float32 (B, n_mels, frames).
        """
        b = rearrange(pictures, "b 1 k n -> b k n").float()
        P = 10 ** (self.top_db / 10 * (b / 255 - 1))
        P = torch.where(b == 0, 0.0, P)
        return P if reference is None else P * rearrange(reference.to(P.dtype), "b -> b 1 1")

    def unmixed(self, power: Tensor) -> Tensor:
        r"""Return nonnegative powers of all frequencies whose bands have these powers, as nearly as possible.

        By steps that never increase the squared error (Lee & Seung 2000, Algorithms for Non-negative Matrix
        Factorization), of which a band that is silent stays so:

        .. math:: S \leftarrow S \odot \frac{A^\top P}{A^\top A S} \qquad \text{[NMF (4)]}

        Args:
            power: (B, n_mels, frames).

        Returns: (B, n_fft // 2 + 1, frames).
        """
        A, P = self.filters, power
        A_P, A_A = A.mT @ P, A.mT @ A
        S = A_P / A.sum(0).clamp(min=FLOOR).square()[:, None]
        for _ in range(UNMIXING):
            S = S * A_P / (A_A @ S).clamp(min=torch.finfo(S.dtype).tiny)
        return S

    def magnitudes(self, pictures: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return magnitudes (B, n_fft // 2 + 1, frames) for these pictures, approximate; arguments as in `power_of`."""
        return self.unmixed(self.power_of(pictures, reference)).sqrt()

    def decode(self, pictures: Tensor, reference: Tensor | None = None, n_iter: int | None = None) -> Tensor:
        """Return sounds for these pictures, approximately.

        Args:
            pictures: uint8 (B, 1, n_mels, frames).
            reference: (B,), as returned by `encode`; None, as for samples, which have none: a peak of 0.9.
            n_iter: rounds of Griffin-Lim; None for the settings'.

        Returns: float32 (B, slice_size).
        """
        y = self.griffin_lim(self.magnitudes(pictures, reference), self.n_iter if n_iter is None else n_iter)
        return y if reference is not None else at_peak(y)

    def griffin_lim(self, S: Tensor, n_iter: int, momentum: float = MOMENTUM, phi: Tensor | None = None) -> Tensor:
        r"""Return sounds whose short-time Fourier transforms have these magnitudes, approximately.

        Griffin and Lim's projections (1984) with the momentum of Perraudin et al. (2013), as librosa has it: G makes a
        sound of a transform and transforms it again.

        .. math::
            T_n = G(S \odot e^{i \phi_{n-1}}), \qquad
            \phi_n = \angle\left(T_n - \frac{\alpha}{1 + \alpha} T_{n-1}\right) \qquad \text{[GLA (momentum)]}

        Args:
            S: magnitudes (B, n_fft // 2 + 1, frames).
            n_iter: how many rounds.
            momentum: alpha, 0 for none.
            phi: the first phases, (n_fft // 2 + 1, frames); None for drawn ones, always the same.

        Returns: (B, slice_size).
        """
        if phi is None:  # of each row, whatever batch it is in
            phi = 2 * math.pi * torch.rand(S.shape[1:], generator=generator(0, "griffin_lim"))
        T, spectrum = torch.zeros_like(S, dtype=torch.complex64), S * torch.polar(torch.ones(()), phi)
        for _ in range(n_iter):
            T_before, T = T, self.transform(self.sound_of(spectrum))
            phi = (T - momentum / (1 + momentum) * T_before).angle()
            spectrum = torch.polar(S, phi)
        return self.sound_of(spectrum)

    def sound_of(self, spectrum: Tensor) -> Tensor:
        """Return the sound (B, slice_size) whose transform is nearest to a spectrum (B, n_fft // 2 + 1, frames)."""
        return torch.istft(spectrum, self.n_fft, self.hop, window=self._window, length=self.slice_size)


def at_peak(y: Tensor, peak: float = 0.9) -> Tensor:
    """Return sounds (B, n) scaled to this peak; silence stays silent."""
    return peak * y / y.abs().amax(1, keepdim=True).clamp(min=FLOOR)


def spectral_convergence(S: Tensor, of_sound: Tensor) -> Tensor:
    r"""Return the relative distance of a sound's magnitudes from the target magnitudes: 0 for equal, 1 for silence.

    .. math::
        C = \frac{\| S - |T| \|_F}{\| S \|_F} \qquad \text{[GLA (convergence)]}

    Args:
        S: the target, (B, *).
        of_sound: |T|, those of the sound.

    Returns: (B,).
    """
    S, T = S.flatten(1), of_sound.flatten(1)
    return (S - T).norm(dim=1) / S.norm(dim=1).clamp(min=FLOOR)


def slices(y: Tensor, size: int) -> Tensor:
    """Cut a sound (n,) into whole consecutive slices (n // size, size), leaving out the rest."""
    whole = len(y) // size
    return rearrange(y[: whole * size], "(k n) -> k n", n=size)


# ------------------------------------------------------------------------------------------------- published settings


def load_mel(folder: str | Path) -> Mel:
    """Load the settings of a published audio model: mel_config.json of its folder, or of its subfolder mel.

    Raises: FileNotFoundError without the file; ValueError for one that is damaged or lacks a setting.
    """
    folder = Path(folder).expanduser()
    found = [path for path in (folder / MEL_CONFIG, folder / "mel" / MEL_CONFIG) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"no {MEL_CONFIG} in {folder} or in {folder / 'mel'}")
    config = read_json(found[0])
    if not isinstance(config, Mapping) or (missing := [name for name in PUBLISHED.values() if name not in config]):
        lacking = f": it lacks {', '.join(missing)}" if isinstance(config, Mapping) else ""
        raise ValueError(f"{found[0]} holds no settings of mel bands{lacking}")
    return Mel(**{ours: config[theirs] for ours, theirs in PUBLISHED.items()})


def save_mel(mel: Mel, folder: str | Path) -> None:
    """Write settings as they are published, into a folder's mel_config.json."""
    settings = {PUBLISHED[name]: value for name, value in mel.settings().items()}
    (Path(folder) / MEL_CONFIG).write_text(json.dumps({"_class_name": "Mel", **settings}, indent=2) + "\n")
