# SPDX-License-Identifier: MIT
"""common.py: the readers on files that the tests write, the loader, the linear evaluation."""

import copy
import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import common

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------------------------- CovType
@pytest.fixture
def tiny_covtype(monkeypatch):
    """21 rows in CovType's form: 14 to train on (each class twice), 7 to test."""
    monkeypatch.setattr(common, "COVTYPE_TRAIN", 14)
    monkeypatch.setattr(common, "COVTYPE_TEST", 7)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(-100, 7000, (21, 10)), rng.integers(0, 2, (21, 44)),
                           np.tile(np.arange(1, 8), 3)[:, None]], axis=1)
    return rows, "".join(",".join(map(str, row)) + "\n" for row in rows)


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("header, floats", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["covtype.data.gz", "covtype.data", "covtype.csv", "covtype.csv.gz"])
def test_covtype_is_read_in_each_form(tmp_path, tiny_covtype, name, header, floats):
    rows, text = tiny_covtype
    text = text.replace(",", ".0,") if floats else text
    write(tmp_path / name, ",".join(f"c{i}" for i in range(55)) * header + "\n" * header + text)
    data = common.load_table("covtype", tmp_path, CPU, mask=0.0)
    assert data.groups == [10, 4, 40] and data.num_classes == 7
    assert torch.equal(data.y_train, torch.tensor(rows[:14, 54] - 1))
    assert torch.equal(data.y_test, torch.tensor(rows[14:, 54] - 1))
    mean, std = rows[:14, :10].mean(axis=0), rows[:14, :10].std(axis=0)
    expected = np.concatenate([(rows[:, :10] - mean) / std, rows[:, 10:54]], axis=1)
    torch.testing.assert_close(torch.cat([data.x_train, data.x_test]).double(), torch.tensor(expected), atol=1e-5, rtol=0)
    of_all = common.load_table("covtype", tmp_path, CPU, standardize="all")
    assert torch.cat([of_all.x_train, of_all.x_test])[:, :10].mean(dim=0).abs().max() < 1e-5


def test_covtype_by_download(tmp_path, tiny_covtype, monkeypatch):
    rows, _ = tiny_covtype
    monkeypatch.setattr(common, "fetch_covtype", lambda data_home, return_X_y: (rows[:, :54] * 1.0, rows[:, 54]))
    assert torch.equal(common.load_table("covtype", tmp_path, CPU).y_test, torch.tensor(rows[14:, 54] - 1))


def test_covtype_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(**_):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(common, "fetch_covtype", offline)
    with pytest.raises(common.DataError) as error:
        common.load_table("covtype", tmp_path, CPU)
    assert str(error.value) == (f"CovType is not in {tmp_path} and could not be downloaded (Network is unreachable): run "
                                "`make covtype`, or put UCI's covtype.data.gz there")


def test_covtype_that_is_not_whole(tmp_path, tiny_covtype):
    rows, text = tiny_covtype
    path = tmp_path / "covtype.data.gz"

    def error():
        with pytest.raises(common.DataError) as caught:
            common.load_table("covtype", tmp_path, CPU)
        assert "\n" not in str(caught.value) and ": move it away, then run `make covtype`" in str(caught.value)
        return str(caught.value)

    path.write_bytes(gzip.compress(text.encode())[:-40])
    assert error().startswith(f"{path} can't be read (")
    path.write_bytes(b"")
    assert error().startswith(f"{path} can't be read (")
    write(path, "".join(text.splitlines(keepends=True)[:-1]))
    assert "but 20 rows of 55" in error()
    lines = text.splitlines(keepends=True)
    write(path, "".join(lines[7:8] * 14 + lines[14:]))
    assert "in its original order" in error()
    write(path, text.replace(lines[3].split(",")[0], "many", 1))
    assert error().startswith(f"{path} can't be read (")


@pytest.mark.skipif(not Path("data/covtype.csv").exists(), reason="needs data/covtype.csv (make covtype)")
def test_real_covtype():
    data = common.load_table("covtype", "data", CPU)
    assert data.x_train.shape == (15_120, 54) and data.x_test.shape == (565_892, 54)
    assert data.y_train.bincount().tolist() == [2160] * 7
    assert data.x_train[:, 10:14].sum(dim=1).eq(1).all() and data.x_test[:, 14:].sum(dim=1).eq(1).all()


