# SPDX-License-Identifier: MIT
"""Speech: log-mel against its formula, each augmentation on a sound whose outcome is known, recordings, lists, cache."""

import json
import math
import os
import shutil
import struct
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio

import byol_imix
import common
import moco_imix
import npair_tabular
import simclr_imix

CPU = torch.device("cpu")
NAMES = ["0a_nohash_0.wav", "0b_nohash_0.wav", "0c_nohash_0.wav", "0c_nohash_1.wav"]


def tone(hertz, seconds=1.0, rate=16000, phase=0.0):
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate + phase)


def write_wav(path, samples, rate=16000, width=2, extensible=False):
    """samples: (n,) or (n, channels) in [-1, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.asarray(samples).reshape(len(samples), -1)
    scaled = (samples * (2 ** (8 * width - 1) - 1)).round().astype(np.int64) + 128 * (width == 1)
    raw = scaled.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    if extensible:  # a "fmt " chunk of 40 bytes, as most programs write it for more than 16 bit or two channels
        data = path.read_bytes()
        fmt = b"\xfe\xff" + data[22:36] + struct.pack("<HHI", 22, 8 * width, 3) + b"\x01\x00" + \
            bytes.fromhex("000000001000800000aa00389b71")
        path.write_bytes(b"RIFF" + struct.pack("<I", 60 + len(raw)) + b"WAVEfmt " + struct.pack("<I", 40) + fmt + data[36:])


def speech_commands(root, words, lists=True, noise=True):
    """A small Speech Commands tree in torchaudio's layout: each word a tone of its own; one file a word in either list."""
    folder = root / "SpeechCommands" / "speech_commands_v0.01"
    rng = np.random.default_rng(0)
    for i, word in enumerate(words):
        for name in NAMES * 6:
            number = sum(1 for _ in (folder / word).glob("*.wav")) if (folder / word).exists() else 0
            write_wav(folder / word / f"{number:02}{name}", tone(300 * 1.7**i, phase=rng.uniform(0, 6)) * rng.uniform(0.2, 0.9))
    if lists:
        for kind, numbers in (("validation", [3]), ("testing", [0, 7, 9])):
            lines = [f"{word}/{path.name}" for word in words for k, path in enumerate(sorted((folder / word).iterdir()))
                     if k in numbers]
            (folder / f"{kind}_list.txt").write_text("\n".join(lines) + "\n")
    if noise:
        write_wav(folder / "_background_noise_" / "hiss.wav", rng.uniform(-0.3, 0.3, 40_000))
        (folder / "_background_noise_" / "README.md").write_text("recorded by nobody")
    return folder


