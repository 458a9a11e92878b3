# SPDX-License-Identifier: MIT
"""pretrain() of the four scripts: the paper's loop, resuming, what it logs and what it refuses."""

import ast
import copy
import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Child
from small import (SCRIPTS, Stop, assert_same, every_script, losses, recipe, setup, stop,
                   without_rate)
from torch import nn

import byol_imix as byol
import common
import moco_imix as moco
import npair_tabular as npair
import simclr_imix as simclr


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, the losses too: in float32 rounding sets two runs apart."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ----------------------------------------------------------------------- the paper's loop
# ----------------------------------------------------------------------- the paper's loop
def cross_entropy(a, b, v, tau):
    """Of cosine similarities with the labels v (N, classes)."""
    return F.cross_entropy(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / tau, v)


def reference(script, encoder, head, *rest, args):
    """Sections 3.1, 3.2 and 3.3 written out, one loop; returns the log and what is trained."""
    *predictor, loader = rest
    model, log, steps = nn.Sequential(encoder, head), [], len(loader)
    ema = copy.deepcopy(model)
    trained = nn.Sequential(model, *predictor)
    optimizer = torch.optim.SGD(trained.parameters(), momentum=0.9, weight_decay=args.weight_decay)
    torch.manual_seed(args.seed * 10**6)
    if script is moco:
        queue = F.normalize(torch.randn(args.queue, 8), dim=1)
    for epoch in range(4):
        torch.manual_seed(args.seed * 10**6 + epoch + 1)
        total = 0
        for i, (x, x_tilde, *y) in enumerate(loader):
            n, t = len(x), epoch * steps + i
            cosine = (1 + math.cos(math.pi * (t - steps) / (3 * steps))) / 2
            lr = args.lr * n / 256 * ((t + 1) / steps if epoch == 0 else cosine)
            optimizer.param_groups[0]["lr"] = lr
            if getattr(args, "inputmix", False):
                x = script.inputmix(x, 1.0)
                x_tilde = script.inputmix(x_tilde, 1.0)
            sides = [(x, x_tilde), (x_tilde, x)][: 1 + getattr(args, "symmetric", False)]
            loss = 0
            for x, x_tilde in sides:
                v = torch.eye(n)
                if getattr(args, "supervised", False):
                    v = (y[0][:, None] == y[0]).double()
                    v = v / v.sum(1, keepdim=True)
                if args.alpha > 0:
                    x, perm, lam = getattr(script, getattr(args, "mix", "mixup"))(x, args.alpha)
                    v = lam[:, None] * v + (1 - lam[:, None]) * v[perm]
                if script in (npair, simclr):
                    f, f_tilde = model(torch.cat([x, x_tilde])).chunk(2)
                    if getattr(args, "loss", "") == "nt-xent":
                        views = F.normalize(torch.cat([f, f_tilde]), dim=1)
                        logits = views @ views.T / args.temperature - 1e9 * torch.eye(2 * n)
                        loss = F.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))
                    else:
                        loss = cross_entropy(f, f_tilde, v, args.temperature)
                elif script is moco:
                    order = torch.randperm(n) if args.bn_groups > 1 else torch.arange(n)
                    size = n // args.bn_groups
                    f = torch.cat([model(part) for part in x.split(size)])
                    f_ema = torch.empty_like(f)
                    with torch.no_grad():
                        for part in order.split(size):
                            f_ema[part] = ema(x_tilde[part])
                    keys = F.normalize(torch.cat([f_ema, queue]), dim=1)
                    v = F.pad(v, [0, len(queue)])
                    if args.alpha > 0 or args.n_plus_k:
                        loss = cross_entropy(f, keys, v, args.temperature)
                    else:
                        loss = sum(cross_entropy(
                            f[k : k + 1], torch.cat([keys[k : k + 1], keys[n:]]),
                            torch.eye(1, 1 + len(queue)), args.temperature) for k in range(n)) / n
                    queue = keys[: args.queue]
                else:
                    g = F.normalize(predictor[0](model(x)), dim=1)
                    with torch.no_grad():
                        targets = F.normalize(ema(x_tilde), dim=1)
                    loss = loss + (2 - 2 * (v * (g @ targets.T)).sum(1)).mean() / len(sides)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for theta_ema, theta in zip(ema.parameters(), model.parameters()):
                m = getattr(args, "ema", 0)
                theta_ema.data = m * theta_ema.data + (1 - m) * theta.data
            total += loss.item() / steps
        log.append({"loss": total, "lr": lr})
    return log, trained, ema


