# SPDX-License-Identifier: MIT
"""The networks at the recipes' sizes, layer by layer, and what each script builds of them."""

import pytest
import torch
import torchvision
from small import Stop
from torch import nn

import byol_imix as byol
import moco_imix as moco
import npair_tabular as npair
import simclr_imix as simclr


def linear(size, out):
    return [(out, size), (out,)]


def batch_norm(size):
    return [(size,), (size,)]


def shapes(*networks):
    """The shapes of all parameters, in order."""
    return [tuple(p.shape) for net in networks for p in net.parameters()]


def test_covtypes_encoder_and_head():
    with torch.device("meta"):
        encoder, head = npair.MLP5Layer([10, 4, 40], 64), npair.projection_head(2048, 128)
    assert shapes(encoder) == [
        *linear(10, 64), *linear(4, 64), *linear(40, 64),
        *linear(192, 2048), *batch_norm(2048), *linear(2048, 2048), *batch_norm(2048),
        *linear(2048, 4096), *batch_norm(4096), *linear(4096, 4096), *batch_norm(4096),
        *linear(4096, 8192)]
    assert shapes(head) == [*linear(2048, 2048), *batch_norm(2048), *linear(2048, 128),
                            *batch_norm(128)]
    assert sum(p.numel() for net in (encoder, head) for p in net.parameters()) == 67_819_456
    x = torch.empty(512, 54, device="meta")
    assert encoder(x).shape == (512, 2048) and head(encoder(x)).shape == (512, 128)


def test_the_encoder_is_maxout_of_groups_of_four_on_column_groups():
    encoder = npair.MLP5Layer([2, 3], 1).eval()
    x = torch.randn(5, 5)
    h = torch.cat([encoder.embed[0](x[:, :2]), encoder.embed[1](x[:, 2:])], dim=1)
    h = encoder.layers(h)
    expected = torch.stack([h[:, 4 * k : 4 * k + 4].max(dim=1).values for k in range(32)], dim=1)
    torch.testing.assert_close(encoder(x), expected)


def test_an_encoder_of_one_column_group_begins_with_batch_norm_and_relu():
    with torch.device("meta"):
        encoder = npair.MLP5Layer([28], 64)  # Higgs
    assert shapes(encoder)[:6] == [*linear(28, 64), *batch_norm(64), *linear(64, 2048)]
    encoder = npair.MLP5Layer([5], 1)
    seen = []
    encoder.layers[2].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    encoder(torch.randn(200, 5))
    h, = seen
    assert h.shape == (200, 64) and h.min() == 0  # after ReLU
    assert (h == 0).float().mean(dim=0).sub(0.5).abs().max() < 0.2  # of what BatchNorm has centred


@pytest.mark.parametrize("arch, features", [("resnet18", 512), ("resnet50", 2048)])
def test_resnets_are_torchvisions_but_for_the_stem(arch, features):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch)
        small, speech, large = (simclr.resnet(arch, *of) for of in ((3, 32), (1, 32), (3, 224)))
    layers = shapes(theirs)[:-2]  # without fc
    assert shapes(large) == layers
    assert shapes(small) == [(64, 3, 3, 3), *layers[1:]]
    assert shapes(speech) == [(64, 1, 3, 3), *layers[1:]]
    for net, channels, pixels in ((small, 3, 32), (speech, 1, 32), (large, 3, 224)):
        assert net(torch.empty(2, channels, pixels, pixels, device="meta")).shape == (2, features)
    assert small.conv1.stride == (1, 1) and isinstance(small.maxpool, nn.Identity)
    assert isinstance(large.maxpool, nn.MaxPool2d)


HEAD = [*linear(512, 512), *batch_norm(512), *linear(512, 128)]  # of a ResNet-18
PREDICTOR = [*linear(128, 512), *batch_norm(512), *linear(512, 128)]
TABLE_HEAD = [*linear(64, 64), *batch_norm(64), *linear(64, 128), *batch_norm(128)]  # w = 2
TABLE_PREDICTOR = [*linear(128, 64), *batch_norm(64), *linear(64, 128), *batch_norm(128)]


@pytest.mark.parametrize("script, domain, flags, expected", [
    (npair, "table", [], [TABLE_HEAD]),
    (simclr, "images", [], [HEAD + batch_norm(128)]),
    (simclr, "clips", [], [HEAD + batch_norm(128)]),
    (simclr, "images", ["--loss=dare"], [HEAD[:-2] + linear(512, 256) + batch_norm(256)]),
    (moco, "images", [], [HEAD]),
    (moco, "clips", [], [HEAD + batch_norm(128)]),
    (moco, "table", [], [TABLE_HEAD]),
    (moco, "images", ["--head=linear"], [linear(512, 128)]),
    (moco, "table", ["--head=linear"], [linear(64, 128)]),
    (moco, "images", ["--head=mlp-no-bn"], [linear(512, 512) + linear(512, 128)]),
    (byol, "images", [], [HEAD, PREDICTOR]),
    (byol, "clips", [], [HEAD + batch_norm(128), PREDICTOR]),
    (byol, "table", [], [TABLE_HEAD, TABLE_PREDICTOR])])
def test_what_is_built_for_each_domain(script, domain, flags, expected, monkeypatch, request,
                                       tmp_path):
    heads = []

    def pretrain(encoder, *rest):
        heads.extend(net for net in rest if isinstance(net, nn.Module))
        raise Stop

    monkeypatch.setattr(script, "pretrain", pretrain)
    dataset = "digits" if domain == "table" else request.getfixturevalue(domain)
    flags += ["--width=2"] if domain == "table" else ["--arch=resnet18"]
    flags += ["--image-size=8"] if domain == "images" else []
    with pytest.raises(Stop):
        script.main([f"--dataset={dataset}", "--batch-size=8", f"--out={tmp_path}/run", *flags])
    assert [shapes(head) for head in heads] == expected
