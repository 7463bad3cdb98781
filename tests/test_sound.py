"""Sounds as pictures of mel bands, and back: by sines and chirps, whose answers are known; and spoken digits."""

import json
import math
import re
import shutil
import wave

import numpy as np
import pytest
import torch
from conftest import SAY, said_in_a_browser

from ddpm.data import Sound, SpokenDigits, spoken_digits
from ddpm.data.sound import FULL, Clips, cut, mel_of_config, read_sound, resampled, to_int16, wav_of
from ddpm.data.spectrogram import (
    Mel,
    hz_of_mel,
    load_mel,
    mel_filters,
    mel_of_hz,
    save_mel,
    slices,
    spectral_convergence,
)
from ddpm.figures.images import to_float
from ddpm.figures.listen_page import Heard, page
from ddpm.metrics.quality import Real
from ddpm.metrics.sound import Judged, as_heard, convergence_curve, distance, held_out, memorised, through_sound

SMALL = Mel(sample_rate=8000, n_fft=256, hop=64, n_mels=16, frames=16)  # clips of 1,023 samples
needs_libraries = [
    pytest.importorskip(name, reason="the extra [audio] is not installed") for name in ("soundfile", "soxr")
]
OPTIONS = {"sample_rate": 8000, "n_fft": 256, "hop": 64, "image_size": 16}


def sine(frequency: float, n: int, rate: int = 8000, loud: float = 0.5) -> torch.Tensor:
    return loud * torch.sin(2 * math.pi * frequency / rate * torch.arange(n, dtype=torch.float64)).float()


def chirps(n: int, mel: Mel = SMALL) -> torch.Tensor:
    """Sounds (n, slice_size) whose pitch rises, each from another one, with a little noise."""
    t, noise = torch.arange(mel.slice_size) / mel.sample_rate, torch.Generator().manual_seed(0)
    low = torch.linspace(200, 800, n)[:, None]
    return 0.5 * torch.sin(2 * math.pi * (low + 4000 * t) * t) + 0.002 * torch.randn(n, len(t), generator=noise)


def write(path, y, rate=8000):
    needs_libraries[0].write(path, y.numpy(), rate)


# ----------------------------------------------------------------------------------------------------------- mel bands


@pytest.mark.equation("Slaney (mel)")
def test_mels_are_linear_up_to_1000_hertz_and_a_logarithm_beyond():
    hertz = torch.tensor([0.0, 200 / 3, 1000.0, 6400.0], dtype=torch.float64)
    assert mel_of_hz(hertz).tolist() == pytest.approx([0, 1, 15, 15 + 27])
    assert torch.allclose(hz_of_mel(mel_of_hz(hertz)), hertz)


@pytest.mark.equation("Slaney (filters)")
def test_filters_are_triangles_of_area_one_between_their_neighbours():
    filters, width = mel_filters(8000, 4096, 8), 8000 / 4096
    assert (filters.sum(1) * width).tolist() == pytest.approx([1] * 8, rel=1e-3)
    top = 15 + 27 * math.log(4) / math.log(6.4)
    f = [m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in np.linspace(0, top, 10)]
    at = filters.argmax(1) * width
    assert at.tolist() == pytest.approx(f[1:-1], abs=width)
    k = 4  # halfway up its left side it has half of its height
    assert filters[k, round((f[k] + f[k + 1]) / 2 / width)].item() == pytest.approx(1 / (f[k + 2] - f[k]), rel=0.02)
    assert not filters[k, : int(f[k] / width)].any() and not filters[k, int(f[k + 2] / width) + 1 :].any()


