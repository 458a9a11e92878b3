# SPDX-License-Identifier: MIT
"""Evaluations, and `python common.py`: what comes after training."""

import copy
import csv
import json
import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import npair_tabular

DIGITS = "--dataset digits --width 4 --batch-size 128 --device cpu".split()


def same(x):
    return x


def dataset(x, y, x_test, y_test, **rest):
    classes = 0 if y.is_floating_point() else int(y.max()) + 1
    return common.Dataset(x, y, x_test, y_test, classes, same, same, **rest)


def train(out, *flags):
    npair_tabular.main([*DIGITS, "--out", str(out), *map(str, flags)])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 30 epochs on digits."""
    return train(tmp_path_factory.mktemp("runs") / "digits", "--epochs", 30)


@pytest.fixture
def copied(run, tmp_path):
    """The same, to write into."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def digits():
    return common.load_table("digits", "data", torch.device("cpu"))


def encoder_of(run, data):
    encoder = npair_tabular.MLP5Layer(data.groups, 4)
    encoder.load_state_dict(torch.load(run / "encoder.pt", weights_only=True))
    return encoder


def untrained_encoder(data):
    torch.manual_seed(0)
    return npair_tabular.MLP5Layer(data.groups, 4)


def accuracy(result):
    return result["test_accuracy"]


# ----------------------------------------------------------------------- the paper's evaluation
def test_linear_eval_is_the_protocol_written_out():
    """It agrees with a classifier that is trained here, on almost all of many test points.

    The training labels can't be learned, so that the weights follow every detail.
    """
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randint(3, (200,))
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)).eval()
    torch.manual_seed(3)
    classifier = nn.Linear(8, 3)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    features = encoder(2 * x).detach()
    optimizer = torch.optim.SGD(classifier.parameters(), momentum=0.9)
    for epoch in range(20):
        optimizer.param_groups[0]["lr"] = 3 * 0.2 ** ((epoch >= 16) + (epoch >= 18) + (epoch >= 19))
        order = torch.randperm(200)
        for index in (order[:64], order[64:128], order[128:192]):
            optimizer.zero_grad()
            F.cross_entropy(classifier(features[index]), y[index]).backward()
            optimizer.step()
    train_correct = (classifier(features).argmax(1) == y).sum().item()
    x_test = torch.randn(20_000, 5)
    y_test = classifier(encoder(2 * x_test)).argmax(1)
    encoder.train()
    data = common.Dataset(x, y, x_test, y_test, 3, lambda x: x + 9, lambda x: 2 * x)
    result = common.linear_eval(encoder, data, epochs=20, batch_size=64, lr=3.0, seed=3)
    assert y_test.bincount(minlength=3).min() > 1000
    assert accuracy(result) > 0.999
    assert result["train_accuracy"] == train_correct / 200
    for part in ("lr 3", "batch 64", "20 epochs"):
        assert part in result["protocol"]


def thirds(n=600, n_test=2500):
    """One-hot features of three classes; a quarter of the test labels is wrong."""
    y, y_test = torch.arange(n) % 3, torch.arange(n_test) % 3
    wrong = torch.where(torch.arange(n_test) < n_test / 4, (y_test + 1) % 3, y_test)
    return dataset(torch.eye(3)[y], y, torch.eye(3)[y_test], wrong)


def test_few_examples_shrink_batch_and_learning_rate():
    one, other = (common.linear_eval(nn.Linear(3, 3), thirds(), 10, batch_size, lr)
                  for batch_size, lr in ((2400, 10.0), (600, 2.5)))
    assert one["protocol"] == other["protocol"] and "lr 2.5, batch 600" in one["protocol"]


def test_training_views_are_drawn_anew_each_epoch():
    data, drawn = thirds(), []
    data.eval_view = lambda x: drawn.append(len(x)) or x
    assert accuracy(common.linear_eval(nn.Identity(), data, epochs=10)) == 0.75
    assert sum(drawn) == 10 * 600


@pytest.mark.parametrize("evaluation", [common.linear_eval, common.finetune])
def test_few_labels_are_a_stratified_share(evaluation, monkeypatch):
    seen, inner = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y: seen.append(y) or inner(x, y))
    result = evaluation(nn.Identity(), thirds(), epochs=3, batch_size=20, labels=0.1)
    assert torch.cat(seen).bincount().tolist() == [60, 60, 60]  # in three epochs
    assert "60 labels" in result["protocol"]
    for share in (0.001, 0.0, 1.0, 2.0):
        with pytest.raises(common.DataError, match="--labels"):
            evaluation(nn.Identity(), thirds(), labels=share)


