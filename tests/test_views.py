# SPDX-License-Identifier: MIT
"""The views of images and speech: each transform against torchvision's and librosa's, or on a
known sound, and how its parameters are drawn."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchaudio
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF
from sklearn.datasets import load_sample_images

import common

N, SIZE = 64, 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def x():
    """Tiles of photographs, (64, 3, 32, 32) in [0, 1]: smooth parts, edges, vivid and gray."""
    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2)[:, :, :416, :640] / 255
    tiles = photos.unfold(2, 52, 52).unfold(3, 40, 40)  # (2, 3, 8, 16, 52, 40)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    tiles = tiles[:: len(tiles) // N][:N]
    tiles = TF.resize(tiles, [SIZE, SIZE]).clamp(0, 1)
    tiles[0], tiles[1], tiles[2] = 0, 1, 0.5  # where hue has no meaning
    tiles[3] = torch.tensor([0.2, 0.7, 0.4])[:, None, None]  # one colour
    assert tiles.shape == (N, 3, SIZE, SIZE)
    return tiles


def worst(ours, theirs):
    """The largest difference between two lists of images."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


# ----------------------------------------------------------------------- transforms
@pytest.mark.parametrize("flip", [False, True])
def test_resized_crop(x, flip):
    top, left, height, width = common.random_resized_crop(N, SIZE, CPU)
    ours = common.resized_crop(x, top, left, height, width, torch.full((N,), flip), SIZE)
    boxes = torch.stack([top, left, height, width], dim=1).int().tolist()
    theirs = [TF.resized_crop(image, *box, [SIZE, SIZE]) for image, box in zip(x, boxes)]
    if flip:
        theirs = [image.flip(-1) for image in theirs]
    assert worst(ours, theirs) < 1e-5


def test_resized_crop_at_its_corners(x):
    boxes = [(0, 0, 32, 32), (31, 31, 1, 1), (0, 0, 1, 32), (5, 0, 27, 1)]
    top, left, height, width = torch.tensor(boxes, dtype=torch.float32).unbind(1)
    no_flip = torch.zeros(4, dtype=torch.bool)
    ours = common.resized_crop(x[4:8], top, left, height, width, no_flip, SIZE)
    theirs = [TF.resized_crop(image, *box, [SIZE, SIZE]) for image, box in zip(x[4:8], boxes)]
    assert worst(ours, theirs) < 1e-5
    assert torch.equal(ours[0], x[4])


# Of color_jitter's parts 0, 1 and 2.
THEIRS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]


def one_part(part, factor):
    """Parameters of color_jitter of N images that change this part alone, by factor (N,)."""
    factors = torch.ones(N, 3)
    factors[:, part] = factor
    return factors, torch.zeros(N), torch.arange(4).expand(N, 4)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_brightness_contrast_and_saturation(x, part):
    factor = torch.empty(N).uniform_(0.6, 1.4)
    factor[-1] = 1
    ours = common.color_jitter(x, *one_part(part, factor))
    theirs = [THEIRS[part](image, by) for image, by in zip(x, factor.tolist())]
    assert worst(ours, theirs) < 1e-5
    torch.testing.assert_close(ours[-1], x[-1])


def test_hue(x):
    shift = torch.empty(N).uniform_(-0.5, 0.5)
    theirs = [TF.adjust_hue(image, by) for image, by in zip(x, shift.tolist())]
    assert worst(common.adjust_hue(x, shift), theirs) < 1e-4
    torch.testing.assert_close(common.adjust_hue(x, torch.zeros(N)), x)


def test_grayscale(x):
    theirs = [TF.rgb_to_grayscale(image) for image in x]
    assert worst(common.grayscale(x), theirs) < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [65, 96, 224])
