# SPDX-License-Identifier: MIT
"""Small networks, data and runs for the tests, and what is compared of runs."""

import itertools
import json
import types

import pytest
import torch
from torch import nn

import byol_imix as byol
import common
import moco_imix as moco
import npair_tabular as npair
import simclr_imix as simclr

SCRIPTS = [npair, simclr, moco, byol]
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
TABLE = ["--dataset=digits", "--width=1", "--batch-size=128"]
FILES = {"checkpoint.pt", "config.json", "data.json", "encoder.pt", "log.csv", "result.json"}


# ----------------------------------------------------------------------- for pretrain()
class Views:
    """Batches of two random views of x; with y (classes) or sizes (of each batch), too."""

    def __init__(self, x, sizes=(16, 16, 16), y=None):
        self.x, self.sizes, self.y = x, sizes, y

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        for size in self.sizes:
            index = torch.randperm(len(self.x))[:size]
            views = [self.x[index] * (torch.rand_like(self.x[index]) > 0.2) for _ in range(2)]
            yield views if self.y is None else (*views, self.y[index])


def setup(script, seed=0, dim=8, **rest):
    """The script's networks, small, and a loader of 3 batches: rest, of Views."""
    torch.manual_seed(seed)
    if script is simclr:
        encoder = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        nets, x = [encoder, script.projection_head(32, dim)], torch.randn(64, 1, 4, 4)
    else:
        nets = [script.MLP5Layer([4, 2], 1), script.projection_head(32, dim)]
        x = torch.randn(64, 6)
    if script is byol:
        nets.append(script.prediction_head(dim, 32))
    return *nets, Views(x, **rest)


def recipe(script, **options):
    """Args of 4 epochs for setup()."""
    of_moco = {"queue": 40, "ema": 0.9, "bn_groups": 1} if script is moco else {}
    return script.Args(**{"epochs": 4, "lr": 0.8, "warmup_epochs": 1, "dim": 8} | of_moco | options)


def losses(log):
    return [row["loss"] for row in log]


def without_rate(out):
    """The rows of log.csv without examples_per_s, which is the last column."""
    return [row.rsplit(",", 1)[0] for row in (out / "log.csv").read_text().splitlines()]


class Stop(Exception):
    pass


def stop():
    raise Stop


# ----------------------------------------------------------------------- for main()
def quick():
    """A linear evaluation of two epochs, and the first of four stages of a ResNet."""
    inner = common.linear_eval

    def linear_eval(*args, **options):
        return inner(*args, **options | {"epochs": 2})

    common.linear_eval = linear_eval
    for script in (simclr, moco, byol):
        def resnet(arch, channels, size, inner=script.resnet):
            net = inner(arch, channels, size)
            net.layer3 = net.layer4 = torch.nn.Identity()
            net.size = 128
            return net

        script.resnet = resnet


def small(script, images):
    """The flags of a small run of a script, with quick(); images: the fixture."""
    if script is simclr:
        return [f"--dataset={images}", "--image-size=8", "--batch-size=8", "--arch=resnet18"]
    return TABLE


def every_epoch_is_saved(script):
    """By a clock on which saving takes no time beside what follows."""
    script.time = types.SimpleNamespace(
        monotonic=map(lambda k: 200**k, itertools.count()).__next__)


# ----------------------------------------------------------------------- what is compared
def assert_same(a, b):
    """Two trees of tensors, bit for bit."""
    leaves = [torch.utils._pytree.tree_flatten(tree) for tree in (a, b)]
    assert leaves[0][1] == leaves[1][1]
    for one, other in zip(leaves[0][0], leaves[1][0], strict=True):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def result_of(out):
    return json.loads((out / "result.json").read_text()) | {"seconds": 0}


def assert_same_run(whole, other):
    """Checkpoint, encoder, log but for the rate, and result: bit for bit."""
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, other)]
    for state in states:
        for row in state["log"]:
            row.pop("examples_per_s")
    assert_same(*states)
    assert_same(*(torch.load(out / "encoder.pt", weights_only=True) for out in (whole, other)))
    assert without_rate(whole) == without_rate(other)
    assert result_of(whole) == result_of(other)
    assert not list(other.glob("*.tmp"))