def test_batch_norm_is_in_eval_mode():
    """In training mode it would centre the shifted test features; so all are of class 0."""
    data = thirds()
    data.x_test = torch.tensor([9.0, 0, 0]).expand(2500, 3)
    expected = (data.y_test == 0).double().mean().item()
    for evaluation in (common.linear_eval, common.sklearn_eval):
        assert accuracy(evaluation(nn.BatchNorm1d(3), data)) == pytest.approx(expected)


@pytest.mark.parametrize("evaluation", [common.linear_eval, common.finetune, common.sklearn_eval])
def test_encoder_and_random_numbers_are_left_as_they_were(evaluation):
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    encoder[2].eval()
    state, rng = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    first = evaluation(encoder, thirds())
    assert torch.equal(rng, torch.get_rng_state())
    torch.testing.assert_close(encoder.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in encoder] == [True, True, False]
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    torch.rand(5)
    assert evaluation(encoder, thirds()) | {"seconds": 0} == first | {"seconds": 0}


def test_many_test_rows_are_announced(capsys):
    data = thirds(n=30, n_test=100_002)
    common.linear_eval(nn.Identity(), data, epochs=1)
    assert "100,002 test" in capsys.readouterr().out
    common.linear_eval(nn.Identity(), thirds(), epochs=1)
    assert not capsys.readouterr().out


# ----------------------------------------------------------------------- fine-tuning
def test_fine_tuning_beats_the_frozen_encoder(run, digits):
    encoder = encoder_of(run, digits)
    frozen = accuracy(common.linear_eval(encoder, digits, batch_size=512))
    assert frozen > 0.88
    assert accuracy(common.finetune(encoder, digits, batch_size=512)) > frozen + 0.02


def test_with_few_labels_fine_tuning_beats_training_from_nothing(run, digits):
    tuned, nothing = (accuracy(common.finetune(encoder, digits, batch_size=512, labels=0.1))
                      for encoder in (encoder_of(run, digits), untrained_encoder(digits)))
    assert 0.5 < nothing < tuned - 0.02


# ----------------------------------------------------------------------- the comparison
class Times(nn.Module):
    def __init__(self, encoder, factor):
        super().__init__()
        self.encoder, self.factor = encoder, factor

    def forward(self, x):
        return self.factor * self.encoder(x)


def test_the_scale_of_features_does_not_count(run, digits):
    one, other = (accuracy(common.sklearn_eval(Times(encoder_of(run, digits), factor), digits, 0.5))
                  for factor in (1e-4, 100))
    assert other == pytest.approx(one, abs=0.02)


def test_an_encoder_that_learned_nothing_reads_as_the_untrained_one(tmp_path):
    out = train(tmp_path / "run", "--epochs", 6, "--lr", 1e-12)
    common.main([str(out)])
    result = json.loads((out / "result-comparison.json").read_text())
    trained, untrained, raw = map(accuracy, result.values())
    assert trained == pytest.approx(untrained, abs=0.03)
    assert 0.5 < trained < raw - 0.1


