# SPDX-License-Identifier: MIT
"""Mixing and losses, each against its definition in the paper, written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import byol_imix as byol
import moco_imix as moco
import npair_tabular as npair
import simclr_imix as simclr

N, D, K, TAU = 6, 5, 11, 0.3
Y = torch.tensor([0, 1, 0, 2, 0, 1])
PERM = torch.tensor([3, 1, 0, 5, 2, 4])  # 1 is its own partner
LAM = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
QUEUE = F.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(1)), dim=1)


def embeddings(d=D):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(N, d, generator=generator)).requires_grad_() for _ in range(2)]


def unit(f):
    return [row / row.norm() for row in f.double()]


# ----------------------------------------------------------------------- the equations
def virtual_labels(y, mixed):
    """v (N, N): each example its own class or shared equally by a class; then mixed."""
    y, v = torch.arange(N) if y is None else y, torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        for n in range(N):
            v[i, n] = (y[i] == y[n]) / (y == y[i]).sum()
    lam = LAM.double()[:, None]
    return lam * v + (1 - lam) * v[PERM] if mixed else v


def cross_entropy(anchors, classes, v):
    """-mean_i sum_n v_in log(exp(s(f_i, n) / tau) / sum_k exp(s(f_i, k) / tau))."""
    total = 0
    for i in range(N):
        s = [torch.exp(torch.dot(anchors[i], k) / TAU) for k in classes]
        for n in range(N):
            total = total - v[i, n] * torch.log(s[n] / sum(s)) / N
    return total


def n_pair(f, f_tilde, y=None, mixed=False):
    return cross_entropy(unit(f), unit(f_tilde), virtual_labels(y, mixed))


def of_moco(f, f_ema, y=None, mixed=False):
    """N + K classes."""
    return cross_entropy(unit(f), unit(f_ema) + unit(QUEUE), virtual_labels(y, mixed))


def mocos_own(f, f_ema, y=None, mixed=False):
    """1 + K classes: one's own key and the queue."""
    f, f_ema, total = unit(f), unit(f_ema), 0
    for i in range(N):
        s = [torch.exp(torch.dot(f[i], k) / TAU) for k in [f_ema[i], *unit(QUEUE)]]
        total = total - torch.log(s[0] / sum(s)) / N
    return total


def of_byol(g, f_ema, y=None, mixed=False):
    """Section 3.3's squared distance, and the term without gradient that is dropped."""
    g, targets, v, total = unit(g), torch.stack(unit(f_ema)).T, virtual_labels(y, mixed), 0
    for i in range(N):
        target = targets @ v[i]  # F~ v, not of unit length where labels are mixed
        total = total + ((g[i] - target).square().sum() + 1 - target.square().sum()) / N
    return total


def nt_xent(f, f_tilde, y=None, mixed=False):
    """2N anchors, each without itself; with y L_out of SupCon: the mean over all positives."""
    views, total = unit(f) + unit(f_tilde), 0
    y = (torch.arange(N) if y is None else y).repeat(2)
    for i in range(2 * N):
        s = [torch.exp(torch.dot(views[i], k) / TAU) for k in views]
        others = sum(s[k] for k in range(2 * N) if k != i)
        positives = [p for p in range(2 * N) if p != i and y[p] == y[i]]
        for p in positives:
            total = total - torch.log(s[p] / others) / len(positives) / (2 * N)
    return total


def labels_of(i, y, mixed):
    """Weight and label of the one or two virtual labels of example i."""
    lam = LAM[i].item()
    return [(lam, y[i]), (1 - lam, y[PERM[i]])] if mixed else [(1.0, y[i])]


def triplet(f, f_tilde, y=None, mixed=False):
    """A margin of 1; the farthest of the class and the nearest of another."""
    f, f_tilde, total = unit(f), unit(f_tilde), 0
    y = torch.arange(N) if y is None else y
    for i in range(N):
        distances = [(f[i] - k).square().sum() for k in f_tilde]
        for weight, label in labels_of(i, y, mixed):
            farthest = max(distances[n] for n in range(N) if y[n] == label)
            nearest = min(distances[n] for n in range(N) if y[n] != label)
            total = total + weight * torch.clamp(1 + farthest - nearest, min=0) / N
    return total


