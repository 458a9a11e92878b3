# SPDX-License-Identifier: MIT
"""common.py: Dataset, the loader, linear evaluation, domains, and the readers of tables, images."""

import copy
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common

CPU = torch.device("cpu")


def same(x):
    return x


def refused(load, *args, **options):
    """The message, one line, of the DataError that load(*args, **options) ends with."""
    with pytest.raises(common.DataError) as error:
        load(*args, **options)
    message = str(error.value)
    assert message.count("\n") == 0
    return message


def assert_names(message, path, *parts):
    """The message names the path, and beside it each of parts."""
    assert str(path) in message
    rest = message.replace(str(path), "")
    for part in parts:
        assert str(part) in rest, message


# ----------------------------------------------------------------------- Dataset
def dataset_of(x):
    y = torch.arange(len(x)) % 2
    return common.Dataset(x, y, x, y, 2, same, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16])
def test_digest_tells_whether_the_data_have_changed(dtype):
    x = torch.arange(60).reshape(6, 10).to(dtype)
    digest = dataset_of(x).digest()
    assert dataset_of(x.clone()).digest() == digest
    other_value = x.clone()
    other_value[5, 9] += 1
    assert dataset_of(other_value).digest() != digest
    other_order = x[[1, 0, 2, 3, 4, 5]]
    assert dataset_of(other_order).digest() != digest
    assert dataset_of(x[:5]).digest() != digest
    for name in ("y_train", "x_test", "y_test"):
        other = dataset_of(x.clone())
        setattr(other, name, getattr(other, name).flip(0))
        assert other.digest() != digest
    other = dataset_of(x)
    other.spec = {"classes": ["a", "b"]}
    assert other.digest() != digest


def test_digest_of_gray_images_from_train_and_test_folders(tmp_path):
    """These are a slice of three channels, whose values do not lie side by side."""
    write_images(tmp_path / "train", mode="L")
    write_images(tmp_path / "test", mode="L")
    data = load_folder(tmp_path)
    digest = data.digest()
    data.x_train = data.x_train.contiguous()
    assert data.digest() == digest


# ----------------------------------------------------------------------- TwoViews
def test_two_views_shuffle_cover_and_drop_the_rest():
    loader = common.TwoViews(torch.arange(1, 24), same, 5)
    assert len(loader) == 4
    epochs = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 4
        for x, x_tilde in batches:
            assert torch.equal(x, x_tilde)  # of the same examples
        epoch = torch.cat([x for x, _ in batches])
        assert len(epoch.unique()) == 20
        epochs.append(epoch)
    assert not torch.equal(*epochs)


def test_the_view_is_called_on_whole_batches():
    """Once for both views; on the CPU, where that is no faster, once for each."""
    for device, calls in (("cpu", [5, 5] * 4), ("meta", [10] * 4)):
        seen = []
        x = torch.zeros(23, 3, device=device)
        batches = list(common.TwoViews(x, lambda x: seen.append(len(x)) or x + 1, 5))
        assert seen == calls
        assert [(len(x), len(x_tilde)) for x, x_tilde in batches] == [(5, 5)] * 4


def test_the_two_views_of_an_example_are_independent():
    torch.manual_seed(0)

    def view(x):
        return x + torch.randn(x.shape)

    (x, x_tilde), = common.TwoViews(torch.zeros(10_000), view, 10_000)
    assert abs(x.std() - 1) < 0.04 and abs(x_tilde.std() - 1) < 0.04
    assert abs(torch.stack([x, x_tilde]).corrcoef()[0, 1]) < 0.04  # 4 standard deviations


# ----------------------------------------------------------------------- linear evaluation
def answerable(n_test=2500, wrong=0.25):
    """Features that are one-hot of their class; a share of the test labels is made wrong."""
    y_train, y_test = torch.arange(600) % 3, torch.arange(n_test) % 3
    x_train, x_test = torch.eye(3)[y_train], torch.eye(3)[y_test]
    is_wrong = torch.arange(n_test) < wrong * n_test
    y_test = torch.where(is_wrong, (y_test + 1) % 3, y_test)
    return common.Dataset(x_train, y_train, x_test, y_test, 3, same, same)


