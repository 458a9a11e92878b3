# SPDX-License-Identifier: MIT
"""npair_tabular.py's parts, each against the paper's definition."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import npair_tabular as npair


def naive_n_pair(f, f_tilde, temperature, v):
    """Section 3.1 as printed, in float64, with an explicit matrix v (N, N) of virtual labels."""
    f, f_tilde = f.double(), f_tilde.double()
    total = 0
    for i in range(len(f)):
        s = [torch.dot(f[i], k) / (f[i].norm() * k.norm()) for k in f_tilde]
        denominator = sum(torch.exp(s_k / temperature) for s_k in s)
        for n in range(len(f)):
            total = total - v[i, n] * torch.log(torch.exp(s[n] / temperature) / denominator)
    return total / len(f)


def embeddings(n=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f, f_tilde = (3 * torch.randn(n, d, generator=generator) for _ in range(2))
    return f.requires_grad_(), f_tilde.requires_grad_()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_gradients_equal_the_equation(mixed, temperature):
    f, f_tilde = embeddings()
    v, perm, lam = torch.eye(6, dtype=torch.float64), None, None
    if mixed:
        perm = torch.tensor([3, 1, 0, 5, 2, 4])  # 1 is its own partner
        lam = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        v = lam.double()[:, None] * v + (1 - lam.double())[:, None] * v[perm]
    expected = naive_n_pair(f, f_tilde, temperature, v)
    expected_gradients = torch.autograd.grad(expected, (f, f_tilde))
    loss = npair.n_pair_loss(f, f_tilde, temperature, perm, lam)
    gradients = torch.autograd.grad(loss, (f, f_tilde))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_mixed_loss_is_the_weighted_sum_of_two_plain_losses():
    f, f_tilde = embeddings(n=8)
    perm, lam = torch.arange(8).roll(3), torch.tensor(0.7)
    mixed = npair.n_pair_loss(f, f_tilde, 0.1, perm, lam.expand(8))
    own, partner = npair.n_pair_loss(f, f_tilde, 0.1), npair.n_pair_loss(f, f_tilde[perm], 0.1)
    assert abs(own - partner) > 0.1
    torch.testing.assert_close(mixed, lam * own + (1 - lam) * partner)


def test_lam_of_one_is_the_plain_loss():
    f, f_tilde = embeddings()
    mixed = npair.n_pair_loss(f, f_tilde, 0.1, torch.randperm(6), torch.ones(6))
    assert torch.equal(mixed, npair.n_pair_loss(f, f_tilde, 0.1))


def test_loss_stays_float32_under_autocast():
    f, f_tilde = embeddings(n=32, d=16)
    plain = npair.n_pair_loss(f, f_tilde, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = npair.n_pair_loss(f, f_tilde, 0.1)
    assert autocast.dtype == torch.float32 and torch.equal(plain, autocast)
    assert npair.n_pair_loss(f.bfloat16(), f_tilde.bfloat16(), 0.1).dtype == torch.float32


@pytest.mark.parametrize("shape", [(64,), (64, 7), (64, 3, 8, 8)])
def test_mixup_contract(shape):
    x = torch.randn(shape)
    before = x.clone()
    x_mix, perm, lam = npair.mixup(x, 1.0)
    assert torch.equal(x, before)
    assert perm.dtype == torch.int64 and torch.equal(perm.sort().values, torch.arange(64))
    assert lam.shape == (64,) and lam.min() >= 0.5 and lam.max() <= 1
    for i in range(64):
        torch.testing.assert_close(x_mix[i], lam[i] * x[i] + (1 - lam[i]) * x[perm[i]])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_mixup_lam_is_a_folded_beta(alpha):
    torch.manual_seed(0)
    n = 200_000
    _, perm, lam = npair.mixup(torch.zeros(n, 1), alpha)
    # With B ~ Beta(alpha, alpha): (lam - 1/2)^2 = (B - 1/2)^2, whose mean is B's variance,
    # 1 / (4 (2 alpha + 1)).
    assert abs((lam - 0.5).square().mean() * 4 * (2 * alpha + 1) - 1) < 0.02
    beta_function = math.gamma(alpha) ** 2 / math.gamma(2 * alpha)
    assert abs(lam.mean() - 0.5 - 4**-alpha / (alpha * beta_function)) < 0.002  # E|B - 1/2|
    assert (perm == torch.arange(n)).sum() < 10  # on average, one fixed point


def test_mixup_of_extreme_alpha_is_finite():
    for alpha in (1e-4, 1e4):
        x_mix, _, lam = npair.mixup(torch.randn(1000, 3), alpha)
        assert x_mix.isfinite().all() and lam.min() >= 0.5 and lam.max() <= 1


def test_encoder_and_head_shapes_and_parameter_count():
    encoder, head = npair.MLP5Layer([10, 4, 40], 64), npair.projection_head(2048, 128)
    x = torch.randn(8, 54)
    representation = encoder(x)
    assert representation.shape == (8, 2048) and head(representation).shape == (8, 128)
    count = sum(p.numel() for p in [*encoder.parameters(), *head.parameters()])
    assert round(count / 1e6, 1) == 67.8


def test_encoder_is_maxout_of_groups_of_four_on_column_groups():
    encoder = npair.MLP5Layer([2, 3], 1).eval()
    x = torch.randn(5, 5)
    h = torch.cat([encoder.embed[0](x[:, :2]), encoder.embed[1](x[:, 2:])], dim=1)
    h = encoder.layers(h)
    expected = torch.stack([h[:, 4 * k : 4 * k + 4].max(dim=1).values for k in range(32)], dim=1)
    torch.testing.assert_close(encoder(x), expected)


def test_learning_rate_at_its_corners():
    args = npair.Args(lr=1.0, epochs=100, warmup_epochs=10)
    rates = [npair.learning_rate(step, 1, args) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1 and rates[55] == pytest.approx(0.5)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001
    assert npair.learning_rate(0, 1, npair.Args(lr=1.0, epochs=100, warmup_epochs=0)) == 1
    args = npair.Args(lr=0.5, epochs=500, warmup_epochs=5, schedule="step")
    rates = [npair.learning_rate(step, 3, args) for step in range(1500)]
    assert rates[:2] == [0.5 / 15, 1.0 / 15] and set(rates[14:900]) == {0.5}
    assert set(rates[900:1200]) == {0.5 * 0.1} and set(rates[1200:]) == {0.5 * 0.1**2}


def test_the_warm_up_is_at_most_a_quarter():
    for epochs, warmup in ((500, 5), (20, 5), (19, 4), (3, 0)):
        args = npair.Args(lr=1.0, epochs=epochs)
        rates = [npair.learning_rate(step, 1, args) for step in range(epochs)]
        assert rates.index(1.0) == max(warmup - 1, 0)


class RandomViews:
    """Two views of 4 batches of 16 random rows: what a user's own loader would yield."""

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def __len__(self):
        return 4

    def __iter__(self):
        for _ in range(4):
            x = torch.randn(16, 6, dtype=self.dtype)
            yield x, x + 0.1 * torch.randn_like(x)