@pytest.mark.slow
def test_the_bands_and_the_bytes_are_those_of_librosa():
    librosa = pytest.importorskip("librosa", reason="librosa is not installed: pip install 'ddpm-ablations[peers]'")
    for rate, n_fft, n_mels in ((8000, 1024, 32), (22050, 2048, 256)):
        theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, dtype=np.float64)
        assert np.abs(theirs - mel_filters(rate, n_fft, n_mels).numpy()).max() < 1e-12
    y = chirps(2)
    power = librosa.feature.melspectrogram(y=y.numpy(), sr=8000, n_fft=256, hop_length=64, n_mels=16)
    assert np.allclose(power, SMALL.power(y).numpy(), rtol=1e-3, atol=1e-6)
    decibels = librosa.power_to_db(power[0], ref=np.max, top_db=80)
    published = ((decibels + 80) * 255 / 80).clip(0, 255) + 0.5
    assert np.array_equal(published.astype(np.uint8), SMALL.encode(y)[0][0, 0].numpy())
    S = SMALL.transform(y).abs()
    settings = {"hop_length": 64, "n_fft": 256, "length": 1023, "init": None, "pad_mode": "constant"}
    for rounds in (0, 1, 2, 4):  # later ones multiply rounding
        theirs = torch.from_numpy(librosa.griffinlim(S.numpy(), n_iter=rounds, **settings))
        ours = SMALL.griffin_lim(S, rounds, phi=torch.zeros(S.shape[1:]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_too_many_bands_and_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"n_mels=64: .* n_fft=64 samples; take fewer bands, or n_fft=128"):
        Mel(8000, n_fft=64, hop=32, n_mels=64, frames=16)
    with pytest.raises(ValueError, match=r"hop=200.*take hop=64"):
        Mel(8000, n_fft=256, hop=200, n_mels=8, frames=16)
    with pytest.raises(ValueError, match=r"frames=2: .* at least 3"):
        Mel(8000, n_fft=256, hop=64, n_mels=8, frames=2)
    for wrong in ({"n_iter": 0}, {"sample_rate": 8000.0}, {"n_mels": True}, {"top_db": 0}, {"top_db": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Mel(**({"sample_rate": 8000, "n_fft": 256, "hop": 64, "n_mels": 8, "frames": 16} | wrong))


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.equation("Decibels (bytes)")
def test_bytes_are_decibels_below_the_loudest():
    power = torch.tensor([1.0, 0.1, 1e-4, 1e-8, 1e-9]).reshape(1, 1, 5)
    steps = [255, 255 * 7 / 8, 255 / 2, 0, 0]  # 0, -10, -40, -80 and -90 of 80 decibels
    found = SMALL.bytes_of(7 * power, torch.tensor([7.0]))[0, 0, 0].tolist()
    assert found == [math.floor(b + 0.5) for b in steps]


@pytest.mark.equation("Decibels (power)")
def test_loudness_is_inverted_to_half_a_step_and_bytes_exactly_where_the_gain_is_kept():
    steps = torch.arange(1, 256, dtype=torch.uint8).reshape(1, 1, 1, 255)
    gain = torch.tensor([3.0])
    power = SMALL.power_of(steps, gain)
    assert torch.equal(SMALL.bytes_of(power, gain), steps)
    assert power[0, 0, -1].item() == pytest.approx(3)
    assert power[0, 0, -1 - 51].item() == pytest.approx(3 * 10**-1.6)  # a fifth of 80 decibels
    any_power = torch.rand(1, 16, 16) + 1e-4
    reference = SMALL.loudest(any_power)
    again = SMALL.power_of(SMALL.bytes_of(any_power, reference), reference)
    assert (10 * (again / any_power).log10()).abs().max() <= 80 / 255 / 2 + 1e-3
    assert SMALL.power_of(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)).abs().sum() == 0  # silence


@pytest.mark.equation("NMF (4)")
def test_powers_of_frequencies_have_the_bands_that_were_asked_for_and_a_step_is_the_paper_s():
    power = SMALL.power(chirps(3))
    S = SMALL.unmixed(power)
    assert (S >= 0).all()
    assert spectral_convergence(power, SMALL.filters @ S).max() < 0.03
    A, P = SMALL.filters.double(), power[0].double()
    fixed = torch.linalg.lstsq(A, P).solution.clamp(min=0)  # where A S = P and S > 0, a step changes nothing
    step = fixed * (A.mT @ P) / (A.mT @ A @ fixed).clamp(min=1e-300)
    inside = ((A @ fixed - P).abs() < 1e-9 * P.max()).all(0)
    assert torch.allclose(step[:, inside], fixed[:, inside], rtol=1e-4, atol=1e-12)
    quiet = SMALL.unmixed(torch.cat([power[:1, :8], torch.zeros(1, 8, 16)], dim=1))
    assert (SMALL.filters @ quiet)[0, 9:].abs().max() < 1e-3 * power.max()


@pytest.mark.equation("GLA (momentum)")
def test_rounds_of_griffin_lim_are_projections_with_momentum():
    S = SMALL.transform(chirps(2)).abs()
    assert torch.allclose(SMALL.griffin_lim(S, 2, 0.5), by_hand(S, 0.5), atol=1e-5)
    assert torch.allclose(SMALL.griffin_lim(S, 2, 0.0), by_hand(S, 0.0), atol=1e-5)
    assert not torch.allclose(by_hand(S, 0.5), by_hand(S, 0.0), atol=1e-3)
    assert torch.allclose(SMALL.griffin_lim(S[1:], 3), SMALL.griffin_lim(S, 3)[1:], atol=1e-5)  # whatever the batch


def by_hand(S: torch.Tensor, alpha: float) -> torch.Tensor:
    """Two rounds, written out."""

    def G(T):
        return SMALL.transform(SMALL.sound_of(T))

    start = SMALL.transform(SMALL.griffin_lim(S, 0))  # consistent: the same as one projection of the first phases
    T_1 = start
    phase = T_1 / T_1.abs().clamp(min=1e-20)
    T_2 = G(S * phase)
    moved = T_2 - alpha / (1 + alpha) * T_1
    return SMALL.sound_of(S * moved / moved.abs().clamp(min=1e-20))


@pytest.mark.equation("GLA (convergence)")
def test_convergence_is_zero_for_the_same_and_one_for_silence_and_falls_with_the_rounds():
    S = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert spectral_convergence(S, S).tolist() == [0, 0]
    assert spectral_convergence(S, 0 * S).tolist() == [1, 1]
    assert spectral_convergence(S[:1], torch.tensor([[3.0, 3.0]])).tolist() == pytest.approx([0.2])
    curve = [c for _, c in convergence_curve(SMALL, SMALL.transform(chirps(4)).abs(), [0, 2, 8, 32])]
    assert curve == sorted(curve, reverse=True) and curve[0] > 0.4 and curve[-1] < 0.12


def test_a_picture_of_the_sound_of_a_picture_is_nearly_that_picture():
    y = chirps(4)
    pictures, gain = SMALL.encode(y)
    again, loudness = SMALL.encode(SMALL.decode(pictures, gain))
    loud = pictures > 128
    assert (again.float() - pictures.float()).abs()[loud].mean() < 8
    assert (loudness / gain).log10().abs().max() < 0.15  # 1.5 dB
    quiet = SMALL.decode(*SMALL.encode(y / 10))
    assert quiet.abs().max() < 0.2 < SMALL.decode(pictures, gain).abs().max()
    assert SMALL.decode(pictures).abs().amax(1).tolist() == pytest.approx([0.9] * 4)


def test_a_sine_lies_in_its_band_and_comes_back_with_its_pitch():
    pictures, _ = SMALL.encode(sine(1000, SMALL.slice_size)[None])
    band = pictures[0, 0, :, 8].argmax().item()
    centre = hz_of_mel(torch.linspace(0, float(mel_of_hz(torch.tensor(4000.0))), 18))[band + 1].item()
    assert abs(centre - 1000) < 150
    y = SMALL.decode(pictures)[0]
    found = torch.fft.rfft(y).abs().argmax().item() * 8000 / len(y)
    assert abs(found - centre) < 150


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("rate", [44100, 11025, 48000])
def test_a_sine_keeps_its_frequency_to_a_tenth_of_a_hertz(rate):
    y = resampled(sine(440.3, 2 * rate, rate), rate, 22050)
    assert abs(len(y) - 2 * 22050) <= 1
    windowed = torch.fft.rfft(y.double() * torch.hann_window(len(y), dtype=torch.float64), n=1 << 20).abs()
    assert abs(windowed.argmax().item() * 22050 / (1 << 20) - 440.3) < 0.1
    assert y[4000:-4000].abs().max().item() == pytest.approx(0.5, rel=1e-3)


def test_slices_are_the_clip_again():
    y = torch.arange(1000)
    assert torch.equal(slices(y, 256).flatten(), y[:768])
    assert torch.equal(cut(y, 2000, pad=True), torch.cat([y, torch.zeros(1000, dtype=torch.long)])[None])
    assert cut(y, 2000, pad=False).shape == (0, 2000)


def test_a_folder_becomes_clips_by_class_whose_recordings_are_held_out_whole(tmp_path, capsys):
    for name, pitch in (("high", 2000), ("low", 500)):
        (tmp_path / name).mkdir()
        for k in range(4):
            write(tmp_path / name / f"{k}.wav", sine(pitch + 10 * k, 3 * SMALL.slice_size + 5))
    write(tmp_path / "low" / "z.flac", torch.stack([sine(500, 2000), sine(500, 2000)], dim=1), 16000)
    data = Sound(tmp_path, **OPTIONS, validation=0.25)
    assert len(data) == 25 and data.shape == (1, 16, 16) and data.classes == ("high", "low")
    assert data.labels.tolist() == [0] * 12 + [1] * 13
    assert not set(data._origins[data.train].tolist()) & set(data._origins[data.held_out].tolist())
    assert 0 < len(data.held_out) <= 6
    high, low = (data.picture(data.batch(torch.tensor([i])).x)[0, 0].mean(1).argmax().item() for i in (0, 12))
    assert high < low  # low sounds are shown below
    heard = data.sound(data.batch(torch.tensor([12])).x, torch.tensor([12]))
    assert heard.shape == (1, SMALL.slice_size) and heard.square().mean().item() == pytest.approx(1 / 8, rel=0.4)
    assert "padded: low/z.flac (0.12 s)" in capsys.readouterr().out
    (tmp_path / "high" / "4.wav").write_bytes((tmp_path / "high" / "0.wav").read_bytes())
    assert data.origin.changed()


def test_the_identity_is_that_of_the_decoded_sounds(tmp_path):
    for folder, suffix in (("a", "wav"), ("b", "flac")):
        (tmp_path / folder).mkdir()
        for k in range(2):
            write(tmp_path / folder / f"{k}.{suffix}", to_int16(sine(400 + 100 * k, 1500)))
    first, second = (Sound(tmp_path / folder, **OPTIONS, name="x") for folder in "ab")
    assert first.identity() == second.identity()
    other = Sound(tmp_path / "a", **OPTIONS | {"n_fft": 512}, name="x")
    assert other.identity()["sha256"] != first.identity()["sha256"]
    way_back = Sound(tmp_path / "a", **OPTIONS, n_iter=5, name="x")
    assert way_back.identity() == first.identity()


def test_wrong_input_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no \.wav, \.flac, \.ogg, \.oga, \.mp3 file in"):
        Sound(tmp_path, **OPTIONS)
    with pytest.raises(FileNotFoundError, match="point root at a folder of sounds"):
        Sound(tmp_path / "none", **OPTIONS)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "wrong.mp3").write_bytes(b"no sound at all" * 9)
    needs_libraries[0].write(tmp_path / "nan.wav", np.full(2000, np.nan, "float32"), 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match="3 of 3 sounds cannot be read"):
        Sound(tmp_path, **OPTIONS)
    write(tmp_path / "good.wav", sine(300, 500), 4000)
    write(tmp_path / "silent.wav", torch.zeros(1023))
    with pytest.raises(ValueError, match=r"3 of 5 sounds .*data.broken=skip leaves them out"):
        Sound(tmp_path, **OPTIONS, broken="error")
    assert len(Sound(tmp_path, **OPTIONS, validation=0)) == 1
    said = capsys.readouterr().out
    assert "empty.wav (it is empty)" in said and "nan.wav (it holds NaN or infinity)" in said
    assert "wrong.mp3 (not a sound that can be read" in said
    assert "1 of 2 sounds have fewer than 8,000 samples a second (the fewest 4,000) and are resampled up" in said
    assert "left out 1 of 2 clips, which are silent" in said
    with pytest.raises(ValueError, match=r"1 of 2 sounds are shorter.*good.wav \(0.12 s\); data.short=pad"):
        Sound(tmp_path, **OPTIONS, short="error")
    (tmp_path / "silent.wav").unlink()
    with pytest.raises(ValueError, match=r"every sound is shorter than the 0.13 s of a clip; data.short=pad"):
        Sound(tmp_path, **OPTIONS, short="drop")
    for wrong in ({"short": "cut"}, {"broken": "yes"}, {"channels": 3}, {"condition": "gray"}, {"hop": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sound(tmp_path, **OPTIONS | wrong)


def test_the_same_name_in_two_classes_is_two_sounds(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "1.wav", sine(300, 500))
    assert len(Sound(tmp_path, **OPTIONS, validation=0)) == 2
    assert "2 of 2 sounds are shorter than the 0.13 s of a clip, and are padded: a/1.wav" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("suffix", "kind", "subtype"),
    [("ogg", "OGG", "VORBIS"), ("oga", "OGG", "VORBIS"), ("mp3", "MP3", "MPEG_LAYER_III")],
)
def test_compressed_files_are_decoded_with_their_pitch_length_and_channels(tmp_path, suffix, kind, subtype):
    soundfile = needs_libraries[0]
    if subtype not in soundfile.available_subtypes(kind):
        pytest.skip(f"libsndfile {soundfile.__libsndfile_version__} writes no {kind}")
    left, right = sine(440, 24000, 16000, loud=0.6), sine(1500, 24000, 16000, loud=0.3)
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, torch.stack([left, right], dim=1).numpy(), 16000, format=kind, subtype=subtype)
    read = read_sound(path, 8000)
    assert read.sample_rate == 16000 and read.seconds == pytest.approx(1.5, abs=0.1)  # MP3 pads to whole frames
    y = read.sound[2000:10000].double() / FULL
    loud = 2 * torch.fft.rfft(y * torch.hann_window(8000, dtype=torch.float64)).abs() / 4000  # a bin is 1 Hz
    assert loud[440].item() == pytest.approx(0.3, rel=0.1) and loud[1500].item() == pytest.approx(0.15, rel=0.1)
    assert loud.topk(6).indices.sort().values.tolist() == [439, 440, 441, 1499, 1500, 1501]
    data = Sound(tmp_path, **OPTIONS, validation=0)
    assert len(data) == len(read.sound) // SMALL.slice_size and data.origin is not None
    assert data.images[:, 0].float().mean((0, 2)).topk(1).indices.item() < 4  # the louder channel is the low one


def test_files_without_samples_are_broken_ones(tmp_path, capsys):
    """Of length zero: no bytes, and a header with nothing after it; and one whose end is missing."""
    write(tmp_path / "header.wav", torch.zeros(0))
    needs_libraries[0].write(tmp_path / "header.ogg", np.zeros((0, 2), "float32"), 8000)
    (tmp_path / "nothing.wav").touch()
    write(tmp_path / "good.wav", sine(300, 2000))
    whole = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[:30])
    assert len(Sound(tmp_path, **OPTIONS, validation=0, broken="skip")) == 1
    said = capsys.readouterr().out
    assert "skipped 4 of 5 sounds, which cannot be read" in said and "nothing.wav (it is empty)" in said
    assert "header.wav (it has no samples)" in said and "good.wav" not in said
    with pytest.raises(ValueError, match=r"4 of 5 sounds .*data\.broken=skip leaves them out"):
        Sound(tmp_path, **OPTIONS, broken="error")