def test_linear_eval_of_a_known_answer():
    result = common.linear_eval(nn.Identity(), answerable(), epochs=10)
    assert result["train_accuracy"] == 1 and result["test_accuracy"] == 0.75
    assert result.keys() == {"test_accuracy", "train_accuracy", "protocol", "seconds"}


def test_linear_eval_is_the_protocol_written_out():
    """It agrees with a classifier that is trained here on almost all of many test points.

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
        lr = 3.0
        if epoch >= 16:
            lr *= 0.2
        if epoch >= 18:
            lr *= 0.2
        if epoch >= 19:
            lr *= 0.2
        optimizer.param_groups[0]["lr"] = lr
        order = torch.randperm(200)
        for index in (order[:64], order[64:128], order[128:192]):
            optimizer.zero_grad()
            F.cross_entropy(classifier(features[index]), y[index]).backward()
            optimizer.step()
    train_correct = (classifier(features).argmax(1) == y).sum().item()
    x_test = torch.randn(20_000, 5)
    y_test = classifier(encoder(2 * x_test)).argmax(1)

    def view(x):
        return x + 9

    def plain(x):
        return 2 * x

    encoder.train()
    data = common.Dataset(x, y, x_test, y_test, 3, view, plain)
    result = common.linear_eval(encoder, data, epochs=20, batch_size=64, lr=3.0, seed=3)
    assert y_test.bincount(minlength=3).min() > 1000
    assert result["test_accuracy"] > 0.999
    assert result["train_accuracy"] == train_correct / 200
    for part in ("lr 3", "batch 64", "20 epochs"):
        assert part in result["protocol"]


def test_linear_eval_of_few_examples_shrinks_batch_and_learning_rate():
    """600 examples of a batch of 2,400 are trained at a quarter of its learning rate."""
    results = [common.linear_eval(nn.Linear(3, 3), answerable(), 10, batch_size, lr)
               for batch_size, lr in ((2400, 10.0), (600, 2.5))]
    assert results[0]["protocol"] == results[1]["protocol"]
    assert "lr 2.5, batch 600" in results[0]["protocol"]


def test_linear_eval_draws_the_training_views_anew_each_epoch():
    data = answerable()
    drawn = []

    def eval_view(x):
        drawn.append(len(x))
        return x

    data.eval_view = eval_view
    result = common.linear_eval(nn.Identity(), data, epochs=10)
    assert sum(drawn) == 10 * 600
    assert result["test_accuracy"] == 0.75


def test_fine_tuning_is_the_protocol_written_out():
    """The encoder learns along in training mode at its own rate, and comes back as it was."""
    torch.manual_seed(0)
    x = torch.randn(120, 5)
    y = x[:, :3].argmax(1)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    data = common.Dataset(x, y, x[:60], y[:60], 3, same, lambda x: 2 * x)
    before = copy.deepcopy(encoder.state_dict())
    result = common.linear_eval(encoder, data, epochs=20, batch_size=32, lr=1.0, seed=3,
                                finetune_lr=0.8)
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)

    torch.manual_seed(3)
    classifier = nn.Linear(8, 3)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    optimizers = [torch.optim.SGD(net.parameters(), momentum=0.9) for net in (encoder, classifier)]
    encoder.train()
    for epoch in range(20):
        drops = (epoch >= 16) + (epoch >= 18) + (epoch >= 19)
        order = torch.randperm(120)
        for index in (order[:32], order[32:64], order[64:96]):
            for optimizer, lr in zip(optimizers, (0.1, 1.0)):  # 0.8 per 256 examples
                optimizer.param_groups[0]["lr"] = lr * 0.2**drops
                optimizer.zero_grad()
            F.cross_entropy(classifier(encoder(2 * x[index])), y[index]).backward()
            for optimizer in optimizers:
                optimizer.step()
    correct = (classifier(encoder.eval()(2 * x)).argmax(1) == y).double()
    assert result["train_accuracy"] == pytest.approx(correct.mean().item(), abs=0.01)
    assert result["test_accuracy"] == pytest.approx(correct[:60].mean().item(), abs=0.02)
    assert result["train_accuracy"] > 0.8
    frozen = common.linear_eval(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), data, epochs=20,
                                batch_size=32, lr=1.0, seed=3)
    assert frozen["protocol"] != result["protocol"]


def test_few_labels_are_a_stratified_share():
    """1 in 10 labels is right, and they alone are used: 20 of each of three classes."""
    data = answerable()
    seen, inner = [], F.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", lambda x, y: seen.append(y) or inner(x, y))
        result = common.linear_eval(nn.Identity(), data, epochs=3, batch_size=20, labels=0.1)
    assert torch.cat(seen).bincount().tolist() == [60, 60, 60]  # in three epochs
    assert result["test_accuracy"] == 0.75 and "60 labels" in result["protocol"]
    with pytest.raises(common.DataError, match="--labels"):
        common.linear_eval(nn.Identity(), data, labels=0.001)


def test_linear_eval_uses_batch_norm_in_eval_mode():
    """In training mode BatchNorm would centre the shifted test features.

    With its running statistics they are all of the first class.
    """
    data = answerable(wrong=0)
    data.x_test = torch.tensor([9.0, 0, 0]).expand(2500, 3)
    result = common.linear_eval(nn.BatchNorm1d(3), data, epochs=10)
    share = (data.y_test == 0).sum().item() / 2500
    assert result["test_accuracy"] == share


def test_linear_eval_leaves_everything_as_it_was():
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    encoder[2].eval()
    state, rng = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    first = common.linear_eval(encoder, answerable(), epochs=3)
    assert torch.equal(rng, torch.get_rng_state())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert [module.training for module in encoder] == [True, True, False]
    for parameter in encoder.parameters():
        assert parameter.grad is None and parameter.requires_grad
    torch.rand(5)
    second = common.linear_eval(encoder, answerable(), epochs=3)
    assert first["test_accuracy"] == second["test_accuracy"]
    assert first["train_accuracy"] == second["train_accuracy"]


# ----------------------------------------------------------------------- domains
@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The working directory is a folder with data of each kind."""
    monkeypatch.chdir(tmp_path)
    for name in ("lower/yes/x.wav", "upper/yes/x.WAV", "images/ant/x.png", "flat/x.wav",
                 "deep/train/yes/x.wav", "table"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


ALL = {"table": "", "image": "", "speech": ""}
NO_TABLE = {"image": "", "speech": ""}


@pytest.mark.parametrize("dataset, known, expected", [
    ("covtype", ALL, "table"),
    ("x.csv", ALL, "table"),
    ("x.csv.gz", ALL, "table"),
    ("table", ALL, "table"),  # an existing file
    ("digits", ALL, "table"),
    ("digits", {"table": ""}, "table"),
    ("digits", NO_TABLE, "image"),
    ("speech_commands", ALL, "speech"),
    ("speech_commands", NO_TABLE, "speech"),
    ("lower", ALL, "speech"),
    ("upper", ALL, "speech"),
    ("upper", NO_TABLE, "speech"),
    ("images", ALL, "image"),
    ("images", NO_TABLE, "image"),
    ("flat", ALL, "speech"),
    ("deep", ALL, "speech"),
    ("nowhere", ALL, "image"),
    ("cifar10", ALL, "image"),
    ("cifar100", NO_TABLE, "image")])
def test_domain(in_folder, dataset, known, expected):
    assert common.domain(dataset, known) == expected


@pytest.mark.parametrize("dataset, known, found", [
    ("covtype", NO_TABLE, "table"),
    ("x.csv", NO_TABLE, "table"),
    ("x.csv.gz", NO_TABLE, "table"),
    ("table", NO_TABLE, "table"),
    ("digits", {"speech": ""}, "image"),
    ("speech_commands", {"table": "", "image": ""}, "speech"),
    ("lower", {"table": "", "image": ""}, "speech"),
    ("upper", {"image": ""}, "speech"),
    ("images", {"table": ""}, "image"),
    ("cifar10", {"table": "", "speech": ""}, "image")])
def test_a_domain_that_is_not_known_is_refused(in_folder, dataset, known, found):
    message = refused(common.domain, dataset, known)
    assert_names(message, f"--dataset {dataset!r}", found, *known)


# ----------------------------------------------------------------------- CovType
@pytest.fixture
def tiny_covtype(monkeypatch):
    """21 rows in CovType's form, and their text: 14 to train on, each class twice, 7 to test."""
    monkeypatch.setattr(common, "COVTYPE_TRAIN", 14)
    monkeypatch.setattr(common, "COVTYPE_TEST", 7)
    rng = np.random.default_rng(0)
    continuous, binary = rng.integers(-100, 7000, (21, 10)), rng.integers(0, 2, (21, 44))
    labels = np.tile(np.arange(1, 8), 3)[:, None]
    rows = np.concatenate([continuous, binary, labels], axis=1)
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    return rows, text


def write(path, text):
    raw = text.encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    path.write_bytes(raw)


NAMES = ["covtype.data.gz", "covtype.data", "covtype.csv", "covtype.csv.gz"]


@pytest.mark.parametrize("form", ["plain", "with a header", "with floats"])
@pytest.mark.parametrize("name", NAMES)
def test_covtype_is_read_in_each_form(tmp_path, tiny_covtype, name, form):
    rows, text = tiny_covtype
    if form == "with a header":
        text = ",".join(f"c{i}" for i in range(55)) + "\n" + text
    if form == "with floats":
        text = text.replace(",", ".0,")
    write(tmp_path / name, text)
    data = common.load_table("covtype", tmp_path, CPU, mask=0.0)
    assert data.groups == [10, 4, 40] and data.num_classes == 7
    assert torch.equal(data.y_train, torch.tensor(rows[:14, 54] - 1))
    assert torch.equal(data.y_test, torch.tensor(rows[14:, 54] - 1))

    continuous, binary = rows[:, :10], rows[:, 10:54]
    standardised = (continuous - continuous[:14].mean(axis=0)) / continuous[:14].std(axis=0)
    expected = torch.tensor(np.concatenate([standardised, binary], axis=1))
    x = torch.cat([data.x_train, data.x_test]).double()
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)

    of_all = common.load_table("covtype", tmp_path, CPU, standardize="all")
    x = torch.cat([of_all.x_train, of_all.x_test])[:, :10]
    assert x.mean(dim=0).abs().max() < 1e-5
    assert (x.std(dim=0, correction=0) - 1).abs().max() < 1e-5


