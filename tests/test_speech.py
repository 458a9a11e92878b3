# SPDX-License-Identifier: MIT
"""Speech: log-mel by its formula, each augmentation on a known sound, recordings, lists, cache."""

import itertools
import json
import math
import os
import shutil
import struct
import tarfile
import wave

import numpy as np
import pytest
import torch
import torchaudio

import byol_imix
import common
import moco_imix
import simclr_imix

CPU = torch.device("cpu")


def tone(hertz, seconds=1.0, rate=16000, phase=0.0):
    time = np.arange(round(seconds * rate)) / rate
    return np.sin(2 * np.pi * hertz * time + phase)


def float32(*clips):
    return torch.tensor(np.stack(clips), dtype=torch.float32)


def write_wav(path, samples, rate=16000, width=2, extensible=False):
    """samples: (n,) or (n, channels) in [-1, 1]; width: bytes a sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.asarray(samples).reshape(len(samples), -1)
    scaled = (samples * (2 ** (8 * width - 1) - 1)).round().astype(np.int64)
    if width == 1:  # 8 bit is unsigned
        scaled += 128
    raw = scaled.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    if extensible:  # a "fmt " chunk of 40 bytes, as many programs write beyond 16 bit, two channels
        plain = path.read_bytes()
        fmt = b"\xfe\xff" + plain[22:36]
        fmt += struct.pack("<HHI", 22, 8 * width, 3)
        fmt += b"\x01\x00" + bytes.fromhex("000000001000800000aa00389b71")  # PCM
        riff = b"RIFF" + struct.pack("<I", 60 + len(raw)) + b"WAVE"
        path.write_bytes(riff + b"fmt " + struct.pack("<I", 40) + fmt + plain[36:])


def two_words(folder):
    """A folder of ten recordings of two words, which are split into 8 and 2."""
    for word, hertz in (("ant", 300), ("bee", 900)):
        for i in range(5):
            write_wav(folder / word / f"{i}.wav", tone(hertz + 20 * i))
    return folder


def speech_commands(root, words, lists=True, noise=True):
    """Speech Commands in small, in torchaudio's layout: a word is a tone of its own.

    Of each word's 12 clips, one is on the list of validation and three are on that of testing.
    """
    folder = root / "SpeechCommands" / "speech_commands_v0.01"
    rng = np.random.default_rng(0)
    names = [f"{i:02}a_nohash_{i % 2}.wav" for i in range(12)]
    for i, word in enumerate(words):
        for name in names:
            clip = tone(300 * 1.7**i, phase=rng.uniform(0, 6)) * rng.uniform(0.2, 0.9)
            write_wav(folder / word / name, clip)
    if lists:
        validation = [f"{word}/{names[3]}" for word in words]
        testing = [f"{word}/{names[i]}" for word in words for i in (0, 7, 9)]
        (folder / "validation_list.txt").write_text("\n".join(validation) + "\n")
        (folder / "testing_list.txt").write_text("\n".join(testing) + "\n")
    if noise:
        write_wav(folder / "_background_noise_" / "hiss.wav", rng.uniform(-0.3, 0.3, 40_000))
        (folder / "_background_noise_" / "README.md").write_text("recorded by nobody")
    return folder


def load_folder(folder, **options):
    return common.load_speech(str(folder), None, CPU, **options)


def load_commands(root, **options):
    return common.load_speech("speech_commands", root, CPU, **options)


def refused(load, *args, **options):
    """The message, one line, of the DataError that load(*args, **options) ends with."""
    with pytest.raises(common.DataError) as error:
        load(*args, **options)
    message = str(error.value)
    assert message.count("\n") == 0
    return message


def assert_names(message, path, *parts):
    """The message names the path, and beside it each of parts."""
    assert str(path) in message
    rest = message.replace(str(path), "")
    for part in parts:
        assert str(part) in rest, message


# ----------------------------------------------------------------------- log-mel
def mel_of(hertz):
    """Slaney's: linear to 1,000 Hz, there 15 mel, then 27 mel for a factor of 6.4."""
    if hertz < 1000:
        return 3 * hertz / 200
    return 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def hertz_of(mel):
    if mel < 15:
        return 200 * mel / 3
    return 1000 * 6.4 ** ((mel - 15) / 27)


