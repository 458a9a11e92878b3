# SPDX-License-Identifier: MIT
"""The README's example of CLIP: zero-shot classification of what was never seen in training."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

import simclr_imix

README = Path(__file__).parent.parent / "README.md"
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 40), "blue": (50, 60, 220),
           "yellow": (230, 220, 40), "purple": (160, 40, 180), "cyan": (40, 210, 210)}
SHAPES = ["circle", "square", "triangle", "cross", "ring"]
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
NEVER_SEEN = [(colour, SHAPES[i % 5]) for i, colour in enumerate(COLOURS)]


def draw(colour, shape, rng):
    """A shape of random size and place, (3, 16, 16), on a dark ground."""
    r = rng.integers(4, 7)
    x, y = np.ogrid[:16, :16] - rng.integers(r, 16 - r, (2, 1, 1))  # from its middle
    ink = np.clip(COLOURS[colour] + rng.integers(-25, 26, 3), 0, 255)
    inside = {"circle": x**2 + y**2 <= r**2, "square": np.maximum(abs(x), abs(y)) <= r,
              "triangle": (abs(y) <= r) & (2 * abs(x) <= y + r),
              "cross": (abs(abs(x) - abs(y)) <= 1) & (abs(x) <= r),
              "ring": abs(np.hypot(x, y) - r) <= 1}[shape]
    return np.where(inside, ink[:, None, None], rng.integers(0, 60, (3, 1, 1)))


def examples(pairs, n, rng):
    """n images of each pair, (n pairs, 3, 16, 16), and their captions."""
    images = np.stack([draw(*pair, rng) for pair in pairs for _ in range(n)])
    captions = [f"a photo of a {' '.join(pair)}" for pair in pairs for _ in range(n)]
    return (torch.tensor(images).float() / 255 - 0.3) / 0.25, captions


class SmallNet(nn.Sequential):
    """In place of the ResNet-18, which would take minutes: (N, 3, H, W) -> (N, 512)."""

    def __init__(self, *_):
        layers, channels = [], 3
        for out in (24, 48, 96):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
                       nn.MaxPool2d(2) if out < 96 else nn.AdaptiveMaxPool2d(1)]
            channels = out
        super().__init__(*layers, nn.Flatten(), nn.Linear(96, 512))


def test_the_readmes_clip_tells_combinations_never_seen(monkeypatch):
    block, = re.findall(r"```python\n([^`]*class Text.*?)```", README.read_text(), re.S)
    monkeypatch.setattr(simclr_imix, "resnet", SmallNet)
    rng = np.random.default_rng(0)
    seen = [pair for pair in PAIRS if pair not in NEVER_SEEN]
    images, captions = examples(seen, 35, rng)
    new_images, truth = examples(NEVER_SEEN, 30, rng)
    classes = examples(PAIRS, 1, rng)[1]
    names = {"images": images, "captions": captions, "new_images": new_images, "classes": classes}
    exec(block, names)
    right = [classes[i] == caption for i, caption in zip(names["guess"], truth)]
    print(f"{sum(right) / len(right):.1%} of images of combinations never seen are named right")
    assert sum(right) / len(right) > 0.5  # chance is 0.03