def test_covtype_by_download(tmp_path, tiny_covtype, monkeypatch):
    rows, _ = tiny_covtype

    def fetch_covtype(data_home, return_X_y):
        assert data_home == tmp_path and return_X_y
        return rows[:, :54] * 1.0, rows[:, 54]

    monkeypatch.setattr(common, "fetch_covtype", fetch_covtype)
    data = common.load_table("covtype", tmp_path, CPU)
    assert torch.equal(data.y_train, torch.tensor(rows[:14, 54] - 1))
    assert torch.equal(data.y_test, torch.tensor(rows[14:, 54] - 1))


def test_covtype_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(**_):
        raise OSError("Network is\nunreachable")

    monkeypatch.setattr(common, "fetch_covtype", offline)
    message = refused(common.load_table, "covtype", tmp_path, CPU)
    assert_names(message, tmp_path, "Network is unreachable", "make covtype")


def test_covtype_that_is_not_whole(tmp_path, tiny_covtype):
    _, text = tiny_covtype
    lines = text.splitlines(keepends=True)
    path = tmp_path / "covtype.data.gz"

    def assert_refused(*parts):
        message = refused(common.load_table, "covtype", tmp_path, CPU)
        assert_names(message, path, "make covtype", *parts)

    path.write_bytes(gzip.compress(text.encode())[:-40])  # cut short
    assert_refused()
    path.write_bytes(b"")
    assert_refused()
    write(path, "".join(lines[:-1]))  # a row is missing
    assert_refused("20 rows")
    write(path, "".join(line.rsplit(",", 1)[0] + "\n" for line in lines))  # a column is missing
    assert_refused("54")
    write(path, "".join(lines[7:8] * 14 + lines[14:]))  # the classes are not alike often
    assert_refused()
    write(path, text.replace(lines[3].split(",")[0], "many", 1))  # text among numbers
    assert_refused("many")