def barlow_twins(f, f_tilde, y=None, mixed=False):
    def standardised(z):
        return (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()  # BatchNorm's epsilon

    f, f_tilde, lam, total = f.double(), f_tilde.double(), LAM.double()[:, None], 0
    if mixed:
        f_tilde = lam * f_tilde + (1 - lam) * f_tilde[PERM]
    f, f_tilde = standardised(f), standardised(f_tilde)
    for d in range(D):
        for e in range(D):
            c = sum(f[i, d] * f_tilde[i, e] for i in range(N)) / N
            total = total + ((1 - c) ** 2 if d == e else 0.0051 * c**2) / D
    return total


def dare(f, f_tilde, y=None, mixed=False):
    """N-pair of samples, and the distance of Gaussians whose means are of unit length."""
    (mu, log_var), (mu_tilde, log_var_tilde) = (z.double().chunk(2, 1) for z in (f, f_tilde))
    torch.manual_seed(5)
    z = mu + (log_var / 2).exp() * torch.randn(N, D).double()
    z_tilde = mu_tilde + (log_var_tilde / 2).exp() * torch.randn(N, D).double()
    total = n_pair(z, z_tilde, y, mixed)
    mu, mu_tilde = unit(mu), unit(mu_tilde)
    for i in range(N):
        for weight, n in labels_of(i, torch.arange(N), mixed):
            for d in range(D):
                total = total + 0.9 * weight / D / N * bhattacharyya(
                    mu[i][d], log_var[i, d].exp(), mu_tilde[n][d], log_var_tilde[n, d].exp())
    return total


def bhattacharyya(mu, var, mu_tilde, var_tilde):
    """-log of the integral of sqrt(p q), by numerical integration."""
    x = torch.linspace(-60, 60, 20_001, dtype=torch.float64)

    def log_density(mu, var):
        return -(x - mu) ** 2 / (2 * var) - torch.log(2 * math.pi * var) / 2

    of_both = (log_density(mu, var) + log_density(mu_tilde, var_tilde)) / 2
    return -torch.log(torch.trapezoid(of_both.exp(), x))


LABELLED, MIXED = {"y": Y}, {"perm": PERM, "lam": LAM}
BOTH = LABELLED | MIXED
EQUATIONS = [  # loss, equation, arguments after the embeddings, options
    (npair.n_pair_loss, n_pair, [TAU], [{}, LABELLED, MIXED, BOTH]),
    (simclr.n_pair_loss, n_pair, [TAU], [{}, BOTH]),
    (simclr.nt_xent_loss, nt_xent, [TAU], [{}, LABELLED]),
    (simclr.triplet_loss, triplet, [1.0], [{}, LABELLED, MIXED, BOTH]),
    (simclr.barlow_twins_loss, barlow_twins, [0.0051], [{}, MIXED]),
    (simclr.dare_loss, dare, [TAU, 0.9], [{}, LABELLED, MIXED, BOTH]),
    (moco.moco_loss, of_moco, [QUEUE, TAU], [{}, MIXED]),
    (moco.moco_own_loss, mocos_own, [QUEUE, TAU], [{}]),
    (byol.byol_loss, of_byol, [], [{}, MIXED])]
NO_GRADIENT = [moco.moco_loss, moco.moco_own_loss, byol.byol_loss]  # into the other views


@pytest.mark.parametrize("loss, equation, rest, options", [
    pytest.param(*row, options, id=f"{row[0].__name__}-{'-'.join(options)}")
    for *row, cases in EQUATIONS for options in cases])
def test_loss_and_gradients_equal_the_equation(loss, equation, rest, options):
    f, f_tilde = embeddings(2 * D if equation is dare else D)
    if equation is dare:  # sigma^2 from 0.3 to 3
        f.data[:, D:].clamp_(-1, 1), f_tilde.data[:, D:].clamp_(-1, 1)
    expected = equation(f, f_tilde, options.get("y"), "perm" in options)
    expected_gradients = torch.autograd.grad(expected, (f, f_tilde))
    torch.manual_seed(5)
    queue = QUEUE.clone().requires_grad_()
    value = loss(f, f_tilde, *(queue if r is QUEUE else r for r in rest), **options)
    gradients = torch.autograd.grad(value, (f, f_tilde, queue), allow_unused=True)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], expected_gradients[0], rtol=1e-4, atol=1e-5)
    if loss in NO_GRADIENT:
        assert gradients[1] is None and gradients[2] is None
    else:
        torch.testing.assert_close(gradients[1], expected_gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss, rest", [
    (npair.n_pair_loss, [0.1]), (moco.moco_loss, [QUEUE, 0.1]), (byol.byol_loss, [])])
