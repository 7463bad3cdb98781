"""Sounds as mel spectrograms: a folder of sound files, with a subfolder a class or without."""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import reduce
from torch import Tensor

from ddpm.data.conditions import KINDS
from ddpm.data.dataset import ImageData, check_choice, check_name, check_options, height_width
from ddpm.data.folder import choose_half, files_in, first_of, looked_at, visible
from ddpm.data.spectrogram import Mel, slices
from ddpm.figures.images import to_uint8
from ddpm.randomness import generator
from ddpm.runs.files import Origin, regular_size
from ddpm.runs.preflight import available, in_words

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".mp3")
LARGEST = 1 << 31  # bytes of a file, and of what it decodes to
AT_ONCE = 64  # clips that are transformed together
FULL = 32768  # of 16 bits
LIBRARIES = ("soundfile", "soxr")  # of the extra "audio"


class Clips(ImageData):
    """Sound clips of one length; the base class of all sources of sounds.

    A network sees a clip as a picture, with a row a mel band, the lowest first, and a column a frame. The
    checksum in its identity is over the decoded sounds, not over the pictures, with the settings that make these.

    Args:
        name, split, labels, classes, validation, condition: as in `ImageData`.
        clips: int16 (N, mel.slice_size), none of them silent.
        mel: the settings that turn them into pictures.
        origins: the recording (N,) of each clip; those of one are all held out, or none. None: one recording each.

    Attributes:
        mel: as given.
        references: the power (N,) that each picture's decibels are counted from: its loudness.

    Raises: ValueError for arguments outside these ranges.
    """

    units = "sounds"
    conditions = tuple(kind for kind in KINDS if kind != "gray")

    def __init__(
        self,
        name: str,
        split: str,
        clips: Tensor,
        mel: Mel,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        *,
        origins: Tensor | None = None,
        validation: float = 0.1,
        condition: str | None = None,
    ):
        if clips.dtype != torch.int16 or clips.shape[1:] != (mel.slice_size,) or not len(clips):
            raise ValueError(f"{name}: sounds are int16 (N, {mel.slice_size}), not {clips.dtype} {tuple(clips.shape)}")
        self.mel, self._origins = mel, torch.arange(len(clips)) if origins is None else origins
        self._of_sounds = hashlib.sha256(clips.contiguous().numpy().astype("<i2").data).hexdigest()
        parts = [mel.encode(part.float() / FULL) for part in clips.split(AT_ONCE)]
        pictures, references = (torch.cat(part) for part in zip(*parts, strict=True))
        self.references = references
        super().__init__(name, split, pictures, labels, classes, validation=validation, condition=condition)

    def picture(self, x: Tensor) -> Tensor:
        """Return samples (n, 1, bands, frames) for display: low frequencies at the bottom, high ones at the top."""
        return x.flip(-2)

    def sound(self, x: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Return the sounds of samples.

        Args:
            x: (n, 1, bands, frames) in [-1, 1].
            numbers: indices of samples of these data (n,), whose loudness is used; None for a peak of 0.9.

        Returns: float32 (n, mel.slice_size).
        """
        return self.mel.decode(to_uint8(x.cpu()), None if numbers is None else self.references[numbers.cpu()])

    def _divide(self, count: int, validation: float) -> tuple[Tensor, Tensor]:
        """Return the sorted indices of the training and of the held-out part, in whole recordings if there are several.

        A single one is divided clip by clip.
        """
        sizes = torch.bincount(self._origins)
        sizes = sizes[sizes > 0]
        if validation == 0 or len(sizes) in (1, count):
            return super()._divide(count, validation)
        recordings = self._origins.unique()
        shuffled = torch.randperm(len(sizes), generator=generator(0, "held_out"))
        held_out = int((sizes[shuffled].cumsum(0) <= round(validation * count)).sum())
        chosen = torch.isin(self._origins, recordings[shuffled[: min(max(held_out, 1), len(sizes) - 1)]])
        return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]

    @cached_property
    def _sha256(self) -> str:
        """The checksum of the decoded sounds, of the settings that make pictures of them, and of the labels."""
        settings = {
            key: value for key, value in self.mel.settings().items() if key != "n_iter"
        }  # n_iter is only used in decoding
        digest = hashlib.sha256(json.dumps([self._of_sounds, settings, self.labels is not None]).encode())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().astype("<i8").data)
        return digest.hexdigest()


class Sound(Clips):
    """The WAV, FLAC, Ogg and MP3 files of a folder, in sorted order.

    If files lie directly in the folder, they have no labels; otherwise each subfolder with files, one level deep, is a
    class. Channels are averaged, other sample rates resampled (soxr, its best quality). A long file is cut into as many
    whole clips as it holds, one after the other; what is left over is left out, and so are silent clips, counted.
    Samples beyond [-1, 1] are clipped, as in 16-bit files.

    Args:
        root: the folder.
        sample_rate, n_fft, hop, top_db, n_iter: as in `Mel`; these are those of published audio diffusion.
        image_size: mel bands and frames, one number for both: a clip has `hop` times as many samples as frames, less 1.
        channels: 1, as pictures of sounds have.
        short: a file shorter than a clip is padded with silence ("pad"), left out and counted ("drop"), or refused
            ("error").
        broken: a file that cannot be read, is empty, or holds NaN is named and left out ("skip"), or refused ("error").
        split, name: as in `Folder`.
        validation, condition: as in `ImageData`.

    Raises: FileNotFoundError or NotADirectoryError if there is no such folder; PermissionError if it cannot be read;
        ValueError if it has no sounds, without the libraries that read them, or for options outside their ranges.
    """

    def __init__(
        self,
        root: str | Path,
        sample_rate: int = 22050,
        n_fft: int = 2048,
        hop: int = 512,
        image_size: int | Sequence[int] = 256,
        channels: int = 1,
        top_db: float = 80,
        n_iter: int = 32,
        short: str = "pad",
        broken: str = "skip",
        split: str = "auto",
        validation: float = 0.1,
        name: str | None = None,
        condition: str | None = None,
    ):
        check_choice("split", split, ("auto", "train", "test"))
        check_choice("short", short, ("pad", "drop", "error"))
        check_choice("broken", broken, ("skip", "error"))
        check_name(name or "")
        check_options(image_size, channels, validation, condition, self.conditions)
        mel = mel_of_options(sample_rate, n_fft, hop, image_size, channels, top_db, n_iter)
        must_have_libraries("data=sound")
        root = Path(root).expanduser()
        try:
            half, folder = choose_half(root, split, self.units)
            self.origin = Origin(partial(looked_at, root, split))
            paths, labels, classes = list_sounds(folder)
        except PermissionError as error:
            raise PermissionError(f"cannot read {error.filename or root}: {error.strerror or error}") from error
        clips, origins = read_all(paths, folder, mel, short, broken)
        super().__init__(
            name or root.resolve().name,
            half,
            clips,
            mel,
            None if labels is None else labels[origins],
            classes,
            origins=origins,
            validation=validation,
            condition=condition,
        )


class Read(NamedTuple):
    """A decoded sound file."""

    sound: Tensor  # int16 (n,), at the rate that was requested
    sample_rate: int  # its own
    seconds: float


def must_have_libraries(what: str) -> None:
    """Raise ValueError, with how to get them, without the libraries that read sounds and resample them."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}: pip install 'ddpm-ablations[audio]'")