@pytest.mark.skipif(not Path("data/covtype.csv").exists(), reason="needs it: make covtype")
def test_real_covtype():
    data = common.load_table("covtype", "data", CPU)
    assert data.x_train.shape == (15_120, 54) and data.x_test.shape == (565_892, 54)
    assert data.y_train.bincount().tolist() == [2160] * 7
    assert data.x_train[:, 10:14].sum(dim=1).eq(1).all()
    assert data.x_test[:, 14:].sum(dim=1).eq(1).all()


# ----------------------------------------------------------------------- digits, one's own CSV
def test_digits():
    data = common.load_table("digits", "nowhere", CPU)
    assert data.x_train.shape == (1437, 64) and data.x_test.shape == (360, 64)
    assert data.num_classes == 10 and data.groups == [64]
    assert data.y_test.bincount().min() >= 35
    again = common.load_table("digits", "nowhere", CPU)
    assert torch.equal(data.x_train, again.x_train) and torch.equal(data.y_test, again.y_test)


def frame(n=60):
    """A table with columns of each kind; its species are cat, dog, emu, cat, ..."""
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "height": rng.normal(170, 10, n),
        "member": rng.integers(0, 2, n),
        "flag": rng.integers(0, 2, n) * 4 - 2,
        "colour": rng.choice(["red", "green", "blue"], n),
        "age": rng.integers(1, 90, n),
        "species": np.array(["cat", "dog", "emu"])[np.arange(n) % 3]})


