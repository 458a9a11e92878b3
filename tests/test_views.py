# SPDX-License-Identifier: MIT
"""The views of images: each transform against torchvision's, and the distributions of its random parameters."""

import itertools
import math

import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF
from sklearn.datasets import load_sample_images

import common

N, SIZE = 64, 32


@pytest.fixture(scope="module")
def x():
    """Photographs, cut into (64, 3, 32, 32) in [0, 1]: smooth parts, edges, saturated and gray pixels."""
    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    tiles = photos[:, :, :416, :640].unfold(2, 52, 52).unfold(3, 40, 40).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    tiles = TF.resize(tiles[:: len(tiles) // N][:N], [SIZE, SIZE]).clamp(0, 1)
    tiles[0], tiles[1], tiles[2] = 0, 1, 0.5  # where hue has no meaning
    tiles[3] = torch.rand(3, 1, 1).expand(3, SIZE, SIZE)
    assert tiles.shape == (N, 3, SIZE, SIZE)
    return tiles


def worst(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("flip", [False, True])
def test_resized_crop(x, flip):
    torch.manual_seed(0)
    top, left, height, width = common.random_resized_crop(N, SIZE, x.device)
    ours = common.resized_crop(x, top, left, height, width, torch.full((N,), flip), SIZE)
    boxes = torch.stack([top, left, height, width], dim=1).int().tolist()
    theirs = [TF.resized_crop(image, *box, [SIZE, SIZE]) for image, box in zip(x, boxes)]
    assert worst(ours, [image.flip(-1) for image in theirs] if flip else theirs) < 1e-5


def test_resized_crop_at_its_corners(x):
    boxes = [(0, 0, 32, 32), (31, 31, 1, 1), (0, 0, 1, 32), (5, 0, 27, 1)]
    parameters = torch.tensor(boxes, dtype=torch.float32).unbind(1)
    ours = common.resized_crop(x[4:8], *parameters, torch.zeros(4, dtype=torch.bool), SIZE)
    theirs = [TF.resized_crop(image, *box, [SIZE, SIZE]) for image, box in zip(x[4:8], boxes)]
    assert worst(ours, theirs) < 1e-5 and torch.equal(ours[0], x[4])


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
    assert worst(common.grayscale(x), [TF.rgb_to_grayscale(image) for image in x]) < 1e-5


def test_color_jitter_in_every_order(x):
    factors, shift = torch.empty(N, 3).uniform_(0.6, 1.4), torch.empty(N).uniform_(-0.1, 0.1)
    orders = torch.rand(N, 4).argsort(dim=1)
    orders[:24] = torch.tensor(list(itertools.permutations(range(4))))
    assert len({tuple(order) for order in orders.tolist()}) == 24
    ours = common.color_jitter(x, factors, shift, orders)
    for i in range(N):
        image = x[i]
        for part in orders[i].tolist():
            image = TF.adjust_hue(image, shift[i].item()) if part == 3 else THEIRS[part](image, factors[i, part].item())
        assert worst([ours[i]], [image]) < 1e-4


def test_uint8_images_within_rounding(x):
    """torchvision rounds uint8 images after each transform, ours are rounded never: 1/255 a transform apart."""
    raw = (x * 255).round().byte()
    for part in range(3):
        ours = common.color_jitter(raw / 255, *one_part(part, torch.tensor(1.3)))
        assert worst(ours, [THEIRS[part](image, 1.3) / 255 for image in raw]) <= 1.01 / 255
    hue = [TF.adjust_hue(image, 0.07) / 255 for image in raw]
    assert worst(common.adjust_hue(raw / 255, torch.full((N,), 0.07)), hue) <= 2.01 / 255
    box = torch.tensor([[3.0, 4, 20, 15]]).expand(N, 4).unbind(1)
    crop = [TF.resized_crop(image, 3, 4, 20, 15, [SIZE, SIZE]) / 255 for image in raw]
    assert worst(common.resized_crop(raw / 255, *box, torch.zeros(N, dtype=torch.bool), SIZE), crop) <= 1.01 / 255


def test_crop_parameters_follow_torchvisions_distribution(monkeypatch):
    torch.manual_seed(0)
    n = 100_000
    ours = torch.stack(common.random_resized_crop(n, SIZE, torch.device("cpu")), dim=1)
    transform = v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0))
    image = torch.zeros(3, SIZE, SIZE)
    keys = ("top", "left", "height", "width")
    theirs = [transform.make_params([image]) for _ in range(20_000)]
    theirs = torch.tensor([[p[key] for key in keys] for p in theirs], dtype=torch.float32)
    standard_error = theirs.std(dim=0) / math.sqrt(len(theirs))
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < 4 * standard_error).all()
    assert ((ours.std(dim=0) / theirs.std(dim=0) - 1).abs() < 0.02).all()
    area, their_area = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):  # the rejection of boxes that do not fit bends the areas' distribution
        assert abs(area.quantile(q) - their_area.quantile(q)) < 16
    assert (ours[:, 0] + ours[:, 2] <= SIZE).all() and (ours[:, 1] + ours[:, 3] <= SIZE).all() and (ours >= 0).all()
    assert (ours[:, 2:] >= 1).all()


