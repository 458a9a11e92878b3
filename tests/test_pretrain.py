# SPDX-License-Identifier: MIT
"""What pretrain() of all four scripts has in common: resuming, what it reads, what it refuses."""

import dataclasses
import json
import math
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import byol_imix
import common
import moco_imix
import npair_tabular
import simclr_imix

SCRIPTS = [npair_tabular, simclr_imix, moco_imix, byol_imix]
CASES = [(npair_tabular, {}), (simclr_imix, {}), (simclr_imix, {"mix": "cutmix"}),
         (simclr_imix, {"alpha": 0.0, "loss": "nt-xent"}),
         (simclr_imix, {"loss": "dare"}), (moco_imix, {"queue": 100}),
         (byol_imix, {"symmetric": True})]


def setup(script, device="cpu", seed=0):
    """The script's networks, small, and a loader of 8 batches."""
    torch.manual_seed(seed)
    if script is simclr_imix:
        encoder = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        nets, x = [encoder, script.projection_head(288, 16)], torch.randn(128, 1, 8, 8)
    else:
        nets = [script.MLP5Layer([10, 4, 40], 1), script.projection_head(32, 16)]
        x = torch.randn(128, 54)
    if script is byol_imix:
        nets.append(script.prediction_head(16, 32))
    loader = common.TwoViews(x.to(device), lambda x: x * (torch.rand_like(x) > 0.2), 16)
    return *(net.to(device) for net in nets), loader


def losses(log):
    return [row["loss"] for row in log]


class Stop(Exception):
    pass


