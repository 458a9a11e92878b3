# SPDX-License-Identifier: MIT
"""The CUDA path: without a card on the fake device of fake_cuda.py, and on a card if there is one.

The tests hide a card from this process, which is forked; test_on_a_card starts one that sees it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_cuda import DEVICE, fake_cuda
from small import Stop, every_script, stop
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

import byol_imix
import common
import moco_imix
import npair_tabular
import simclr_imix

CARD = torch.cuda.is_available()
fake = pytest.mark.skipif(CARD or not torch.backends.cuda.is_built(),
                          reason="for PyTorch built with CUDA where there is no card")
on_card = pytest.mark.skipif(not CARD, reason="needs a card, which test_on_a_card shows")
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

AMPS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [(npair_tabular, "table", {}), (npair_tabular, "table", {"alpha": 0.0}),
         (npair_tabular, "table", {"supervised": True}),
         (simclr_imix, "images", {"mix": "cutmix"}), (simclr_imix, "clips", {}),
         (simclr_imix, "images", {"alpha": 0.0, "loss": "nt-xent"}),
         (simclr_imix, "images", {"alpha": 0.0, "loss": "supcon"}),
         (simclr_imix, "images", {"loss": "triplet"}), (simclr_imix, "images", {"loss": "dare"}),
         (simclr_imix, "images", {"loss": "barlow-twins", "inputmix": True}),
         (moco_imix, "table", {"bn_groups": 1}), (moco_imix, "images", {"mix": "cutmix"}),
         (moco_imix, "table", {"alpha": 0.0}),
         (byol_imix, "table", {}), (byol_imix, "images", {"symmetric": True})]
SHORT = [CASES[0], CASES[3], CASES[11], CASES[14]]


def load(script, domain, request, device=DEVICE):
    """The Dataset on the card, and small networks, for images instead of a ResNet."""
    dataset = "digits" if domain == "table" else str(request.getfixturevalue(domain))
    args = script.Args(dataset=dataset, **{"image_size": 8} if domain == "images" else {})
    data = common.load(args, script.DOMAINS, device)
    with device:
        if domain == "table":
            encoder = script.MLP5Layer(data.groups, 2)
        else:
            channels = data.plain(data.x_train[:1]).shape[1]
            encoder = nn.Sequential(nn.Conv2d(channels, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
                                    nn.AdaptiveAvgPool2d(1), nn.Flatten())
        nets = [encoder, script.projection_head(64, 16)]
        if script is byol_imix:
            nets.append(script.prediction_head(16, 64))
    return data, nets


def pretrain(data, nets, script, out=None, steps=1, **options):
    """Pre-train with a batch of 8, by default for one epoch of one step."""
    args = script.Args(**{"epochs": 1, "dim": 16} | options)
    if options.get("loss") == "dare":
        args.dim = 8
    y = data.y_train[: 8 * steps] if getattr(args, "supervised", False) else None
    loader = common.TwoViews(data.x_train[: 8 * steps], data.view, 8, y)
    return script.pretrain(*nets, loader, args, out)


# ----------------------------------------------------------------------- without a card
def check(request, script, domain, options, amp):
    """No step waits for the card; networks compute in amp's dtype, views and losses in float32."""
    inside, waits, spreads = f"{script.__name__}.pretrain", [], []
    for steps in (1, 2):
        with fake_cuda() as watch:
            data, nets = load(script, domain, request)
            watch.clear()
            pretrain(data, nets, script, steps=steps, amp=amp, **options)
        waits.append(watch.waits)
        spreads.append(watch.launches["std"])
        of_networks = set()
        for place, dtype in watch.products:
            if place.startswith("common.") or place.endswith("_loss"):
                assert dtype == torch.float32, place
            elif place != "fake_cuda.backward":  # which has those of both
                of_networks.add(dtype)
        assert of_networks == {AMPS[amp]}
    assert waits[0] == waits[1]  # only an epoch's end reads values:
    assert set(waits[0]) == {("read", inside)} and len(waits[0]) <= 4
    assert spreads == [1, 1]  # and that of the embeddings is computed there


@fake
@pytest.mark.parametrize("script, domain, options, amp", [
    *((*case, "bf16") for case in CASES), *((*case, "fp16") for case in SHORT),
    *((*case, "off") for case in SHORT[:1])])
def test_pretrain(request, script, domain, options, amp):
    check(request, script, domain, options, amp)


FAULTS = {  # what a loss might do to embeddings f, and what then fails
    "read a value": (lambda f: float(f.sum()), "'read', 'npair_tabular.n_pair_loss'"),
    "copy to the host": (lambda f: f.to("cpu"), "'_to_copy', 'npair_tabular.n_pair_loss'"),
    "mix devices": (lambda f: f * torch.ones(len(f), 1), "two (different )?devices"),
    "index on the host": (lambda f: f[torch.arange(4)], "'index', 'npair_tabular.n_pair_loss'"),
    "select by a mask": (lambda f: f[f > 0], "nonzero"),
    "put by a mask": (lambda f: f.index_put((f > 0,), f), "'index_put', 'npair_tabular.n_pair"),
    "round": (lambda f: f.bfloat16() @ f.bfloat16().T, "n_pair_loss\nassert torch.bfloat16 =="),
}