def networks(seed=0):
    torch.manual_seed(seed)
    return npair.MLP5Layer([4, 2], 1), npair.projection_head(32, 8)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_pretrain_is_section_3_1_written_out(alpha):
    """alpha 0: the plain baseline, bit for bit; else only the anchors are mixed."""
    dtype = torch.float64 if alpha else torch.float32  # in float32, rounding sets two runs apart
    encoder, head = (net.to(dtype) for net in networks())
    args = npair.Args(alpha=alpha, epochs=4, lr=0.16, temperature=0.2, warmup_epochs=1, seed=3)
    log = npair.pretrain(encoder, head, RandomViews(dtype), args)

    model = nn.Sequential(*networks()).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4, fused=True)
    for epoch in range(4):
        torch.manual_seed(3_000_000 + epoch + 1)
        losses = []
        for step, (x, x_tilde) in enumerate(RandomViews(dtype)):
            t = 4 * epoch + step
            rate = (t + 1) / 4 if t < 4 else (1 + math.cos(math.pi * (t - 4) / 12)) / 2
            optimizer.param_groups[0]["lr"] = 0.16 * 16 / 256 * rate
            perm, lam = torch.arange(16), torch.ones(16)
            if alpha:
                x, perm, lam = npair.mixup(x, alpha)
            f, f_tilde = model(torch.cat([x, x_tilde])).float().chunk(2)
            logits = F.normalize(f, dim=1) @ F.normalize(f_tilde, dim=1).T / 0.2
            loss_i = F.cross_entropy(logits, torch.arange(16), reduction="none")
            loss_j = F.cross_entropy(logits, perm, reduction="none")
            loss = (lam * loss_i + (1 - lam) * loss_j if alpha else loss_i).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert log[epoch]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
        assert log[epoch]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
    rounding = {"rtol": 1e-4, "atol": 1e-4} if alpha else {"rtol": 0, "atol": 0}
    ours = nn.Sequential(encoder, head).state_dict()
    torch.testing.assert_close(ours, model.state_dict(), **rounding)


def test_pretrain_learns_and_mixing_changes_the_result():
    results = []
    for alpha in (0.0, 2.0):
        args = npair.Args(alpha=alpha, epochs=20, lr=1.6, temperature=0.2)
        log = npair.pretrain(*networks(), RandomViews(), args)
        assert [row["epoch"] for row in log] == list(range(1, 21))
        assert log[-1]["loss"] < 0.8 * log[0]["loss"]
        results.append(log[-1]["loss"])
    assert results[0] < results[1] - 0.1  # the mixed task is the harder one


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_and_grad_scaler_train(monkeypatch, amp):
    encoder, head = networks()
    seen, inner = set(), npair.n_pair_loss
    monkeypatch.setattr(npair, "n_pair_loss", lambda f, *rest: seen.add(f.dtype) or inner(f, *rest))
    args = npair.Args(amp=amp, epochs=20, lr=1.6, temperature=0.2)
    log = npair.pretrain(encoder, head, RandomViews(), args)
    assert seen == {npair.autocast_dtype(amp, torch.device("cpu"))}
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


def test_a_run_begun_without_a_grad_scaler_goes_on_with_one(tmp_path):
    """A run begun on the CPU may go on where fp16 autocast wants its GradScaler."""
    npair.pretrain(*networks(), RandomViews(), npair.Args(epochs=2), tmp_path)
    log = npair.pretrain(*networks(), RandomViews(), npair.Args(epochs=4, amp="fp16"), tmp_path)
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]


def test_the_last_rows_of_a_checkpoint_are_the_log(tmp_path):
    log = npair.pretrain(*networks(), RandomViews(), npair.Args(epochs=3), tmp_path)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,lr,examples_per_s" and len(rows) == 4
    assert [float(row.split(",")[1]) for row in rows[1:]] == [row["loss"] for row in log]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_alike(monkeypatch):
    compiled, inner = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or inner(net))
    losses = []
    for compile in (False, True):
        nets = [net.double() for net in networks()]  # in float32, rounding sets two runs apart
        args = npair.Args(epochs=2, lr=1.6, compile=compile)
        log = npair.pretrain(*nets, RandomViews(torch.float64), args)
        losses.append([row["loss"] for row in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(compiled) == 1