@pytest.mark.parametrize("script, options", [*CASES, *((s, {"amp": "fp16"}) for s in SCRIPTS)])
def test_going_on_from_a_checkpoint_is_bit_exact(monkeypatch, tmp_path, script, options):
    """Whatever the state of the random numbers is, and whatever the weights were, at the start."""
    args = script.Args(epochs=6, lr=1.6, warmup_epochs=1, eval_every=3, **options)
    whole, again = setup(script), setup(script, seed=1)
    log = script.pretrain(*whole, args)

    def stop():
        raise Stop

    seconds = iter(range(10**6))  # as time passes, each epoch is saved
    monkeypatch.setattr(script, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    with pytest.raises(Stop):
        script.pretrain(*setup(script), args, tmp_path, stop)
    monkeypatch.undo()
    torch.rand(3)
    log_again = script.pretrain(*again[:-1], whole[-1], args, tmp_path)
    assert losses(log) == losses(log_again)
    for ours, theirs in zip(whole[:-1], again[:-1]):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluating_on_the_way_changes_nothing(script):
    seen = []
    args = script.Args(epochs=5, lr=1.6, eval_every=2)
    without = script.pretrain(*setup(script), args)
    log = script.pretrain(*setup(script), args, evaluate=lambda: seen.append(torch.rand(1000)))
    assert losses(without) == losses(log) and len(seen) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_networks_are_trained_in_training_mode(script):
    """Also those that come in eval mode, as after an evaluation of one's own."""
    logs = []
    for mode in (True, False):
        *nets, loader = setup(script)
        nets = [net.train(mode) for net in nets]
        logs.append(script.pretrain(*nets, loader, script.Args(epochs=2)))
    assert losses(logs[0]) == losses(logs[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_seeds_and_epochs_have_their_own_random_numbers(script):
    class Constant:
        """The same batch again and again: only the mixing sets the epochs apart."""

        def __init__(self, loader):
            self.batch = next(iter(loader))

        def __len__(self):
            return 1

        def __iter__(self):
            yield self.batch

    seen, inner = [], script.mixup
    for seed in (0, 1):
        *nets, loader = setup(script)
        script.mixup = lambda x, alpha: seen.append(inner(x, alpha)) or seen[-1]
        try:
            script.pretrain(*nets, Constant(loader), script.Args(epochs=3, seed=seed))
        finally:
            script.mixup = inner
    lams = torch.stack([lam for _, _, lam in seen])
    assert len(lams) == 6 and len(lams.unique(dim=0)) == 6


@pytest.mark.parametrize("script, options", CASES)
def test_no_value_is_read_inside_an_epoch(monkeypatch, script, options):
    """What reads a tensor's value waits for the device: the loss and the check, once an epoch."""
    reads = []
    names = "__bool__ __float__ __index__ __int__ cpu item nonzero numpy tolist".split()
    for name in names:
        def read(self, *args, name=name, inner=getattr(torch.Tensor, name), **kwargs):
            reads.append(name)
            return inner(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, read)
    script.pretrain(*setup(script), script.Args(epochs=3, **options))
    assert reads == ["item", "__bool__"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("script, options", CASES)
def test_no_synchronisation_inside_an_epoch_on_cuda(script, options):
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True, action="always") as seen:
            script.pretrain(*setup(script, "cuda"), script.Args(epochs=3, amp="bf16", **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) <= 2 * 3  # none of 8 steps


# ----------------------------------------------------------------------- what is not finite
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_broken_last_step_is_noticed_before_it_is_saved(monkeypatch, tmp_path, script):
    """A last step of an epoch that breaks the weights leaves that epoch's loss finite."""
    inner = script.learning_rate
    monkeypatch.setattr(script, "learning_rate",
                        lambda step, *rest: 1e45 if step == 15 else inner(step, *rest))
    with pytest.raises(FloatingPointError, match="epoch 2"):
        script.pretrain(*setup(script), script.Args(epochs=3), tmp_path)
    assert_finite_checkpoint(tmp_path, 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_broken_batchnorm_statistics_are_noticed(tmp_path, script):
    """A batch can break the running variance, which is of no use until the evaluation."""
    *nets, loader = setup(script)

    class Last:
        """The view x~ of epoch 2's last batch is so large that its variance is infinite."""
        epoch = 0

        def __len__(self):
            return 8

        def __iter__(self):
            self.epoch += 1
            for i, (x, x_tilde) in enumerate(loader):
                scale = 1e25 if (self.epoch, i) == (2, 7) else 1
                yield x, x_tilde * scale

    with pytest.raises(FloatingPointError, match="epoch 2"):
        script.pretrain(*nets, Last(), script.Args(epochs=3, lr=1e-9), tmp_path)
    assert_finite_checkpoint(tmp_path, 1)


def assert_finite_checkpoint(folder, epochs):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(state["log"]) == epochs
    for name in {"model", "online", "predictor", "target", "ema"} & state.keys():
        assert all(tensor.isfinite().all() for tensor in state[name].values()), name


# ----------------------------------------------------------------------- files
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_take_a_hundredth_of_the_time(monkeypatch, tmp_path, script):
    """Epochs of 30 s and a checkpoint of 1 s: after epoch 1, 100 s after that, and at the end."""
    now, saved = [1000.0], []

    class Loader:
        def __init__(self, loader):
            self.batch = next(iter(loader))

        def __len__(self):
            return 1

        def __iter__(self):
            now[0] += 30
            yield self.batch

    def save_checkpoint(out, parts, log, **rest):
        saved.append(len(log))
        now[0] += 1

    monkeypatch.setattr(script, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(script, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    *nets, loader = setup(script)
    script.pretrain(*nets, Loader(loader), script.Args(epochs=10), tmp_path)
    assert saved == [1, 5, 9, 10]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_comes_whole_or_not_at_all(monkeypatch, tmp_path, script):
    args = script.Args(epochs=2)
    script.pretrain(*setup(script), args, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(path, content):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        script.pretrain(*setup(script), dataclasses.replace(args, epochs=3), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_stop_ends_with_the_last_epoch_saved(monkeypatch, tmp_path, script):
    """At once where that is saved already, as before the first; else after the epoch it is in."""
    (tmp_path / "a").mkdir()
    asked = iter([False, True])
    log = script.pretrain(*setup(script), script.Args(epochs=3), tmp_path / "a", None,
                          lambda: next(asked))
    assert log == [] and not list((tmp_path / "a").iterdir())

    monkeypatch.setattr(script.time, "monotonic", iter(range(0, 10**9, 10**6)).__next__)
    begun = []  # saving seems to take long, so that epoch 2 is not saved before
    log = script.pretrain(*setup(script), script.Args(epochs=9, eval_every=2), tmp_path,
                          lambda: begun.append(1), lambda: bool(begun))
    assert len(log) == 2
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(saved["log"]) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_no_checkpoint_of_this_script_is_refused(tmp_path, script):
    path = tmp_path / "checkpoint.pt"
    other = byol_imix if script is moco_imix else moco_imix
    other.pretrain(*setup(other), other.Args(epochs=1), tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 and no more", whole[: len(whole) // 2], whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.pt can't be read"):
            script.pretrain(*setup(script), script.Args(epochs=1), tmp_path)
        assert path.read_bytes() == content


# ----------------------------------------------------------------------- Args
BAD_ARGS = {"alpha": [-1, math.nan, math.inf], "epochs": [0], "batch_size": [1],
            "lr": [0, math.nan], "weight_decay": [-1e-4], "warmup_epochs": [-1], "dim": [0],
            "seed": [-1], "amp": ["bf-16"], "schedule": ["Step"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_args_out_of_bounds_are_refused(script):
    for name, values in BAD_ARGS.items():
        for value in values:
            with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}"):
                script.Args(**{name: value})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_a_field_and_is_explained(script):
    for field in dataclasses.fields(script.Args):
        assert field.metadata["help"], field.name
    json.dumps(dataclasses.asdict(script.Args()))  # as config.json holds it