@fake
@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_faults_are_noticed(monkeypatch, request, fault, message):
    normalize = F.normalize

    def faulty(f, dim):
        fault(f.detach())
        return normalize(f, dim=dim)

    monkeypatch.setattr(F, "normalize", faulty)
    with pytest.raises(Exception, match=message):
        check(request, npair_tabular, "table", {}, "bf16")


@fake
@pytest.mark.parametrize("script, domain, options", SHORT)
def test_going_on_from_a_checkpoint(monkeypatch, tmp_path, request, script, domain, options):
    """A checkpoint comes back on the host. Fake tensors can't be written: a dict has them."""
    saved = {}

    def save(content, path):
        saved[path.stem] = tree_map_only(torch.Tensor, torch.Tensor.cpu, content)
        path.touch()

    monkeypatch.setattr(script, "save", save)
    monkeypatch.setattr(torch, "load", lambda path, **_: saved[Path(path).stem])
    with fake_cuda() as watch:
        for epochs in (1, 2):
            data, nets = load(script, domain, request)
            watch.clear()
            log = pretrain(data, nets, script, tmp_path, epochs=epochs, amp="fp16", **options)
    assert [row["epoch"] for row in log] == [1, 2] and "checkpoint" in saved
    assert ("read", f"{script.__name__}.pretrain") in watch.waits


@fake
@pytest.mark.parametrize("script, domain, options", [
    *SHORT, (moco_imix, "table", {"bn_groups": 1})])
def test_batch_norm_is_that_of_all_processes(monkeypatch, request, script, domain, options):
    """SyncBatchNorm; but in MoCo's two groups, of two processes each has its own."""
    groups = getattr(script.Args(), "bn_groups", 1) == 2 and options.get("bn_groups") != 1
    own, synchronised = nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm
    seen, inner = set(), own.forward

    def forward(name):
        def forward(self, x):
            seen.add(name)
            return inner(self, x)
        return forward

    monkeypatch.setattr(own, "forward", forward("own"))
    monkeypatch.setattr(synchronised, "forward", forward("synchronised"))
    monkeypatch.setattr(script, "DistributedDataParallel", lambda model, **_: model)
    monkeypatch.setattr(script, "gather", lambda f: torch.cat([f, f]))
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with fake_cuda():
            data, nets = load(script, domain, request)
            pretrain(data, nets, script, **options)
    finally:
        dist.destroy_process_group()
    assert seen == {"own" if groups else "synchronised"}


@pytest.mark.parametrize("device, env, index", [
    ("auto", {}, 0), ("cuda", {}, 0), ("cuda:1", {}, 1),
    ("auto", {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 1)])
@every_script
def test_each_process_takes_a_card(monkeypatch, script, device, env, index):
    """torch.cuda.set_device needs an index."""
    cards, joined = [], []

    def load(args, domains, device):
        raise Stop(device)

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))  # there is no such card
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **_: joined.append(args))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(common, "load", load)
    with pytest.raises(Stop) as stop:
        script.main(["--dataset=digits", f"--device={device}"])
    assert stop.value.args == (torch.device("cuda", index),)
    assert cards == [torch.device("cuda", index)] and len(joined) == bool(env)


@fake
@pytest.mark.parametrize("script, domain", [(npair_tabular, "table"), (simclr_imix, "images")])
def test_linear_evaluation(request, script, domain):
    """Labels and answers alone are read, however many epochs there are."""
    waits = []
    for epochs in (1, 3):
        with fake_cuda() as watch:
            data, (encoder, _) = load(script, domain, request)
            watch.clear()
            common.linear_eval(encoder, data, epochs=epochs, batch_size=512)
        waits.append(watch.waits)
    assert waits[0] == waits[1] != []


# ----------------------------------------------------------------------- on a card
@pytest.mark.skipif(CARD or not Path("/dev/nvidiactl").exists(), reason="needs a card")
def test_on_a_card():
    """The tests below, by a process from which the card is not hidden."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", __file__], check=True,
                   env=os.environ | {"CARD": "0"})


class NoWait:
    """A loader: from the first batch on until the last step is over, waiting for the card fails."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        try:
            for batch in self.loader:
                yield batch
                torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_card
@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("script, domain, options", CASES)
def test_a_card_is_not_waited_for_and_learns(request, script, domain, options, amp):
    data, nets = load(script, domain, request, torch.device("cuda", 0))
    args = script.Args(**{"epochs": 3, "dim": 16, "amp": amp} | options)
    if options.get("loss") == "dare":
        args.dim = 8
    y = data.y_train[:16] if getattr(args, "supervised", False) else None
    loader = NoWait(common.TwoViews(data.x_train[:16], data.view, 4, y))
    log = script.pretrain(*nets, loader, args)
    assert len(log) == 3 and all(row["loss"] == row["loss"] for row in log)


@on_card
@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("script, domain, options", SHORT)
def test_a_card_goes_on_from_a_checkpoint(tmp_path, request, script, domain, options, amp):
    def train(out, evaluate):
        torch.manual_seed(0)
        data, nets = load(script, domain, request, torch.device("cuda", 0))
        loader = common.TwoViews(data.x_train[:16], data.view, 8)
        args = script.Args(epochs=4, dim=16, amp=amp, eval_every=2, **options)
        script.pretrain(*nets, loader, args, out, evaluate)
        return [*nets[0].parameters()]

    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", lambda: 0.5)
    with pytest.raises(Stop):
        train(tmp_path, stop)
    torch.testing.assert_close(whole, train(tmp_path, lambda: 0.5), rtol=1e-3, atol=1e-4)