@pytest.mark.parametrize("script, options", [
    (npair, {}), (npair, {"alpha": 0.0}), (npair, {"supervised": True}), (simclr, {}),
    (simclr, {"mix": "cutmix"}), (simclr, {"alpha": 0.0, "loss": "nt-xent"}),
    (simclr, {"inputmix": True, "alpha": 0.3}), (moco, {}), (moco, {"alpha": 0.0}),
    (moco, {"alpha": 0.0, "n_plus_k": True}), (moco, {"bn_groups": 2}), (moco, {"queue": 5}),
    (moco, {"inputmix": True, "alpha": 0.3}), (byol, {}), (byol, {"alpha": 0.0}),
    (byol, {"symmetric": True, "ema": 0.0}), (byol, {"inputmix": True, "alpha": 0.3})],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value))
def test_pretrain_is_the_papers_loop(float64, tmp_path, script, options):
    *nets, loader = setup(script, y=torch.arange(64) % 5)  # which the supervised losses alone take
    args = recipe(script, weight_decay=0.01, lr=0.16, seed=3, **options)
    expected, trained, ema = reference(script, *copy.deepcopy(nets), loader, args=args)
    log = script.pretrain(*nets, loader, args, tmp_path)
    for row, row_expected in zip(log, expected, strict=True):
        assert row["loss"] == pytest.approx(row_expected["loss"], rel=1e-9)
        assert row["lr"] == pytest.approx(row_expected["lr"])
    exact = {"rtol": 1e-7, "atol": 1e-9}
    for net, net_expected in zip(nets, [*trained[0], *trained[1:]], strict=True):
        torch.testing.assert_close(net.state_dict(), net_expected.state_dict(), **exact)
    if script in (moco, byol):
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        found = state["ema" if "ema" in state else "target"]
        torch.testing.assert_close(found, ema.state_dict(), **exact)