def test_the_loss_is_linear_in_the_label(loss, rest):
    """Mixed, it is the weighted sum of two plain losses; with lam 1 it is the plain one."""
    f, f_tilde = embeddings()
    perm, lam = torch.arange(N).roll(3), 0.7
    own, partner = loss(f, f_tilde, *rest), loss(f, f_tilde[perm], *rest)
    assert abs(own - partner) > 0.1
    mixed = loss(f, f_tilde, *rest, perm, torch.full((N,), lam))
    torch.testing.assert_close(mixed, lam * own + (1 - lam) * partner)
    assert torch.equal(loss(f, f_tilde, *rest, perm, torch.ones(N)), own)


@pytest.mark.parametrize("loss, rest", [(row[0], row[2]) for row in EQUATIONS],
                         ids=lambda value: getattr(value, "__name__", ""))
def test_losses_stay_float32_under_autocast(loss, rest):
    f, f_tilde = (z.detach() for z in embeddings(2 * D if loss is simclr.dare_loss else D))
    values = []
    for inputs, dtype in (((f, f_tilde), None), ((f, f_tilde), torch.bfloat16),
                          ((f.bfloat16(), f_tilde.bfloat16()), torch.bfloat16)):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            values.append(loss(*inputs, *rest))
    assert values[1].dtype == values[2].dtype == torch.float32
    assert torch.equal(values[0], values[1])  # nothing inside is rounded
    torch.manual_seed(0)
    assert torch.equal(values[2], loss(f.bfloat16().float(), f_tilde.bfloat16().float(), *rest))