# -------------------------------------------------------------------------------------------------------------- log-mel
def naive_log_mel(x):
    """librosa.power_to_db(librosa.feature.melspectrogram(y=x, sr=16000, n_fft=2048, hop_length=512, n_mels=32), ref=np.max)
    from its definition, in float64: x (16000,) -> (32, 32)."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    padded = np.concatenate([np.zeros(1024), x, np.zeros(1024)])
    power = np.stack([np.abs(np.fft.rfft(window * padded[512 * t: 512 * t + 2048])) ** 2 for t in range(32)], axis=1)

    def mel(hertz):  # Slaney: linear to 1,000 Hz, there 15 mel, then 27 mel for a factor of 6.4
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    def hertz(mel):
        return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    edges = [hertz(mel(8000) * k / 33) for k in range(34)]
    filters = np.zeros((32, 1025))
    for band, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:])):
        for k in range(1025):
            f = 16000 * k / 2048
            filters[band, k] = max(0, min((f - low) / (middle - low), (high - f) / (high - middle))) * 2 / (high - low)
    level = 10 * np.log10(np.maximum(filters @ power, 1e-10))
    return np.maximum(level - level.max(), -80)


def log_mel(x):
    return common.log_mel(common.squared_magnitude(common.stft(x)))


def test_log_mel_is_librosas_definition():
    rng = np.random.default_rng(0)
    sweep = np.sin(2 * np.pi * np.cumsum(np.linspace(100, 7000, 16000)) / 16000)
    clips = [tone(440), 0.01 * tone(3000), sweep, np.r_[np.zeros(8000), tone(1000, 0.5)], rng.uniform(-1, 1, 16000),
             1e-4 * rng.uniform(-1, 1, 16000)]
    ours = log_mel(torch.tensor(np.stack(clips), dtype=torch.float32))
    assert ours.shape == (6, 1, 32, 32) and ours.dtype == torch.float32
    for clip, level in zip(clips, ours[:, 0].double().numpy()):
        expected = naive_log_mel(clip)
        assert np.abs(level - expected)[expected > -60].max() < 0.01  # dB
        assert np.abs(level - expected).max() < 0.5  # 80 dB below, where float32 ends


def test_a_tone_is_loudest_in_its_band_and_zeros_are_flat():
    for hertz in (200, 440, 1000, 3000, 7000):
        level = log_mel(torch.tensor(tone(hertz), dtype=torch.float32)[None])[0, 0]
        mel = 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)
        top = 15 + 27 * math.log(8) / math.log(6.4)
        assert abs(level.mean(1).argmax() - (mel / top * 33 - 1)) <= 0.6, hertz
    assert log_mel(torch.zeros(2, 16000)).abs().max() == 0


# -------------------------------------------------------------------------------------------------------- augmentations
def pitch(x):
    """The strongest frequency of each clip, in Hz, to 1 Hz."""
    return torch.fft.rfft(x).abs().argmax(1)


def test_speed_changes_pitch_and_length():
    x = torch.tensor(np.stack([tone(500)] * 4), dtype=torch.float32)
    speed = torch.tensor([2.0, 1.0, 0.8, 1.25])
    y = common.change_speed(x, speed)
    assert torch.equal(y[1], x[1])
    assert pitch(y[:1, :8000]).item() * 2 == 1000 and pitch(y[2:3]).item() == 400 and pitch(y[3:, :12800]).item() * 1.25 == 625
    assert y[0, 8000:].abs().max() == 0 and y[3, 12801:].abs().max() == 0  # past the end is silence
    for i in (0, 2, 3):
        expected = np.interp(np.arange(16000) * float(speed[i]), np.arange(16001), np.r_[tone(500), 0], right=0)
        assert np.abs(y[i].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("rate", [0.8, 0.93, 1.0, 1.2])
def test_stretch_has_the_magnitudes_of_torchaudios_phase_vocoder(rate):
    torch.manual_seed(0)
    s = common.stft(torch.randn(3, 16000))
    advance = torch.linspace(0, math.pi * 512, 1025)[:, None]
    expected = torchaudio.functional.phase_vocoder(s.mT, rate, advance).abs().mT[[0, 2]]
    ours = common.stretch_and_shift(s.abs(), torch.tensor([rate, 1.1, rate]), torch.zeros(3))[[0, 2]]
    frames = min(32, math.ceil(32 / rate))
    assert ours.shape == (2, 32, 1025) and expected.shape[1] == math.ceil(32 / rate)
    torch.testing.assert_close(ours[:, :frames], expected[:, :frames], atol=5e-4, rtol=1e-4)
    assert not ours[:, frames:].any()


def test_stretch_keeps_the_pitch_and_moves_the_end():
    x = torch.zeros(2, 16000)
    x[:, :8192] = torch.tensor(tone(1000, 8192 / 16000))  # 16 frames of a tone, then silence
    power = common.stretch_and_shift(common.stft(x).abs(), torch.tensor([0.8, 1.2]), torch.zeros(2)).square()
    assert (power.sum(1).argmax(1) == 128).all()  # bin 128 is 1,000 Hz
    loud = (power.sum(2) > power.sum(2).amax(1, keepdim=True) / 4).int()
    last = 32 - loud.flip(1).argmax(1)  # the tone ends where 16 / rate says
    assert abs(last[0] - 16 / 0.8) <= 1 and abs(last[1] - 16 / 1.2) <= 1


def test_shift_moves_a_click_by_frames_and_brings_in_silence():
    x = torch.zeros(3, 16000)
    x[:, 16 * 512] = 1  # in the middle of frame 16
    magnitude = common.stretch_and_shift(common.stft(x).abs(), torch.ones(3), torch.tensor([0.0, 5.0, -8.0]))
    assert magnitude.sum(2).argmax(1).tolist() == [16, 11, 24]
    white = common.stretch_and_shift(torch.ones(3, 32, 1025), torch.tensor([1.0, 0.8, 1.0]), torch.tensor([-3.0, 8.0, 8.0]))
    assert not white[0, :3].any() and (white[0, 3:] == 1).all()  # before the clip: nothing, not its first frame
    assert (white[1] > 0.79).all()  # slowed down to 40 frames, of which the last 32 are taken
    assert (white[2, :24] == 1).all() and not white[2, 24:].any()
    half = common.stretch_and_shift(torch.ones(1, 32, 1025), torch.tensor([0.9]), torch.tensor([-1.0]))
    assert not half[0, 0].any() and (half[0, 1:] == 1).all()  # at -0.9: still before the clip
    level = common.log_mel(common.stretch_and_shift(common.stft(torch.tensor(tone(440))[None].float()).abs(), torch.ones(1),
                                                    torch.tensor([8.0])).square())
    assert (level[0, 0, :, 24:] == -80).all()  # silence, not noise


def fix(monkeypatch, chosen, share):
    """Make of each view's draws, in order amplitude, speed, stretch, shift, noise, only those chosen, at the range's share."""
    draws = iter(range(100))

    def rand(n, **_):
        return torch.full((n,), 0.0 if next(draws) % 5 in chosen else 1.0)

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_(low + share * (high - low)))


def test_each_augmentation_alone(monkeypatch):
    x = torch.tensor(np.stack([tone(500), tone(1500)]), dtype=torch.float32) / 2
    seen, inner = [], common.log_mel
    monkeypatch.setattr(common, "log_mel", lambda power: seen.append(power) or inner(power))
    torch.manual_seed(0)
    noise = common.stft(torch.randn(1, 16000) / 9)
    m, zero, one = common.stft(x).abs(), torch.zeros(2), torch.ones(2)
    for part, share, expected in [
            (0, 0.0, 0.7 * m), (0, 1.0, 1.1 * m),
            (1, 0.0, common.stft(common.change_speed(x, 1.25 * one)).abs()),
            (1, 1.0, common.stft(common.change_speed(x, one / 1.2)).abs()),
            (2, 0.0, common.stretch_and_shift(m, 0.8 * one, zero)), (2, 1.0, common.stretch_and_shift(m, 1.2 * one, zero)),
            (3, 0.0, common.stretch_and_shift(m, one, -8 * one)), (3, 0.999, common.stretch_and_shift(m, one, 8 * one)),
            (4, 0.0, m), (4, 1.0, (0.55 * m + 0.45 * noise).abs())]:
        fix(monkeypatch, [part], share)
        view = common.speech_view(x, noise)
        assert view.shape == (2, 1, 32, 32)
        torch.testing.assert_close(seen.pop().sqrt(), expected, atol=2e-3, rtol=1e-3)
    fix(monkeypatch, [], 0.3)
    torch.testing.assert_close(common.speech_view(x, noise), log_mel(x), atol=0.05, rtol=0)


def test_noise_has_the_share_that_it_is_given(monkeypatch):
    """With independent phases powers add up: (1 - share)^2 of the clip's, share^2 of the noise's."""
    seen = []
    monkeypatch.setattr(common, "log_mel", lambda power: seen.append(power) or power)
    fix(monkeypatch, [4], 1.0)
    torch.manual_seed(0)
    x, noise = torch.randn(200, 16000), 2 * torch.randn(200, 16000)
    common.speech_view(x, common.stft(noise))
    clip, other = (common.squared_magnitude(common.stft(a)).mean() for a in (x, noise))
    torch.testing.assert_close(seen[0].mean(), 0.55**2 * clip + 0.45**2 * other, rtol=0.01, atol=0)


def test_each_is_drawn_for_half_of_the_clips(monkeypatch):
    drawn, inner = [], torch.where
    monkeypatch.setattr(torch, "where", lambda c, a, b: drawn.append((c, a)) or inner(c, a, b))
    torch.manual_seed(0)
    common.speech_view(torch.randn(300, 16000), common.stft(torch.randn(3, 16000)))
    ranges = [(0.7, 1.1), (-0.2, 0.2), (-0.2, 0.2), (-8, 9), (0, 0.45)]
    drawn = [pair for pair in drawn if pair[0].shape == (300,)]
    assert len(drawn) == 5
    for (active, value), (low, high) in zip(drawn, ranges):
        assert 0.4 < active.float().mean() < 0.6  # 3.5 standard deviations
        assert low <= value.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < value.max() <= high
    for (a, _), (b, _) in zip(drawn, drawn[1:]):
        assert 0.1 < (a & b).float().mean() < 0.4  # independent


def test_views_work_without_data():
    """On the meta device nothing can be copied to the host, so a view that waits for the device fails."""
    x = torch.empty(4, 16000, device="meta", dtype=torch.int16)
    view = common.speech_view(x / 32768, torch.empty(3, 32, 1025, device="meta", dtype=torch.complex64))
    assert view.shape == log_mel(x / 32768).shape == (4, 1, 32, 32)


# ----------------------------------------------------------------------------------------------------------- recordings
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
    samples = np.stack([0.8 * tone(440, 1.5, rate), 0.2 * tone(440, 1.5, rate)], axis=1)  # their mean has amplitude 0.5
    write_wav(tmp_path / "a.wav", samples, rate, width, extensible)
    read = common.read_wav(tmp_path / "a.wav") / 32768
    assert abs(len(read) - 24000) <= 20
    inner = slice(200, len(read) - 200)  # the filter's ends
    true_rate = 16000 if rate != 11127 else rate / float(common.Fraction(rate, 16000).limit_denominator(1000))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(read)) / true_rate)
    assert abs(true_rate / 16000 - 1) < 1e-3
    assert np.abs(read - expected)[inner].max() < (0.01 if width == 1 else 0.003)


def damaged(folder, kind):
    path = folder / "ant" / "1.wav"
    raw = path.read_bytes()
    content = {"empty": b"", "text": b"hello, I am no sound\n" * 9, "cut short": raw[:20_000], "header alone": raw[:44],
               "cut in the header": raw[:30], "float": raw[:20] + b"\x03\x00" + raw[22:],
               "16 million Hz": raw[:24] + struct.pack("<I", 15_999_983) + raw[28:],
               "64 bit": raw[:32] + struct.pack("<HH", 8, 64) + raw[36:]}
    path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind, reason", [
    ("empty", "cut short"), ("text", "file does not start with RIFF id"), ("cut in the header", "cut short"),
    ("cut short", "19,956 bytes of samples instead of 32,000"), ("header alone", "no samples"),
    ("float", "unknown format: 3"), ("16 million Hz", "16 bit, 15,999,983 Hz"), ("64 bit", "64 bit, 16,000 Hz")])
def test_unreadable_files_are_named(tmp_path, kind, reason):
    for word in ("ant", "bee"):
        for i in range(5):
            write_wav(tmp_path / word / f"{i}.wav", tone(300 + i))
    path = damaged(tmp_path, kind)
    with pytest.raises(common.DataError) as error:
        common.load_speech(str(tmp_path), None, CPU)
    assert str(error.value) == (f"{path} can't be read as a WAV file of 8 to 32 bit PCM ({reason}): convert or remove it")
    assert not list(tmp_path.glob("imix*"))


def test_dangling_links_are_named(tmp_path):
    for word in ("ant", "bee"):
        for i in range(5):
            write_wav(tmp_path / word / f"{i}.wav", tone(300 + i))
    (tmp_path / "ant" / "9.wav").symlink_to(tmp_path / "nowhere.wav")
    with pytest.raises(common.DataError, match="9.wav can't be read"):
        common.load_speech(str(tmp_path), None, CPU)


# ------------------------------------------------------------------------------------------------- lists, classes, cache
def test_speech_commands_by_torchaudios_lists(tmp_path, capsys):
    words = ["bed", "cat", "dog"]
    folder = speech_commands(tmp_path, words)
    data = common.load_speech("speech_commands", tmp_path, CPU)
    assert capsys.readouterr().out == (f"{folder}: 3 words, none is one of the paper's ten, so each is a class; recordings "
                                       "of background noise: 1\n")
    parts = {name: torchaudio.datasets.SPEECHCOMMANDS(tmp_path, "speech_commands_v0.01", subset=name)
             for name in ("training", "testing")}
    for part, x, y in (("training", data.x_train, data.y_train), ("testing", data.x_test, data.y_test)):
        walked = [parts[part].get_metadata(i) for i in range(len(parts[part]))]
        assert len(x) == len(walked) == {"training": 60, "testing": 9}[part]
        assert x.dtype == torch.int16 and x.shape[1:] == (16000,)
        for i, (name, _, label, _, _) in enumerate(walked):
            assert words[y[i]] == label
            assert np.array_equal(x[i], common.read_wav(tmp_path / "SpeechCommands" / name))
    assert data.num_classes == 3 and data.eval_view is None
    x = data.x_train / 32768
    torch.testing.assert_close(data.plain(data.x_train), log_mel(x))
    noise = np.zeros(48000)
    noise[:40000] = common.read_wav(folder / "_background_noise_" / "hiss.wav") / 32768
    noise = common.stft(torch.tensor(noise.reshape(3, 16000), dtype=torch.float32))
    views = []
    for make in (lambda: data.view(data.x_train), lambda: common.speech_view(x, noise)):
        torch.manual_seed(0)
        views.append(make())
    torch.testing.assert_close(*views)


def test_the_papers_twelve_classes(tmp_path, capsys):
    speech_commands(tmp_path, ["bed", "go", "yes"], noise=False)
    data = common.load_speech("speech_commands", tmp_path, CPU)
    assert "3 words, the classes are the paper's ten, 'unknown' and 'silence'; recordings of background noise: 0" in capsys.readouterr().out
    assert data.num_classes == 12
    assert data.y_train.bincount(minlength=12).tolist() == [20, 0, 0, 0, 0, 0, 0, 0, 0, 20, 20, 6]
    assert data.y_test.bincount(minlength=12).tolist() == [3, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 0]  # no silence to test on
    assert data.x_train[data.y_train == 11].abs().max() == 0 and data.x_train[data.y_train != 11].abs().amax(1).min() > 0
    assert data.view(data.x_train[-2:]).abs().max() == 0  # silence stays silent where there is no noise


def test_ones_own_folder(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for word, hertz in (("ant", 400), ("bee", 1200)):
        for i in range(10):
            name = f"take {i}.{'WAV' if i % 2 else 'wav'}"
            write_wav(tmp_path / word / name, rng.uniform(0.3, 0.9) * tone(hertz, 0.5 + i / 5, 22050), 22050, 1 + i % 4)
    write_wav(tmp_path / "_background_noise_" / "hum.wav", tone(50, 2))
    (tmp_path / "_background_noise_" / "._hum.wav").write_text("what some systems keep beside a file")
    data = common.load_speech(str(tmp_path), None, CPU)
    assert len(data.x_train) == 16 and data.y_test.tolist().count(0) == 2 == data.y_test.tolist().count(1)
    short = data.x_train[(data.x_train[:, 8000:] == 0).all(1)]
    assert 1 <= len(short) <= 2 and (short[:, 7000:7990].abs() > 100).any()  # half a second, filled up with zeros
    (tmp_path / "testing_list.txt").write_text("\ufeffant/take 0.wav\r\n./bee/take 1.WAV \r\n\r\nbee/gone.wav\r\n")
    (tmp_path / "validation_list.txt").write_text("bee/take 3.WAV\n")
    (tmp_path / "ant" / "._take 0.wav").write_text("what some systems keep beside a file")
    (tmp_path / ".trash").mkdir()
    write_wav(tmp_path / ".trash" / "1.wav", tone(50))
    capsys.readouterr()
    data = common.load_speech(str(tmp_path), None, CPU)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'testing_list.txt'}: 1 of 3 are not there, as bee/gone.wav\n"
        f"{tmp_path}: 2 words, none is one of the paper's ten, so each is a class; recordings of background noise: 1\n")
    assert len(data.x_train) == 17 and data.y_test.tolist() == [0, 1]
    sizes = [len(common.load_speech(str(tmp_path), None, CPU, train_size=size).x_train) for size in (4, 17)]
    assert sizes == [4, 17]
    with pytest.raises(common.DataError, match="^--train-size 18 of the 17 training examples: give 2 to 15, "):
        common.load_speech(str(tmp_path), None, CPU, train_size=18)


def test_the_second_start_reads_the_cache(tmp_path, monkeypatch):
    folder = speech_commands(tmp_path, ["bed", "cat"], noise=False)
    first = common.load_speech("speech_commands", tmp_path, CPU)
    read, inner = [], common.read_wav
    monkeypatch.setattr(common, "read_wav", lambda path: read.append(path.name) or inner(path))

    def again():
        read.clear()
        return common.load_speech("speech_commands", tmp_path, CPU)

    second = again()
    assert not read and torch.equal(first.x_train, second.x_train) and torch.equal(first.x_test, second.x_test)
    changed = sorted((folder / "bed").iterdir())[5]
    write_wav(changed, tone(123))
    third = again()
    assert len(read) == 46 and not torch.equal(first.x_train, third.x_train)
    (folder / "imix_clips.npy").write_bytes((folder / "imix_clips.npy").read_bytes()[:5000])
    fourth = again()
    assert len(read) == 46 and torch.equal(third.x_train, fourth.x_train)
    changed.rename(changed.with_name("99a_nohash_0.wav"))
    fifth = again()
    assert len(read) == 46 and len(fifth.x_train) == len(first.x_train)
    np.save(folder / "imix_clips.npy", np.zeros(3))
    assert torch.equal(again().x_train, fifth.x_train)
    assert [path.name for path in folder.glob("imix*")] == ["imix_clips.npy"]


def test_what_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    folder = speech_commands(tmp_path, ["bed", "cat"])
    monkeypatch.setattr(os, "sysconf", lambda name: 1400)  # pages, and bytes a page: 2 MB, of which noise takes 0.8
    with pytest.raises(common.DataError) as error:
        common.load_speech("speech_commands", tmp_path, CPU)
    assert str(error.value) == f"{folder}: 46 clips and 3 s of noise take 0.0 GB, and cpu has 0.0: keep fewer with --train-size"
    assert not (folder / "imix_clips.npy").exists()
    assert len(common.load_speech("speech_commands", tmp_path, CPU, train_size=8).x_train) == 8


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    speech_commands(tmp_path, ["bed", "cat"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(common.DataError, match=r"npy\.\d+\.tmp can't be written \(No space left on device\): the clips are kept"):
        common.load_speech("speech_commands", tmp_path, CPU)
    assert not list(tmp_path.glob("*/*/imix*"))


def test_a_file_system_that_cannot_be_written(tmp_path, monkeypatch):
    speech_commands(tmp_path, ["bed", "cat"])
    inner = open

    def read_only(path, mode="r", *rest):
        if mode == "wb":
            raise OSError(30, "Read-only file system")
        return inner(path, mode, *rest)

    def unlink(*_, **__):  # there it fails also for a file that is not there
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(common.DataError, match=r"npy\.\d+\.tmp can't be written \(Read-only file system\): the clips are kept"):
        common.load_speech("speech_commands", tmp_path, CPU)


def test_words_without_a_clip_to_train_on(tmp_path):
    folder = speech_commands(tmp_path, ["bed", "cat", "dog"])
    names = [f"dog/{path.name}" for path in (folder / "dog").iterdir()]
    with open(folder / "testing_list.txt", "a") as file:
        file.write("\n".join(names) + "\n")
    for dataset in ("speech_commands", str(folder)):
        with pytest.raises(common.DataError) as error:
            common.load_speech(dataset, tmp_path, CPU)
        assert str(error.value) == f"{folder}: no clip of 'dog' is left to train on: shorten the lists"


def test_listed_clips_that_are_not_there_are_noted(tmp_path, capsys):
    folder = speech_commands(tmp_path, ["bed", "cat"])
    for name in (folder / "testing_list.txt").read_text().split()[:2]:
        (folder / name).unlink()
    for dataset in ("speech_commands", str(folder)):
        assert len(common.load_speech(dataset, tmp_path, CPU).x_test) == 4
        assert f"{folder / 'testing_list.txt'}: 2 of 6 are not there, as bed/" in capsys.readouterr().out


def test_the_download_comes_whole_or_not_at_all(tmp_path, monkeypatch):
    made = speech_commands(tmp_path / "made", ["bed", "cat"])
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as tar:
        tar.add(made, arcname=".")
    monkeypatch.setattr(torchaudio.datasets.speechcommands, "download_url_to_file",
                        lambda url, path, hash_prefix: shutil.copy(tmp_path / "made.tar.gz", path))
    data_dir = tmp_path / "new" / "data"
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        def half(archive, folder):
            shutil.copytree(made / "bed", Path(folder) / "bed")
            raise KeyboardInterrupt
        context.setattr(torchaudio.datasets.speechcommands, "_extract_tar", half)
        common.load_speech("speech_commands", data_dir, CPU)
    assert [path.name for path in data_dir.rglob("*")] == ["SpeechCommands"]
    data = common.load_speech("speech_commands", data_dir, CPU)
    assert torch.equal(data.x_train, common.load_speech("speech_commands", tmp_path / "made", CPU).x_train)
    assert [path.name for path in data_dir.iterdir()] == ["SpeechCommands"]


def test_a_folder_and_its_lists_share_the_cache(tmp_path, monkeypatch):
    folder = speech_commands(tmp_path, ["bed", "cat"])
    (folder / "validation_list.txt").write_text("")
    by_lists = common.load_speech("speech_commands", tmp_path, CPU)
    monkeypatch.setattr(common, "read_wav", lambda path: {"hiss.wav": np.zeros(16000, np.int16)}[path.name])  # no other
    by_folder = common.load_speech(str(folder), None, CPU)
    assert torch.equal(by_lists.x_test, by_folder.x_test) and torch.equal(by_lists.x_train, by_folder.x_train)


def test_missing_and_one_word_speech(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("<urlopen error\nno route>")

    version = "speech_commands_v0.01"
    monkeypatch.setattr(torchaudio.datasets.speechcommands, "download_url_to_file", no_network)
    with pytest.raises(common.DataError) as error:
        common.load_speech("speech_commands", tmp_path, CPU)
    assert str(error.value) == (f"{version} is not in {tmp_path} and could not be downloaded (<urlopen error no route>): put "
                                "the data set's folders and lists there, or give any folder of WORD/*.wav as --dataset")
    folder = speech_commands(tmp_path, ["bed", "cat"], lists=False)
    with pytest.raises(common.DataError, match=f"^{folder} can't be read .*_list.txt"):
        common.load_speech("speech_commands", tmp_path, CPU)
    assert len(common.load_speech(str(folder), None, CPU).x_test) == 10
    one = speech_commands(tmp_path / "one", ["bed"])
    with pytest.raises(common.DataError, match=f"^{one}: words: 1, clips to train on: 20, to test: 3: give "):
        common.load_speech("speech_commands", tmp_path / "one", CPU)
    with pytest.raises(common.DataError, match="^nowhere can't be split"):
        common.load_speech("nowhere", None, CPU)


def test_an_interrupted_unpacking_is_not_taken_for_the_data_set(tmp_path, monkeypatch):
    def unpack(_, path):
        write_wav(Path(path) / "bed" / NAMES[0], tone(440))
        raise KeyboardInterrupt

    monkeypatch.setattr(torchaudio.datasets.speechcommands, "download_url_to_file", lambda *_, **__: None)
    monkeypatch.setattr(torchaudio.datasets.speechcommands, "_extract_tar", unpack)
    with pytest.raises(KeyboardInterrupt):
        common.load_speech("speech_commands", tmp_path, CPU)
    assert not (tmp_path / "SpeechCommands" / "speech_commands_v0.01").exists()


# ------------------------------------------------------------------------------------------------------------- scripts
@pytest.mark.parametrize("script", [simclr_imix, moco_imix, byol_imix])
@pytest.mark.parametrize("flags", [["--alpha", "1"], ["--alpha", "0"], ["--no-augment"]], ids=" ".join)
def test_the_scripts_run_on_speech_commands(tmp_path, capsys, script, flags):
    """Through torchaudio's dataset class; tones half an octave apart are told apart by any features."""
    speech_commands(tmp_path, ["bed", "cat", "dog"])
    out = tmp_path / "run"
    script.main(["--dataset", "speech_commands", "--data-dir", str(tmp_path), "--arch", "resnet18", "--batch-size", "12",
                 "--epochs", "2", "--device", "cpu", "--out", str(out), *flags])
    assert "speech_commands: 60 examples to train on, 9 to test, 3 classes; cpu" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["test_accuracy"] > 0.6
    script.resnet("resnet18", 1, 32).load_state_dict(torch.load(out / "encoder.pt", weights_only=True))