def mel_of_options(
    sample_rate: int,
    n_fft: int,
    hop: int,
    image_size: int | Sequence[int],
    channels: int,
    top_db: float,
    n_iter: int,
) -> Mel:
    """Return the spectrogram settings for a source's options; ValueError as in `Mel`, and for colour."""
    if channels != 1:
        raise ValueError(f"channels={channels!r}: pictures of sounds have 1")
    bands, frames = height_width(image_size)
    return Mel(sample_rate, n_fft, hop, bands, frames, top_db, n_iter)


def list_sounds(folder: Path) -> tuple[list[Path], Tensor | None, list[str]]:
    """Return the sound files' paths in sorted order, their labels int64 (N,) or None, and the classes' names."""
    direct, others = files_in(folder, SUFFIXES)
    inside = {path: files_in(path, SUFFIXES)[0] for path in visible(folder) if path.is_dir()}
    classes = {path: sounds for path, sounds in inside.items() if sounds}
    if not direct and not classes:
        raise ValueError(
            f"no {', '.join(SUFFIXES)} file in {folder} or in its subfolders (one level deep)"
            + (f"; there are {len(others):,} other files" if others else "")
        )
    if direct:
        if classes:
            print(f"{folder}: using the {len(direct):,} sounds directly in it, not those of {len(classes)} subfolders")
        return direct, None, []
    labels = [label for label, sounds in enumerate(classes.values()) for _ in sounds]
    return [path for sounds in classes.values() for path in sounds], torch.tensor(labels), [p.name for p in classes]