def load_csv(path, table, label_column="species", **options):
    if isinstance(table, pd.DataFrame):
        table.to_csv(path, index=False)
    else:
        write(path, table)
    return common.load_table(str(path), "data", CPU, label_column=label_column, **options)


@pytest.mark.parametrize("name", ["my.csv", "my.csv.gz"])
def test_csv_columns_by_kind(tmp_path, name):
    data = load_csv(tmp_path / name, frame(), test_share=0.25)
    assert data.x_train.shape == (45, 7) and data.x_test.shape == (15, 7)
    assert data.groups == [2, 2, 3] and data.num_classes == 3
    assert data.y_test.bincount().tolist() == [5, 5, 5]
    numbers, member, flag = data.x_train[:, :2], data.x_train[:, 2], data.x_train[:, 3]
    assert numbers.mean(dim=0).abs().max() < 1e-5
    assert (numbers.std(dim=0, correction=0) - 1).abs().max() < 1e-5
    assert set(member.tolist()) == {0, 1} and set(flag.tolist()) == {0, 1}
    colours = data.x_train[:, 4:]
    assert colours.sum(dim=1).eq(1).all() and colours.amax(dim=1).eq(1).all()
    again = load_csv(tmp_path / name, frame(), test_share=0.25)
    assert torch.equal(data.x_train, again.x_train) and torch.equal(data.x_test, again.x_test)


def test_each_row_of_a_csv_keeps_its_label(tmp_path):
    table = frame()
    table["age"] = np.arange(60) % 3 * 10  # 0, 10, 20, as cat, dog, emu
    data = load_csv(tmp_path / "my.csv", table)
    age = torch.cat([data.x_train[:, 1], data.x_test[:, 1]])
    labels = torch.cat([data.y_train, data.y_test])
    values = age.unique()
    assert len(values) == 3 and torch.equal(age, values[labels])


@pytest.mark.parametrize("labels", [
    [5, 7, 10], ["a", "b", "c"], [0.5, 1.5, 2.5], ["2020-01-01", "x", "1"]])
