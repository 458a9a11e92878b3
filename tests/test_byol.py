# SPDX-License-Identifier: MIT
"""byol_imix.py's own parts: the loss, the loop, what keeps BYOL and SimSiam from collapsing."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import byol_imix as byol
import common


@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_gradient_equal_the_equation(mixed):
    torch.manual_seed(0)
    g, f_ema = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5)
    g.requires_grad_(), f_ema.requires_grad_()
    v, perm, lam = torch.eye(6, dtype=torch.float64), None, None
    if mixed:
        perm, lam = torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        v = lam.double()[:, None] * v + (1 - lam.double())[:, None] * v[perm]
    targets = torch.stack([row / row.norm() for row in f_ema.detach().double()]).T  # F~  (D, N)
    distance, dropped = 0, 0
    for i in range(6):
        prediction, target = g[i].double() / g[i].double().norm(), targets @ v[i]
        distance = distance + ((prediction - target) ** 2).sum() / 6
        dropped = dropped + (1 - (target**2).sum()) / 6  # of a mixed label, and without gradient
    assert (abs(dropped) > 0.05) == mixed
    loss = byol.byol_loss(g, f_ema, perm, lam)
    torch.testing.assert_close(loss.double(), distance + dropped, rtol=1e-6, atol=1e-6)
    expected_gradient, = torch.autograd.grad(distance, g)
    loss.backward()
    assert g.grad.abs().max() > 1e-3
    torch.testing.assert_close(g.grad, expected_gradient, rtol=1e-5, atol=1e-6)
    assert f_ema.grad is None


def test_loss_stays_float32_under_autocast():
    g, f_ema = torch.randn(8, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = byol.byol_loss(g, f_ema)
    assert autocast.dtype == torch.float32 and torch.equal(autocast, byol.byol_loss(g, f_ema))
    g, f_ema = g.bfloat16(), f_ema.bfloat16()  # as the networks return them under autocast
    assert torch.equal(byol.byol_loss(g, f_ema), byol.byol_loss(g.float(), f_ema.float()))


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
    return byol.MLP5Layer([4, 2], 1), byol.projection_head(32, 8), byol.prediction_head(8, 32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("m", [0.0, 0.9])
def test_pretrain_is_section_3_3_written_out(tmp_path, alpha, symmetric, m):
    """Anchors mixed, targets without gradient, all three networks trained, then the EMA."""
    nets = [net.double() for net in networks()]  # in float32, rounding sets two runs apart
    online, g = copy.deepcopy(nn.Sequential(*nets[:2])), copy.deepcopy(nets[2])
    args = byol.Args(alpha=alpha, symmetric=symmetric, ema=m, epochs=4, warmup_epochs=1, lr=0.16,
                     schedule="step", weight_decay=0.1)
    byol.pretrain(*nets, Views(torch.float64), args, tmp_path)

    target = copy.deepcopy(online)
    theta = [*online.parameters(), *g.parameters()]
    optimizer = torch.optim.SGD(theta, momentum=0.9, weight_decay=0.1)
    rates = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    for epoch in range(4):
        torch.manual_seed(epoch + 1)
        for i, (x, x_tilde) in enumerate(Views(torch.float64)):
            optimizer.param_groups[0]["lr"] = 0.16 * 16 / 256 * rates[3 * epoch + i]
            losses = []
            for anchor, other in [(x, x_tilde), (x_tilde, x)][: 1 + symmetric]:
                perm, lam = torch.arange(16), torch.ones(16)
                if alpha:
                    anchor, perm, lam = byol.mixup(anchor, alpha)
                prediction = F.normalize(g(online(anchor)).float(), dim=1)
                with torch.no_grad():
                    f_ema = F.normalize(target(other).float(), dim=1)
                losses.append(lam * (prediction - f_ema).square().sum(1)
                              + (1 - lam) * (prediction - f_ema[perm]).square().sum(1))
            optimizer.zero_grad()
            torch.cat(losses).mean().backward()
            optimizer.step()
            with torch.no_grad():
                for theta_ema, theta in zip(target.parameters(), online.parameters()):
                    theta_ema.copy_(m * theta_ema + (1 - m) * theta)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, network in {"online": online, "predictor": g, "target": target}.items():
        torch.testing.assert_close(state[name], network.state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_reaches_both_networks(monkeypatch, amp):
    seen, inner = set(), byol.byol_loss

    def watched(g, f_ema, *rest):
        seen.add((g.dtype, f_ema.dtype))
        return inner(g, f_ema, *rest)

    monkeypatch.setattr(byol, "byol_loss", watched)
    byol.pretrain(*networks(), Views(), byol.Args(epochs=1, amp=amp))
    dtype = byol.autocast_dtype(amp, torch.device("cpu"))
    assert seen == {(dtype, dtype)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_alike(monkeypatch):
    compiled, inner = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or inner(net))
    logs = []
    for compile in (False, True):
        nets = [net.double() for net in networks()]  # in float32, rounding sets two runs apart
        args = byol.Args(epochs=2, lr=1.6, symmetric=True, compile=compile)
        logs.append(byol.pretrain(*nets, Views(torch.float64), args))
    assert [r["loss"] for r in logs[0]] == pytest.approx([r["loss"] for r in logs[1]], rel=1e-5)
    assert len(compiled) == 2


def spread(model, x):
    """The normalised outputs' standard deviation in units of 1/sqrt(D).

    It is near 1 where they fill the sphere, 0 where all are the same.
    """
    with torch.no_grad():
        z = F.normalize(model.eval()(x), dim=1)
    return (z.std(dim=0).mean() * z.shape[1] ** 0.5).item()


def on_digits(predictor=True):
    """Networks for digits, which BatchNorm at the end would keep from collapsing, and a loader."""
    torch.manual_seed(0)
    data = common.load_table("digits", "data", torch.device("cpu"))
    encoder, head = byol.MLP5Layer(data.groups, 2), byol.projection_head(64, 32)[:-1]
    g = byol.prediction_head(32, 64)[:-1] if predictor else nn.Identity()
    return encoder, head, g, common.TwoViews(data.x_train, data.view, 128)


@pytest.mark.parametrize("m", [0.0, 0.99])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_byol_and_simsiam_train_and_do_not_collapse(m, alpha):
    encoder, head, predictor, loader = on_digits()
    args = byol.Args(epochs=20, lr=0.2, warmup_epochs=0, symmetric=True, ema=m, alpha=alpha)
    log = byol.pretrain(encoder, head, predictor, loader, args)
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert spread(nn.Sequential(encoder, head), loader.x) > 0.6


def test_without_the_predictor_simsiam_collapses():
    encoder, head, predictor, loader = on_digits(predictor=False)
    args = byol.Args(epochs=20, lr=0.2, warmup_epochs=0, symmetric=True, ema=0.0, alpha=0.0)
    byol.pretrain(encoder, head, predictor, loader, args)
    assert spread(nn.Sequential(encoder, head), loader.x) < 0.15


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_without_the_stop_gradient_simsiam_collapses(stop_gradient):
    """SimSiam written out, as pretrain() can't leave the gradient in."""
    encoder, head, predictor, loader = on_digits()
    model = nn.Sequential(encoder, head)
    theta = [*model.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(theta, 0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(20):
        for x, x_tilde in loader:
            f, f_tilde = model(x), model(x_tilde)
            target, target_tilde = (f.detach(), f_tilde.detach()) if stop_gradient else (f, f_tilde)
            loss = -F.cosine_similarity(predictor(f), target_tilde)
            loss = loss - F.cosine_similarity(predictor(f_tilde), target)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    width = spread(model, loader.x)
    assert width > 0.6 if stop_gradient else width < 0.15