def naive_log_mel(x):
    """librosa's log-mel from its definition, in float64: x (16000,) -> (32, 32).

    power_to_db(melspectrogram(y=x, sr=16000, n_fft=2048, hop_length=512, n_mels=32,
    pad_mode="reflect"), ref=np.max)
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    padded = np.concatenate([x[1024:0:-1], x, x[-2:-1026:-1]])  # reflected at both ends
    power = np.zeros((1025, 32))
    for t in range(32):
        frame = padded[512 * t : 512 * t + 2048]
        power[:, t] = np.abs(np.fft.rfft(window * frame)) ** 2

    edges = [hertz_of(mel_of(8000) * k / 33) for k in range(34)]
    filters = np.zeros((32, 1025))
    for band in range(32):
        low, middle, high = edges[band : band + 3]
        for k in range(1025):
            f = 16000 * k / 2048
            triangle = min((f - low) / (middle - low), (high - f) / (high - middle))
            filters[band, k] = max(0, triangle) * 2 / (high - low)
    level = 10 * np.log10(np.maximum(filters @ power, 1e-10))
    return np.maximum(level - level.max(), -80)


def log_mel(x):
    return common.log_mel(common.squared_magnitude(common.stft(x)))


def test_log_mel_is_librosas_definition():
    rng = np.random.default_rng(0)
    sweep = np.sin(2 * np.pi * np.cumsum(np.linspace(100, 7000, 16000)) / 16000)
    late = np.concatenate([np.zeros(8000), tone(1000, 0.5)])
    noise = rng.uniform(-1, 1, 16000)
    clips = [tone(440), 0.01 * tone(3000), sweep, late, noise, 1e-4 * noise]
    ours = log_mel(float32(*clips))
    assert ours.shape == (6, 1, 32, 32) and ours.dtype == torch.float32
    for clip, level in zip(clips, ours[:, 0].double().numpy()):
        expected = naive_log_mel(clip)
        error = np.abs(level - expected)  # dB
        assert error[expected > -60].max() < 0.01
        assert error.max() < 0.5  # 80 dB below, where float32 ends


@pytest.mark.parametrize("hertz", [200, 440, 1000, 3000, 7000])
def test_a_tone_is_loudest_in_its_band(hertz):
    level = log_mel(float32(tone(hertz)))[0, 0]
    band = mel_of(hertz) / mel_of(8000) * 33 - 1
    assert abs(level.mean(1).argmax() - band) <= 0.6


def test_zeros_are_flat():
    assert log_mel(torch.zeros(2, 16000)).abs().max() == 0


# ----------------------------------------------------------------------- augmentations
def pitch(x):
    """The strongest frequency of each clip, in periods over its length."""
    return torch.fft.rfft(x).abs().argmax(1)


def test_speed_changes_pitch_and_length():
    x = float32(tone(500)).expand(4, 16000)
    speed = [2.0, 1.0, 0.8, 1.25]
    y = common.change_speed(x, torch.tensor(speed))
    assert torch.equal(y[1], x[1])
    assert pitch(y[:1, :8000]).item() == 1000 / 2  # over half a second
    assert pitch(y[2:3]).item() == 400
    assert pitch(y[3:, :12800]).item() == 625 * 0.8
    assert y[0, 8000:].abs().max() == 0 and y[3, 12801:].abs().max() == 0  # past the end
    samples = np.append(tone(500), 0)
    for i in range(4):
        at = np.arange(16000) * speed[i]
        expected = np.interp(at, np.arange(16001), samples, right=0)
        assert np.abs(y[i].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("rate", [0.8, 0.93, 1.0, 1.2])
def test_stretch_has_the_magnitudes_of_torchaudios_phase_vocoder(rate):
    torch.manual_seed(0)
    s = common.stft(torch.randn(3, 16000))
    advance = torch.linspace(0, math.pi * 512, 1025)[:, None]
    expected = torchaudio.functional.phase_vocoder(s.mT, rate, advance).abs().mT
    assert expected.shape == (3, math.ceil(32 / rate), 1025)
    rates = torch.tensor([rate, 1.1, rate])
    ours = common.stretch_and_shift(s.abs(), rates, torch.zeros(3))
    assert ours.shape == (3, 32, 1025)
    frames = min(32, math.ceil(32 / rate))
    for i in (0, 2):
        torch.testing.assert_close(ours[i, :frames], expected[i, :frames], atol=5e-4, rtol=1e-4)
        assert not ours[i, frames:].any()


def test_stretch_keeps_the_pitch_and_moves_the_end():
    x = torch.zeros(2, 16000)
    x[:, :8192] = float32(tone(1000, 8192 / 16000))  # 16 frames of a tone, then silence
    rate = torch.tensor([0.8, 1.2])
    power = common.stretch_and_shift(common.stft(x).abs(), rate, torch.zeros(2)).square()
    assert (power.sum(1).argmax(1) == 128).all()  # bin 128 is 1,000 Hz
    level = power.sum(2)  # of each frame
    for i in range(2):
        loud = level[i] > level[i].max() / 4
        end = loud.nonzero().max().item() + 1
        assert abs(end - 16 / rate[i]) <= 1


def test_shift_moves_a_click_by_frames():
    x = torch.zeros(3, 16000)
    x[:, 16 * 512] = 1  # in the middle of frame 16
    shift = torch.tensor([0.0, 5.0, -8.0])
    moved = common.stretch_and_shift(magnitude(x), torch.ones(3), shift)
    assert moved.sum(2).argmax(1).tolist() == [16, 11, 24]


def test_a_shortened_clip_is_cut_before_it_is_shifted():
    """By hand: at a rate of 1.2 a clip has ceil(32 / 1.2) = 27 frames, the last one at 31.2.

    Five frames later it would reach to frame 32, but ends at 27 all the same.
    """
    frame = torch.arange(1.0, 33).expand(3, 32)[:, :, None]  # frame t holds t + 1
    moved = common.stretch_and_shift(frame, torch.full((3,), 1.2), torch.tensor([0.0, -5.0, 5.0]))
    stretched = torch.tensor([1 + 1.2 * t for t in range(26)] + [0.8 * 32])  # 26: 31.2, 0.8 inside
    silence = torch.zeros(5)
    torch.testing.assert_close(moved[0, :, 0], torch.cat([stretched, silence]))
    torch.testing.assert_close(moved[1, :, 0], torch.cat([silence, stretched[:22], silence]))
    torch.testing.assert_close(moved[2, :, 0], torch.cat([stretched[5:], silence, silence]))


def test_shift_brings_in_silence():
    flat = torch.ones(4, 32, 1025)
    rate, shift = torch.tensor([1.0, 0.8, 1.0, 0.9]), torch.tensor([-3.0, 8.0, 8.0, -1.0])
    moved = common.stretch_and_shift(flat, rate, shift)
    assert not moved[0, :3].any() and (moved[0, 3:] == 1).all()  # before the clip is nothing
    assert (moved[1] > 0.79).all()  # slowed down to 40 frames, of which the last 32 are taken
    assert (moved[2, :24] == 1).all() and not moved[2, 24:].any()
    assert not moved[3, 0].any() and (moved[3, 1:] == 1).all()  # -0.9 is before the clip, too
    moved = common.stretch_and_shift(magnitude(float32(tone(440))), torch.ones(1),
                                     torch.tensor([8.0]))
    level = common.log_mel(moved.square())
    assert (level[0, 0, :, 24:] == -80).all()  # silence, not noise


PARTS = ["amplitude", "speed", "stretch", "shift"]


def fix(monkeypatch, **shares):
    """Fix what a view draws: these parts alone, each at this share of its range.

    Noise and then the clip draw PARTS each; then the clip is given its share of noise. Between
    them the phase is 0.
    """
    order = [f"noise_{part}" for part in PARTS] + ["noise"] + PARTS
    drawn = iter([])

    def draw(n, low, high, otherwise, device):
        nonlocal drawn
        part = next(drawn, None)
        if part is None:
            drawn = iter(order)
            part = next(drawn)
        value = low + shares[part] * (high - low) if part in shares else otherwise
        return torch.full((n,), value)

    monkeypatch.setattr(common, "draw", draw)
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)


@pytest.fixture
def powers(monkeypatch):
    """The powers that log_mel is called with, in a list."""
    seen = []
    inner = common.log_mel

    def keep(power):
        seen.append(power)
        return inner(power)

    monkeypatch.setattr(common, "log_mel", keep)
    return seen


def magnitude(x):
    return common.stft(x).abs()


def clip_and_noise():
    torch.manual_seed(0)
    return float32(tone(500), tone(1500)) / 2, torch.randn(1, 16000) / 9


def test_each_part_of_a_view_alone(monkeypatch, powers):
    x, noise = clip_and_noise()
    m, zero, one = magnitude(x), torch.zeros(2), torch.ones(2)
    cases = [  # the part, its share of its range, the magnitude that it makes
        ("amplitude", 0.0, 0.7 * m),
        ("amplitude", 1.0, 1.1 * m),
        ("speed", 0.0, magnitude(common.change_speed(x, 1.25 * one))),
        ("speed", 1.0, magnitude(common.change_speed(x, one / 1.2))),
        ("stretch", 0.0, common.stretch_and_shift(m, 0.8 * one, zero)),
        ("stretch", 1.0, common.stretch_and_shift(m, 1.2 * one, zero)),
        ("shift", 0.0, common.stretch_and_shift(m, one, -8 * one)),
        ("shift", 0.999, common.stretch_and_shift(m, one, 8 * one)),
        ("noise", 0.0, m),
        ("noise", 1.0, 0.55 * m + 0.45 * magnitude(noise)),
        ("noise_speed", 1.0, m)]  # of noise of which no share is taken
    for part, share, expected in cases:
        fix(monkeypatch, **{part: share})
        view = common.speech_view(x, noise)
        assert view.shape == (2, 1, 32, 32)
        torch.testing.assert_close(powers.pop().sqrt(), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(view, log_mel(x), atol=0.05, rtol=0)  # with none of them


def test_noise_goes_through_the_same_parts(monkeypatch, powers):
    """Seen on silence, to which 0.45 of it is added: amplitude, speed, stretch and shift."""
    _, noise = clip_and_noise()
    one = torch.ones(1)
    cases = [
        ({"noise_amplitude": 0.5}, magnitude(0.9 * noise)),
        ({"noise_speed": 1.0}, magnitude(common.change_speed(noise, one / 1.2))),
        ({"noise_stretch": 1.0}, common.stretch_and_shift(magnitude(noise), 1.2 * one, 0 * one)),
        ({"noise_shift": 0.0}, common.stretch_and_shift(magnitude(noise), one, -8 * one)),
        ({"amplitude": 0.0, "speed": 1.0, "stretch": 0.0, "shift": 0.0}, magnitude(noise)),
        ({"noise_stretch": 1.0, "noise_shift": 0.0},
         common.stretch_and_shift(magnitude(noise), 1.2 * one, -8 * one))]
    for shares, expected in cases:
        fix(monkeypatch, noise=1.0, **shares)
        common.speech_view(torch.zeros(1, 16000), noise)
        torch.testing.assert_close(powers.pop().sqrt(), 0.45 * expected, atol=2e-3, rtol=1e-3)
    assert not expected[0, :8].any() and not expected[0, 27:].any()  # 8 frames late, cut after 27


@pytest.mark.parametrize("cycles, share", [(0, 0.55 + 0.45), (0.25, math.hypot(0.55, 0.45)),
                                           (0.5, 0.55 - 0.45)])
def test_the_phase_between_clip_and_noise(monkeypatch, powers, cycles, share):
    """In step, magnitudes add up; a quarter apart, powers do; opposite, they are subtracted."""
    x, _ = clip_and_noise()
    fix(monkeypatch, noise=1.0)
    monkeypatch.setattr(torch, "rand_like", lambda m: torch.full_like(m, cycles))
    common.speech_view(x[:1], x[:1])
    torch.testing.assert_close(powers[0].sqrt(), share * magnitude(x[:1]), atol=2e-2, rtol=1e-3)


def test_noise_has_the_share_that_it_is_given(monkeypatch, powers):
    """Phases are as likely as one another, so powers add up: (1 - share)^2 and share^2 of each."""
    torch.manual_seed(0)
    clips, noise = torch.randn(200, 16000), 2 * torch.randn(200, 16000)
    with monkeypatch.context() as patch:
        fix(patch, noise=1.0)
        patch.setattr(torch, "rand_like", lambda m: m.clone().uniform_())
        common.speech_view(clips, noise)
    expected = 0.55**2 * magnitude(clips).square().mean()
    expected += 0.45**2 * magnitude(noise).square().mean()
    torch.testing.assert_close(powers[0].mean(), expected, rtol=0.01, atol=0)


def test_each_is_drawn_for_half_of_the_clips(monkeypatch):
    drawn, inner = [], common.draw

    def draw(n, low, high, otherwise, device):
        values = inner(n, low, high, otherwise, device)
        drawn.append((values, low, high, otherwise))
        return values

    monkeypatch.setattr(common, "draw", draw)
    torch.manual_seed(0)
    common.speech_view(torch.randn(300, 16000), torch.randn(3, 16000))
    ranges = [(0.7, 1.1, 1), (-0.2, 0.2, 0), (-0.2, 0.2, 0), (-8, 9, 0)]  # of PARTS
    assert [row[1:] for row in drawn] == [*ranges, (0, 0.45, 0), *ranges]
    active = [values != otherwise for values, _, _, otherwise in drawn]
    for (values, low, high, _), chosen in zip(drawn, active):
        assert 0.4 < chosen.float().mean() < 0.6  # 3.5 standard deviations
        edge = 0.05 * (high - low)
        assert low <= values[chosen].min() < low + edge
        assert high - edge < values[chosen].max() <= high
    for a, b in itertools.pairwise(active):
        assert 0.1 < (a & b).float().mean() < 0.4  # independent


def test_views_work_without_data():
    """On the meta device nothing can be copied to the host: a view that waits for it fails."""
    x = torch.empty(4, 16000, device="meta", dtype=torch.int16) / 32768
    noise = torch.empty(3, 16000, device="meta")
    assert common.speech_view(x, noise).shape == (4, 1, 32, 32)
    assert log_mel(x).shape == (4, 1, 32, 32)


# ----------------------------------------------------------------------- recordings
def test_16_bit_mono_is_read_exactly(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 1000).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", None))
        file.writeframes(samples.tobytes())
    read = common.read_wav(tmp_path / "a.wav")
    assert read.dtype == np.int16 and np.array_equal(read, samples)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 11127])
def test_recordings_of_any_kind(tmp_path, width, extensible, rate):
    left, right = 0.8 * tone(440, 1.5, rate), 0.2 * tone(440, 1.5, rate)
    write_wav(tmp_path / "a.wav", np.stack([left, right], axis=1), rate, width, extensible)
    read = common.read_wav(tmp_path / "a.wav") / 32768
    assert abs(len(read) - 24000) <= 20
    true_rate = 16000
    if rate == 11127:  # by a ratio of small numbers near it
        true_rate = rate / float(common.Fraction(rate, 16000).limit_denominator(1000))
        assert true_rate != 16000 and abs(true_rate / 16000 - 1) < 1e-3
    expected = 0.5 * tone(440, len(read) / true_rate, true_rate)  # the mean of left and right
    error = np.abs(read - expected[: len(read)])[200:-200]  # without the filter's ends
    assert error.max() < (0.01 if width == 1 else 0.003)


def damage(raw, kind):
    if kind == "empty":
        return b""
    if kind == "text":
        return b"hello, I am no sound\n" * 9
    if kind == "cut in the header":
        return raw[:30]
    if kind == "header alone":
        return raw[:44]
    if kind == "no samples":
        return raw[:40] + bytes(4)
    if kind == "cut short":
        return raw[:20_000]
    if kind == "float":
        return raw[:20] + b"\x03\x00" + raw[22:]
    if kind == "16 million Hz":
        return raw[:24] + struct.pack("<I", 15_999_983) + raw[28:]
    assert kind == "64 bit"
    return raw[:32] + struct.pack("<HH", 8, 64) + raw[36:]


@pytest.mark.parametrize("kind, parts", [
    ("empty", []), ("text", []), ("cut in the header", []), ("header alone", []),
    ("no samples", []), ("cut short", ["19,956", "32,000"]), ("float", []),
    ("16 million Hz", ["15,999,983"]), ("64 bit", ["64 bit"])])
def test_unreadable_files_are_named(tmp_path, kind, parts):
    path = two_words(tmp_path) / "ant" / "1.wav"
    path.write_bytes(damage(path.read_bytes(), kind))
    message = refused(load_folder, tmp_path)
    assert_names(message, path, *parts)
    assert not list(tmp_path.glob("imix*"))


def test_dangling_links_are_named(tmp_path):
    path = two_words(tmp_path) / "ant" / "9.wav"
    path.symlink_to(tmp_path / "nowhere.wav")
    assert_names(refused(load_folder, tmp_path), path)


# ----------------------------------------------------------------------- lists and classes
def test_speech_commands_by_torchaudios_lists(tmp_path, capsys):
    words = ["bed", "cat", "dog"]
    folder = speech_commands(tmp_path, words)
    data = load_commands(tmp_path)
    assert_names(capsys.readouterr().out, folder, "'bed' 11", "'cat' 11", "'dog' 11")
    assert data.num_classes == 3
    assert len(data.x_train) == 24 and len(data.x_test) == 9
    assert data.x_train.dtype == data.x_test.dtype == torch.int16
    parts = (("training", data.x_train, data.y_train), ("testing", data.x_test, data.y_test))
    for subset, x, y in parts:
        theirs = torchaudio.datasets.SPEECHCOMMANDS(tmp_path, folder.name, subset=subset)
        assert len(x) == len(y) == len(theirs)
        for i in range(len(x)):
            file, _, word, _, _ = theirs.get_metadata(i)
            assert words[y[i]] == word
            assert np.array_equal(x[i], common.read_wav(tmp_path / "SpeechCommands" / file))


def test_views_of_speech_are_log_mel_spectrograms_with_the_folders_noise(tmp_path):
    folder = speech_commands(tmp_path, ["bed", "cat"])
    data = load_commands(tmp_path)
    x = data.x_train / 32768
    torch.testing.assert_close(data.plain(data.x_train), log_mel(x))
    assert data.eval_view is None
    noise = np.zeros(48_000)  # three clips, the last one filled up
    noise[:40_000] = common.read_wav(folder / "_background_noise_" / "hiss.wav") / 32768
    noise = float32(*noise.reshape(3, 16000))
    torch.manual_seed(0)
    view = data.view(data.x_train)
    torch.manual_seed(0)
    torch.testing.assert_close(view, common.speech_view(x, noise))


def test_the_papers_twelve_classes(tmp_path, capsys):
    speech_commands(tmp_path, ["bed", "go", "yes"], noise=False)
    data = load_commands(tmp_path)
    note = capsys.readouterr().out
    assert "'go' 11" in note and "'unknown'" in note and "'silence'" in note
    assert data.num_classes == 12
    yes, go, unknown, silence = 0, 9, 10, 11
    train, test = (y.bincount(minlength=12) for y in (data.y_train, data.y_test))
    assert train[[yes, go, unknown, silence]].tolist() == [8, 8, 8, 2] and train.sum() == 26
    assert test[[yes, go, unknown]].tolist() == [3, 3, 3] and test.sum() == 9
    loudest = data.x_train.abs().amax(1)
    assert (loudest[data.y_train == silence] == 0).all()
    assert (loudest[data.y_train != silence] > 0).all()
    silent = data.x_train[data.y_train == silence]
    assert data.view(silent).abs().max() == 0  # it stays so where there is no noise


def ones_own(folder):
    """Recordings as people have them: of any rate, length and width, and other things by them."""
    rng = np.random.default_rng(0)
    for word, hertz in (("ant", 400), ("bee", 1200)):
        for i in range(10):
            kind = "WAV" if i % 2 else "wav"
            clip = rng.uniform(0.3, 0.9) * tone(hertz, 0.5 + i / 5, 22050)
            write_wav(folder / word / f"take {i}.{kind}", clip, 22050, 1 + i % 4)
    write_wav(folder / "_background_noise_" / "hum.wav", tone(50, 2))
    for name in ("_background_noise_/._hum.wav", "ant/._take 0.wav"):
        (folder / name).write_text("what some systems keep beside a file")
    write_wav(folder / ".trash" / "1.wav", tone(50))
    return folder


def test_ones_own_folder_is_split_by_word(tmp_path):
    data = load_folder(ones_own(tmp_path))
    assert data.num_classes == 2
    assert data.y_train.bincount().tolist() == [8, 8] and data.y_test.bincount().tolist() == [2, 2]
    clips, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert clips.shape == (20, 16000)
    for clip, label in zip(clips, y):
        assert pitch(clip[None, :8000].float()).item() in ((199, 200, 201), (599, 600, 601))[label]
    short = clips[(clips[:, 8000:] == 0).all(1)]  # half a second, filled up with zeros
    assert len(short) == 2
    assert (short[:, 7000:7990].abs() > 100).any(1).all()
    again = load_folder(tmp_path)
    assert torch.equal(data.x_train, again.x_train) and torch.equal(data.x_test, again.x_test)


def test_ones_own_folder_with_lists(tmp_path, capsys):
    folder = ones_own(tmp_path)
    testing = "\ufeffant/take 0.wav\r\n./bee/take 1.WAV \r\n\r\nbee/gone.wav\r\n"
    (folder / "testing_list.txt").write_text(testing)
    (folder / "validation_list.txt").write_text("bee/take 3.WAV\n")
    data = load_folder(folder)
    assert_names(capsys.readouterr().out, folder / "testing_list.txt", "1 of 3", "bee/gone.wav")
    assert data.y_train.bincount().tolist() == [9, 8] and data.y_test.tolist() == [0, 1]
    first = common.read_wav(folder / "ant" / "take 0.wav")  # half a second
    assert np.array_equal(data.x_test[0, : len(first)], first)


def test_train_size_of_speech(tmp_path):
    two_words(tmp_path)
    for size in (4, 8):
        data = load_folder(tmp_path, train_size=size)
        assert data.y_train.bincount().tolist() == [size // 2, size // 2]
        assert len(data.x_test) == 2
    for size in (1, 7, 9):
        message = refused(load_folder, tmp_path, train_size=size)
        assert_names(message, f"--train-size {size}", "8", "2 to 6")


def test_words_without_a_clip_to_train_on(tmp_path):
    folder = speech_commands(tmp_path, ["bed", "cat", "dog"])
    names = [f"dog/{path.name}" for path in (folder / "dog").iterdir()]
    with open(folder / "testing_list.txt", "a") as file:
        file.write("\n".join(names) + "\n")
    assert_names(refused(load_commands, tmp_path), folder, "dog")
    assert_names(refused(load_folder, folder), folder, "dog")


def test_listed_clips_that_are_not_there_are_noted(tmp_path, capsys):
    folder = speech_commands(tmp_path, ["bed", "cat"])
    path = folder / "testing_list.txt"
    gone = path.read_text().split()[:2]
    for name in gone:
        (folder / name).unlink()
    assert len(load_commands(tmp_path).x_test) == 4
    assert_names(capsys.readouterr().out, path, "2 of 6", gone[0])
    assert len(load_folder(folder).x_test) == 4
    assert_names(capsys.readouterr().out, path, "2 of 6", gone[0])


def test_recordings_without_words_or_of_one_have_no_classes(tmp_path):
    folder = speech_commands(tmp_path, ["yes"])
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (folder / "yes").glob("*.wav"):
        file.rename(flat / file.name)
    data = load_folder(flat)
    assert data.num_classes == 0 and len(data.x_train) == 12 and len(data.x_test) == 0
    assert (data.y_train == -1).all() and data.labelled == 0
    assert sorted(data.names) == sorted(file.name for file in flat.glob("*.wav"))
    write_wav(tmp_path / "one" / "yes" / "1.wav", tone(400))
    data = load_folder(tmp_path / "one")
    assert data.num_classes == 0 and len(data.x_train) == 1


def test_folders_without_recordings_are_refused(tmp_path):
    assert_names(refused(load_folder, tmp_path / "nowhere"), tmp_path / "nowhere")
    (tmp_path / "ant").mkdir()
    assert_names(refused(load_folder, tmp_path), tmp_path)


def test_speech_commands_without_lists(tmp_path):
    folder = speech_commands(tmp_path, ["bed", "cat"], lists=False)
    assert_names(refused(load_commands, tmp_path), folder, "_list.txt")
    assert len(load_folder(folder).x_test) == 5  # a fifth of 24, which needs none


# ----------------------------------------------------------------------- download
def test_speech_commands_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("<urlopen error\nno route>")

    monkeypatch.setattr(torchaudio.datasets.speechcommands, "download_url_to_file", offline)
    message = refused(load_commands, tmp_path)
    assert_names(message, tmp_path, "speech_commands_v0.01", "<urlopen error no route>")
    message = refused(load_commands, tmp_path, version="v0.02")
    assert_names(message, tmp_path, "speech_commands_v0.02")


def test_the_download_comes_whole_or_not_at_all(tmp_path, monkeypatch):
    made = speech_commands(tmp_path / "made", ["bed", "cat"])
    archive = tmp_path / "made.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made, arcname=".")

    def download(url, path, hash_prefix):
        assert "speech_commands_v0.01" in url and hash_prefix
        shutil.copy(archive, path)

    monkeypatch.setattr(torchaudio.datasets.speechcommands, "download_url_to_file", download)
    data_dir = tmp_path / "new" / "data"

    # Stopped, as by Ctrl-C, while it unpacks the tenth file.
    inner, unpacked = tarfile.TarFile.extract, []

    def extract(self, *args, **options):
        unpacked.append(args)
        if len(unpacked) == 10:
            raise KeyboardInterrupt
        inner(self, *args, **options)

    with monkeypatch.context() as context:
        context.setattr(tarfile.TarFile, "extract", extract)
        with pytest.raises(KeyboardInterrupt):
            load_commands(data_dir)
    assert [path.name for path in data_dir.rglob("*")] == ["SpeechCommands"]

    data = load_commands(data_dir)
    assert torch.equal(data.x_train, load_commands(tmp_path / "made").x_train)
    assert [path.name for path in data_dir.iterdir()] == ["SpeechCommands"]
    assert [path.name for path in (data_dir / "SpeechCommands").iterdir()] == [made.name]


# ----------------------------------------------------------------------- cache
def the_cache(folder):
    """The one file that a start has left in the folder."""
    path, = folder.glob("imix*")
    assert path.name.startswith("imix_clips-") and path.suffix == ".npy"
    return path


def put_back_time(path, before, later=0):
    """Give a file the time that it had, or one that is later by some nanoseconds."""
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))


def spoil(folder):
    """Overwrite each recording, so that reading it fails; its name, size and time stay."""
    for path in folder.glob("*/*.wav"):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        put_back_time(path, before)


def assert_same(data, other):
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(data, name), getattr(other, name)), name


def test_the_second_start_reads_the_cache(tmp_path):
    two_words(tmp_path)
    first = load_folder(tmp_path)
    clips = np.load(the_cache(tmp_path))
    assert clips.shape == (10, 16000) and clips.dtype == np.int16
    spoil(tmp_path)
    assert_same(load_folder(tmp_path), first)


def test_another_split_reads_the_same_cache(tmp_path):
    load_folder(two_words(tmp_path))
    cache = the_cache(tmp_path)
    spoil(tmp_path)
    (tmp_path / "testing_list.txt").write_text("bee/2.wav\nant/3.wav\n")
    data = load_folder(tmp_path)
    assert data.y_test.tolist() == [0, 1]
    assert np.array_equal(data.x_test, np.load(cache)[[3, 5 + 2]])
    assert the_cache(tmp_path) == cache


def another_time(path):
    before = path.stat()
    write_wav(path, tone(123))
    assert path.stat().st_size == before.st_size
    put_back_time(path, before, later=10**6)


def another_size(path):
    before = path.stat()
    write_wav(path, tone(123, 0.9))
    put_back_time(path, before)


def another_name(path):
    path.rename(path.with_name("9.wav"))


def one_more(path):
    write_wav(path.with_name("9.wav"), tone(123))


def one_less(path):
    path.unlink()


@pytest.mark.parametrize("change", [
    another_time, another_size, another_name, one_more, one_less])
def test_where_recordings_have_changed_the_cache_is_made_anew(tmp_path, change):
    for path in two_words(tmp_path).glob("*/*.wav"):
        os.utime(path, (10**9, 10**9))
    load_folder(tmp_path)
    old = the_cache(tmp_path)
    change(tmp_path / "ant" / "2.wav")
    data = load_folder(tmp_path)
    new = the_cache(tmp_path)  # the old one is removed
    assert new != old
    new.unlink()
    assert_same(data, load_folder(tmp_path))  # by what is there now


@pytest.mark.parametrize("length", [0, 3, 50, 5000])
def test_a_cache_cut_short_is_made_anew(tmp_path, length):
    first = load_folder(two_words(tmp_path))
    cache = the_cache(tmp_path)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:length])
    assert_same(load_folder(tmp_path), first)
    assert the_cache(tmp_path) == cache and cache.read_bytes() == whole


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    load_folder(two_words(tmp_path))
    old = the_cache(tmp_path)
    one_more(tmp_path / "ant" / "2.wav")

    def save(path, clips):
        path.write_bytes(b"the first bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    message = refused(load_folder, tmp_path)
    assert_names(message, tmp_path, "No space left on device")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"ant", "bee", old.name}  # and no part of the new one


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    two_words(tmp_path)
    monkeypatch.setattr(os, "mkdir", read_only)
    assert_names(refused(load_folder, tmp_path), tmp_path, "Read-only file system")


def test_two_starts_at_once(tmp_path, monkeypatch):
    """While one start writes the cache another one begins, and ends first."""
    two_words(tmp_path)
    inner, ended = np.save, []

    def save(file, clips):
        monkeypatch.setattr(np, "save", inner)
        ended.append(load_folder(tmp_path))
        inner(file, clips)

    monkeypatch.setattr(np, "save", save)
    data = load_folder(tmp_path)
    assert_same(data, ended[0])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"ant", "bee", the_cache(tmp_path).name}


def test_what_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    folder = speech_commands(tmp_path, ["bed", "cat"])
    # Pages, and bytes a page: 0.81 MB. The noise takes 0.19, each of 22 clips 0.03.
    monkeypatch.setattr(os, "sysconf", lambda name: 900)
    message = refused(load_commands, tmp_path)
    assert_names(message, folder, "--train-size")
    assert not list(folder.glob("imix*"))
    assert len(load_commands(tmp_path, train_size=6).x_train) == 6


# ----------------------------------------------------------------------- scripts
@pytest.mark.parametrize("alpha", ["1", "0"])
@pytest.mark.parametrize("script", [simclr_imix, moco_imix, byol_imix])
def test_the_scripts_run_on_speech_commands(tmp_path, script, alpha):
    """Tones almost an octave apart are told apart by almost any features."""
    speech_commands(tmp_path, ["bed", "cat", "dog"])
    out = tmp_path / "run"
    script.main([
        "--dataset", "speech_commands", "--data-dir", str(tmp_path), "--arch", "resnet18",
        "--batch-size", "12", "--epochs", "1", "--alpha", alpha, "--device", "cpu",
        "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert result["test_accuracy"] > 0.6
    encoder = script.resnet("resnet18", 1, 32)
    encoder.load_state_dict(torch.load(out / "encoder.pt", weights_only=True))


@pytest.mark.parametrize("script", [simclr_imix, moco_imix, byol_imix])
def test_no_augment_makes_both_views_the_plain_input(tmp_path, monkeypatch, script):
    folder = two_words(tmp_path / "words")
    calls = []

    def pretrain(*args):
        calls.append(args)
        return range(args[-4].epochs)

    monkeypatch.setattr(script, "pretrain", pretrain)
    script.main([
        "--dataset", str(folder), "--arch", "resnet18", "--batch-size", "8", "--no-augment",
        "--linear-epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    *_, loader, _, _, _, _ = calls[0]  # then args, out, evaluate, stop
    (x, x_tilde), = loader
    assert torch.equal(x, x_tilde)
    plain = log_mel(load_folder(folder).x_train / 32768)
    distance, which = torch.cdist(x.flatten(1), plain.flatten(1)).min(dim=1)
    assert distance.max() < 1 and which.sort().values.tolist() == list(range(8))