def test_learning_rate_at_its_corners():
    args = npair.Args(lr=1.0, epochs=100, warmup_epochs=10)
    rates = [npair.learning_rate(step, 1, args) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1 and rates[55] == pytest.approx(0.5)
    args = npair.Args(lr=0.5, epochs=500, warmup_epochs=5, schedule="step")
    rates = [npair.learning_rate(step, 3, args) for step in range(1500)]
    assert rates[:2] == [0.5 / 15, 1.0 / 15] and set(rates[14:900]) == {0.5}
    assert set(rates[900:1200]) == {0.5 * 0.1} and set(rates[1200:]) == {0.5 * 0.1**2}
    for epochs, warmup in ((500, 5), (20, 5), (19, 4), (3, 0)):  # at most a quarter
        args = npair.Args(lr=1.0, epochs=epochs, warmup_epochs=5)
        rates = [npair.learning_rate(step, 1, args) for step in range(epochs)]
        assert rates.index(1.0) == max(warmup - 1, 0)


@every_script
def test_evaluating_on_the_way_changes_nothing(script):
    seen = []
    without = script.pretrain(*setup(script), recipe(script))
    log = script.pretrain(*setup(script), recipe(script, eval_every=2),
                          evaluate=lambda: seen.append(torch.rand(1000)) or 0.5)
    assert losses(without) == losses(log) and seen


@every_script
def test_networks_are_trained_in_training_mode(script):
    """Also those that come in eval mode, as after an evaluation of one's own."""
    logs = []
    for mode in (True, False):
        *nets, loader = setup(script)
        nets = [net.train(mode) for net in nets]
        logs.append(losses(script.pretrain(*nets, loader, recipe(script))))
    assert logs[0] == logs[1]


@every_script
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_reaches_the_networks_and_learns(script, monkeypatch, amp):
    name = {npair: "n_pair_loss", simclr: "n_pair_loss", moco: "moco_loss", byol: "byol_loss"}
    inner, seen = getattr(script, name[script]), set()

    def loss(f, f_other, *rest):
        seen.update([f.dtype, f_other.dtype])
        return inner(f, f_other, *rest)

    monkeypatch.setattr(script, name[script], loss)
    *nets, loader = setup(script)
    log = script.pretrain(*nets, loader, recipe(script, epochs=20, amp=amp))
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(p.dtype == torch.float32 for p in nets[0].parameters())


@every_script
def test_compiled_networks_train_alike(script, float64, monkeypatch):
    compiled = []
    quick = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or quick(net))
    logs = [losses(script.pretrain(*setup(script), recipe(script, compile=compile)))
            for compile in (False, True)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert len(compiled) == (1 if script in (npair, simclr) else 2)


# ----------------------------------------------------------------------- MoCo's groups
class Recorder(nn.Module):
    """A linear encoder that notes which rows come at once; a row's first value is its number."""

    def __init__(self, log):
        super().__init__()
        self.linear, self.log = nn.Linear(2, 8), log

    def forward(self, x):
        self.log.append((torch.is_grad_enabled(), x[:, 0].long().tolist()))
        return self.linear(x)

    def __deepcopy__(self, memo):
        twin = Recorder(self.log)
        twin.load_state_dict(self.state_dict())
        return twin


def test_mocos_keys_pass_in_other_groups_than_its_queries(monkeypatch):
    """Random parts of the batch, drawn anew each step; every key comes back to its place."""
    log, inner = [], moco.moco_own_loss
    numbered = torch.stack([torch.arange(8.0), torch.ones(8)], dim=1)

    def loss(f, f_ema, *rest):
        torch.testing.assert_close(f, f_ema)  # m = 1 and rate 0: theta_EMA is theta
        return inner(f, f_ema, *rest)

    monkeypatch.setattr(moco, "moco_own_loss", loss)
    args = recipe(moco, alpha=0.0, bn_groups=2, epochs=1, ema=1.0, lr=0.0)
    moco.pretrain(Recorder(log), nn.Linear(8, 8), [(numbered, numbered)] * 20, args)
    queries, keys = ([rows for is_query, rows in log if is_query == kind] for kind in (True, False))
    assert queries == [[0, 1, 2, 3], [4, 5, 6, 7]] * 20
    for one, other in zip(keys[::2], keys[1::2], strict=True):
        assert sorted(one + other) == list(range(8)) and len(one) == 4
    assert len({frozenset(one) for one in keys[::2]}) > 10  # of 70


# ----------------------------------------------------------------------- resuming
@every_script
@pytest.mark.parametrize("options", [{}, {"amp": "fp16"}], ids=str)
def test_going_on_from_a_checkpoint_is_bit_exact(tmp_path, script, options):
    """Whatever the state of the random numbers is, and whatever the weights were, at the start."""
    args = recipe(script, epochs=6, eval_every=3, **options)
    outs = [tmp_path / name for name in ("whole", "parts")]
    for out in outs:
        out.mkdir()
    whole, again = setup(script), setup(script, seed=1)
    log = script.pretrain(*whole, args, outs[0], lambda: 0.5)
    with pytest.raises(Stop):
        script.pretrain(*setup(script), args, outs[1], stop)
    saved = torch.load(outs[1] / "checkpoint.pt", weights_only=True)
    assert 0 < len(saved["log"]) < 6
    setup(script)[0].load_state_dict(torch.load(outs[1] / "encoder.pt", weights_only=True))
    torch.rand(3)
    log_again = script.pretrain(*again[:-1], whole[-1], args, outs[1], lambda: 0.5)
    assert losses(log) == losses(log_again)
    assert without_rate(outs[0]) == without_rate(outs[1])
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in outs]
    for state in states:
        state.pop("log")
    assert_same(*states)
    weights = [torch.load(out / "encoder.pt", weights_only=True) for out in outs]
    assert_same(*weights)
    assert_same(dict(weights[0]), dict(whole[0].state_dict()))


def damaged(how, path, tmp_path):
    """Damage the checkpoint in one of these ways."""
    state = torch.load(path, weights_only=True)
    weights = next(iter(state.values()))
    if how == "cut":
        return path.write_bytes(path.read_bytes()[:-1000])
    if how == "no key":
        state.pop("optimizer")
    elif how == "other weights":
        weights[next(iter(weights))] = torch.zeros(3, 3)
    elif how == "another momentum":
        state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3, 3)
    elif how == "code":
        class Evil:
            def __reduce__(self):
                return (tmp_path / "done").touch, ()
        state["log"] = Evil()
    torch.save(state, path)


