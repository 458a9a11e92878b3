# SPDX-License-Identifier: MIT
"""simclr_imix.py's own parts: CutMix, NT-Xent, the ResNets, the loop."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import npair_tabular
import simclr_imix as simclr


@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_nt_xent_and_its_gradients_equal_the_equation(temperature):
    torch.manual_seed(0)
    f, f_tilde = (3 * torch.randn(5, 7) for _ in range(2))
    f.requires_grad_(), f_tilde.requires_grad_()
    views = torch.cat([f, f_tilde]).double()
    expected = 0
    for i in range(10):
        s = [torch.dot(views[i], view) / (views[i].norm() * view.norm()) for view in views]
        denominator = sum(torch.exp(s[k] / temperature) for k in range(10) if k != i)
        expected = expected - torch.log(torch.exp(s[(5 + i) % 10] / temperature) / denominator) / 10
    expected_gradients = torch.autograd.grad(expected, (f, f_tilde))
    loss = simclr.nt_xent_loss(f, f_tilde, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(loss, (f, f_tilde))
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_nt_xent_stays_float32_under_autocast():
    f, f_tilde = torch.randn(16, 8), torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = simclr.nt_xent_loss(f, f_tilde, 0.2)
    assert autocast.dtype == torch.float32
    assert torch.equal(autocast, simclr.nt_xent_loss(f, f_tilde, 0.2))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("shape", [(8, 8), (9, 13)])
def test_cutmix_lam_is_the_share_of_pixels_kept(alpha, shape):
    n, at_border = 6, 0
    x = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 3, *shape)
    for seed in range(200):
        torch.manual_seed(seed)
        x_mix, perm, lam = simclr.cutmix(x, alpha)
        assert lam.shape == (n,) and lam.min() >= 0.5 and lam.max() <= 1
        assert torch.equal(perm.sort().values, torch.arange(n))
        moved = perm != torch.arange(n)
        kept = (x_mix == x).float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(kept[moved], lam[moved])
        assert ((x_mix == x) | (x_mix == x[perm])).all()
        if moved.any() and lam[0] < 1:  # one box is pasted, in every image and channel
            pasted = (x_mix != x)[moved]
            assert (pasted == pasted[:1, :1]).all()
            rows, columns = pasted[0, 0].any(dim=1), pasted[0, 0].any(dim=0)
            assert torch.equal(pasted[0, 0], rows[:, None] & columns)
            for side in (rows, columns):
                inside = side.nonzero().flatten()
                assert len(inside) == inside[-1] - inside[0] + 1
            at_border += (rows[0] | rows[-1] | columns[0] | columns[-1]).item()
    assert at_border > 20  # boxes cut off at the border were among them


def test_cutmix_box_is_anywhere_and_of_lams_size():
    torch.manual_seed(0)
    x = torch.arange(2.0)[:, None, None, None].expand(2, 1, 32, 32)
    pasted, kept = torch.zeros(32, 32), []
    for _ in range(3000):
        x_mix, perm, lam = simclr.cutmix(x, 1.0)
        if perm[0] == 1:
            pasted += x_mix[0, 0]
            kept.append(lam[0])
    assert pasted.min() > 0.2 * pasted.max() and pasted[16, 16] > 0.9 * pasted.max()
    # Without the border, lam would be max(B, 1 - B) of a uniform B, 0.75 on average; boxes that
    # are cut off keep more.
    assert 0.76 < torch.stack(kept).mean() < 0.84


@pytest.mark.parametrize("beta, middle, rows, kept", [
    (0.75, 16, range(8, 24), 0.75),  # a quarter of the pixels: 16 a side
    (0.25, 16, range(8, 24), 0.75),  # folded
    (0.75, 3, range(0, 11), 1 - 11**2 / 32**2),  # cut off at the border
    (0.9, 16, range(11, 21), 1 - 10**2 / 32**2),  # 0.316 of 32 is 10.1
    (0.886, 16, range(11, 21), 1 - 10**2 / 32**2),  # 0.338 of 32 is 10.8
    (0.87, 16, range(11, 21), 1 - 10**2 / 32**2),  # 0.361 of 32 is 11.5: an even side
    (0.998, 16, range(0), 1)])  # 0.045 of 32 is 1.4: no box
def test_cutmix_box_by_hand(monkeypatch, beta, middle, rows, kept):
    """As published: 2 * (cut // 2) pixels a side, around the pixel that is drawn."""
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor([beta]))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([middle]))
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n).roll(1))
    x = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    x_mix, _, lam = simclr.cutmix(x, 1.0)
    expected = torch.zeros(32, 32)
    for row in rows:
        expected[row, rows] = 1
    assert torch.equal(x_mix[0, 0], expected) and torch.equal(x_mix[1, 0], 1 - expected)
    assert lam.tolist() == pytest.approx([kept, kept])


