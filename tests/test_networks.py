# SPDX-License-Identifier: MIT
"""The networks at the recipes' sizes, layer by layer, and what each script builds of them."""

import pytest
import torch
import torchvision

import byol_imix as byol
import common
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


def size(*networks):
    return sum(p.numel() for net in networks for p in net.parameters())


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
    assert size(encoder, head) == 67_819_456
    x = torch.empty(512, 54, device="meta")
    assert encoder(x).shape == (512, 2048) and head(encoder(x)).shape == (512, 128)


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


def test_byols_predictor_is_as_wide_as_a_representation():
    with torch.device("meta"):
        predictor, of_resnet18 = byol.prediction_head(128, 2048), byol.prediction_head(128, 512)
    assert shapes(predictor) == [*linear(128, 2048), *batch_norm(2048), *linear(2048, 128),
                                 *batch_norm(128)]
    assert size(predictor) == 530_816
    assert shapes(of_resnet18)[0] == (512, 128)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnets_are_torchvisions_but_for_the_stem(arch):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch)
        small, speech, large = (simclr.resnet(arch, *of) for of in ((3, 32), (1, 32), (3, 224)))
    layers = shapes(theirs)[:-2]  # without fc
    assert shapes(large) == layers
    assert shapes(small) == [(64, 3, 3, 3), *layers[1:]]
    assert shapes(speech) == [(64, 1, 3, 3), *layers[1:]]
    out = 2048 if arch == "resnet50" else 512
    for net, channels, pixels in ((small, 3, 32), (speech, 1, 32), (large, 3, 224)):
        assert net(torch.empty(2, channels, pixels, pixels, device="meta")).shape == (2, out)


X = {"image": torch.zeros(8, 3, 32, 32), "speech": torch.zeros(8, 1, 32, 32),
     "table": torch.zeros(8, 7)}
HEAD = [*linear(512, 512), *batch_norm(512), *linear(512, 128)]  # of a ResNet-18
PREDICTOR = [*linear(128, 512), *batch_norm(512), *linear(512, 128)]
TABLE_HEAD = [*linear(64, 64), *batch_norm(64), *linear(64, 128), *batch_norm(128)]  # w = 2
TABLE_PREDICTOR = [*linear(128, 64), *batch_norm(64), *linear(64, 128), *batch_norm(128)]


@pytest.mark.parametrize("script, domain, flags, expected", [
    (npair, "table", [], [TABLE_HEAD]),
    (simclr, "image", [], [HEAD + batch_norm(128)]),
    (simclr, "speech", [], [HEAD + batch_norm(128)]),
    (moco, "image", [], [HEAD]),
    (moco, "speech", [], [HEAD + batch_norm(128)]),
    (moco, "table", [], [TABLE_HEAD]),
    (moco, "image", ["--head", "linear"], [linear(512, 128)]),
    (moco, "table", ["--head", "linear"], [linear(64, 128)]),
    (moco, "image", ["--head", "mlp-no-bn"], [linear(512, 512) + linear(512, 128)]),
    (byol, "image", [], [HEAD, PREDICTOR]),
    (byol, "speech", [], [HEAD + batch_norm(128), PREDICTOR]),
    (byol, "table", [], [TABLE_HEAD, TABLE_PREDICTOR])])
def test_what_is_built_for_each_domain(script, domain, flags, expected, monkeypatch, tmp_path):
    y = torch.arange(8) % 2
    data = common.Dataset(X[domain], y, X[domain], y, 2, None, lambda x: x, groups=[4, 3])
    monkeypatch.setattr(common, "domain", lambda *_: domain)
    monkeypatch.setattr(common, "load", lambda *_: data)
    heads = []

    def pretrain(encoder, *rest):
        heads.extend(net for net in rest if isinstance(net, torch.nn.Module))
        raise FloatingPointError("that is all")

    monkeypatch.setattr(script, "pretrain", pretrain)
    flags += ["--width", "2"] if domain == "table" else ["--arch", "resnet18"]
    with pytest.raises(SystemExit):
        script.main([*flags, "--batch-size", "8", "--out", str(tmp_path / "run")])
    assert [shapes(head) for head in heads] == expected