def read_all(paths: Sequence[Path], folder: Path, mel: Mel, short: str, broken: str) -> tuple[Tensor, Tensor]:
    """Return clips of all files, int16 (N, mel.slice_size), and the indices (N,) in `paths` that they come from.

    Args:
        short, broken: as in `Sound`; prints what is left out.
    Raises: ValueError if nothing is left, for what `short` and `broken` refuse, or if memory has no room.
    """
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(partial(_attempt, sample_rate=mel.sample_rate), paths))
    failed = [f"{p.relative_to(folder)} ({r})" for p, r in zip(paths, results, strict=True) if isinstance(r, str)]
    if failed and (broken == "error" or len(failed) == len(paths)):
        hint = "; data.broken=skip leaves them out" if broken == "error" and len(failed) < len(paths) else ""
        raise ValueError(f"{folder}: {len(failed):,} of {len(paths):,} sounds cannot be read: {first_of(failed)}{hint}")
    if failed:
        print(f"{folder}: skipped {len(failed):,} of {len(paths):,} sounds, which cannot be read: {first_of(failed)}")
    whole = {place: read for place, read in enumerate(results) if isinstance(read, Read)}
    _report_low_rates([read.sample_rate for read in whole.values()], mel.sample_rate, folder)
    _check_shortness({str(paths[n].relative_to(folder)): read for n, read in whole.items()}, folder, mel, short)
    parts = [(place, cut(read.sound, mel.slice_size, pad=short == "pad")) for place, read in whole.items()]
    if not sum(len(part) for _, part in parts):
        raise ValueError(
            f"{folder}: every sound is shorter than the {mel.seconds:.2f} s of a clip; data.short=pad pads them, "
            f"or take fewer frames, or hop={max(mel.hop // 2, 1)}"
        )
    clips, origins = torch.cat([part for _, part in parts]), [place for place, part in parts for _ in part]
    needed, there = 2 * clips.nbytes, available(torch.device("cpu"))
    if there is not None and needed > there:
        raise ValueError(f"{folder}: its sounds take {in_words(needed)}, but {in_words(there)} of memory are available")
    heard = (clips != 0).any(1)
    if not heard.any():
        raise ValueError(f"{folder}: every clip is silent")
    if silent := int((~heard).sum()):
        print(f"{folder}: left out {silent:,} of {len(clips):,} clips, which are silent")
    return clips[heard], torch.tensor(origins)[heard]