def test_csv_labels_of_any_type(tmp_path, labels):
    labels = np.array(labels, dtype=object)
    table = frame().assign(species=labels[np.arange(60) % 3])
    data = load_csv(tmp_path / "my.csv", table)
    assert data.num_classes == 3
    assert data.y_test.bincount().tolist() == [4, 4, 4]
    assert data.spec["classes"] == [str(label) for label in (
        labels if isinstance(labels[0], (int, float)) else sorted(labels))]


def test_csv_true_and_false_are_two_values(tmp_path):
    table = frame()[["species"]].assign(b=np.arange(60) % 2 == 0)
    data = load_csv(tmp_path / "my.csv", table)
    assert data.groups == [1] and set(data.x_train.flatten().tolist()) == {0, 1}


def changed(row, column, value):
    """The table with another value in a row, counted from 1, of a column."""
    table = frame().astype(object)
    table.loc[row - 1, column] = value
    return table


COLUMNS = list(frame().columns)
BAD_CSV = {  # a table, and what the message names beside the file
    "a number is missing": (changed(7, "age", None), ["age", "row 7"]),
    "infinite": (changed(3, "height", "inf"), ["height", "row 3", "inf"]),
    "too large": (changed(4, "height", 1e300), ["height", "row 4", "1e+300"]),
    "text among numbers": (changed(5, "age", "old"), ["age", "row 5", "old"]),
    "? among numbers": (changed(5, "age", "?"), ["age", "row 5", "?"]),
    "NA among numbers": (changed(6, "age", "NA"), ["age", "row 6", "NA"]),
    "a label seen once": (changed(8, "species", "yak"), ["species", "row 8", "yak"]),
    "names": (frame().assign(name=[f"n{i}" for i in range(60)]), ["'name'", "60"]),
    "labels alone": (frame()[["species"]], ["column"]),
    "no such column": (frame().rename(columns={"species": "kind"}),
                       ["species", *COLUMNS[:5], "kind"]),
    "too few rows": (frame(6), ["--test-share"]),
    "a header line alone": (frame(0), ["header"]),
    "more fields than names": ("a,species\n" + "1,2,cat\n1,3,dog\n" * 9, ["header"]),
}


@pytest.mark.parametrize("what", BAD_CSV)
def test_bad_csv(tmp_path, what):
    table, parts = BAD_CSV[what]
    message = refused(load_csv, tmp_path / "my.csv", table)
    assert_names(message, tmp_path / "my.csv", *parts)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe\x00\x81" * 9, b"a,b\n1,2\n1,2,3,4\n"],
                         ids=["empty", "no text", "ragged"])
def test_unreadable_csv(tmp_path, raw):
    path = tmp_path / "my.csv"
    path.write_bytes(raw)
    message = refused(common.load_table, str(path), "data", CPU, label_column="b")
    assert_names(message, path)


def test_a_csv_that_is_not_there_or_a_folder(tmp_path):
    path = tmp_path / "my.csv"
    for _ in range(2):
        message = refused(common.load_table, str(path), "data", CPU, label_column="b")
        assert_names(message, path, "CSV", "--dataset")
        path.mkdir(exist_ok=True)


def test_masking_is_independent_and_of_the_continuous_columns_alone(tmp_path):
    torch.manual_seed(0)
    data = load_csv(tmp_path / "my.csv", frame(3000), mask=0.2)
    (x, x_tilde), = common.TwoViews(data.x_train, data.view, 2400)
    masked, masked_tilde = x[:, :2] == 0, x_tilde[:, :2] == 0
    assert abs(masked.float().mean() - 0.2) < 0.02
    assert abs(masked_tilde.float().mean() - 0.2) < 0.02
    assert abs((masked & masked_tilde).float().mean() - 0.04) < 0.02
    assert abs((masked[:, 0] & masked[:, 1]).float().mean() - 0.04) < 0.02
    assert torch.equal(x[:, 2:], x_tilde[:, 2:])
    kept = ~(masked | masked_tilde)
    assert torch.equal(x[:, :2][kept], x_tilde[:, :2][kept])
    view = data.view(data.x_train)
    assert ((view == data.x_train) | (view == 0)).all()  # what is kept is not scaled up


