# SPDX-License-Identifier: MIT
"""byol_imix.py's own parts: the loss, the predictor, and what keeps BYOL and SimSiam from collapsing."""

import copy
import io
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
    return byol.MLP5Layer([4, 2], 1), byol.projection_head(32, 8), byol.projection_head(8, 8)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("m", [0.0, 0.9])
def test_pretrain_is_section_3_3_written_out(alpha, symmetric, m):
    """Anchors mixed, targets by the EMA encoder without gradient, encoder, head and predictor trained, then the EMA."""
    encoder, head, predictor = (net.double() for net in networks())  # in float32, rounding sets two runs apart
    model, g, states = copy.deepcopy(nn.Sequential(encoder, head)), copy.deepcopy(predictor), []
    byol.pretrain(encoder, head, predictor, Views(torch.float64), alpha=alpha, symmetric=symmetric, m=m, epochs=2,
                  warmup_epochs=1, lr=0.01, schedule=byol.step_schedule, weight_decay=0.1,
                  after_epoch=lambda log, get_state: states.append(get_state()))

    networks()  # the random number generator as it was
    ema = copy.deepcopy(model)
    optimizer = torch.optim.SGD([*model.parameters(), *g.parameters()], 0.01, momentum=0.9, weight_decay=0.1)
    for step, (x, x_tilde) in enumerate(pair for _ in range(2) for pair in Views(torch.float64)):
        optimizer.param_groups[0]["lr"] = [0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.001, 0.0001][step]
        losses = []
        for anchor, other in [(x, x_tilde), (x_tilde, x)][:1 + symmetric]:
            anchor, perm, lam = byol.mixup(anchor, alpha) if alpha else (anchor, torch.arange(16), torch.ones(16))
            prediction = F.normalize(g(model(anchor)), dim=1)
            with torch.no_grad():
                target = F.normalize(ema(other), dim=1)
            losses += [(lam * (prediction - target).square().sum(1) + (1 - lam) * (prediction - target[perm]).square().sum(1))]
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for theta_ema, theta in zip(ema.parameters(), model.parameters()):
                theta_ema.copy_(m * theta_ema + (1 - m) * theta)
    expected = {"model": nn.Sequential(*model, g), "ema": ema}
    for name, network in expected.items():
        torch.testing.assert_close(states[-1][name], network.state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"symmetric": True, "m": 0.0}, {"amp": torch.float16}], ids=str)
def test_state_goes_on_bit_for_bit(options):
    options = {"epochs": 6, "lr": 0.1, "warmup_epochs": 2} | options
    states = []

    def keep(log, get_state):
        torch.save(get_state(), file := io.BytesIO())
        file.seek(0)
        states.append(torch.load(file, weights_only=True))

    encoder, *rest = networks()
    log = byol.pretrain(encoder, *rest, Views(), after_epoch=keep, **options)
    again, *rest = networks(seed=1)
    log_again = byol.pretrain(again, *rest, Views(), state=states[2], **options)
    assert [row["loss"] for row in log] == [row["loss"] for row in log_again]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_reaches_both_networks(monkeypatch, amp):
    seen, inner = set(), byol.byol_loss
    monkeypatch.setattr(byol, "byol_loss", lambda g, f_ema, *rest: seen.add((g.dtype, f_ema.dtype)) or inner(g, f_ema, *rest))
    byol.pretrain(*networks(), Views(), epochs=1, warmup_epochs=0, amp=amp)
    assert seen == {(amp, amp)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_networks_train_alike(monkeypatch):
    compiled, inner = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or inner(net))
    logs = []
    for compile in (False, True):
        nets = [net.double() for net in networks()]
        loader = [(x.double(), x_tilde.double()) for x, x_tilde in Views()]  # in float32, rounding sets two runs apart
        logs.append(byol.pretrain(*nets, loader, epochs=2, lr=0.1, symmetric=True, compile=compile))
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-5)
    assert len(compiled) == 2


def spread(model, x):
    """Standard deviation of the normalised outputs in units of 1/sqrt(D): near 1 where they fill the sphere, 0 where
    all are the same."""
    with torch.no_grad():
        z = F.normalize(model.eval()(x), dim=1)
    return (z.std(dim=0).mean() * z.shape[1] ** 0.5).item()


def on_digits(predictor=True):
    """Digits' encoder, head and predictor, and their loader. BatchNorm at the end would hide a collapse."""
    torch.manual_seed(0)
    data = common.load_table("digits", "data", torch.device("cpu"))
    networks = byol.MLP5Layer(data.groups, 2), byol.projection_head(64, 32)[:-1], byol.projection_head(32, 32)[:-1]
    return *networks[:2], networks[2] if predictor else nn.Identity(), common.TwoViews(data.x_train, data.view, 128)


@pytest.mark.parametrize("m", [0.0, 0.99])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_byol_and_simsiam_train_and_do_not_collapse(m, alpha):
    encoder, head, predictor, loader = on_digits()
    log = byol.pretrain(encoder, head, predictor, loader, epochs=20, lr=0.1, warmup_epochs=0, symmetric=True, m=m, alpha=alpha)
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert spread(nn.Sequential(encoder, head), loader.x) > 0.6


def test_without_the_predictor_simsiam_collapses():
    encoder, head, predictor, loader = on_digits(predictor=False)
    byol.pretrain(encoder, head, predictor, loader, epochs=20, lr=0.1, warmup_epochs=0, symmetric=True, m=0.0, alpha=0.0)
    assert spread(nn.Sequential(encoder, head), loader.x) < 0.15


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_without_the_stop_gradient_simsiam_collapses(stop_gradient):
    """SimSiam written out, as pretrain() can't leave the gradient in."""
    encoder, head, predictor, loader = on_digits()
    model = nn.Sequential(encoder, head)
    optimizer = torch.optim.SGD([*model.parameters(), *predictor.parameters()], 0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(20):
        for x, x_tilde in loader:
            f, f_tilde = model(x), model(x_tilde)
            target, target_tilde = (f.detach(), f_tilde.detach()) if stop_gradient else (f, f_tilde)
            loss = -F.cosine_similarity(predictor(f), target_tilde) - F.cosine_similarity(predictor(f_tilde), target)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    width = spread(model, loader.x)
    assert width > 0.6 if stop_gradient else width < 0.15
