# SPDX-License-Identifier: MIT
"""npair_tabular.py's parts: mixing, loss, networks, schedule, pre-training, each against the paper's definition."""

import io
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
        total = total - sum(v[i, n] * torch.log(torch.exp(s[n] / temperature) / denominator) for n in range(len(f)))
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
    # With B ~ Beta(alpha, alpha): (lam - 1/2)^2 = (B - 1/2)^2, whose mean is B's variance, 1 / (4 (2 alpha + 1)).
    assert abs((lam - 0.5).square().mean() * 4 * (2 * alpha + 1) - 1) < 0.02
    beta_function = math.gamma(alpha) ** 2 / math.gamma(2 * alpha)
    assert abs(lam.mean() - 0.5 - 4**-alpha / (alpha * beta_function)) < 0.002  # E|B - 1/2|
    assert (perm == torch.arange(n)).sum() < 10  # a random permutation has one fixed point on average


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


def test_schedule_at_its_corners():
    assert npair.cosine_schedule(0, 100, 10) == 0.1
    assert npair.cosine_schedule(9, 100, 10) == 1
    assert npair.cosine_schedule(10, 100, 10) == 1
    assert npair.cosine_schedule(55, 100, 10) == pytest.approx(0.5)
    assert 0 < npair.cosine_schedule(99, 100, 10) < 0.001
    assert npair.cosine_schedule(0, 100, 0) == 1
    assert npair.cosine_schedule(99, 100, 100) == 1
    rates = [npair.cosine_schedule(step, 100, 10) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


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
    """alpha 0: the plain baseline, bit for bit; else only the anchors are mixed, in one pass with the other views."""
    dtype = torch.float64 if alpha else torch.float32  # in float32, rounding alone sets two runs apart
    encoder, head = (net.to(dtype) for net in networks())
    npair.pretrain(encoder, head, RandomViews(dtype), alpha=alpha, epochs=3, lr=0.01, temperature=0.2, warmup_epochs=1)

    model = nn.Sequential(*networks()).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    for epoch in range(3):
        for step, (x, x_tilde) in enumerate(RandomViews(dtype)):
            t = 4 * epoch + step
            rate = (t + 1) / 4 if t < 4 else (1 + math.cos(math.pi * (t - 4) / 8)) / 2
            optimizer.param_groups[0]["lr"] = 0.01 * rate
            x, perm, lam = npair.mixup(x, alpha) if alpha else (x, torch.arange(16), torch.ones(16))
            f, f_tilde = model(torch.cat([x, x_tilde])).float().chunk(2)
            logits = F.normalize(f, dim=1) @ F.normalize(f_tilde, dim=1).T / 0.2
            loss_i, loss_j = (F.cross_entropy(logits, label, reduction="none") for label in (torch.arange(16), perm))
            optimizer.zero_grad()
            (lam * loss_i + (1 - lam) * loss_j if alpha else loss_i).mean().backward()
            optimizer.step()
    rounding = {"rtol": 1e-4, "atol": 1e-4} if alpha else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(nn.Sequential(encoder, head).state_dict(), model.state_dict(), **rounding)


def test_pretrain_learns_and_mixing_changes_the_result():
    results = []
    for alpha in (0.0, 2.0):
        encoder, head = networks()
        log = npair.pretrain(encoder, head, RandomViews(), alpha=alpha, epochs=20, lr=0.1, temperature=0.2)
        assert [row["epoch"] for row in log] == list(range(1, 21))
        assert log[-1]["loss"] < 0.8 * log[0]["loss"]
        results.append(log[-1]["loss"])
    assert results[0] < results[1] - 0.1  # the mixed task is the harder one


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler_train(monkeypatch, amp):
    encoder, head = networks()
    seen, inner = set(), npair.n_pair_loss
    monkeypatch.setattr(npair, "n_pair_loss", lambda f, *rest: seen.add(f.dtype) or inner(f, *rest))
    log = npair.pretrain(encoder, head, RandomViews(), amp=amp, epochs=20, lr=0.1, temperature=0.2)
    assert seen == {amp} and log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_state_goes_on_bit_for_bit(amp):
    options = {"epochs": 6, "lr": 0.1, "warmup_epochs": 2, "amp": amp}
    states = []

    def keep(log, get_state):
        torch.save(get_state(), file := io.BytesIO())
        file.seek(0)
        states.append(torch.load(file, weights_only=True))

    encoder, head = networks()
    log = npair.pretrain(encoder, head, RandomViews(), after_epoch=keep, **options)
    again, head_again = networks(seed=1)
    log_again = npair.pretrain(again, head_again, RandomViews(), state=states[2], **options)
    assert [row["loss"] for row in log] == [row["loss"] for row in log_again]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_state_without_a_scaler_goes_on_with_one():
    """A run begun on the CPU may go on where fp16 autocast wants its GradScaler."""
    states = []
    npair.pretrain(*networks(), RandomViews(), epochs=2, after_epoch=lambda log, get_state: states.append(get_state()))
    log = npair.pretrain(*networks(), RandomViews(), epochs=4, amp=torch.float16, state=states[-1])
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]


def test_a_broken_last_step_is_noticed_before_the_checkpoint(monkeypatch):
    """A last step of an epoch that breaks the weights leaves the epoch's loss finite; after_epoch must not see it."""
    monkeypatch.setattr(npair, "cosine_schedule", lambda step, steps, warmup: 1e39 if step == 7 else 0.1)
    seen = []
    with pytest.raises(FloatingPointError, match="the loss is no longer finite in epoch 2"):
        npair.pretrain(*networks(), RandomViews(), epochs=3, after_epoch=lambda log, _: seen.append(log[-1]["epoch"]))
    assert seen == [1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_networks_train_alike(monkeypatch):
    compiled, inner = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or inner(net))
    losses = []
    for compile in (False, True):
        encoder, head = networks()  # in float64: in float32, rounding alone sets two runs apart within an epoch
        loader = RandomViews(dtype=torch.float64)
        log = npair.pretrain(encoder.double(), head.double(), loader, epochs=2, lr=0.1, compile=compile)
        losses.append([row["loss"] for row in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(compiled) == 1