# ------------------------------------------------------------------------------------------------- digits and one's own
def test_digits():
    data = common.load_table("digits", "nowhere", CPU)
    assert data.x_train.shape == (1437, 64) and data.x_test.shape == (360, 64)
    assert data.num_classes == 10 and data.groups == [64]
    assert data.y_test.bincount().min() >= 35
    assert torch.equal(data.y_test, common.load_table("digits", "nowhere", CPU).y_test)


def frame(n=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "height": rng.normal(170, 10, n), "member": rng.integers(0, 2, n), "flag": rng.integers(0, 2, n) * 4 - 2,
        "colour": rng.choice(["red", "green", "blue"], n), "age": rng.integers(1, 90, n),
        "species": np.array(["cat", "dog", "emu"])[np.arange(n) % 3]})


def load_csv(table, path, column="species", **options):
    table.to_csv(path, index=False) if isinstance(table, pd.DataFrame) else write(path, table)
    return common.load_table(str(path), "data", CPU, label_column=column, **options)


@pytest.mark.parametrize("name", ["my.csv", "my.csv.gz"])
def test_csv_columns_by_kind(tmp_path, name):
    table = frame()
    data = load_csv(table, tmp_path / name, test_share=0.25)
    assert data.x_train.shape == (45, 7) and data.x_test.shape == (15, 7)
    assert data.groups == [2, 2, 3] and data.num_classes == 3
    assert data.y_test.bincount().tolist() == [5, 5, 5]
    assert data.x_train[:, :2].mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(data.x_train[:, :2].std(dim=0, correction=0), torch.ones(2))
    assert set(data.x_train[:, 2].tolist()) == {0, 1} and set(data.x_train[:, 3].tolist()) == {-2, 2}
    assert data.x_train[:, 4:].sum(dim=1).eq(1).all()
    again = load_csv(table, tmp_path / name, test_share=0.25)
    assert torch.equal(data.x_train, again.x_train)
    # each row kept its label: the labels follow a column that tells them apart
    table["age"] = np.arange(60) % 3 * 10
    data = load_csv(table, tmp_path / name, test_share=0.25)
    assert torch.equal(data.x_test[:, 1].argsort().argsort() // 5, data.y_test)


@pytest.mark.parametrize("labels", [[5, 7, 9], ["a", "b", "c"], [0.5, 1.5, 2.5], ["2020-01-01", "x", "None"]])
def test_csv_labels_of_any_type(tmp_path, labels):
    table = frame().assign(species=np.array(labels, dtype=object)[np.arange(60) % 3])
    assert load_csv(table, tmp_path / "my.csv").y_test.bincount().tolist() == [4, 4, 4]


def test_csv_true_and_false_are_two_values(tmp_path):
    data = load_csv(frame()[["species"]].assign(b=np.arange(60) % 2 == 0), tmp_path / "my.csv")
    assert data.groups == [1] and set(data.x_train.flatten().tolist()) == {0, 1}


def test_csv_leaves_out_what_says_nothing(tmp_path, capsys):
    table = frame().assign(one=1, also="same")
    table.insert(0, "Unnamed: 0", np.arange(60))
    table["id"] = np.random.default_rng(0).permutation(60) + 1000
    data = load_csv(table, tmp_path / "my.csv")
    assert data.groups == [2, 2, 3]
    assert capsys.readouterr().out == (f"{tmp_path / 'my.csv'}: left out 'Unnamed: 0' (counts the rows), 'one' (constant), "
                                       "'also' (constant), 'id' (counts the rows)\n")


def changed(row, column, value):
    table = frame().astype({"height": object, "age": object, "colour": object, "species": object})
    table.loc[row - 1, column] = value
    return table


BAD_CSV = {
    "a number is missing": (changed(7, "age", None), "column 'age', row 7: the value is missing: fill it in, or remove "
                            "the row or the column"),
    "a label is missing": (changed(9, "species", None), "column 'species', row 9: the value is missing: fill it in, or "
                           "remove the row or the column"),
    "infinite": (changed(3, "height", "inf"), "column 'height', row 3: inf is not a finite number of single precision: "
                 "correct it, or remove the row or the column"),
    "too large": (changed(4, "height", 1e300), "column 'height', row 4: 1e+300 is not a finite number of single "
                  "precision: correct it, or remove the row or the column"),
    "text among numbers": (changed(5, "age", "?"), "column 'age', row 5: '?' is not a number, and most of the column is: "
                           "correct it, or remove the row or the column"),
    "NA among numbers": (changed(6, "age", "NA"), "column 'age', row 6: 'NA' is not a number, and most of the column "
                         "is: correct it, or remove the row or the column"),
    "a label seen once": (changed(8, "species", "yak"), "column 'species', row 8: the label 'yak' is seen only once, and "
                          "a class needs a row to train on and one to test: remove the row or merge the label into "
                          "another"),
    "names": (frame().assign(name=[f"n{i}" for i in range(60)]), "column 'name', row 1 and on: 60 different texts are "
              "too many for one-hot: remove the column, or group its values"),
    "one class": (frame().assign(species="cat"), "column 'species' holds one class, 'cat': give rows of two or more"),
    "labels alone": (frame()[["species"]], "no column is left beside the labels 'species'"),
    "no such column": (frame().rename(columns={"species": "kind"}), "there is no column 'species'; its columns are: "
                       "height, member, flag, colour, age, kind"),
    "too few rows": (frame(6), "The test_size = 2 should be greater or equal to the number of classes = 3: add rows or "
                     "change --test-share"),
    "a header line alone": (frame(0), "no rows below the header line"),
    "more fields than names": ("a,species\n" + "1,2,cat\n1,3,dog\n" * 9, "the rows have more fields than the header "
                               "line: give each column a name"),
}


@pytest.mark.parametrize("what", BAD_CSV)
def test_bad_csv(tmp_path, what):
    table, message = BAD_CSV[what]
    with pytest.raises(common.DataError) as error:
        load_csv(table, tmp_path / "my.csv")
    assert str(error.value) == f"{tmp_path / 'my.csv'}: {message}"


def test_csv_without_label_column_lists_the_columns(tmp_path):
    with pytest.raises(common.DataError) as error:
        load_csv(frame(), tmp_path / "my.csv", column=None)
    assert str(error.value) == (f"{tmp_path / 'my.csv'}: say which column holds the labels with --label-column; its "
                                "columns are: height, member, flag, colour, age, species")


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe\x00\x81" * 9, "a,b\n1,2\n1,2,3,4\n", "a folder"])
def test_unreadable_csv(tmp_path, content):
    path = tmp_path / "my.csv"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(common.DataError) as error:
        common.load_table(str(path), "data", CPU, label_column="b")
    assert str(error.value).startswith(f"{path} can't be read as CSV (") and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- images
def write_cifar(folder, files, label_bytes, classes, records=10):
    """Files in the layout of CIFAR's binary distribution; each image is filled with its label, channels 0, 1, 2 apart."""
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        labels = (np.arange(records) + number) % classes
        pixels = labels[:, None, None] + np.arange(3)[:, None] * 10 + np.zeros(1024, int)
        parts = [np.full((records, label_bytes - 1), 99), labels[:, None], pixels.reshape(records, -1)]
        np.concatenate(parts, axis=1).astype(np.uint8).tofile(folder / file)


@pytest.mark.parametrize("name, folder, files, label_bytes, mean, std", [
    ("cifar10", "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"], 1,
     [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ("cifar100", "cifar-100-binary", ["train.bin", "test.bin"], 2, [0.5071, 0.4865, 0.4409], [0.2009, 0.1984, 0.2023])])
def test_cifar_binary(tmp_path, name, folder, files, label_bytes, mean, std):
    write_cifar(tmp_path / folder, files, label_bytes, 10)
    data = common.load_images(name, tmp_path, CPU)
    assert data.x_train.shape == (10 * len(files) - 10, 3, 32, 32) and data.x_test.shape == (10, 3, 32, 32)
    assert data.x_train.dtype == torch.uint8 and data.num_classes == 10
    expected = data.y_train[:, None] + torch.arange(3) * 10
    assert torch.equal(data.x_train, expected[:, :, None, None].expand_as(data.x_train).to(torch.uint8))
    x, mean, std = data.x_train / 255, *(torch.tensor(values)[:, None, None] for values in (mean, std))
    torch.testing.assert_close(data.plain(data.x_train), (x - mean) / std)
    for ours, view in ((data.view, common.image_view), (data.eval_view, common.padded_crop)):
        views = []
        for make in (lambda: ours(data.x_train), lambda: (view(x) - mean) / std):
            torch.manual_seed(0)
            views.append(make())
        torch.testing.assert_close(*views)

    path = tmp_path / folder / files[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(common.DataError, match=f"{path} is cut short: {10 * (3072 + label_bytes) - 1:,} bytes, "):
        common.load_images(name, tmp_path, CPU)
    path.unlink()
    with pytest.raises(common.DataError, match=f"{path} can't be read "):
        common.load_images(name, tmp_path, CPU)


def test_cifar_by_torchvision(tmp_path, monkeypatch):
    class CIFAR10:
        def __init__(self, root, train, download):
            assert root == tmp_path and download
            self.data = np.arange(4 * 3072 if train else 2 * 3072).astype(np.uint8).reshape(-1, 32, 32, 3)
            self.targets = [0, 1, 2, 3] if train else [3, 0]

    monkeypatch.setattr(common.torchvision.datasets, "CIFAR10", CIFAR10)
    data = common.load_images("cifar10", tmp_path, CPU)
    assert data.x_train[1, 2, 3, 4] == (3072 + 3 * 96 + 4 * 3 + 2) % 256 and data.y_test.tolist() == [3, 0]

    def offline(*_, **__):
        raise OSError("Network is\nunreachable")

    monkeypatch.setattr(common.torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(common.DataError) as error:
        common.load_images("cifar10", tmp_path, CPU)
    assert str(error.value) == (f"cifar10 is not in {tmp_path} and could not be downloaded (Network is unreachable): put "
                                "cifar-10-batches-bin/ there, or take another --dataset (digits, or a folder of images)")


def write_images(folder, count=6, size=(16, 16), mode="RGB", kind="png"):
    for number, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new(mode, size, (40 * number + i) if mode == "L" else (40 * number + i, 90, 200)).save(
                folder / name / f"{i}.{kind}")


def test_image_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", count=2)
    data = common.load_images(str(tmp_path), "data", CPU, image_size=16)
    assert data.x_train.shape == (12, 3, 16, 16) and data.x_test.shape == (4, 3, 16, 16)
    assert data.y_train.tolist() == [0] * 6 + [1] * 6
    assert data.x_train[:, 0, 3, 3].tolist() == [*range(6), *range(40, 46)]  # decoded as they are
    plain = data.plain(data.x_train)[:, 0]
    assert abs(plain.mean()) < 1e-5 and abs(plain.std() - 1) < 1e-3  # by the training images' own mean and std


def test_image_folder_is_split_resized_and_cropped(tmp_path):
    write_images(tmp_path, count=10, size=(64, 40), kind="jpg")
    data = common.load_images(str(tmp_path), "data", CPU, image_size=20)
    assert data.x_train.shape == (16, 3, 20, 20) and data.y_test.bincount().tolist() == [2, 2]
    assert torch.equal(data.x_test, common.load_images(str(tmp_path), "data", CPU, image_size=20).x_test)


def test_gray_images_have_one_channel(tmp_path):
    write_images(tmp_path, mode="L")
    assert common.load_images(str(tmp_path), "data", CPU, image_size=16).x_train.shape[1] == 1


def test_a_channel_without_content_does_no_harm(tmp_path):
    write_images(tmp_path)  # its green and blue channels are constant
    data = common.load_images(str(tmp_path), "data", CPU, image_size=16)
    assert data.plain(data.x_train).isfinite().all() and data.view(data.x_train).isfinite().all()


def test_images_of_16_bits_are_refused(tmp_path):
    write_images(tmp_path)
    Image.new("I;16", (16, 16), 40000).save(tmp_path / "ant/0.png")
    with pytest.raises(common.DataError, match="0.png can't be read as an image .mode I;16: more than 8 bits a channel"):
        common.load_images(str(tmp_path), "data", CPU, image_size=16)


def test_digits_as_images():
    data = common.load_images("digits", "data", CPU)
    assert data.x_train.shape == (1437, 1, 8, 8) and data.x_train.dtype == torch.uint8 and data.x_train.max() == 255
    assert torch.equal(data.y_test, common.load_table("digits", "data", CPU).y_test)  # the same split as the table's


def test_train_size_is_a_stratified_subset():
    data = common.load_images("digits", "data", CPU, train_size=100)
    assert data.x_train.shape == (100, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.y_train.bincount().min() >= 9
    assert torch.equal(data.x_train, common.load_images("digits", "data", CPU, train_size=100).x_train)
    assert len(common.load_images("digits", "data", CPU, train_size=1437).x_train) == 1437
    for size in (5, 1438):
        with pytest.raises(common.DataError, match=f"^--train-size {size} of the 1,437 training examples: give 10 to 1,427, "):
            common.load_images("digits", "data", CPU, train_size=size)


def truncated(path):
    Image.effect_noise((16, 16), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-200])


BAD_FOLDERS = {
    "not there": (lambda path: None, r"{path} is no folder of images, one folder a class \(.*\): --dataset takes cifar10, "),
    "no classes": (lambda path: path.mkdir(), r"{path} is no folder of images, one folder a class "),
    "no images": (lambda path: (path / "ant").mkdir(parents=True), r"{path} is no folder of images, one folder a class "),
    "one class": (lambda path: (write_images(path), shutil.rmtree(path / "bee")), "{path} holds one class, 'ant': give images "
                  "of two or more"),
    "truncated": (lambda path: (write_images(path), truncated(path / "bee/3.jpg")), r"{path}/bee/3.jpg can't be read as an "
                  r"image \(.*\): mend or remove it"),
    "text": (lambda path: (write_images(path), (path / "bee/3.png").write_text("hello")), "{path}/bee/3.png can't be read as "),
    "too small": (lambda path: (write_images(path), Image.new("RGB", (16, 15)).save(path / "ant/x.png")), "{path}/ant/x.png is "
                  "16 x 15 pixels, smaller than --image-size 16: remove it, or lower --image-size"),
    "too few": (lambda path: write_images(path, count=1), "{path} can't be split into training and test images: "),
    "no test images": (lambda path: (write_images(path / "train"), (path / "test").mkdir()), "{path}/test is no folder of "),
    "other classes": (lambda path: (write_images(path / "train"), write_images(path / "test"), (path / "test/bee").rename(
        path / "test/cow")), "{path}/train and {path}/test differ in their classes, or only one is gray: make them alike"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_bad_image_folder(tmp_path, what):
    make, message = BAD_FOLDERS[what]
    path = tmp_path / "images"
    make(path)
    with pytest.raises(common.DataError) as error:
        common.load_images(str(path), "data", CPU, image_size=16)
    assert re.match(message.format(path=path), str(error.value)), error.value
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- loader
def test_two_views_shuffle_cover_and_drop_the_rest():
    x = torch.arange(1, 24.0)[:, None]
    loader = common.TwoViews(x, lambda x: x.clone(), 5)
    first, second = ([x[:, 0] for x, _ in loader] for _ in range(2))
    assert len(loader) == len(first) == 4
    assert torch.cat(first).unique().numel() == 20
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert all(torch.equal(x, x_tilde) for x, x_tilde in loader)  # two views of the same batch


def test_masking_is_independent_and_of_the_continuous_columns_alone(tmp_path):
    torch.manual_seed(0)
    table = frame(3000)
    data = load_csv(table, tmp_path / "my.csv", mask=0.2)
    (x, x_tilde), *_ = common.TwoViews(data.x_train, data.view, 2400)
    masked, masked_tilde = x[:, :2] == 0, x_tilde[:, :2] == 0
    for share, expected in [(masked, 0.2), (masked_tilde, 0.2), (masked & masked_tilde, 0.04),
                            (masked[:, 0] & masked[:, 1], 0.04)]:
        assert abs(share.float().mean() - expected) < 0.02
    assert torch.equal(x[:, 2:], x_tilde[:, 2:])
    kept = ~(masked | masked_tilde)
    assert torch.equal(x[:, :2][kept], x_tilde[:, :2][kept])
    view = data.view(data.x_train)
    assert ((view == data.x_train) | (view == 0)).all()  # what is kept is not scaled up
    unmasked = load_csv(table, tmp_path / "my.csv", mask=0.0)
    assert torch.equal(unmasked.view(unmasked.x_train), unmasked.plain(unmasked.x_train))


# ---------------------------------------------------------------------------------------------------- linear evaluation
def answerable(n_test=2500, wrong=0.25):
    """Features that are one-hot of their class; a quarter of the test labels are wrong on purpose."""
    y_train, y_test = torch.arange(600) % 3, torch.arange(n_test) % 3
    x_train, x_test = torch.eye(3)[y_train], torch.eye(3)[y_test]
    y_test = torch.where(torch.arange(n_test) < wrong * n_test, (y_test + 1) % 3, y_test)
    return common.Dataset(x_train, y_train, x_test, y_test, 3, lambda x: x, lambda x: x)


def test_linear_eval_of_a_known_answer():
    result = common.linear_eval(nn.Identity(), answerable(), epochs=20)
    assert result["train_accuracy"] == 1 and result["test_accuracy"] == 0.75
    assert result.keys() == {"test_accuracy", "train_accuracy", "protocol", "seconds"}


def test_linear_eval_is_the_protocol_written_out(monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randint(3, (200,))  # labels that can't be learned: the weights follow every detail
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    data = common.Dataset(x, y, x[:40], y[:40], 3, lambda x: x + 9, lambda x: 2 * x)
    made, inner = [], nn.Linear
    monkeypatch.setattr(nn, "Linear", lambda *args, **kwargs: made.append(inner(*args, **kwargs)) or made[-1])
    result = common.linear_eval(encoder, data, epochs=20, batch_size=64, seed=3)
    monkeypatch.undo()

    encoder.eval()
    torch.manual_seed(3)
    classifier = nn.Linear(8, 3)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    features = encoder(2 * x).detach()
    optimizer = torch.optim.SGD(classifier.parameters(), 2.5, momentum=0.9)
    for epoch in range(20):
        optimizer.param_groups[0]["lr"] = 2.5 * (1 if epoch < 16 else 0.2 if epoch < 18 else 0.04 if epoch < 19 else 0.008)
        order = torch.randperm(200)
        for index in (order[:64], order[64:128], order[128:192]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(features[index]), y[index]).backward()
            optimizer.step()
    torch.testing.assert_close(made[0].state_dict(), classifier.state_dict(), rtol=1e-3, atol=1e-3)
    correct = classifier(features).argmax(1) == y
    assert result["train_accuracy"] == correct.sum() / 200 and result["test_accuracy"] == correct[:40].sum() / 40
    assert result["protocol"] == ("linear classifier on frozen features: SGD, momentum 0.9, lr 10 x batch/256, batch 64, 20 "
                                  "epochs, x 0.2 after 80, 90 and 95 %")


def test_linear_eval_draws_the_training_views_anew_five_times():
    data = answerable()
    drawn = []
    data.eval_view = lambda x: drawn.append(len(x)) or x
    assert common.linear_eval(nn.Identity(), data, epochs=20)["test_accuracy"] == 0.75
    assert sum(drawn) == 5 * 600


def test_linear_eval_uses_batch_norm_in_eval_mode():
    """In training mode BatchNorm would centre the shifted test features; frozen, they are all of the first class."""
    data = answerable(wrong=0)
    data.x_test = data.x_test * 0 + torch.tensor([9.0, 0, 0])
    result = common.linear_eval(nn.BatchNorm1d(3), data, epochs=20)
    assert result["test_accuracy"] == (data.y_test == 0).float().mean()


def test_linear_eval_leaves_everything_as_it_was():
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    encoder[2].eval()
    before, rng = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    first = common.linear_eval(encoder, answerable(), epochs=3)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert [module.training for module in encoder] == [True, True, False]
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    torch.rand(5)
    second = common.linear_eval(encoder, answerable(), epochs=3)
    assert first | {"seconds": 0} == second | {"seconds": 0}