@every_script
@pytest.mark.parametrize("how", ["cut", "no key", "other weights", "another momentum", "code"])
def test_what_is_no_checkpoint_of_these_networks_is_refused(tmp_path, script, how):
    """In a fork: a fused step past a tensor's end may end the process. No pickle's code is run."""
    path = tmp_path / "checkpoint.pt"
    script.pretrain(*setup(script), recipe(script, epochs=2), tmp_path)
    damaged(how, path, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def go_on():
        with pytest.raises((OSError, ValueError), match="checkpoint.pt") as error:
            script.pretrain(*setup(script), recipe(script), tmp_path)
        assert str(error.value).count("\n") == 0

    child = Child(go_on).wait()
    assert child.rc == 0, child.err
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


# ----------------------------------------------------------------------- the log
@every_script
def test_std_tells_how_far_embeddings_are_spread(script):
    """Of normalised embeddings of the last batch: the mean over dimensions, times sqrt(D)."""
    for spread, low, high in ((1.0, 0.9, 1.05), (0.01, 0.0, 0.05)):
        torch.manual_seed(1)
        batches = [torch.ones(64, 32) + (spread < 1 or -1) + spread * torch.randn(64, 32)
                   for _ in range(3)]
        nets = [nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False), nn.Identity()]
        args = recipe(script, alpha=0.0, lr=0.0, epochs=1, dim=16)
        log = script.pretrain(*nets[: 3 if script is byol else 2], [(x, x) for x in batches], args)
        f = F.normalize(nets[1](nets[0](batches[-1])), dim=1)
        expected = sum(f[:, d].std() for d in range(16)) / 16 * 16**0.5
        assert log[0]["std"] == pytest.approx(expected.item(), rel=0.01)
        assert low <= log[0]["std"] <= high


@every_script
def test_log_csv_has_a_row_an_epoch(tmp_path, script):
    log = script.pretrain(*setup(script), recipe(script, eval_every=2, epochs=5), tmp_path,
                          lambda: 0.625)
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    assert header == "epoch,loss,lr,std,test_accuracy,examples_per_s"
    rows = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    assert [float(row["loss"]) for row in rows] == losses(log)
    assert [row["test_accuracy"] for row in rows] == ["", "0.625", "", "0.625", ""]


# ----------------------------------------------------------------------- loaders
@every_script
def test_a_smaller_last_batch_counts_by_its_size(script):
    """Its learning rate is per example; the loss is the mean over the steps."""
    log = script.pretrain(*setup(script, sizes=(16, 16, 6)), recipe(script, warmup_epochs=0))
    full = script.pretrain(*setup(script, sizes=(16, 16, 16)), recipe(script, warmup_epochs=0))
    for row, row_full in zip(log, full):
        assert row["lr"] == pytest.approx(row_full["lr"] * 6 / 16)
        assert math.isfinite(row["loss"]) and math.isfinite(row["std"])


@every_script
@pytest.mark.parametrize("what", ["pairs and labels", "empty", "one example", "no classes"])
def test_a_loader_of_another_form_is_told_so(script, what):
    *nets, loader = setup(script)
    x, x_tilde = next(iter(loader))
    batches = {"pairs and labels": [((x, x_tilde), torch.zeros(16))], "empty": [],
               "one example": [(x[:1], x_tilde[:1])], "no classes": [(x, x_tilde)]}[what]
    options = {}
    if what == "no classes":
        if script not in (npair, simclr):
            return
        options = {"supervised": True}
    with pytest.raises(ValueError) as error:
        script.pretrain(*nets, batches, recipe(script, **options))
    assert str(error.value).count("\n") == 0 and "x_tilde" in str(error.value)


# ----------------------------------------------------------------------- what is not finite
@every_script
def test_a_broken_last_step_is_noticed_before_it_is_saved(monkeypatch, tmp_path, script):
    """A last step of an epoch that breaks the weights leaves that epoch's loss finite."""
    inner = script.learning_rate
    monkeypatch.setattr(script, "learning_rate",
                        lambda step, *rest: 1e45 if step == 5 else inner(step, *rest))
    with pytest.raises(FloatingPointError, match="epoch 2"):
        script.pretrain(*setup(script), recipe(script), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["log"]) == 1
    tensors = [t for t in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(t)]
    assert all(tensor.isfinite().all() for tensor in tensors)


