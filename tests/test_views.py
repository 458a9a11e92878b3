# SPDX-License-Identifier: MIT
"""The views of images: each transform against torchvision's, and how its parameters are drawn."""

import itertools
import math

import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF
from sklearn.datasets import load_sample_images

import common

N, SIZE = 64, 32
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


def test_uint8_images_within_rounding(x):
    """torchvision rounds uint8 images after each transform, ours never: 1/255 a transform."""
    raw = (x * 255).round().byte()
    for part in range(3):
        ours = common.color_jitter(raw / 255, *one_part(part, torch.tensor(1.3)))
        theirs = [THEIRS[part](image, 1.3) / 255 for image in raw]
        assert worst(ours, theirs) <= 1.01 / 255

    ours = common.adjust_hue(raw / 255, torch.full((N,), 0.07))
    theirs = [TF.adjust_hue(image, 0.07) / 255 for image in raw]
    assert worst(ours, theirs) <= 2.01 / 255

    top, left, height, width = torch.tensor([[3.0, 4, 20, 15]]).expand(N, 4).unbind(1)
    no_flip = torch.zeros(N, dtype=torch.bool)
    ours = common.resized_crop(raw / 255, top, left, height, width, no_flip, SIZE)
    theirs = [TF.resized_crop(image, 3, 4, 20, 15, [SIZE, SIZE]) / 255 for image in raw]
    assert worst(ours, theirs) <= 1.01 / 255


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


def test_two_views_of_an_image_are_independent(x):
    images = x[10:11].expand(2000, 3, SIZE, SIZE)
    (view, view_tilde), = common.TwoViews(images, common.image_view, 2000)
    assert view.shape == (2000, 3, SIZE, SIZE)
    means = torch.stack([view.mean(dim=(1, 2, 3)), view_tilde.mean(dim=(1, 2, 3))])
    assert means.std(dim=1).min() > 0.02
    assert means.corrcoef()[0, 1].abs() < 0.08


def test_one_channel_is_cropped_and_brightened_but_not_flipped():
    ramp = torch.linspace(0.2, 0.6, 8).expand(500, 1, 8, 8)
    view = common.image_view(ramp)
    assert view.shape == (500, 1, 8, 8)
    assert (view[..., 1:] - view[..., :-1] >= -1e-6).all()  # it still rises from left to right
    assert view.mean(dim=(1, 2, 3)).std() > 0.02


def test_padded_crop_is_torchvisions_random_crop(x):
    images = x[10:11].expand(3000, 3, SIZE, SIZE)
    views = common.padded_crop(images)
    padded = TF.pad(x[10], [4, 4, 4, 4])
    every = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    every = torch.stack(every)
    every = torch.cat([every, every.flip(-1)]).flatten(1)
    exactly = "donot_use_mm_for_euclid_dist"
    distance, which = torch.cdist(views.flatten(1), every, compute_mode=exactly).min(dim=1)
    assert distance.max() < 1e-3
    counts = which.bincount(minlength=162)  # 18.5 on average
    assert counts.min() > 3 and counts.max() < 45


def test_no_view_synchronises():
    """On the meta device nothing can be copied to the host: a view that waits for it fails."""
    x = torch.empty(16, 3, 32, 32, device="meta")
    assert common.image_view(x).shape == (16, 3, 32, 32)
    assert common.padded_crop(x).shape == (16, 3, 32, 32)
    x = torch.empty(16, 3, 96, 96, device="meta")
    assert common.image_view(x).shape == (16, 3, 96, 96)