@pytest.mark.parametrize("script", [simclr_imix, moco_imix, byol_imix])
def test_the_recipe_for_speech(tmp_path, script):
    write_wav(tmp_path / "mine" / "ant" / "1.WAV", tone(440))
    for dataset in ("speech_commands", str(tmp_path / "mine")):
        args = script.parse_args(["--dataset", dataset])
        assert (args.alpha, args.epochs, args.batch_size, args.warmup_epochs, args.schedule) == (1.0, 500, 256, 5, "step")
        assert args.arch == "resnet50" and args.speech_version == "v0.01"
        assert script is byol_imix or args.temperature == 0.5
    images = script.parse_args(["--dataset", str(tmp_path)])
    assert (images.epochs, images.schedule) == (1000, "cosine")
    rates = [script.step_schedule(epoch, 500, 5) for epoch in range(500)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and set(rates[5:300]) == {1.0}
    assert set(rates[300:400]) == {0.1} and set(rates[400:]) == {0.1**2}


@pytest.mark.parametrize("script", [npair_tabular, simclr_imix, moco_imix, byol_imix])
def test_no_augment_makes_both_views_the_plain_input(tmp_path, monkeypatch, script):
    class Stop(Exception):
        pass

    loaders = []

    def pretrain(*networks_and_loader, **_):
        loaders.append(networks_and_loader[-1])
        raise Stop

    monkeypatch.setattr(script, "pretrain", pretrain)
    for flags in ([], ["--no-augment"]):
        with pytest.raises(Stop):
            script.main(["--dataset", "digits", "--mask" if script is not simclr_imix else "--image-size",
                         "0.2" if script is not simclr_imix else "8", "--device", "cpu", "--out", str(tmp_path / str(flags)),
                         *flags])
    (x, x_tilde), (plain, plain_tilde) = (next(iter(loader)) for loader in loaders)
    assert not torch.equal(x, x_tilde) and torch.equal(plain, plain_tilde)
    assert loaders[1].view(loaders[1].x[:9]).equal(loaders[1].view(loaders[1].x[:9]))
