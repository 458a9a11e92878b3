# SPDX-License-Identifier: MIT
"""moco_imix.py's own parts: the loss, the queue, the EMA encoder."""

import copy
import io
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
    f, f_ema, queue = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5), F.normalize(torch.randn(11, 5), dim=1)
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
        expected = expected - sum(v[i, n] * torch.log(torch.exp(s[n] / temperature) / denominator) for n in range(6)) / 6
    expected_gradient, = torch.autograd.grad(expected, f)
    loss = moco.moco_loss(f, f_ema, queue, temperature, perm, lam)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert f.grad.abs().max() > 1e-3
    torch.testing.assert_close(f.grad, expected_gradient, rtol=1e-5, atol=1e-6)
    assert f_ema.grad is None and queue.grad is None


def test_log_sum_exp_of_large_logits():
    """Logits of up to +-1,000, which exp alone would overflow: value and gradient."""
    torch.manual_seed(0)
    q, keys = (F.normalize(torch.randn(n, 8), dim=1) for n in (20, 40))
    for scale in (1, 1000):
        q_scaled = (scale * q).requires_grad_()
        q_double = q_scaled.detach().double().requires_grad_()
        expected = torch.logsumexp(q_double @ keys.double().T, dim=1)
        log_z = moco.LogSumExp.apply(q_scaled, keys)
        torch.testing.assert_close(log_z.double(), expected, rtol=1e-6, atol=1e-6)
        weight = torch.randn(20)
        (weight * log_z).sum().backward()
        (weight.double() * expected).sum().backward()
        torch.testing.assert_close(q_scaled.grad.double(), q_double.grad, rtol=1e-4, atol=1e-4)


def test_loss_stays_float32_under_autocast():
    f, f_ema, queue = torch.randn(8, 16), torch.randn(8, 16), F.normalize(torch.randn(32, 16), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = moco.moco_loss(f, f_ema, queue, 0.2)
    assert autocast.dtype == torch.float32 and torch.equal(autocast, moco.moco_loss(f, f_ema, queue, 0.2))
    f, f_ema = f.bfloat16(), f_ema.bfloat16()  # as the networks return them under autocast
    assert torch.equal(moco.moco_loss(f, f_ema, queue, 0.2), moco.moco_loss(f.float(), f_ema.float(), queue, 0.2))


@pytest.mark.parametrize("n, k", [(4, 12), (4, 4), (5, 12), (7, 12), (12, 5), (10, 5), (1, 3)])
def test_queue_holds_the_last_keys_oldest_first_out(n, k):
    """Of every batch so far, the last K keys, and place `pointer` is the oldest's."""
    torch.manual_seed(0)
    queue, pointer = F.normalize(torch.randn(k, 6), dim=1), 0
    history = list(queue.clone())
    for _ in range(9):
        keys = 3 * torch.randn(n, 6)
        history += list(F.normalize(keys, dim=1))
        pointer = moco.enqueue(queue, keys, pointer)
        torch.testing.assert_close(queue.roll(-pointer, dims=0), torch.stack(history[-k:]), rtol=0, atol=0)


def test_ema_equals_its_closed_form():
    """Of a model that moves: m^n theta_EMA,0 + (1 - m) sum_t m^(n - t) theta_t; BatchNorm's buffers stay its own."""
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
        expected = [e + (1 - m) * m ** (n - t) * p.detach() for e, p in zip(expected, model.parameters())]
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


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_pretrain_is_section_3_2_written_out(alpha):
    """Anchors mixed, keys by the EMA encoder, cross-entropies over keys and queue, the EMA and the queue after the step."""
    encoder, head = (net.double() for net in networks())  # in float32, rounding sets two runs apart
    model, states = copy.deepcopy(nn.Sequential(encoder, head)), []
    moco.pretrain(encoder, head, Views(torch.float64), alpha=alpha, m=0.9, queue_size=20, epochs=2, warmup_epochs=1, lr=0.01,
                  schedule=moco.step_schedule, weight_decay=0.1, temperature=0.2,
                  after_epoch=lambda log, get_state: states.append(get_state()))

    networks()  # the random number generator as it was
    ema = copy.deepcopy(model)
    queue = list(F.normalize(torch.randn(20, 8), dim=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for step, (x, x_tilde) in enumerate(pair for _ in range(2) for pair in Views(torch.float64)):
        optimizer.param_groups[0]["lr"] = [0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.001, 0.0001][step]
        x, perm, lam = moco.mixup(x, alpha) if alpha else (x, torch.arange(16), torch.ones(16))
        with torch.no_grad():
            keys = F.normalize(ema(x_tilde), dim=1)
        logits = F.normalize(model(x), dim=1) @ torch.stack([*keys, *queue]).T / 0.2
        loss_i, loss_j = (F.cross_entropy(logits, label, reduction="none") for label in (torch.arange(16), perm))
        optimizer.zero_grad()
        (lam * loss_i + (1 - lam) * loss_j).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for theta_ema, theta in zip(ema.parameters(), model.parameters()):
                theta_ema.copy_(0.9 * theta_ema + 0.1 * theta)
        queue = [*queue, *keys][-20:]
    state = states[-1]
    for name, network in {"model": model, "ema": ema}.items():
        torch.testing.assert_close(state[name], network.state_dict(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["queue"].roll(-state["pointer"], dims=0), torch.stack(queue).float(), rtol=1e-4, atol=1e-4)


def test_state_goes_on_bit_for_bit():
    options = {"epochs": 6, "lr": 0.1, "warmup_epochs": 2, "queue_size": 20}
    states = []

    def keep(log, get_state):
        torch.save(get_state(), file := io.BytesIO())
        file.seek(0)
        states.append(torch.load(file, weights_only=True))

    encoder, head = networks()
    log = moco.pretrain(encoder, head, Views(), after_epoch=keep, **options)
    again, head_again = networks(seed=1)
    log_again = moco.pretrain(again, head_again, Views(), state=states[2], **options)
    assert [row["loss"] for row in log] == [row["loss"] for row in log_again]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 2.0}, {"alpha": 1.0, "amp": torch.bfloat16},
                                     {"alpha": 1.0, "amp": torch.float16}], ids=str)
def test_pretrain_learns(monkeypatch, options):
    seen, inner = set(), moco.moco_loss
    monkeypatch.setattr(moco, "moco_loss", lambda f, f_ema, *rest: seen.add((f.dtype, f_ema.dtype)) or inner(f, f_ema, *rest))
    log = moco.pretrain(*networks(), Views(), epochs=30, lr=0.1, temperature=0.2, m=0.9, queue_size=64, **options)
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert seen == {(options.get("amp", torch.float32),) * 2}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_networks_train_alike(monkeypatch):
    compiled, inner = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or inner(net))
    logs = []
    for compile in (False, True):
        encoder, head = networks()
        loader = [(x.double(), x_tilde.double()) for x, x_tilde in Views()]  # in float32, rounding sets two runs apart
        logs.append(moco.pretrain(encoder.double(), head.double(), loader, epochs=2, lr=0.1, queue_size=20, compile=compile))
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-5)
    assert len(compiled) == 2