def blobs(n, seed=0):
    """Two blobs that overlap in 2 of 100 columns, the others noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    x = rng.normal(size=(n, 100))
    x[:, :2] += y[:, None]
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def test_noisy_blobs_are_read_as_well_as_by_logistic_regression_cv():
    from sklearn.linear_model import LogisticRegressionCV

    for n in (300, 3000):
        data = dataset(*blobs(n), *blobs(4000, seed=1))
        peer = LogisticRegressionCV(Cs=10, cv=5, scoring="accuracy", use_legacy_attributes=False,
                                    l1_ratios=(0,))
        peer.fit(data.x_train.numpy(), data.y_train.numpy())
        expected = peer.score(data.x_test.numpy(), data.y_test.numpy())
        assert accuracy(common.sklearn_eval(nn.Identity(), data)) > expected - 0.02


def test_20_000_of_more_training_examples_serve():
    data = thirds(n=30_000)
    result = common.sklearn_eval(nn.Identity(), data)
    assert accuracy(result) == 0.75 and "20000 labels" in result["protocol"]


def test_ridge_regression_chooses_its_penalty():
    """Of noise, and of columns that are nearly equal, no penalty alone reads both well."""
    from sklearn.linear_model import Ridge

    rng, datas, table = np.random.default_rng(0), [], []
    for n, noise, spread in ((100, 3.0, 1.0), (300, 0.003, 0.01)):
        x = rng.normal(size=(n + 2000, 1)) * (spread < 1) + spread * rng.normal(size=(n + 2000, 50))
        y = (x - x.mean(1, keepdims=True)) @ rng.normal(size=50)
        y = torch.tensor(y / y.std() + noise * rng.normal(size=len(y)))
        x = torch.tensor((x - x[:n].mean(0)) / x[:n].std(0)).float()
        datas.append(dataset(x[:n], y[:n], x[n:], y[n:]))
        table.append([Ridge(penalty).fit(x[:n], y[:n]).score(x[n:], y[n:])
                      for penalty in np.logspace(-3, 5, 17)])
    least = np.max(table, axis=1) - 0.1
    assert not (np.array(table).T > least).all(axis=1).any()
    for data, bound in zip(datas, least):
        assert common.sklearn_eval(nn.Identity(), data)["test_r2"] > bound


def test_evaluate_of_classes_numbers_and_nothing(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert common.evaluate(nn.Identity(), thirds(), 0, path) == 0.75
    assert "SGD" in json.loads(path.read_text())["protocol"]
    x = torch.arange(40.0)[:, None]
    numbers = dataset(x, 2 * x[:, 0].double(), x, 2 * x[:, 0].double())
    assert common.evaluate(nn.Identity(), numbers, 0, path) > 0.99
    assert json.loads(path.read_text())["test_r2"] > 0.99
    nothing = common.Dataset(x, torch.full([40], -1), x[:0], torch.zeros(0).long(), 0, same, same)
    common.evaluate(nn.Identity(), nothing, 0, path)
    assert list(json.loads(path.read_text())) == ["protocol"]
    assert len(capsys.readouterr().out.splitlines()) == 3


# ----------------------------------------------------------------------- views of the evaluation
@pytest.mark.parametrize("size, pad", [(8, 1), (32, 4)])
def test_padded_crop_shifts_by_an_eighth(size, pad):
    x = torch.zeros(2000, 1, size, size)
    x[:, :, size // 2, size // 2] = 1
    moved = common.padded_crop(x).flatten(1)
    assert torch.equal(moved.sum(1), torch.ones(2000))
    at = moved.argmax(1)
    for shift in (at // size - size // 2, at % size - size // 2):
        assert shift.unique().tolist() == list(range(-pad, pad + 1))


# ----------------------------------------------------------------------- features.npz
def test_features_are_in_the_order_of_names_without_silence(tmp_path):
    names = np.array(["no/2.wav", "", "go/1.wav", "", "no/1.wav", "go/9.wav"])
    x = torch.arange(6.0)[:, None].repeat(1, 3)
    y = torch.tensor([1, 2, 0, 2, 1, 0])
    data = dataset(x[:4], y[:4], x[4:], y[4:], names=names,
                   spec={"classes": ["go", "no", "silence"]})
    common.save_features(tmp_path / "features.npz", nn.Identity(), data)
    saved = np.load(tmp_path / "features.npz")
    assert saved["name"].tolist() == ["go/1.wav", "go/9.wav", "no/1.wav", "no/2.wav"]
    assert saved["features"][:, 0].tolist() == [2, 5, 4, 0]
    assert saved["label"].tolist() == [0, 0, 1, 1]
    assert saved["test"].tolist() == [False, True, True, False]
    assert saved["classes"].tolist() == ["go", "no", "silence"]


def test_features_of_a_table_are_in_its_order(copied, digits):
    from sklearn.datasets import load_digits

    common.main([str(copied), "--features"])
    saved = np.load(copied / "features.npz")
    assert saved["name"].tolist() == list(range(1797))
    assert np.array_equal(saved["label"], load_digits().target)
    assert saved["test"].sum() == 360
    expected = common.encode(encoder_of(copied, digits), same, digits.x_test)
    assert torch.equal(torch.tensor(saved["features"])[digits.names[-360:]], expected)


# ----------------------------------------------------------------------- the command
def test_the_comparison(copied, capsys):
    common.main([str(copied)])
    shown = capsys.readouterr().out
    results = json.loads((copied / "result-comparison.json").read_text())
    trained, untrained, raw = map(accuracy, results.values())
    assert untrained + 0.1 < trained and raw > 0.94
    for name, result in results.items():
        assert f"test accuracy {accuracy(result):.4f}" in shown and name in shown
        assert "logistic" in result["protocol"] and "1437 labels" in result["protocol"]
    assert "30 of 30 epochs" in shown


def test_other_evaluations(copied):
    common.main([str(copied), "--probe", "sgd", "--linear-epochs", "100"])
    (result,) = json.loads((copied / "result-sgd.json").read_text()).values()
    assert result | {"seconds": 0} == (
        json.loads((copied / "result.json").read_text()) | {"seconds": 0})
    common.main([str(copied), "--finetune", "--labels", "0.1", "--linear-epochs", "3",
                 "--linear-lr", "0.1", "--linear-batch-size", "64"])
    results = json.loads((copied / "result-finetune-labels0.1.json").read_text())
    assert len(results) == 2
    for result in results.values():
        for part in ("lr 0.1", "batch 64", "3 epochs", "143 labels"):
            assert part in result["protocol"]


def test_a_run_that_is_not_over(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"epochs": 500}))
    common.main([str(copied), "--probe", "sgd", "--linear-epochs", "1"])
    assert "after 30 of 500 epochs" in capsys.readouterr().out
    (copied / "encoder.pt").unlink()
    for folder in (copied, copied / "nowhere"):
        with pytest.raises(common.DataError, match=str(folder)):
            common.main([str(folder)])


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_that_hold_code_are_refused(copied, tmp_path):
    torch.save({"weights": Code(tmp_path / "it-ran")}, copied / "encoder.pt")
    with pytest.raises(common.DataError, match="encoder.pt"):
        common.main([str(copied)])
    assert not (tmp_path / "it-ran").exists()
    (copied / "encoder.pt").write_bytes(b"")
    with pytest.raises(common.DataError, match="encoder.pt"):
        common.main([str(copied)])


def test_a_script_that_is_none_of_these_is_not_imported(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"script": "this"}))
    with pytest.raises(common.DataError, match="this"):
        common.main([str(copied)])
    assert "this" not in sys.modules


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["common.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(common.__file__, run_name="__main__")
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("common.py: ") and message.count("\n") == 1


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["width", "colour", "kind"], *rows])
    return path


def test_new_rows_are_embedded(tmp_path, monkeypatch):
    for name in ("torchvision", "torchaudio"):  # a table needs neither
        monkeypatch.setitem(sys.modules, name, None)
    rng = np.random.default_rng(0)
    rows = [[f"{rng.normal():.3f}", "red blue".split()[i % 2], "ab"[i % 2]] for i in range(60)]
    table = write_table(tmp_path / "mine.csv", rows)
    out = train(tmp_path / "run", "--dataset", table, "--label-column", "kind", "--epochs", 2)
    common.main([str(out), "--features"])
    table.unlink()  # new rows take the run folder alone
    new = write_table(tmp_path / "new.csv", [rows[k] for k in (7, 3)])
    common.main([str(out), "--embed", str(new)])
    features, of_run = (np.load(out / f"{name}.npz") for name in ("features-new", "features"))
    assert features["name"].tolist() == [0, 1]
    np.testing.assert_allclose(features["features"], of_run["features"][[7, 3]], atol=1e-6)
    for bad in ("inf", "1e300"):
        write_table(new, [rows[0], [bad, "red", "a"]])
        with pytest.raises(common.DataError):
            common.main([str(out), "--embed", str(new)])
    for path in ("", tmp_path / "nowhere.csv"):
        with pytest.raises((common.DataError, OSError)):
            common.main([str(out), "--embed", str(path)])


def test_runs_are_listed(copied, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs"
    folder.mkdir()
    copied.rename(folder / "done")
    (folder / "begun").mkdir()
    (folder / "begun/config.json").write_bytes((folder / "done/config.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    common.main([])
    header, _, begun, done = capsys.readouterr().out.splitlines()
    assert "alpha" in header and {line.count("|") for line in (header, begun, done)} == {8}
    for part in ("runs/begun", "0 of 30"):
        assert part in begun
    test = accuracy(json.loads((folder / "done/result.json").read_text()))
    for part in ("runs/done", "digits", "30 of 30", f"{test:.4f}"):
        assert part in done


def test_pictures_are_well_formed(copied, tmp_path):
    common.main([str(copied), "--pictures"])
    circles = "{http://www.w3.org/2000/svg}circle"
    assert len(ElementTree.parse(copied / "loss.svg").findall(circles)) == 30
    assert len(ElementTree.parse(copied / "tsne.svg").findall(circles)) == 720
    common.svg(tmp_path / "x.svg", [("<&>", np.zeros((1, 2)), np.array(["a < b & c"]))])
    text = "".join(ElementTree.parse(tmp_path / "x.svg").getroot().itertext())
    assert "a < b & c" in text and "<&>" in text


def test_help_and_import_cost_no_more_than_torch():
    code = "import sys, common; print(*(set(sys.modules) & {'pandas', 'sklearn', 'scipy', 'PIL'}))"
    root = Path(common.__file__).parent
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert shown.stdout.split() == [] and not shown.stderr