@every_script
def test_broken_batchnorm_statistics_are_noticed(tmp_path, script):
    """A batch can break the running variance, which is of no use until the evaluation."""
    *nets, loader = setup(script)
    x = loader.x[:16]
    batches = [(x, x), (x, x * 1e25)]
    with pytest.raises(FloatingPointError, match="epoch 1"):
        script.pretrain(*nets, batches, recipe(script, lr=1e-9), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


# ----------------------------------------------------------------------- learning
def digits_of(kind):
    dataset = common.load_table if kind == "table" else common.load_images
    return dataset("digits", "data", torch.device("cpu"))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["table", "images"])
def test_dare_stays_finite_and_its_loss_falls(kind, alpha):
    data = digits_of(kind)
    if kind == "table":
        encoder, size = npair.MLP5Layer(data.groups, 2), 64
    else:
        encoder, size = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                                      nn.Flatten(), nn.Linear(576, 64)), 64
    args = simclr.Args(loss="dare", alpha=alpha, epochs=4, dim=32, batch_size=128)
    loader = common.TwoViews(data.x_train, data.view, 128)
    log = losses(simclr.pretrain(encoder, simclr.projection_head(size, 64), loader, args))
    assert all(map(math.isfinite, log)) and log[-1] < log[1] < log[0]


@pytest.mark.parametrize("m, alpha, predictor", [(0.99, 2.0, True), (0.0, 0.0, True),
                                                 (0.0, 0.0, False)])
def test_byol_and_simsiam_do_not_collapse_but_without_the_predictor(m, alpha, predictor):
    """Without a BatchNorm at the end, which would keep them from it."""
    data = digits_of("table")
    nets = [byol.MLP5Layer(data.groups, 2), byol.projection_head(64, 32)[:-1],
            byol.prediction_head(32, 64)[:-1] if predictor else nn.Identity()]
    args = byol.Args(epochs=12, lr=0.2, warmup_epochs=0, symmetric=True, ema=m, alpha=alpha)
    log = byol.pretrain(*nets, common.TwoViews(data.x_train, data.view, 128), args)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["std"] > 0.5 if predictor else log[-1]["std"] < 0.2


# ----------------------------------------------------------------------- each file on its own
@every_script
def test_a_script_copied_alone_trains_on_ones_own_tensors(tmp_path, script):
    """Into an empty folder; common.py is not there, and for tables nor are the libraries."""
    copied = tmp_path / "mine.py"
    copied.write_text(Path(script.__file__).read_text())

    def train():
        sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
        sys.modules.update({"common": None, "pandas": None, "sklearn": None})
        if script is npair:
            sys.modules.update({"torchvision": None, "torchaudio": None})
        spec = importlib.util.spec_from_file_location("mine", copied)
        mine = importlib.util.module_from_spec(spec)
        sys.modules["mine"] = mine  # where dataclass looks
        spec.loader.exec_module(mine)
        if script is simclr:
            encoder, size, x = mine.resnet("resnet18", 3, 8), 512, torch.randn(32, 3, 8, 8)
        else:
            encoder, size, x = mine.MLP5Layer([4, 2], 2), 64, torch.randn(64, 6)
        nets = [encoder, mine.projection_head(size, 32)]
        if script is byol:
            nets.append(mine.prediction_head(32, size))
        loader = [(batch, batch + 0.1) for batch in x.split(16)]
        log = mine.pretrain(*nets, loader, mine.Args(alpha=1.0, epochs=2, dim=32))
        assert len(log) == 2 and encoder(x).shape == (len(x), size)

    child = Child(train, cwd=tmp_path).wait()
    assert child.rc == 0, child.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_one_name_one_code():
    """What several scripts define under one name is the same in each, but for their own parts."""
    seen = {}
    for script in SCRIPTS:
        for node in ast.parse(Path(script.__file__).read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if node.name not in ("main", "make_encoder", "pretrain", "Args"):
                first = seen.setdefault(node.name, (script.__name__, ast.unparse(node)))
                assert first[1] == ast.unparse(node), f"{node.name}: {first[0]}, {script.__name__}"
    assert {"mixup", "gather", "save", "learning_rate", "parse_args"} <= seen.keys()


def test_every_file_carries_its_licence_and_fits_a_page():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        lines = path.read_text().splitlines()
        assert lines[0] == "# SPDX-License-Identifier: MIT", path
        assert max(map(len, lines)) <= 100, path