def test_inputmix_by_hand(monkeypatch):
    """Shares 1/2 + d_0/2, d_1/2 and d_2/2 of an example and its two partners."""
    d = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    partners = iter([torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])])
    monkeypatch.setattr(torch.distributions.Dirichlet, "sample", lambda self: d)
    monkeypatch.setattr(torch, "randperm", lambda n, device: next(partners))
    x = torch.tensor([[1.0], [10.0], [100.0]])
    expected = [0.6 * 1 + 0.15 * 10 + 0.25 * 100, 10.0, 0.5 * 100 + 0.5 * 10]
    assert simclr.inputmix(x, 1.0).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_inputmix_shares_follow_the_dirichlet_distribution(alpha):
    """Read off one-hot examples. d_k has mean 1/3 and variance 2 / (9 (3 alpha + 1))."""
    torch.manual_seed(0)
    n = 2000
    shares = simclr.inputmix(torch.eye(n), alpha)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(n))
    own = shares.diagonal().clone()
    others = shares.fill_diagonal_(0).sort(dim=1).values
    assert own.min() >= 0.5 and not others[:, :-2].any()
    assert abs(own.mean() - (1 / 2 + 1 / 6)) < 0.01
    assert abs((2 * own).var() / (2 / (9 * (3 * alpha + 1))) - 1) < 0.1


def test_inputmix_mixes_both_views_on_their_own_and_before_imix(monkeypatch):
    seen, mixed = [], []
    inner = simclr.inputmix
    monkeypatch.setattr(simclr, "inputmix",
                        lambda x, alpha: seen.append(inner(x, alpha)) or seen[-1])
    monkeypatch.setattr(simclr, "mixup", lambda x, alpha: mixed.append(x) or (x, None, None))
    x = torch.randn(16, 1, 4, 4)
    nets = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), simclr.projection_head(16, 8)
    simclr.pretrain(*nets, [(x, x)], simclr.Args(epochs=1, inputmix=True))
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])
    assert len(mixed) == 1 and mixed[0] is seen[0]


def test_lam_one_of_cutmix_leaves_the_loss_plain():
    f, f_tilde = torch.randn(6, 8), torch.randn(6, 8)
    plain = simclr.n_pair_loss(f, f_tilde, 0.2)
    one = torch.ones(1).expand(6)
    assert torch.equal(simclr.n_pair_loss(f, f_tilde, 0.2, torch.randperm(6), one), plain)
    assert torch.equal(npair_tabular.n_pair_loss(f, f_tilde, 0.2), plain)


@pytest.mark.parametrize("arch, features, millions", [
    ("resnet18", 512, 11.2), ("resnet34", 512, 21.3), ("resnet50", 2048, 23.5)])
def test_resnets(arch, features, millions):
    net = simclr.resnet(arch, 3, 32)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, features)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    assert net.conv1.stride == (1, 1) and isinstance(net.maxpool, torch.nn.Identity)
    shapes = []
    net.layer1.register_forward_hook(lambda module, args, output: shapes.append(output.shape[2:]))
    net(torch.randn(2, 3, 32, 32))
    assert shapes == [(32, 32)]  # the small stem keeps the image's size


