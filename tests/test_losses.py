# SPDX-License-Identifier: MIT
"""The losses with class indices, and those beside the paper's, each against its equation."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import npair_tabular as npair
import simclr_imix as simclr

N, D, TAU = 6, 5, 0.3
Y = torch.tensor([0, 1, 0, 2, 0, 1])
PERM = torch.tensor([3, 1, 0, 5, 2, 4])  # 1 is its own partner
LAM = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def embeddings(d=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(N, d, generator=generator)).requires_grad_() for _ in range(2)]


def unit(f):
    return [row / row.norm() for row in f.double()]


def classes(y):
    return torch.arange(N) if y is None else y


def virtual_labels(y, mixed):
    """v (N, N) in float64: shared equally by a class, then mixed."""
    y, v = classes(y), torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        members = [n for n in range(N) if y[n] == y[i]]
        for n in members:
            v[i, n] = 1 / len(members)
    if mixed:
        lam = LAM.double()[:, None]
        v = lam * v + (1 - lam) * v[PERM]
    return v


def n_pair(f, f_tilde, y=None, mixed=False):
    f, f_tilde, v, total = unit(f), unit(f_tilde), virtual_labels(y, mixed), 0
    for i in range(N):
        s = [torch.exp(torch.dot(f[i], k) / TAU) for k in f_tilde]
        for n in range(N):
            total = total - v[i, n] * torch.log(s[n] / sum(s)) / N
    return total


def supcon(f, f_tilde, y=None):
    """L_out: the mean over an anchor's positives of its log-softmax, over 2N anchors."""
    views, y, total = unit(f) + unit(f_tilde), classes(y).repeat(2), 0
    for i in range(2 * N):
        s = [torch.exp(torch.dot(views[i], k) / TAU) for k in views]
        others = sum(s[k] for k in range(2 * N) if k != i)
        positives = [p for p in range(2 * N) if p != i and y[p] == y[i]]
        for p in positives:
            total = total - torch.log(s[p] / others) / len(positives) / (2 * N)
    return total


def triplet(f, f_tilde, y=None, mixed=False, margin=1.0):
    f, f_tilde, y, total = unit(f), unit(f_tilde), classes(y), 0
    for i in range(N):
        distances = [(f[i] - k).square().sum() for k in f_tilde]
        labels = [(1.0, y[i])]
        if mixed:
            labels = [(LAM[i].item(), y[i]), (1 - LAM[i].item(), y[PERM[i]])]
        for weight, label in labels:
            farthest = max(distances[n] for n in range(N) if y[n] == label)
            nearest = min(distances[n] for n in range(N) if y[n] != label)
            total = total + weight * torch.clamp(margin + farthest - nearest, min=0) / N
    return total