def test_a_crop_that_never_fits_is_the_whole_image(monkeypatch):
    """One image, ten tries that are all too wide: torchvision's fallback for a square image is all of it."""
    uniform = torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: uniform(self, low, high).fill_(high))
    crop = common.random_resized_crop(5, SIZE, torch.device("cpu"))  # area 1 x ratio 4/3
    assert torch.stack(crop, dim=1).tolist() == [[0, 0, SIZE, SIZE]] * 5


def test_view_applies_its_parts_as_often_as_torchvision(monkeypatch):
    torch.manual_seed(0)
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
    untouched = (seen["factors"] == 1).all(dim=1) & (seen["shift"] == 0)
    assert abs(untouched.float().mean() - 0.2) < 0.03
    factors, shift = seen["factors"][~untouched], seen["shift"][~untouched]
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and (factors.mean(dim=0) - 1).abs().max() < 0.02
    assert (factors.std(dim=0) - 0.8 / math.sqrt(12)).abs().max() < 0.01
    assert shift.abs().max() <= 0.1 and abs(shift.mean()) < 0.005 and abs(shift.std() - 0.2 / math.sqrt(12)) < 0.003
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    _, counts = seen["order"].unique(dim=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 110 and counts.max() < 230  # 167 on average
    assert abs(seen["flip"].float().mean() - 0.5) < 0.03
    gray = (view.amax(dim=1) - view.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
    assert abs(gray.float().mean() - 0.2) < 0.03


def test_two_views_of_an_image_are_independent(x):
    torch.manual_seed(0)
    images = x[10:11].expand(2000, 3, SIZE, SIZE)
    loader = common.TwoViews(images, common.image_view, 2000)
    (view, view_tilde), = loader
    assert view.shape == (2000, 3, SIZE, SIZE) and not torch.equal(view, view_tilde)
    means = torch.stack([view.mean(dim=(1, 2, 3)), view_tilde.mean(dim=(1, 2, 3))])
    assert means.std(dim=1).min() > 0.02 and means.corrcoef()[0, 1].abs() < 0.08


def test_one_channel_is_cropped_and_brightened_but_not_flipped():
    torch.manual_seed(0)
    ramp = torch.linspace(0.2, 0.6, 8).expand(500, 1, 8, 8)
    view = common.image_view(ramp)
    assert view.shape == (500, 1, 8, 8)
    assert (view[..., 1:] - view[..., :-1] >= -1e-6).all()  # still rising from left to right: no flip
    assert view.mean(dim=(1, 2, 3)).std() > 0.02


def test_padded_crop_is_torchvisions_random_crop(x):
    torch.manual_seed(0)
    images = x[10:11].expand(3000, 3, SIZE, SIZE)
    views = common.padded_crop(images)
    padded = TF.pad(x[10], [4, 4, 4, 4])
    every = torch.stack([padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)])
    every = torch.cat([every, every.flip(-1)]).flatten(1)
    distance, which = torch.cdist(views.flatten(1), every, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert distance.max() < 1e-3
    counts = which.bincount(minlength=162)
    assert counts.min() > 3 and counts.max() < 45  # 18.5 on average: every offset, flipped or not, alike


def test_no_view_synchronises():
    """Nothing that a view computes depends on a tensor's value on the host: it runs on the meta device."""
    x = torch.empty(16, 3, 32, 32, device="meta")
    assert common.image_view(x).shape == common.padded_crop(x).shape == (16, 3, 32, 32)
