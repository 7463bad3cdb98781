"""Spoken digits, synthesised by espeak-ng in many voices, from a seed, and cached."""

import hashlib
import io
import json
import shutil
import subprocess
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.checks import is_whole
from ddpm.data.dataset import check_choice, check_options
from ddpm.data.sound import Clips, mel_of_options, must_have_libraries, resampled, to_int16
from ddpm.data.spectrogram import Mel
from ddpm.randomness import generator
from ddpm.runs.tensor_cache import load_tensor, save_tensor

PROGRAM = "espeak-ng"
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
SPEAKERS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
SPEEDS, PITCHES = (130, 200), (20, 80)  # words a minute; espeak's own scale of 0..99
QUIET = 0.02  # of the peak: quieter parts before and after a word are cut off
SPEAKING = 1  # raised by every change that makes other sounds: part of the cache file's name
WORKERS = 2
MOST = 100_000


class Utterance(NamedTuple):
    """A digit and the voice, speed, pitch and position in which it is spoken."""

    label: int
    voice: str
    speed: int
    pitch: int
    start: float  # of the word in the silence of its clip: the share of half of that before it


class SpokenDigits(Clips):
    """The digits zero to nine in 84 English voices of espeak-ng, at speeds and pitches that a seed draws.

    Every digit is spoken as often as the others, to within one. The sounds are synthesised once, which takes minutes,
    and cached in root/spoken_digits: they are a function of the settings and of espeak-ng's version, and their
    checksum is in the run's hash.

    Args:
        root: the folder of data sets.
        count: how many.
        seed: of voices, speeds, pitches and places.
        sample_rate, n_fft, hop, image_size, channels, top_db, n_iter: as in `Sound`; these are clips of one second.
        split: "auto", which is all of them.
        validation, condition: as in `ImageData`.

    Raises: FileNotFoundError without espeak-ng, unless the sounds are cached; ValueError for options out of range.
    """

    def __init__(
        self,
        root: str | Path = "data",
        count: int = 4000,
        seed: int = 0,
        sample_rate: int = 8000,
        n_fft: int = 1024,
        hop: int = 256,
        image_size: int | Sequence[int] = 32,
        channels: int = 1,
        top_db: float = 80,
        n_iter: int = 32,
        split: str = "auto",
        validation: float = 0.1,
        condition: str | None = None,
    ):
        check_choice("split", split, ("auto",))
        check_options(image_size, channels, validation, condition, self.conditions)
        if not is_whole(count, len(CLASSES), MOST):
            raise ValueError(f"count={count!r}: a whole number of sounds from {len(CLASSES)} to {MOST:,}")
        if not is_whole(seed, 0):
            raise ValueError(f"seed={seed!r} must be a whole number >= 0")
        mel = mel_of_options(sample_rate, n_fft, hop, image_size, channels, top_db, n_iter)
        clips = _cached(count, seed, mel, Path(root).expanduser() / "spoken_digits")
        labels = torch.arange(count) % len(CLASSES)
        super().__init__(
            "spoken_digits", "all", clips, mel, labels, CLASSES, validation=validation, condition=condition
        )


def utterances(count: int, seed: int) -> list[Utterance]:
    """Return the utterances of a seed: number i is the digit i mod 10, whatever the count."""
    found = []
    for i in range(count):
        u = torch.rand(5, generator=generator(seed, "spoken digit", i), dtype=torch.float64).tolist()
        accent, speaker = ACCENTS[int(u[0] * len(ACCENTS))], SPEAKERS[int(u[1] * len(SPEAKERS))]
        speed, pitch = (
            low + int(share * (high + 1 - low)) for share, (low, high) in zip(u[2:4], (SPEEDS, PITCHES), strict=True)
        )
        found.append(Utterance(i % len(CLASSES), f"{accent}+{speaker}", speed, pitch, u[4]))
    return found


def _cached(count: int, seed: int, mel: Mel, folder: Path) -> Tensor:
    """Return the clips int16 (count, slice_size), from a cache file in a folder, or synthesised and saved there."""
    settings = [SPEAKING, count, seed, mel.sample_rate, mel.slice_size]
    place = folder / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}.safetensors"
    clips = load_tensor(place, torch.int16, (count, mel.slice_size))
    if clips is None:
        program = located()
        must_have_libraries("data=spoken_digits")
        print(f"{PROGRAM} speaks {count:,} digits, once: they are saved as {place}", flush=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            words = pool.map(lambda utterance: placed(utterance, say(program, utterance), mel), utterances(count, seed))
            clips = torch.stack(list(words))
        save_tensor(clips, place)
    return clips


def located() -> str:
    """Return the path of espeak-ng; FileNotFoundError with how to get it."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise FileNotFoundError(
            f"{PROGRAM} is not installed, which speaks the digits; Debian's and Ubuntu's package {PROGRAM} has it "
            f"(apt install {PROGRAM}); or copy a spoken_digits folder that another machine made into data.root"
        )
    return program


def say(program: str, utterance: Utterance) -> tuple[Tensor, int]:
    """Synthesise a word: float32 (n,) without the silence around it, and its sample rate.

    Raises: ValueError if the program says nothing.
    """
    words = ["-v", utterance.voice, "-s", str(utterance.speed), "-p", str(utterance.pitch), "--stdout"]
    done = subprocess.run([program, *words, CLASSES[utterance.label]], capture_output=True)
    try:
        with wave.open(io.BytesIO(done.stdout)) as file:
            rate = file.getframerate()
            heard = np.frombuffer(file.readframes(-1), dtype="<i2")
    except (wave.Error, EOFError) as error:
        reason = done.stderr.decode(errors="replace").strip() or str(error)
        raise ValueError(f"{program} -v {utterance.voice} produces no sound: {reason}") from error
    y = torch.from_numpy(heard.astype(np.float32) / 32768)
    return trimmed(y), rate


def trimmed(y: Tensor) -> Tensor:
    """Return a sound (n,) without the quiet parts before and after it."""
    loud = (y.abs() > QUIET * y.abs().max()).nonzero()[:, 0]
    return y[int(loud[0]) : int(loud[-1]) + 1] if len(loud) else y


def placed(utterance: Utterance, word: tuple[Tensor, int], mel: Mel) -> Tensor:
    """Return a clip, int16 (slice_size,), with a word placed in it; a word longer than the clip is cut off."""
    y = resampled(word[0], word[1], mel.sample_rate)[: mel.slice_size]
    clip, start = torch.zeros(mel.slice_size), int(utterance.start * (mel.slice_size - len(y)) / 2)
    clip[start : start + len(y)] = y
    return to_int16(clip)