def test_resnet_for_large_images_and_one_channel():
    net = simclr.resnet("resnet18", 1, 96)
    assert net.conv1.kernel_size == (7, 7) and isinstance(net.maxpool, torch.nn.MaxPool2d)
    assert net(torch.randn(2, 1, 96, 96)).shape == (2, 512)
    he = math.sqrt(2 / (64 * 49))  # He's initialisation, fan-out
    assert abs(net.conv1.weight.std() - he) < 0.002


@pytest.mark.parametrize("mix, loss, alpha", [("mixup", "n-pair", 1.0), ("cutmix", "n-pair", 1.0),
                                              ("mixup", "n-pair", 0.0), ("mixup", "nt-xent", 0.0)])
def test_pretrain_is_section_3_1_written_out(mix, loss, alpha):
    """Only the anchors are mixed, in one pass with the other views; the loss falls."""
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64)  # in float32, rounding sets two runs apart
    loader = [(x, x + 0.1 * torch.randn_like(x)) for _ in range(4)]
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(encoder, simclr.projection_head(288, 16)).double()
    ours = copy.deepcopy(model)
    args = simclr.Args(alpha=alpha, mix=mix, loss=loss, lr=0.16, epochs=4, warmup_epochs=1,
                       temperature=0.5, schedule="step", weight_decay=0.1)
    log = simclr.pretrain(*ours, loader, args)
    assert log[-1]["loss"] < log[0]["loss"]

    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=0.1)
    rates = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    for step, (x, x_tilde) in enumerate(4 * loader):
        if step % 4 == 0:
            torch.manual_seed(step // 4 + 1)
        optimizer.param_groups[0]["lr"] = 0.16 * 16 / 256 * rates[step]
        perm, lam = torch.arange(16), torch.ones(16)
        if alpha:
            x, perm, lam = getattr(simclr, mix)(x, alpha)
        f = F.normalize(model(torch.cat([x, x_tilde])), dim=1)
        if loss == "n-pair":
            logits = f[:16] @ f[16:].T / 0.5
            loss_i = F.cross_entropy(logits, torch.arange(16), reduction="none")
            loss_j = F.cross_entropy(logits, perm, reduction="none")
            value = (lam * loss_i + (1 - lam) * loss_j).mean()
        else:
            logits = f @ f.T / 0.5 - 1e9 * torch.eye(32)
            value = F.cross_entropy(logits, (torch.arange(32) + 16) % 32)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-4)


def test_autocast_reaches_the_networks(monkeypatch):
    seen, inner = [], simclr.n_pair_loss
    monkeypatch.setattr(simclr, "n_pair_loss",
                        lambda f, *rest: seen.append(f.dtype) or inner(f, *rest))
    x = torch.randn(16, 1, 4, 4)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    args = simclr.Args(epochs=1, amp="bf16")
    simclr.pretrain(encoder, simclr.projection_head(16, 8), [(x, x)], args)
    assert seen == [torch.bfloat16]


def test_nt_xent_has_no_labels_to_mix():
    with pytest.raises(ValueError, match="--alpha 0"):
        simclr.Args(loss="nt-xent", alpha=1.0)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"mix": "cutmix"},
                                     {"alpha": 0.0, "loss": "nt-xent"}], ids=str)
def test_it_learns_from_the_views_of_images(options):
    """Each view is told from 128 others' ever better, and the features tell ten digits apart."""
    torch.manual_seed(0)
    data = common.load_images("digits", "data", torch.device("cpu"))
    encoder = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                            nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
                            nn.Flatten())
    args = simclr.Args(epochs=8, lr=0.25, **options)
    loader = common.TwoViews(data.x_train, data.view, 128)
    log = simclr.pretrain(encoder, simclr.projection_head(288, 64), loader, args)
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    assert common.linear_eval(encoder, data, 20)["test_accuracy"] > 0.25  # chance is 0.1