def test_a_wav_file_is_read_as_it_was_written(tmp_path):
    y = chirps(1)[0]
    (tmp_path / "x.wav").write_bytes(wav_of(y, 8000))
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 1, len(y))
    assert torch.equal(read_sound(tmp_path / "x.wav", 8000).sound, to_int16(y))
    assert to_int16(torch.tensor([2.0, -2.0, 0.5])).tolist() == [32767, -32768, 16384]


def test_published_settings_are_read_and_written(tmp_path):
    published = {"_class_name": "Mel", "hop_length": 512, "n_fft": 2048, "n_iter": 32, "sample_rate": 22050}
    (tmp_path / "mel").mkdir()
    (tmp_path / "mel" / "mel_config.json").write_text(
        json.dumps(published | {"top_db": 80, "x_res": 256, "y_res": 256})
    )
    mel = load_mel(tmp_path)
    assert mel == Mel() and mel.slice_size == 256 * 512 - 1
    save_mel(SMALL, tmp_path)
    assert load_mel(tmp_path) == SMALL
    (tmp_path / "mel_config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match="it lacks y_res, x_res, top_db"):
        load_mel(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape("no mel_config.json")):
        load_mel(tmp_path / "mel" / "none")


def test_a_configuration_says_what_its_samples_sound_by():
    data = {"_target_": "ddpm.data.Sound", "channels": 1, "top_db": 80, "n_iter": 32, **OPTIONS}
    assert mel_of_config(data) == SMALL
    assert mel_of_config({"_target_": "ddpm.data.Digits"}) is None and mel_of_config(None) is None


def test_the_frames_of_a_gap_are_those_whose_centres_lie_in_it():
    assert SMALL.columns(0, SMALL.seconds) == (0, 16)
    assert SMALL.columns(0.016, 0.032) == (2, 4)  # a frame is 8 ms
    assert SMALL.columns(0.0161, 0.0162) == (3, 4)


# ------------------------------------------------------------------------------------------------------- spoken digits


def test_every_digit_is_said_as_often_in_voices_that_a_seed_draws():
    said = spoken_digits.utterances(200, seed=0)
    assert [u.label for u in said[:12]] == [*range(10), 0, 1]
    assert said[:20] == spoken_digits.utterances(20, seed=0) != spoken_digits.utterances(20, seed=1)
    assert len({u.voice for u in said}) > 50 and {u.voice.split("+")[0] for u in said} == set(spoken_digits.ACCENTS)
    assert all(130 <= u.speed <= 200 and 20 <= u.pitch <= 80 and 0 <= u.start < 1 for u in said)


def test_without_the_program_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt install espeak-ng"):
        SpokenDigits(tmp_path, count=10)


def test_what_is_said_is_kept_and_read_without_the_program(tmp_path, monkeypatch):
    def say(program, utterance):
        return spoken_digits.trimmed(torch.cat([torch.zeros(50), sine(200 + 50 * utterance.label, 900)])), 8000

    monkeypatch.setattr(spoken_digits, "located", lambda: "program")
    monkeypatch.setattr(spoken_digits, "say", say)
    first = SpokenDigits(tmp_path, count=20, **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    second = SpokenDigits(tmp_path, count=20, **OPTIONS)
    assert first.identity() == second.identity() and torch.equal(first.images, second.images)
    assert second.labels.tolist() == [*range(10)] * 2 and second.classes[7] == "seven"
    with pytest.raises(ValueError, match="count=9: a whole number of sounds from 10"):
        SpokenDigits(tmp_path, count=9)


def test_digits_are_said_the_same_each_time():
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    utterance = spoken_digits.utterances(8, seed=0)[7]
    (y, rate), (again, _) = (spoken_digits.say(spoken_digits.located(), utterance) for _ in range(2))
    assert torch.equal(y, again) and rate == 22050 and 0.2 < len(y) / rate < 1
    clip = spoken_digits.placed(utterance, (y, rate), Mel(8000, 1024, 256, 32, 32))
    assert clip.shape == (8191,) and clip.abs().max() > 1000


# ------------------------------------------------------------------------------------------------ what reads, and pages


class ByPitch:
    """A classifier's features that reads which half of the bands is the louder one."""

    name, size = "pitch", 2

    def __call__(self, x):
        return torch.stack([x[:, 0, :8].sum((1, 2)), x[:, 0, 8:].sum((1, 2))], dim=1).cpu()

    def probabilities(self, features):
        return features.softmax(1)


@pytest.fixture(scope="module")
def pitches():
    """Low and high sines in turn, and what reads which they are."""
    y = torch.stack(
        [sine(400 + 10 * k, SMALL.slice_size) if k % 2 == 0 else sine(2600 + 10 * k, 1023) for k in range(20)]
    )
    data = Clips("pitches", "all", to_int16(y), SMALL, torch.arange(20) % 2, ("low", "high"), validation=0.4)
    return data, Real(data, ByPitch())


def test_samples_are_read_after_they_were_sounds(pitches):
    data, real = pitches
    ceiling, asked, x = held_out(data, real), torch.tensor([0, 1] * 10), data.batch(torch.arange(20)).x
    assert ceiling.right(ceiling.seen, real).all() and ceiling.right(ceiling.heard, real).all()
    drawn = Judged.of(x, asked, SMALL, real)
    assert as_heard(drawn, ceiling, real).value == 1.0
    wrong = as_heard(drawn._replace(y=torch.cat([1 - asked[:5], asked[5:]])), ceiling, real)
    assert wrong.value == 0.75 and wrong.more["relative"] == 0.75 and wrong.low < 0.75 < wrong.high
    heard, convergence = through_sound(x, SMALL)
    assert heard.shape == x.shape and not torch.equal(heard, x) and (heard - x).abs().mean() < 0.3
    assert torch.equal(drawn.seen, real.features(x)) and torch.equal(drawn.heard, real.features(heard))
    S = SMALL.magnitudes(data.images[:1])
    of_sound = SMALL.transform(SMALL.griffin_lim(S, SMALL.n_iter)).abs()
    assert convergence[0].item() == pytest.approx(spectral_convergence(S, of_sound).item(), rel=1e-4)
    assert wrong.more["convergence"] == convergence.mean().item() != wrong.more["real_convergence"]
    with pytest.raises(ValueError, match="no classes were requested"):
        as_heard(drawn._replace(y=None), ceiling, real)
    silence = to_float(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    assert through_sound(silence, SMALL)[0].isfinite().all()


def test_sounds_are_as_far_as_their_features_before_and_after_the_way(pitches):
    """The Frechet distance of features that are moved by d is |d|^2, and 0 of the same; held-out ones are the floor."""
    data, real = pitches
    floor = held_out(data, real)
    same = floor._replace(x=data.batch(data.train).x, seen=real.train, heard=real.train)
    assert distance(same, floor, real).value == pytest.approx(0, abs=1e-6 * real.train.var().item())
    moved = distance(same._replace(heard=real.train + torch.tensor([3.0, -4.0])), floor, real)
    assert moved.value == pytest.approx(25, rel=1e-3) and moved.low < 25 < moved.high
    unheard = distance(same, floor._replace(heard=real.held_out), real)
    assert unheard.more["floor"] == pytest.approx(unheard.real_vs_real, rel=1e-6) != moved.more["floor"]
    assert "held-out sounds" in moved.words and "images" not in moved.words
    fresh, copied = memorised(floor, real), memorised(same, real)
    assert fresh.value == pytest.approx(1) and fresh.more["pixel_ratio"] == pytest.approx(1)
    assert copied.value == copied.more["pixel_ratio"] == copied.more["smallest"] == 0
    assert copied.more["share_closer"] == copied.more["pixel_share_closer"] == 1
    heard_alike = memorised(floor._replace(heard=real.train[: len(floor.heard)]), real)
    assert heard_alike.value == fresh.value  # sounds are not looked at


def test_a_page_of_sounds_plays_one_at_a_time_and_asks_for_nothing(tmp_path):
    pictures, _ = SMALL.encode(chirps(3))
    sounds = [
        Heard(f"<{i}> & co", p, wav_of(y, 8000)) for i, (p, y) in enumerate(zip(pictures, chirps(3), strict=True))
    ]
    text = page("A <title>", "words & more", [("Samples", sounds)], SMALL.seconds, 4000)
    script = f"""
const said = {{errors: []}};
addEventListener("error", (event) => said.errors.push(event.message));
addEventListener("load", async () => {{
  const players = [...document.querySelectorAll("audio")];
  const ready = (player) => player.readyState >= 1 ? null : new Promise((done) => {{
    player.onloadedmetadata = done; player.onerror = () => {{ said.errors.push("no sound"); done(); }};
  }});
  for (const player of players) await ready(player);
  said.seconds = players.map((player) => player.duration);
  said.loaded = [...document.images].map((image) => image.naturalWidth);
  said.title = document.querySelector("h1").textContent;
  said.names = [...document.querySelectorAll("figcaption")].map((caption) => caption.textContent);
  let paused = 0;
  players[1].pause = () => {{ paused += 1; }};
  players[0].dispatchEvent(new Event("play"));
  said.paused = paused;
  said.playing = [...document.querySelectorAll("figure")].map((figure) => figure.classList.contains("playing"));
  {SAY}
}});
"""
    said = said_in_a_browser(text, script, tmp_path)
    assert said["seconds"] == pytest.approx([1023 / 8000] * 3, abs=1e-3) and said["loaded"] == [16] * 3
    assert said["title"] == "A <title>" and said["names"][0] == "<0> & co"
    assert said["paused"] == 1 and said["playing"] == [True, False, False]


def test_a_page_has_room_for_so_many_sounds_and_says_how_many_it_left_out(monkeypatch):
    monkeypatch.setattr("ddpm.figures.listen_page.MOST_BYTES", 5000)
    pictures, _ = SMALL.encode(chirps(3))
    sounds = [Heard("x", p, wav_of(y, 8000)) for p, y in zip(pictures, chirps(3), strict=True)]  # of 2,090 bytes
    text = page("t", "w", [("Samples", sounds)], 1, 4000)
    assert text.count("<audio") == 2 and "(2 of 3)" in text and FULL == 32768