def test_nothing_is_masked_with_mask_0(tmp_path):
    data = load_csv(tmp_path / "my.csv", frame(), mask=0.0)
    assert torch.equal(data.view(data.x_train), data.x_train)
    assert torch.equal(data.plain(data.x_train), data.x_train)


# ----------------------------------------------------------------------- CIFAR
@pytest.mark.parametrize("name, mean, std", [
    ("cifar10", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ("cifar100", [0.5071, 0.4865, 0.4409], [0.2009, 0.1984, 0.2023])])
def test_cifar_by_torchvision(tmp_path, monkeypatch, name, mean, std):
    class Reader:
        classes = ["a", "b", "c", "d"]

        def __init__(self, root, train, download):
            assert root == tmp_path and download
            n = 4 if train else 2
            self.data = np.arange(n * 3072).astype(np.uint8).reshape(n, 32, 32, 3)
            self.targets = [0, 1, 2, 3] if train else [3, 0]

    monkeypatch.setattr(common.torchvision.datasets, name.upper(), Reader)
    data = common.load_images(name, tmp_path, CPU)
    assert data.x_train.shape == (4, 3, 32, 32) and data.x_test.shape == (2, 3, 32, 32)
    assert data.x_train[1, 2, 3, 4] == (3072 + 3 * 96 + 4 * 3 + 2) % 256
    assert data.y_train.tolist() == [0, 1, 2, 3] and data.y_test.tolist() == [3, 0]
    assert data.num_classes == 4 and data.probe == "sgd"

    def standardise(x):
        return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    x = data.x_train / 255
    torch.testing.assert_close(data.plain(data.x_train), standardise(x))
    for ours, theirs in ((data.view, common.image_view), (data.eval_view, common.padded_crop)):
        torch.manual_seed(0)
        view = ours(data.x_train)
        torch.manual_seed(0)
        torch.testing.assert_close(view, standardise(theirs(x)))


def test_cifar_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("Network is\nunreachable")

    monkeypatch.setattr(common.torchvision.datasets, "CIFAR10", offline)
    message = refused(common.load_images, "cifar10", tmp_path, CPU)
    assert_names(message, tmp_path, "cifar10", "Network is unreachable")


# ----------------------------------------------------------------------- folders of images
def write_images(folder, count=6, size=(16, 16), mode="RGB", kind="png"):
    """count images each of ant and bee: the i-th ant has a red (or gray) of i, the bee of 40 + i.

    Green and blue are constant.
    """
    for name, first in (("ant", 0), ("bee", 40)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = first + i
            if mode == "RGB":
                colour = (colour, 90, 200)
            Image.new(mode, size, colour).save(folder / name / f"{i}.{kind}")


def load_folder(path, image_size=16):
    return common.load_images(str(path), "data", CPU, image_size=image_size)


def test_image_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", count=2)
    data = load_folder(tmp_path)
    assert data.x_train.shape == (12, 3, 16, 16) and data.x_test.shape == (4, 3, 16, 16)
    assert data.y_train.tolist() == [0] * 6 + [1] * 6 and data.y_test.tolist() == [0, 0, 1, 1]
    assert data.x_train[:, 0, 3, 3].tolist() == [0, 1, 2, 3, 4, 5, 40, 41, 42, 43, 44, 45]
    plain = data.plain(data.x_train)[:, 0]  # by the training images' own mean and std
    assert abs(plain.mean()) < 1e-5 and abs(plain.std() - 1) < 1e-3


def test_image_folder_is_split_resized_and_cropped(tmp_path):
    write_images(tmp_path, count=10, size=(64, 40), kind="jpg")
    data = load_folder(tmp_path, image_size=20)
    assert data.x_train.shape == (16, 3, 20, 20)
    assert data.y_test.bincount().tolist() == [2, 2]
    again = load_folder(tmp_path, image_size=20)
    assert torch.equal(data.x_train, again.x_train) and torch.equal(data.x_test, again.x_test)


def test_the_middle_of_an_image_is_taken(tmp_path):
    write_images(tmp_path)
    image = Image.new("RGB", (48, 32), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 40, 32))  # blue, but for a sixth on the left and the right
    for name in ("ant", "bee"):
        for i in range(6):
            image.save(tmp_path / name / f"{i}.png")
    data = load_folder(tmp_path)
    middle = data.x_train[:, :, :, 1:15]  # but for the edge, which is smoothed
    assert middle[:, 2].min() > 250 and middle[:, 0].max() < 5


def test_gray_images_have_one_channel(tmp_path):
    write_images(tmp_path, mode="L")
    assert load_folder(tmp_path).x_train.shape == (9, 1, 16, 16)


def test_one_image_in_colour_makes_three_channels(tmp_path):
    write_images(tmp_path, mode="L")
    Image.new("RGB", (16, 16)).save(tmp_path / "ant" / "x.png")
    assert load_folder(tmp_path).x_train.shape == (10, 3, 16, 16)


def test_a_channel_without_content_does_no_harm(tmp_path):
    write_images(tmp_path)  # its green and blue channels are constant
    data = load_folder(tmp_path)
    assert data.plain(data.x_train).isfinite().all()
    assert data.view(data.x_train).isfinite().all()


def test_digits_as_images():
    data = common.load_images("digits", "data", CPU)
    assert data.x_train.shape == (1437, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.dtype == torch.uint8 and data.x_train.max() == 255
    table = common.load_table("digits", "data", CPU)  # the same split
    assert torch.equal(data.y_train, table.y_train) and torch.equal(data.y_test, table.y_test)


def test_train_size_is_a_stratified_subset():
    data = common.load_images("digits", "data", CPU, train_size=100)
    assert data.x_train.shape == (100, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.y_train.bincount().min() >= 9
    again = common.load_images("digits", "data", CPU, train_size=100)
    assert torch.equal(data.x_train, again.x_train)
    whole = common.load_images("digits", "data", CPU, train_size=1437)
    assert len(whole.x_train) == 1437


@pytest.mark.parametrize("size", [5, 1430, 1438])
def test_a_train_size_that_cannot_be_had(size):
    message = refused(common.load_images, "digits", "data", CPU, train_size=size)
    assert_names(message, f"--train-size {size}", "1,437", "10 to 1,427")


def truncated(path):
    write_images(path)
    file = path / "bee" / "3.jpg"
    Image.effect_noise((16, 16), 50).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:-200])


def text(path):
    write_images(path)
    (path / "bee" / "3.png").write_text("hello")


def of_16_bits(path):
    write_images(path)
    Image.new("I;16", (16, 16), 40000).save(path / "bee" / "3.png")


def too_small(path):
    write_images(path)
    Image.new("RGB", (16, 15)).save(path / "ant" / "x.png")


def not_there(path):
    pass


def no_classes(path):
    path.mkdir()


def no_images(path):
    (path / "ant").mkdir(parents=True)


def too_few(path):
    write_images(path, count=1)


def other_classes(path):
    write_images(path / "train")
    write_images(path / "test")
    (path / "test" / "bee").rename(path / "test" / "cow")


BAD_FOLDERS = [  # what makes it, what the message names in it, and what beside that
    (truncated, "bee/3.jpg", []),
    (text, "bee/3.png", []),
    (of_16_bits, "bee/3.png", ["I;16"]),
    (too_small, "ant/x.png", ["16 x 15", "--image-size 16"]),
    (not_there, "", ["--dataset"]),
    (no_classes, "", ["--dataset"]),
    (no_images, "ant", []),
    (too_few, "", []),
    (other_classes, "", ["cow"]),
]


@pytest.mark.parametrize("make, named, parts", BAD_FOLDERS,
                         ids=[make.__name__ for make, _, _ in BAD_FOLDERS])
def test_bad_image_folder(tmp_path, make, named, parts):
    path = tmp_path / "images"
    make(path)
    message = refused(load_folder, path)
    assert_names(message, path / named, *parts)