def standardised(z):
    return (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()  # BatchNorm's epsilon


def barlow_twins(f, f_tilde, y=None, mixed=False):
    f, f_tilde = f.double(), f_tilde.double()
    if mixed:
        lam = LAM.double()[:, None]
        f_tilde = lam * f_tilde + (1 - lam) * f_tilde[PERM]
    f, f_tilde, total = standardised(f), standardised(f_tilde), 0
    for d in range(D):
        for e in range(D):
            c = sum(f[i, d] * f_tilde[i, e] for i in range(N)) / N
            total = total + ((1 - c) ** 2 if d == e else 0.0051 * c**2) / D
    return total


def dare(f, f_tilde, y=None, mixed=False):
    """Bhattacharyya's distance from its definition: -log of the integral of sqrt(p q)."""
    (mu, log_var), (mu_tilde, log_var_tilde) = (z.chunk(2, dim=1) for z in (f.double(),
                                                                             f_tilde.double()))
    torch.manual_seed(5)
    z = mu + (log_var / 2).exp() * torch.randn(N, D).double()
    z_tilde = mu_tilde + (log_var_tilde / 2).exp() * torch.randn(N, D).double()
    total = n_pair(z, z_tilde, y, mixed)
    for i in range(N):
        pairs = [(1.0, i)]
        if mixed:
            pairs = [(LAM[i].item(), i), (1 - LAM[i].item(), PERM[i])]
        for weight, n in pairs:
            for d in range(D):
                total = total + 0.9 * weight / D / N * bhattacharyya(
                    mu[i, d], log_var[i, d].exp(), mu_tilde[n, d], log_var_tilde[n, d].exp())
    return total


def bhattacharyya(mu, var, mu_tilde, var_tilde):
    """By numerical integration."""
    x = torch.linspace(-60, 60, 40_001, dtype=torch.float64)

    def log_density(mu, var):
        return -(x - mu) ** 2 / (2 * var) - torch.log(2 * math.pi * var) / 2

    of_both = (log_density(mu, var) + log_density(mu_tilde, var_tilde)) / 2
    return -torch.log(torch.trapezoid(of_both.exp(), x))


LABELLED = {"y": Y}
MIXED = {"perm": PERM, "lam": LAM}
CASES = [
    (npair.n_pair_loss, n_pair, [TAU], [LABELLED, MIXED, LABELLED | MIXED]),
    (simclr.n_pair_loss, n_pair, [TAU], [{}, LABELLED | MIXED]),
    (simclr.nt_xent_loss, supcon, [TAU], [{}, LABELLED]),
    (simclr.triplet_loss, triplet, [1.0], [{}, LABELLED, MIXED, LABELLED | MIXED]),
    (simclr.barlow_twins_loss, barlow_twins, [0.0051], [{}, MIXED]),
    (simclr.dare_loss, dare, [TAU, 0.9], [{}, LABELLED, MIXED, LABELLED | MIXED])]


@pytest.mark.parametrize("loss, equation, settings, options", [
    pytest.param(loss, equation, settings, options, id=f"{loss.__name__}-{'-'.join(options)}")
    for loss, equation, settings, cases in CASES for options in cases])
def test_loss_and_gradients_equal_the_equation(loss, equation, settings, options):
    f, f_tilde = embeddings(2 * D if equation is dare else D)
    if equation is dare:  # sigma^2 from 0.3 to 3
        f.data[:, D:].clamp_(-1, 1), f_tilde.data[:, D:].clamp_(-1, 1)
    mixed = {"mixed": True} if "perm" in options else {}
    expected = equation(f, f_tilde, options.get("y"), **mixed)
    expected_gradients = torch.autograd.grad(expected, (f, f_tilde))
    torch.manual_seed(5)
    value = loss(f, f_tilde, *settings, **options)
    gradients = torch.autograd.grad(value, (f, f_tilde))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", [npair, simclr])
@pytest.mark.parametrize("mixed", [False, True])
def test_without_classes_n_pair_is_bit_for_bit_cross_entropy_with_the_identity(script, mixed):
    """Value and gradients as of two gathered log-probabilities."""
    results = []
    for of in ("ours", "gathered"):
        f, f_tilde = embeddings()
        options = MIXED if mixed else {}
        if of == "ours":
            loss = script.n_pair_loss(f, f_tilde, TAU, **options)
        else:
            logits = F.normalize(f, dim=1) @ F.normalize(f_tilde, dim=1).T / TAU
            log_p = F.log_softmax(logits, dim=1)
            loss = -log_p.diagonal()
            if mixed:
                loss = LAM * loss + (1 - LAM) * -log_p.gather(1, PERM[:, None]).squeeze(1)
            loss = loss.mean()
        results.append([loss, *torch.autograd.grad(loss, (f, f_tilde))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", simclr.LOSSES)
def test_losses_stay_float32_under_autocast(name):
    row, y = simclr.LOSSES[name], None
    args = simclr.Args(loss=name, alpha=0.0)
    if args.supervised:
        y = Y
    f, f_tilde = (z.detach() for z in embeddings(2 * D))
    values = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            values.append(row.of(f, f_tilde, args, None, None, y))
    assert values[1].dtype == torch.float32 and torch.equal(*values)


def test_supcon_is_pytorch_metric_learnings():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    f, f_tilde = embeddings()
    theirs = losses.SupConLoss(temperature=TAU)(torch.cat([f, f_tilde]), Y.repeat(2))
    torch.testing.assert_close(simclr.nt_xent_loss(f, f_tilde, TAU, Y), theirs)


def test_barlow_twins_is_lightlys():
    loss = pytest.importorskip("lightly.loss").BarlowTwinsLoss(lambda_param=0.0051)
    f, f_tilde = embeddings()
    torch.testing.assert_close(simclr.barlow_twins_loss(f, f_tilde, 0.0051) * D, loss(f, f_tilde))


# ----------------------------------------------------------------------- flags, loop
@pytest.mark.parametrize("options, instead", [
    ({"loss": "nt-xent"}, "--loss n-pair"), ({"loss": "supcon"}, "--loss n-pair --supervised"),
    ({"loss": "nt-xent", "alpha": 0.0, "supervised": True}, "--loss supcon"),
    ({"loss": "barlow-twins", "supervised": True}, "leave it out"),
    ({"supervised": True, "labels": 0.1}, "--labels"),
    ({"finetune": True, "eval_every": 2}, "--eval-every")])
def test_what_does_not_go_together_is_refused(options, instead):
    with pytest.raises(ValueError, match=instead):
        simclr.Args(**options)


def test_recipes_of_the_losses():
    def args(*flags):
        return simclr.parse_args(list(flags), common.domain)[0]

    assert args().temperature == 0.2 and args().dim == 128
    assert args("--loss", "supcon", "--alpha", "0").temperature == 0.1
    assert args("--loss", "supcon", "--alpha", "0").supervised
    assert args("--loss", "barlow-twins").dim == 2048
    assert args("--loss", "dare").temperature == 0.2


@pytest.mark.parametrize("script", [npair, simclr])
def test_classes_reach_the_loss_alone_where_they_are_asked_for(script, monkeypatch):
    """A loader may yield classes all the same; where it yields none, that is said."""
    seen, inner = [], script.n_pair_loss

    def loss(f, f_tilde, temperature, perm, lam, y):
        seen.append(y)
        return inner(f, f_tilde, temperature, perm, lam, y)

    monkeypatch.setattr(script, "n_pair_loss", loss)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    for supervised in (False, True):
        nets = torch.nn.Linear(6, 32), script.projection_head(32, 8)
        args = script.Args(epochs=1, supervised=supervised)
        script.pretrain(*nets, [(x, x, y)], args)
    assert seen[0] is None and torch.equal(seen[1], y)
    with pytest.raises(ValueError, match="y"):
        script.pretrain(*nets, [(x, x)], args)


def test_two_views_yields_the_classes_of_its_batch():
    x = torch.arange(20.0)[:, None]
    for view, view_tilde, y in common.TwoViews(x, lambda x: x, 5, torch.arange(20)):
        assert torch.equal(view, view_tilde) and torch.equal(view[:, 0].long(), y)