def test_blur(size, channels):
    """torchvision's with SimCLR's kernel: a tenth of the image, and odd."""
    x = torch.rand(6, channels, size, size)
    sigma = torch.tensor([0.1, 0.3, 0.8, 1.4, 2.0, 0.01])
    ours = common.blur(x, sigma)
    kernel = 2 * (size // 20) + 1
    assert kernel == {65: 7, 96: 9, 224: 23}[size]
    theirs = [TF.gaussian_blur(image, kernel, by) for image, by in zip(x, sigma.tolist())]
    assert worst(ours, theirs) < 1e-5
    assert torch.equal(ours[5], x[5])  # so small a sigma leaves an image as it is


@pytest.mark.parametrize("size, blurred", [(64, 0), (65, 0.5)])
def test_large_images_are_blurred_half_of_the_time(monkeypatch, size, blurred):
    seen, inner = [torch.full((300,), 0.01)], common.blur
    monkeypatch.setattr(common, "blur", lambda x, sigma: seen.append(sigma) or inner(x, sigma))
    common.image_view(torch.rand(300, 1, size, size))
    sigma = seen[-1]
    drawn = sigma[sigma > 0.01]
    assert abs(len(drawn) / 300 - blurred) < 0.1
    if blurred:
        assert 0.1 <= drawn.min() < 0.2 and 1.9 < drawn.max() <= 2
        assert abs(drawn.mean() - 1.05) < 0.15


def test_color_jitter_in_every_order(x):
    factors = torch.empty(N, 3).uniform_(0.6, 1.4)
    shift = torch.empty(N).uniform_(-0.1, 0.1)
    orders = torch.rand(N, 4).argsort(dim=1)
    orders[:24] = torch.tensor(list(itertools.permutations(range(4))))
    ours = common.color_jitter(x, factors, shift, orders)
    for i in range(N):
        image = x[i]
        for part in orders[i].tolist():
            if part == 3:
                image = TF.adjust_hue(image, shift[i].item())
            else:
                image = THEIRS[part](image, factors[i, part].item())
        assert worst([ours[i]], [image]) < 1e-4, orders[i]


# ----------------------------------------------------------------------- how they are drawn
def test_crop_parameters_follow_torchvisions_distribution():
    ours = torch.stack(common.random_resized_crop(100_000, SIZE, CPU), dim=1)
    transform = v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0))
    image = torch.zeros(3, SIZE, SIZE)
    theirs = []
    for _ in range(20_000):
        drawn = transform.make_params([image])
        theirs.append([drawn["top"], drawn["left"], drawn["height"], drawn["width"]])
    theirs = torch.tensor(theirs, dtype=torch.float32)

    standard_error = theirs.std(dim=0) / math.sqrt(len(theirs))
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < 4 * standard_error).all()
    assert ((ours.std(dim=0) / theirs.std(dim=0) - 1).abs() < 0.02).all()
    # Boxes that do not fit are rejected, which bends the distribution of areas.
    area, their_area = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(area.quantile(q) - their_area.quantile(q)) < 16
    top, left, height, width = ours.unbind(1)
    assert top.min() >= 0 and left.min() >= 0
    assert height.min() >= 1 and width.min() >= 1
    assert (top + height).max() <= SIZE and (left + width).max() <= SIZE


def test_a_crop_that_never_fits_is_the_whole_image(monkeypatch):
    """Ten tries that are all too wide: torchvision's fallback for a square image is all of it."""
    def uniform(self, low, high):
        return self.fill_(high)  # area 1, ratio 4/3

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    crop = common.random_resized_crop(5, SIZE, CPU)
    assert torch.stack(crop, dim=1).tolist() == [[0, 0, SIZE, SIZE]] * 5