def _report_low_rates(rates: Sequence[int], sample_rate: int, folder: Path) -> None:
    """Print if some sounds have a lower sample rate: they have no content in the upper mel bands."""
    slow = [rate for rate in rates if rate < sample_rate]
    if slow:
        print(
            f"{folder}: {len(slow):,} of {len(rates):,} sounds have fewer than {sample_rate:,} samples a second (the "
            f"fewest {min(slow):,}) and are resampled up: they hold nothing above {min(slow) // 2:,} Hz; "
            f"data.sample_rate={Counter(rates).most_common(1)[0][0]} takes the most frequent rate"
        )


def _check_shortness(reads: dict[str, Read], folder: Path, mel: Mel, short: str) -> None:
    """Raise ValueError for files shorter than a clip, or print what becomes of them."""
    few = [f"{name} ({read.seconds:.2f} s)" for name, read in reads.items() if len(read.sound) < mel.slice_size]
    if not few:
        return
    what = f"{folder}: {len(few):,} of {len(reads):,} sounds are shorter than the {mel.seconds:.2f} s of a clip"
    if short == "error":
        raise ValueError(f"{what}: {first_of(few)}; data.short=pad pads them, data.short=drop leaves them out")
    print(f"{what}, and are {'padded' if short == 'pad' else 'left out'}: {first_of(few)}")


def cut(sound: Tensor, size: int, pad: bool) -> Tensor:
    """Return clips (k, size) of a sound (n,): its whole slices, or a shorter sound padded with silence."""
    if len(sound) < size and pad:
        sound = torch.nn.functional.pad(sound, (0, size - len(sound)))
    return slices(sound, size)


def _attempt(path: Path, sample_rate: int) -> Read | str:
    """Return the result of `read_sound`, or the reason why it failed."""
    try:
        return read_sound(path, sample_rate)
    except Exception as error:  # damaged files
        return " ".join(str(error).split()) or type(error).__name__


def read_sound(path: Path, sample_rate: int) -> Read:
    """Return a sound file with its channels averaged, resampled to `sample_rate`.

    Raises: ValueError for one that cannot be read, is empty, too large, or holds NaN.
    """
    import soundfile

    if regular_size(path, LARGEST) == 0:
        raise ValueError("it is empty")
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames * file.channels * 4 > LARGEST:
                raise ValueError(f"it decodes to more than {in_words(LARGEST)}")
            own, y = file.samplerate, torch.from_numpy(file.read(dtype="float32", always_2d=True))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"not a sound that can be read: {error.error_string}") from error
    if not len(y):
        raise ValueError("it has no samples")
    if not y.isfinite().all():
        raise ValueError("it holds NaN or infinity")
    mono = reduce(y, "n c -> n", "mean")
    return Read(to_int16(resampled(mono, own, sample_rate)), own, len(mono) / own)


def resampled(y: Tensor, rate: int, sample_rate: int) -> Tensor:
    """Return a sound float32 (n,) at another rate, by soxr's very high quality; itself at the same."""
    if rate == sample_rate:
        return y
    import soxr

    return torch.from_numpy(soxr.resample(y.numpy(), rate, sample_rate, quality="VHQ"))


def to_int16(y: Tensor) -> Tensor:
    """Return samples in [-1, 1] as 16-bit integers, clipped."""
    return (y * FULL).round().clamp(-FULL, FULL - 1).to(torch.int16)


def wav_of(y: Tensor, sample_rate: int) -> bytes:
    """Return a sound float32 (n,) as a WAV file of 16 bits, by the standard library alone."""
    import io
    import wave

    file_bytes = io.BytesIO()
    with wave.open(file_bytes, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(to_int16(y).numpy().astype("<i2").tobytes())
    return file_bytes.getvalue()


def mel_of_config(data: Any) -> Mel | None:
    """Return the spectrogram settings of a run, from its data configuration; None if its data are not sounds."""
    if not isinstance(data, dict) or data.get("_target_") not in ("ddpm.data.Sound", "ddpm.data.SpokenDigits"):
        return None
    keys = ("sample_rate", "n_fft", "hop", "image_size", "channels", "top_db", "n_iter")
    return mel_of_options(**{key: data[key] for key in keys})
