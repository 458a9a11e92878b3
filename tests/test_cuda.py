# SPDX-License-Identifier: MIT
"""The CUDA path without a card, on the fake device of fake_cuda.py."""

import wave

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import DEVICE, fake_cuda
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map_only

import byol_imix
import common
import moco_imix
import npair_tabular
import simclr_imix

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available() or not torch.backends.cuda.is_built(),
                       reason="for PyTorch built with CUDA where there is no card"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

AMPS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [(npair_tabular, "table", {}), (npair_tabular, "table", {"alpha": 0.0}),
         (simclr_imix, "image", {"mix": "mixup"}), (simclr_imix, "image", {"mix": "cutmix"}),
         (simclr_imix, "image", {"alpha": 0.0, "loss": "nt-xent"}), (simclr_imix, "speech", {}),
         (npair_tabular, "table", {"supervised": True}),
         (simclr_imix, "image", {"alpha": 0.0, "loss": "supcon"}),
         (simclr_imix, "image", {"loss": "triplet"}), (simclr_imix, "image", {"loss": "dare"}),
         (simclr_imix, "image", {"loss": "barlow-twins", "inputmix": True}),
         (moco_imix, "table", {}), (moco_imix, "image", {"mix": "cutmix"}),
         (moco_imix, "table", {"alpha": 0.0}),
         (byol_imix, "table", {}), (byol_imix, "image", {"symmetric": True})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds image/WORD/*.png and speech/WORD/*.wav, of which 32 each are to train on."""
    folder = tmp_path_factory.mktemp("data")
    for word in ("one", "two"):
        (folder / "image" / word).mkdir(parents=True)
        (folder / "speech" / word).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (32, 32)).save(folder / "image" / word / f"{i}.png")
            with wave.open(str(folder / "speech" / word / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", None))
                file.writeframes(bytes(2 * 16000))
    return folder


def load(script, domain, folder):
    """The Dataset on the card, and the script's networks, of a ResNet the first of four stages."""
    dataset = "digits" if domain == "table" else str(folder / domain)
    data = common.load(domain, script.Args(dataset=dataset), DEVICE)
    with DEVICE:
        if domain == "table":
            encoder = script.MLP5Layer(data.groups, 2)
        else:
            encoder = script.resnet("resnet18", *data.plain(data.x_train[:1]).shape[1:3])
            encoder.layer2 = encoder.layer3 = encoder.layer4 = nn.Identity()
        nets = [encoder, script.projection_head(64, 16)]
        if script is byol_imix:
            nets.append(script.prediction_head(16, 64))
    return data, nets


def pretrain(data, nets, script, out=None, **options):
    """Pre-train in epochs of two steps, by default one epoch."""
    args = script.Args(**{"epochs": 1} | options)
    y = data.y_train[:32] if getattr(args, "supervised", False) else None
    loader = common.TwoViews(data.x_train[:32], data.view, 16, y)
    return script.pretrain(*nets, loader, args, out)


def check(folder, script, domain, options, amp):
    """No step waits for the card; networks compute in amp's dtype, views and losses in float32."""
    with fake_cuda() as watch:
        data, nets = load(script, domain, folder)
        watch.clear()
        pretrain(data, nets, script, amp=amp, **options)
    inside = f"{script.__name__}.pretrain"
    assert watch.waits == [("read", inside)] * 2  # the loss, and the check that all is finite
    assert watch.norms == ({torch.float32} if options.get("loss") != "barlow-twins" else set())
    assert (inside, AMPS[amp]) in watch.products
    for place, dtype in watch.products:
        if place.startswith("common.") or place.endswith("_loss"):
            assert dtype == torch.float32, place
        elif place != "fake_cuda.backward":  # which has those of both
            assert dtype == AMPS[amp], place


@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("script, domain, options", CASES)
def test_pretrain(folder, script, domain, options, amp):
    check(folder, script, domain, options, amp)


FAULTS = {  # what a loss might do to embeddings f, and what then fails
    "read a value": (lambda f: float(f.sum()), "'read', 'npair_tabular.n_pair_loss'"),
    "copy to the host": (lambda f: f.to("cpu"), "'_to_copy', 'npair_tabular.n_pair_loss'"),
    "copy a number": (lambda f: f.sum().cpu(), "'_to_copy', 'npair_tabular.n_pair_loss'"),
    "mix devices": (lambda f: f * torch.ones(len(f), 1), "at least two devices"),
    "index on the host": (lambda f: f[torch.arange(9)], "'index', 'npair_tabular.n_pair_loss'"),
    "select by a mask": (lambda f: f[f > 0], "nonzero"),
    "put by a mask": (lambda f: f.index_put((f > 0,), f), "'index_put', 'npair_tabular.n_pair"),
    "round": (lambda f: f.bfloat16() @ f.bfloat16().T, "n_pair_loss\nassert torch.bfloat16 =="),
}


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(monkeypatch, folder, fault, message):
    normalize = F.normalize

    def faulty(f, dim):
        fault(f.detach())
        return normalize(f, dim=dim)

    monkeypatch.setattr(F, "normalize", faulty)
    with pytest.raises(Exception, match=message):
        check(folder, npair_tabular, "table", {}, "bf16")


@pytest.mark.parametrize("script, domain", [(npair_tabular, "table"), (simclr_imix, "image"),
                                            (moco_imix, "table"), (byol_imix, "table")])
def test_going_on_from_a_checkpoint(monkeypatch, tmp_path, folder, script, domain):
    """A checkpoint comes back on the host. torch.save can't write fake tensors: a list has them."""
    saved = []

    def save(state, file):
        saved.append(tree_map_only(torch.Tensor, torch.Tensor.cpu, state))

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(torch, "load", lambda path, **kwargs: saved[-1])
    with fake_cuda() as watch:
        for epochs in (1, 2):
            data, nets = load(script, domain, folder)
            watch.clear()
            log = pretrain(data, nets, script, tmp_path, epochs=epochs, amp="fp16")
    assert [row["epoch"] for row in log] == [1, 2] and len(saved) == 2
    assert watch.waits.count(("read", f"{script.__name__}.pretrain")) == 2


@pytest.mark.parametrize("script, domain", [(npair_tabular, "table"), (simclr_imix, "image"),
                                            (simclr_imix, "speech")])
def test_linear_evaluation(folder, script, domain):
    with fake_cuda() as watch:
        data, (encoder, _) = load(script, domain, folder)
        watch.clear()
        common.linear_eval(encoder, data, epochs=2, batch_size=32)
        common.linear_eval(encoder, data, epochs=2, batch_size=32, finetune_lr=0.1)
    assert watch.waits == [("read", "common.linear_eval")] * 4  # how many answers are correct


def test_how_many_operators_draw_a_batch_of_views(folder):
    """Each costs a launch of a kernel, whatever the batch's size: both views are drawn at once."""
    with fake_cuda() as watch:
        data, _ = load(simclr_imix, "image", folder)
        watch.clear()
        next(iter(common.TwoViews(data.x_train, data.view, 16)))
    assert 0 < watch.launches <= 213  # 194 when this was written