def test_view_applies_its_parts_as_often_as_torchvision(monkeypatch):
    n = 4000
    x = torch.rand(1, 3, 8, 8).expand(n, 3, 8, 8) * 0.4 + 0.3
    seen = {}
    jitter, crop = common.color_jitter, common.resized_crop

    def color_jitter(x, factors, shift, order):
        seen.update(factors=factors, shift=shift, order=order)
        return jitter(x, factors, shift, order)

    def resized_crop(x, top, left, height, width, flip, size):
        seen.update(flip=flip)
        return crop(x, top, left, height, width, flip, size)

    monkeypatch.setattr(common, "color_jitter", color_jitter)
    monkeypatch.setattr(common, "resized_crop", resized_crop)
    view = common.image_view(x)
    assert abs(seen["flip"].float().mean() - 0.5) < 0.03

    untouched = (seen["factors"] == 1).all(dim=1) & (seen["shift"] == 0)
    assert abs(untouched.float().mean() - 0.2) < 0.03
    factors, shift = seen["factors"][~untouched], seen["shift"][~untouched]
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert (factors.mean(dim=0) - 1).abs().max() < 0.02
    assert (factors.std(dim=0) - 0.8 / math.sqrt(12)).abs().max() < 0.01
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    assert shift.abs().max() <= 0.1 and abs(shift.mean()) < 0.005
    assert abs(shift.std() - 0.2 / math.sqrt(12)) < 0.003
    _, counts = seen["order"].unique(dim=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 110 and counts.max() < 230  # 167 on average

    gray = (view.amax(dim=1) - view.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
    assert abs(gray.float().mean() - 0.2) < 0.03


def test_one_channel_is_cropped_and_brightened_but_not_flipped():
    ramp = torch.linspace(0.2, 0.6, 8).expand(500, 1, 8, 8)
    view = common.image_view(ramp)
    assert view.shape == (500, 1, 8, 8)
    assert (view[..., 1:] - view[..., :-1] >= -1e-6).all()  # it still rises from left to right
    assert view.mean(dim=(1, 2, 3)).std() > 0.02


@pytest.mark.parametrize("size, padding, n", [(32, 4, 3000), (8, 1, 330)])
def test_padded_crop_is_torchvisions_random_crop(x, size, padding, n):
    """Padded by an eighth of the size; 18.5 views of each shift and side, on average."""
    image = x[10, :, :size, :size]
    views = common.padded_crop(image.expand(n, 3, size, size))
    padded, shifts = TF.pad(image, [padding] * 4), range(2 * padding + 1)
    every = torch.stack([padded[:, i : i + size, j : j + size] for i in shifts for j in shifts])
    every = torch.cat([every, every.flip(-1)]).flatten(1)
    exactly = "donot_use_mm_for_euclid_dist"
    distance, which = torch.cdist(views.flatten(1), every, compute_mode=exactly).min(dim=1)
    assert distance.max() < 1e-3
    counts = which.bincount(minlength=len(every))
    assert counts.min() > 3 and counts.max() < 45


def test_no_view_synchronises():
    """On the meta device nothing can be copied to the host: a view that waits for it fails."""
    x = torch.empty(16, 3, 32, 32, device="meta")
    assert common.image_view(x).shape == (16, 3, 32, 32)
    assert common.padded_crop(x).shape == (16, 3, 32, 32)
    x = torch.empty(16, 3, 96, 96, device="meta")
    assert common.image_view(x).shape == (16, 3, 96, 96)


# ----------------------------------------------------------------------- speech
def tone(hertz, seconds=1.0, phase=0.0):
    time = np.arange(round(seconds * 16000)) / 16000
    return np.sin(2 * np.pi * hertz * time + phase)


def float32(*clips):
    return torch.tensor(np.stack(clips), dtype=torch.float32)


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


def stft(x):
    """librosa's: clips (N, 16000) -> (N, 32, 1025)."""
    window = torch.hann_window(2048, device=x.device)
    return torch.stft(x, 2048, 512, window=window, pad_mode="reflect", return_complex=True).mT


def magnitude(x):
    return stft(x).abs()


def log_mel(x):
    return common.log_mel(magnitude(x).square())


def test_log_mel_is_librosas_definition():
    rng = np.random.default_rng(0)
    sweep = np.sin(2 * np.pi * np.cumsum(np.linspace(100, 7000, 16000)) / 16000)
    late = np.concatenate([np.zeros(8000), tone(1000, 0.5)])
    noise = rng.uniform(-1, 1, 16000)
    clips = [tone(440), 0.01 * tone(3000), sweep, late, noise, 1e-4 * noise]
    ours = common.plain_speech(32768 * float32(*clips))
    assert ours.shape == (6, 1, 32, 32) and ours.dtype == torch.float32
    for clip, level in zip(clips, ours[:, 0].double().numpy()):
        expected = naive_log_mel(clip)
        error = np.abs(level - expected)  # dB
        assert error[expected > -60].max() < 0.01
        assert error.max() < 0.5  # 80 dB below, where float32 ends


def test_zeros_are_flat():
    assert common.plain_speech(torch.zeros(2, 16000)).abs().max() == 0


def test_speed_is_linear_interpolation():
    x = float32(tone(500)).expand(4, 16000)
    speed = [2.0, 1.0, 0.8, 1.25]
    y = common.change_speed(x, torch.tensor(speed))
    assert torch.equal(y[1], x[1])
    samples = np.append(tone(500), 0)
    for i in range(4):
        at = np.arange(16000) * speed[i]
        expected = np.interp(at, np.arange(16001), samples, right=0)
        assert np.abs(y[i].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("rate", [0.8, 0.93, 1.0, 1.2])
def test_stretch_has_the_magnitudes_of_torchaudios_phase_vocoder(rate):
    s = stft(torch.randn(3, 16000))
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
    seen, inner = [], common.log_mel
    monkeypatch.setattr(common, "log_mel", lambda power: seen.append(power) or inner(power))
    return seen


def clip_and_noise():
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


def test_each_is_drawn_for_half_of_the_clips(monkeypatch):
    drawn, inner = [], common.draw

    def draw(n, low, high, otherwise, device):
        values = inner(n, low, high, otherwise, device)
        drawn.append((values, low, high, otherwise))
        return values

    monkeypatch.setattr(common, "draw", draw)
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
