# SPDX-License-Identifier: MIT
"""moco_imix.py's own parts: the loss, the queue, the EMA encoder."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moco_imix as moco


@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_gradient_equal_the_equation(mixed, temperature):
    torch.manual_seed(0)
    f, f_ema = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5)
    queue = F.normalize(torch.randn(11, 5), dim=1)
    f.requires_grad_(), f_ema.requires_grad_(), queue.requires_grad_()
    v, perm, lam = torch.eye(6, dtype=torch.float64), None, None
    if mixed:
        perm, lam = torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        v = lam.double()[:, None] * v + (1 - lam.double())[:, None] * v[perm]
    expected = 0
    for i in range(6):
        keys = [*f_ema.detach().double(), *queue.detach().double()]
        s = [torch.dot(f[i].double(), k) / (f[i].double().norm() * k.norm()) for k in keys]
        denominator = sum(torch.exp(s[k] / temperature) for k in range(6)) + sum(
            torch.exp(s[6 + k] / temperature) for k in range(11))
        for n in range(6):
            p = torch.exp(s[n] / temperature) / denominator
            expected = expected - v[i, n] * torch.log(p) / 6
    expected_gradient, = torch.autograd.grad(expected, f)
    loss = moco.moco_loss(f, f_ema, queue, temperature, perm, lam)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert f.grad.abs().max() > 1e-3
    torch.testing.assert_close(f.grad, expected_gradient, rtol=1e-5, atol=1e-6)
    assert f_ema.grad is None and queue.grad is None


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_mocos_own_loss_and_gradient_equal_its_equation(temperature):
    """1 + K classes: one's own key and the queue."""
    torch.manual_seed(0)
    f, f_ema = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5)
    queue = F.normalize(torch.randn(11, 5), dim=1)
    f.requires_grad_(), f_ema.requires_grad_(), queue.requires_grad_()
    expected = 0
    for i in range(6):
        keys = [f_ema[i].detach().double(), *queue.detach().double()]
        s = [torch.dot(f[i].double(), k) / (f[i].double().norm() * k.norm()) for k in keys]
        p = torch.exp(s[0] / temperature) / sum(torch.exp(s_k / temperature) for s_k in s)
        expected = expected - torch.log(p) / 6
    expected_gradient, = torch.autograd.grad(expected, f)
    loss = moco.moco_own_loss(f, f_ema, queue, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert f.grad.abs().max() > 1e-3
    torch.testing.assert_close(f.grad, expected_gradient, rtol=1e-5, atol=1e-6)
    assert f_ema.grad is None and queue.grad is None


@pytest.mark.parametrize("loss", [moco.moco_loss, moco.moco_own_loss])
def test_losses_stay_float32_under_autocast(loss):
    f, f_ema = torch.randn(2, 8, 16)
    queue = F.normalize(torch.randn(32, 16), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = loss(f, f_ema, queue, 0.2)
    assert autocast.dtype == torch.float32
    assert torch.equal(autocast, loss(f, f_ema, queue, 0.2))
    f, f_ema = f.bfloat16(), f_ema.bfloat16()  # as the networks return them under autocast
    as_float = loss(f.float(), f_ema.float(), queue, 0.2)
    assert torch.equal(loss(f, f_ema, queue, 0.2), as_float)


@pytest.mark.parametrize("n, k", [(4, 12), (4, 4), (5, 12), (12, 5), (1, 3)])
def test_queue_holds_the_last_keys_and_the_oldest_leave(n, k):
    torch.manual_seed(0)
    queue = F.normalize(torch.randn(k, 6), dim=1)
    history = [queue.clone()]  # newest first
    for _ in range(9):
        keys = 3 * torch.randn(n, 6)
        history.insert(0, F.normalize(keys, dim=1))
        queue = moco.enqueue(queue, keys)
        torch.testing.assert_close(queue, torch.cat(history)[:k], rtol=0, atol=0)


def test_ema_equals_its_closed_form():
    """Of a model that moves: m^n theta_EMA,0 + (1 - m) sum_t m^(n - t) theta_t.

    BatchNorm's buffers stay the EMA network's own.
    """
    torch.manual_seed(0)
    model, ema = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    m, n = 0.9, 7
    expected = [m**n * p.detach() for p in ema.parameters()]
    ema(torch.randn(8, 3))
    buffers = [b.clone() for b in ema.buffers()]
    for t in range(1, n + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(8, 3))
        weight = (1 - m) * m ** (n - t)
        expected = [e + weight * p.detach() for e, p in zip(expected, model.parameters())]
        moco.update_ema(ema, model, m)
    torch.testing.assert_close([p.detach() for p in ema.parameters()], expected)
    assert all(torch.equal(a, b) for a, b in zip(buffers, ema.buffers()))
    moco.update_ema(ema, model, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(ema.parameters(), model.parameters()))


class Views:
    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def __len__(self):
        return 3

    def __iter__(self):
        for _ in range(3):
            x = torch.randn(16, 6, dtype=self.dtype)
            yield x, x + 0.1 * torch.randn_like(x)


def networks(seed=0):
    torch.manual_seed(seed)
    return moco.MLP5Layer([4, 2], 1), moco.projection_head(32, 8)


@pytest.mark.parametrize("alpha, n_plus_k", [(0.0, False), (0.0, True), (1.0, False)])
def test_pretrain_is_section_3_2_written_out(tmp_path, alpha, n_plus_k):
    """Anchors mixed, keys by the EMA encoder; the EMA and the queue after the step.

    Without i-Mix the other keys of the batch are no classes, unless that is asked for.
    """
    encoder, head = (net.double() for net in networks())  # in float32, rounding sets two runs apart
    model = copy.deepcopy(nn.Sequential(encoder, head))
    args = moco.Args(alpha=alpha, ema=0.9, queue=20, epochs=4, warmup_epochs=1, lr=0.16,
                     schedule="step", weight_decay=0.1, temperature=0.2, n_plus_k=n_plus_k)
    moco.pretrain(encoder, head, Views(torch.float64), args, tmp_path)

    torch.manual_seed(0)
    ema = copy.deepcopy(model)
    queue = F.normalize(torch.randn(20, 8), dim=1)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=0.1)
    rates = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    for epoch in range(4):
        torch.manual_seed(epoch + 1)
        for i, (x, x_tilde) in enumerate(Views(torch.float64)):
            optimizer.param_groups[0]["lr"] = 0.16 * 16 / 256 * rates[3 * epoch + i]
            perm, lam = torch.arange(16), torch.ones(16)
            if alpha:
                x, perm, lam = moco.mixup(x, alpha)
            with torch.no_grad():
                keys = F.normalize(ema(x_tilde), dim=1)
            logits = F.normalize(model(x), dim=1) @ torch.cat([keys, queue]).T / 0.2
            if not alpha and not n_plus_k:
                logits[:, :16] += torch.where(torch.eye(16) == 1, 0, -1e9)
            loss_i = F.cross_entropy(logits, torch.arange(16), reduction="none")
            loss_j = F.cross_entropy(logits, perm, reduction="none")
            optimizer.zero_grad()
            (lam * loss_i + (1 - lam) * loss_j).mean().backward()
            optimizer.step()
            with torch.no_grad():
                for theta_ema, theta in zip(ema.parameters(), model.parameters()):
                    theta_ema.copy_(0.9 * theta_ema + 0.1 * theta)
            queue = torch.cat([keys, queue])[:20]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, network in {"model": model, "ema": ema}.items():
        torch.testing.assert_close(state[name], network.state_dict(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["queue"], queue.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 2.0}, {"amp": "bf16"},
                                     {"amp": "fp16"}], ids=str)
def test_pretrain_learns(monkeypatch, options):
    name = "moco_own_loss" if options.get("alpha") == 0 else "moco_loss"
    seen, inner = set(), getattr(moco, name)

    def watched(f, f_ema, *rest):
        seen.add((f.dtype, f_ema.dtype))
        return inner(f, f_ema, *rest)

    monkeypatch.setattr(moco, name, watched)
    args = moco.Args(epochs=30, lr=1.6, temperature=0.2, ema=0.9, queue=64, **options)
    log = moco.pretrain(*networks(), Views(), args)
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    dtype = moco.autocast_dtype(options.get("amp"), torch.device("cpu")) or torch.float32
    assert seen == {(dtype, dtype)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_alike(monkeypatch):
    compiled, inner = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or inner(net))
    logs = []
    for compile in (False, True):
        nets = [net.double() for net in networks()]  # in float32, rounding sets two runs apart
        args = moco.Args(epochs=2, lr=1.6, queue=20, compile=compile)
        logs.append(moco.pretrain(*nets, Views(torch.float64), args))
    assert [r["loss"] for r in logs[0]] == pytest.approx([r["loss"] for r in logs[1]], rel=1e-5)
    assert len(compiled) == 2