# ----------------------------------------------------------------------- mixing
@pytest.mark.parametrize("shape", [(64, 7), (64, 3, 8, 8)])
def test_mixup(shape):
    x = torch.randn(shape)
    before = x.clone()
    x_mix, perm, lam = npair.mixup(x, 1.0)
    assert torch.equal(x, before)
    assert torch.equal(perm.sort().values, torch.arange(64))
    assert lam.shape == (64,) and lam.min() >= 0.5 and lam.max() <= 1
    for i in range(64):
        torch.testing.assert_close(x_mix[i], lam[i] * x[i] + (1 - lam[i]) * x[perm[i]])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_mixups_lam_is_a_folded_beta(alpha):
    n = 200_000
    _, perm, lam = npair.mixup(torch.zeros(n, 1), alpha)
    # With B ~ Beta(alpha, alpha): (lam - 1/2)^2 = (B - 1/2)^2, whose mean is B's variance.
    assert abs((lam - 0.5).square().mean() * 4 * (2 * alpha + 1) - 1) < 0.02
    beta_function = math.gamma(alpha) ** 2 / math.gamma(2 * alpha)
    assert abs(lam.mean() - 0.5 - 4**-alpha / (alpha * beta_function)) < 0.002  # E|B - 1/2|
    assert (perm == torch.arange(n)).sum() < 10  # on average, one fixed point
    assert abs(torch.stack([lam, lam.roll(1)]).corrcoef()[0, 1]) < 0.01  # one of each example


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("shape", [(8, 8), (9, 13)])
def test_cutmix_pastes_one_box_and_lam_is_the_share_of_pixels_kept(alpha, shape):
    n, at_border = 6, 0
    x = torch.arange(float(n))[:, None, None, None].expand(n, 3, *shape)
    for seed in range(200):
        torch.manual_seed(seed)
        x_mix, perm, lam = simclr.cutmix(x, alpha)
        assert lam.shape == (n,) and lam.min() >= 0.5 and lam.max() <= 1
        assert torch.equal(perm.sort().values, torch.arange(n))
        assert ((x_mix == x) | (x_mix == x[perm])).all()
        moved = perm != torch.arange(n)
        kept = (x_mix == x).float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(kept[moved], lam[moved])
        if moved.any() and lam[0] < 1:  # the same box in every image and channel
            pasted = (x_mix != x)[moved]
            assert (pasted == pasted[:1, :1]).all()
            rows, columns = pasted[0, 0].any(dim=1), pasted[0, 0].any(dim=0)
            assert torch.equal(pasted[0, 0], rows[:, None] & columns)
            for side in (rows, columns):
                inside = side.nonzero().flatten()
                assert len(inside) == inside[-1] - inside[0] + 1
            at_border += (rows[0] | rows[-1] | columns[0] | columns[-1]).item()
    assert at_border > 20  # boxes cut off at the border were among them


@pytest.mark.parametrize("beta, middle, rows", [
    (0.75, 16, range(8, 24)),  # a quarter of the pixels: 16 a side
    (0.25, 16, range(8, 24)),  # folded
    (0.75, 3, range(0, 11)),  # cut off at the border
    (0.886, 16, range(11, 21)),  # 0.338 of 32 is 10.8
    (0.87, 16, range(11, 21)),  # 0.361 of 32 is 11.5: an even side
    (0.998, 16, range(0))])  # 0.045 of 32 is 1.4: no box
def test_cutmixs_box_by_hand(monkeypatch, beta, middle, rows):
    """As published: 2 * (cut // 2) pixels a side, around the pixel that is drawn."""
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor([beta]))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([middle]))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).roll(1))
    x = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    x_mix, _, lam = simclr.cutmix(x, 1.0)
    expected = torch.zeros(32, 32)
    for row in rows:
        expected[row, rows] = 1
    assert torch.equal(x_mix[0, 0], expected) and torch.equal(x_mix[1, 0], 1 - expected)
    assert lam.tolist() == pytest.approx([1 - len(rows) ** 2 / 32**2] * 2)


def test_cutmixs_middle_is_any_pixel_alike(monkeypatch):
    """A box of two pixels a side: the rows and columns pasted tell which pixel was drawn."""
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor([0.5]))
    x = torch.arange(2.0)[:, None, None, None].expand(2, 1, 4, 4)
    counts = torch.zeros(4, 4)
    for _ in range(4000):
        x_mix, perm, _ = simclr.cutmix(x, 1.0)
        if perm[0] == 1:
            pasted = x_mix[0, 0] == 1
            row, column = (pasted.any(dim=d).nonzero().max() for d in (1, 0))
            counts[row, column] += 1  # the middle is the last row and column of its box
    assert counts.min() > 80 and counts.max() < 180  # 125 on average


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_inputmixs_shares_follow_the_dirichlet_distribution(alpha):
    """Read off one-hot examples. d_k has mean 1/3 and variance 2 / (9 (3 alpha + 1))."""
    shares = simclr.inputmix(torch.eye(2000), alpha)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2000))
    own = shares.diagonal().clone()
    others = shares.fill_diagonal_(0).sort(dim=1).values
    assert own.min() >= 0.5 and not others[:, :-2].any()
    assert abs(own.mean() - (1 / 2 + 1 / 6)) < 0.01
    assert abs((2 * own).var() / (2 / (9 * (3 * alpha + 1))) - 1) < 0.1
