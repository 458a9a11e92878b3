# SPDX-License-Identifier: MIT
"""Data of one's own: how tables and folders are read, with labels or without, and read again."""

import gzip
import json
import os
import wave

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import byol_imix
import common
import npair_tabular
import runs
import simclr_imix

CPU = torch.device("cpu")
N = 60
RNG = np.random.default_rng(0)
NOISE = RNG.permutation(N) * 1.5 + 0.25  # a column that says nothing, in no order
KINDS = np.array(["cat", "dog", "emu"])[np.arange(N) % 3]


def load(path, text, label_column="kind", **options):
    """A table of columns, or a text or bytes, written and read."""
    if isinstance(text, dict):
        text = pd.DataFrame(text).to_csv(index=False)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return common.load_table(str(path), "data", CPU, label_column=label_column, **options)


def column(values, **others):
    return {"c": values, "noise": NOISE, **others, "kind": KINDS}


def described(data, name="c"):
    """How data.json has a column read."""
    return next((c for c in data.spec["columns"] if c["name"] == name), None)


def in_order(data):
    """The rows as in the file, float32."""
    x = torch.cat([data.x_train, data.x_test])
    return x[torch.tensor(data.order).argsort()]


def refused(path, text, *parts, **options):
    with pytest.raises(common.DataError) as error:
        load(path, text, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 1000
    for part in parts:
        assert part in message, message


# ----------------------------------------------------------------------- numbers as texts
WHOLE = RNG.integers(1000, 99999, N)
PARTS = RNG.integers(0, 1000, N) / 10


@pytest.mark.parametrize("write", [
    str, "{:,}".format, "${:,}".format, "{} €".format, "{:,}%".format, "  {} ".format,
    "{:,.2f}".format, lambda v: f"{v:,}".replace(",", " "), lambda v: f"{v:,}".replace(",", "'"),
    lambda v: f"{v:,.2f}".translate(str.maketrans(",.", ".,")), "{:.3e}".format, "+{}".format,
    "₹{}".format, lambda v: f"{v:,}".replace(",", "\N{THIN SPACE}")],
    ids=lambda write: write(12345))
def test_numbers_written_as_text(tmp_path, write):
    texts = [write(v) for v in WHOLE]
    expected = [float(f"{v:.3e}") for v in WHOLE] if "e" in texts[0] else WHOLE
    data = load(tmp_path / "my.csv", column(texts))
    plain = load(tmp_path / "plain.csv", column(expected))
    assert described(data)["kind"] == "number" and data.groups == [2]
    torch.testing.assert_close(in_order(data), in_order(plain))


@pytest.mark.parametrize("write", [
    lambda v: f"{v:.1f}".replace(".", ","), lambda v: f"{-v:.1f}".replace(".", ",").replace(
        "-", "\N{MINUS SIGN}"), lambda v: f"{v:.1f}".replace(".", ",") + " %"])
def test_decimal_commas(tmp_path, write):
    data = load(tmp_path / "my.csv", column([write(v) for v in PARTS]))
    sign = -1 if "\N{MINUS SIGN}" in write(1.5) else 1
    plain = load(tmp_path / "plain.csv", column(sign * PARTS))
    torch.testing.assert_close(in_order(data), in_order(plain))


def test_1_comma_234_is_as_the_rest_of_the_file_says(tmp_path):
    """1,234 and 1.234 are read by the file's other columns; where these say nothing, refused."""
    commas = [f"{v / 1000:.3f}".replace(".", ",") for v in RNG.integers(1000, 9999, N)]
    texts = [f"{v:.1f}".replace(".", ",") for v in PARTS]

    def table(other):
        lines = [f"{a};{b};{kind}" for a, b, kind in zip(commas, other, KINDS)]
        return "c;noise;kind\n" + "\n".join(lines)

    data = load(tmp_path / "my.csv", table(texts))
    assert described(data)["decimal"] == ","
    data = load(tmp_path / "my.csv", table(NOISE))
    assert described(data)["decimal"] == "."
    refused(tmp_path / "my.csv", table(RNG.permutation(N)), "'c'", commas[0])
    quoted = load(tmp_path / "my.csv", column(commas, noise=RNG.permutation(N)))
    assert described(quoted)["decimal"] == "."  # in a file of commas they part thousands


@pytest.mark.parametrize("texts", [
    ["5%", "7"], ["$5", "€7"], ["2024-03-01", "2024-04-17"], ["1.5.2024", "17.12.2024"],
    ["3/1/24", "12/24/24"], ["12:30", "7:45"], ["Jan 5, 2024", "Mar 17, 2024"],
    ["5 March 2024", "12 May 2023"], ["2024-03-01T10:00", "2024-03-02 11:00:30"],
    ["1:30 PM", "7:45 am"], ["2024-03", "2024-04"], ["2024-01-02Z", "2024-05-02Z"],
    ["Mon, 1 Jan 2024", "Tue, 2 Jan 2024"], ["1st Jan 2024", "3rd May 2024"],
    ["1-Jan-24", "7-Mar-24"], ["5", "-", "-", "-", "7"],
    ["1,5", "2.5"], ["1", "2", "3", "many"]])
def test_what_could_be_misread_is_refused(tmp_path, texts):
    """A column of few different texts, which would do as categories, but are none."""
    refused(tmp_path / "my.csv", column(np.resize(texts + texts[:1] * 2, N)), "'c'", "row")


@pytest.mark.parametrize("texts", [
    ["red", "green", "blue"], ["A1", "A2", "B1"], ["1 room", "2 rooms", "many"],
    ["may", "march", "jan"], ["a,b", "c;d", "$"], ["v1.2", "v1.3", "v2.0"],
    ["Octane 91", "Octane 95", "Octane 98"], ["1.2.3", "1.2.4", "2.0.1"],
    ["None", "Mild", "Severe"], ["a" + " " * 20_000 + "b", "c", "d"]])
def test_categories(tmp_path, texts):
    data = load(tmp_path / "my.csv", column(np.resize(texts, N)[RNG.permutation(N)]))
    assert described(data)["values"] == sorted(texts) and data.groups == [1, 3]


def test_blanks_make_no_further_class_or_category(tmp_path):
    blank = np.resize(["", " ", "\N{NO-BREAK SPACE}", "\t"], N)
    texts = np.char.add(np.resize(["red", "green", "blue"], N)[RNG.permutation(N)], blank)
    table = column(texts)
    table["kind"] = np.char.add(blank, KINDS)
    data = load(tmp_path / "my.csv", table)
    assert data.groups == [1, 3] and data.spec["classes"] == ["cat", "dog", "emu"]


@pytest.mark.parametrize("values", [
    [2023, 2024], [0, 1_000_000], ["yes", "no"], [True, False], [-1e-9, 1e9], [0.5, 0.25]])
def test_two_values_are_0_and_1(tmp_path, values):
    data = load(tmp_path / "my.csv", column(np.resize(values, N)[RNG.permutation(N)]))
    assert data.groups == [1, 1] and described(data)["kind"] == "binary"
    assert set(in_order(data)[:, 1].tolist()) == {0, 1}


# ----------------------------------------------------------------------- what tells nothing
@pytest.mark.parametrize("name, values", [
    ("index", np.arange(N)), ("", np.arange(N)), ("c", np.arange(N) + 7), ("c", -3 * np.arange(N)),
    ("c", np.arange(N) * 0.05), ("c", np.sort(RNG.choice(10_000, N, replace=False))),
    ("customer_id", RNG.permutation(10 * N)[:N]), ("ID", RNG.permutation(N)),
    ("id", np.arange(N) % 30), ("Unnamed: 0", np.arange(N) % 30), ("S.No.", RNG.permutation(N)),
    ("userId", np.arange(N) // 4), ("c", np.sort(RNG.choice(10**9, N, replace=False)) * 1.0)])
def test_what_tells_the_row_is_left_out(tmp_path, capsys, name, values):
    data = load(tmp_path / "my.csv", {name: values, "noise": NOISE, "kind": KINDS})
    assert data.groups == [1]
    assert f"'{name or 'column 1'}'" in capsys.readouterr().out


@pytest.mark.parametrize("name, values", [
    ("population", RNG.permutation(10**6)[:N]), ("price", np.sort(NOISE**1.5)),
    ("humid", NOISE), ("paid", RNG.permutation(500)[:N]), ("solid", RNG.permutation(N)),
    ("Body Mass Index", RNG.permutation(N)), ("store_id", RNG.integers(0, 9, N)),
    ("age", np.sort(RNG.integers(1, 60, N))), ("grid", RNG.integers(0, 9, N))])
def test_a_real_feature_is_kept(tmp_path, name, values):
    data = load(tmp_path / "my.csv", {name: values, "noise": NOISE, "kind": KINDS})
    assert data.groups == [2]


@pytest.mark.parametrize("values", [
    np.full(N, 3), np.full(N, "same"), 0.1 + np.resize([0, 1e-17, 2e-17], N) * 5,
    1e9 + np.resize([0, 1e-7], N)])
def test_constant_columns_are_left_out(tmp_path, capsys, values):
    data = load(tmp_path / "my.csv", {"c": map(repr, values.tolist()), "noise": NOISE,
                                      "kind": KINDS})
    assert data.groups == [1] and "'c'" in capsys.readouterr().out


def test_constant_in_the_training_rows_alone_is_left_out(tmp_path):
    data = load(tmp_path / "my.csv", column(np.arange(N)))
    values = np.zeros(N)
    values[data.order[len(data.x_train):]] = 1e6 + np.arange(12)
    data = load(tmp_path / "my.csv", column(values))
    assert data.groups == [1] and in_order(data).abs().max() < 10


@pytest.mark.parametrize("header, twice", [
    ("kind,noise,kind", "'kind'"), ("noise,noise,kind", "'noise'"), ("a, a,kind", "'a'")])
def test_two_columns_of_one_name_are_refused(tmp_path, header, twice):
    rows = "\n".join(f"{a},{b},{kind}" for a, b, kind in zip(NOISE, WHOLE, KINDS))
    refused(tmp_path / "my.csv", f"{header}\n{rows}", twice)


# ----------------------------------------------------------------------- files
@pytest.mark.parametrize("write", [
    lambda text: text.replace(",", ";"), lambda text: text.replace(",", "\t"),
    lambda text: text.replace(",", "|"), lambda text: "\n\n" + text,
    lambda text: text.replace("c,noise,kind", '"c; m",noise,kind').replace('"c; m"', "c"),
    lambda text: text.replace(",", ", "), lambda text: "\ufeff" + text,
    lambda text: text.encode("utf-16"), lambda text: text.replace("\n", "\r\n")])
def test_separators_and_encodings(tmp_path, write):
    table = pd.DataFrame(column(PARTS)).to_csv(index=False)
    data, plain = load(tmp_path / "my.csv", write(table)), load(tmp_path / "plain.csv", table)
    assert data.spec["classes"] == plain.spec["classes"]
    assert torch.equal(data.x_train, plain.x_train)


@pytest.mark.parametrize("header, row", [
    ("Weight, kg;Height, cm;kind", "{i},5;{j};{kind}"), ('"price; EUR",b,kind', "{i},{j},{kind}")])
def test_the_separator_is_what_makes_fields_alike(tmp_path, header, row):
    rows = [row.format(i=i * i % 23, j=i % 7, kind=KINDS[i]) for i in range(N)]
    data = load(tmp_path / "my.csv", "\n".join([header, *rows]))
    assert data.groups == [2] and data.num_classes == 3


@pytest.mark.parametrize("rows", [
    [f"{a:.1f},{b},{kind}" for a, b, kind in zip(NOISE, WHOLE, KINDS)],
    [f"{b},{a:.0f},{kind}" for a, b, kind in zip(NOISE, WHOLE, KINDS)]])
def test_a_table_without_a_header_line_is_refused(tmp_path, rows):
    refused(tmp_path / "my.csv", "\n".join(rows), "header", label_column=None)


def test_years_and_numbers_may_be_names(tmp_path):
    data = load(tmp_path / "my.csv", {"2019": PARTS, "2020": NOISE, "kind": KINDS})
    assert data.groups == [2]


def test_utf_16_without_a_mark_is_refused_with_a_remedy(tmp_path):
    table = pd.DataFrame(column(PARTS)).to_csv(index=False)
    refused(tmp_path / "my.csv", table.encode("utf-16-le"), "UTF-8", "iconv")


def test_latin_1_is_refused_with_a_remedy(tmp_path):
    table = pd.DataFrame(column(np.resize(["rot", "grün", "blau"], N))).to_csv(index=False)
    refused(tmp_path / "my.csv", table.encode("latin-1"), "UTF-8", "iconv")


def test_names_and_values_are_quoted_and_cut(tmp_path):
    refused(tmp_path / "my.csv", column(["x" * 10**6] + ["1"] * (N - 1)), "'xxx")
    refused(tmp_path / "my.csv", {"a\nb\x1b[31m": ["?"] * N, "kind": KINDS}, r"a\nb\x1b[31m",
            label_column="nothing")


# ----------------------------------------------------------------------- missing values
def test_missing_values_are_imputed(tmp_path):
    number = PARTS.astype(object)
    text = np.resize(["red", "green", "red", "blue"], N).astype(object)
    number[::7], text[3::7] = "NA", "?"
    table = column(number, colour=text)
    refused(tmp_path / "my.csv", table, "--missing impute", "'c'", "row 1")
    data = load(tmp_path / "my.csv", table, missing="impute")
    assert data.groups == [2, 2, 3]
    train = data.order[: len(data.x_train)]
    x, is_number = in_order(data), number != "NA"
    known = number[train][is_number[train]].astype(float)
    filled = np.where(is_number, number, np.median(known)).astype(float)
    filled = (filled - filled[train].mean()) / filled[train].std()
    torch.testing.assert_close(x[:, 0], torch.tensor(filled, dtype=torch.float32))
    assert (x[:, 2].numpy() == ~is_number).all() and (x[:, 3].numpy() == (text == "?")).all()
    assert x[text == "?", 4:].argmax(1).unique().tolist() == [2]  # blue, green, red


def test_that_a_value_is_missing_is_kept_where_it_is_all_that_differs(tmp_path):
    alley = np.resize(["Pave", "NA"], N)[RNG.permutation(N)]
    data = load(tmp_path / "my.csv", column(alley), missing="impute")
    assert data.groups == [1, 1] and (in_order(data)[:, 1].numpy() == (alley == "NA")).all()


def test_rows_without_a_label_only_train(tmp_path):
    labels = KINDS.astype(object)
    labels[::5] = ["", "NA", "?", "nan"] * 3
    data = load(tmp_path / "my.csv", column(PARTS) | {"kind": labels})
    assert len(data.x_train) + len(data.x_test) == N and data.labelled == 38
    assert (data.y_train[:38] >= 0).all() and (data.y_train[38:] == -1).all()
    assert set(data.order[38:50]) == set(range(0, N, 5)) and (data.y_test >= 0).all()
    result = common.sklearn_eval(nn.Flatten(), data)
    assert "38 labels" in result["protocol"]


@pytest.mark.parametrize("labels", [
    None, np.full(N, "all"), np.arange(N), RNG.permutation([f"a{i}" for i in range(N)])],
    ids=["no column", "one value", "counter", "names"])
def test_without_classes_all_rows_train(tmp_path, capsys, labels):
    table = column(PARTS) | {"kind": labels}
    if labels is None:
        del table["kind"]
    data = load(tmp_path / "my.csv", table, label_column=None if labels is None else "kind")
    assert len(data.x_train) == N and data.num_classes == 0 and data.groups == [2]
    assert "no evaluation" in capsys.readouterr().out
    result = common.evaluate(nn.Flatten(), data, None)
    assert result.keys() == {"protocol"} and "labels" in common.in_words(result, data)


@pytest.mark.parametrize("numbers", [NOISE, RNG.permutation(N) + 100, np.round(NOISE) / 4])
def test_numbers_to_predict(tmp_path, numbers):
    """A linear function of a column is predicted by ridge regression; R^2 is near 1."""
    data = load(tmp_path / "my.csv", {"c": 3 * numbers + 5 + 0.01 * PARTS, "other": PARTS,
                                      "price": numbers}, label_column="price")
    assert data.y_train.dtype == torch.float64 and data.num_classes == 0
    result = common.sklearn_eval(nn.Flatten(), data)
    assert result["test_r2"] > 0.99 and "R^2" in common.in_words(result, data)
    with pytest.raises(common.DataError, match="classes"):
        common.linear_eval(nn.Flatten(), data)


@pytest.mark.parametrize("write", [
    lambda v: f"{v:.1f}".replace(".", ","), "${:.1f}".format, "{:.1f} %".format])
def test_numbers_to_predict_written_as_text(tmp_path, write):
    data = load(tmp_path / "my.csv", column([write(v) for v in PARTS]), label_column="c")
    assert data.num_classes == 0 and sorted(torch.cat([data.y_train, data.y_test]).tolist()) == \
        sorted(PARTS)


def test_classes_that_are_numbers_may_be_written_in_two_ways(tmp_path):
    data = load(tmp_path / "my.csv", column(PARTS) | {"kind": np.resize(["1", "1.0", "2"], N)})
    assert data.num_classes == 2


def test_logistic_regression_is_scikit_learns(tmp_path):
    from sklearn.linear_model import LogisticRegression
    data = common.load_table("digits", "data", CPU)
    encoder = nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20))
    result = common.sklearn_eval(encoder, data)
    assert encoder.training
    with torch.no_grad():
        x, x_test = (encoder.eval()(part).double().numpy() for part in (data.x_train, data.x_test))
    mean, std = x.mean(0), x.std(0)
    model = LogisticRegression(max_iter=1000).fit((x - mean) / std, data.y_train)
    score = model.score((x_test - mean) / std, data.y_test)
    assert result["test_accuracy"] == pytest.approx(score, abs=0.006) and score > 0.8


# ----------------------------------------------------------------------- new examples
def read_again(path, data):
    """data.json as it comes back from the run folder."""
    return common.load_new(str(path), json.loads(json.dumps(data.spec)), CPU)


def mixed():
    """A table with columns of each kind, written in ways of their own."""
    return column([f"{v:,} €" for v in WHOLE], colour=np.resize(["red", "green", "blue"], N),
                  member=np.resize(["no", "yes", "no"], N)[RNG.permutation(N)],
                  year=RNG.integers(2023, 2025, N), part=PARTS, id=np.arange(N))


def test_the_training_file_is_read_again_alike(tmp_path):
    data = load(tmp_path / "my.csv", mixed())
    new = read_again(tmp_path / "my.csv", data)
    assert torch.equal(new.x_train, in_order(data)) and new.groups == data.groups


def test_new_rows_in_another_company_are_coded_alike(tmp_path):
    """A row's input does not depend on the rows beside it, nor on the order of the columns."""
    table = pd.DataFrame(mixed())
    data = load(tmp_path / "my.csv", table.to_csv(index=False))
    some = table.iloc[[5, 17, 40]]
    for written in (some, some[some.columns[::-1]], some.drop(columns=["kind", "id"])):
        written.to_csv(tmp_path / "new.csv", index=False)
        new = read_again(tmp_path / "new.csv", data)
        assert torch.equal(new.x_train, in_order(data)[[5, 17, 40]])


@pytest.mark.parametrize("change, parts", [
    (lambda t: t.drop(columns="part"), ["'part'"]),
    (lambda t: t.assign(more=1), ["'more'"]),
    (lambda t: t.assign(colour="pink"), ["'colour'", "row 1", "'pink'"]),
    (lambda t: t.assign(year=2026), ["'year'", "'2026'"]),
    (lambda t: t.assign(c="$5"), ["'c'", "'$5'"]),
    (lambda t: t.assign(part="?"), ["'part'", "missing"])])
def test_new_rows_that_do_not_fit_are_refused(tmp_path, change, parts):
    data = load(tmp_path / "my.csv", mixed())
    path = tmp_path / "new.csv"
    change(pd.DataFrame(mixed())).to_csv(path, index=False)
    with pytest.raises(common.DataError) as error:
        read_again(path, data)
    for part in (str(path), *parts):
        assert part in str(error.value)


def test_new_rows_with_values_missing_are_filled_as_in_training(tmp_path):
    data = load(tmp_path / "my.csv", column(PARTS), missing="impute")
    pd.DataFrame(column(["NA"] * N)).to_csv(tmp_path / "new.csv", index=False)
    train = data.order[: len(data.x_train)]
    expected = (np.median(PARTS[train]) - PARTS[train].mean()) / PARTS[train].std()
    new = read_again(tmp_path / "new.csv", data).x_train[:, 0]
    torch.testing.assert_close(new, torch.full([N], expected, dtype=torch.float32))


def test_new_rows_of_a_table_that_comes_with_the_package(tmp_path):
    data = common.load_table("digits", "data", CPU)
    x = common.load_digits().data
    for extra in (0, 1):
        np.savetxt(tmp_path / "new.csv", np.pad(x[:9], [(0, 0), (0, extra)]), delimiter=",")
        assert torch.equal(read_again(tmp_path / "new.csv", data).x_train, in_order(data)[:9])
    pd.DataFrame(x[:9]).to_csv(tmp_path / "new.csv", index=False)  # its names are 0 to 63
    assert torch.equal(read_again(tmp_path / "new.csv", data).x_train, in_order(data)[:9])
    holed = x[:9].copy()
    holed[3, 5] = np.nan
    for wrong in (x[:9, :5], np.column_stack([np.arange(9) + 20, x[:9]]), holed):
        np.savetxt(tmp_path / "new.csv", wrong, delimiter=",")
        with pytest.raises(common.DataError, match="new.csv"):
            read_again(tmp_path / "new.csv", data)


# ----------------------------------------------------------------------- folders
def picture(value, size=(16, 16)):
    return Image.new("RGB", size, (value, 90, 200))


def write_pictures(folder, count=8, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(first + i).save(folder / f"{i}.png")


def load_folder(path):
    return common.load_images(str(path), "data", CPU, image_size=16)


@pytest.mark.parametrize("folder", ["", "images"])
def test_images_without_classes(tmp_path, capsys, folder):
    write_pictures(tmp_path / folder)
    data = load_folder(tmp_path)
    assert data.x_train.shape == (8, 3, 16, 16) and data.num_classes == 0
    assert data.x_train[:, 0, 0, 0].tolist() == list(range(8))
    assert "no evaluation" in capsys.readouterr().out


def test_images_beside_the_classes_only_train(tmp_path):
    write_pictures(tmp_path, 3, 100)
    for i, name in enumerate(("ant", "bee")):
        write_pictures(tmp_path / name, 10, 40 * i)
    data = load_folder(tmp_path)
    assert len(data.x_train) == 19 and len(data.x_test) == 4 and data.labelled == 16
    assert data.x_train[16:, 0, 0, 0].tolist() == [100, 101, 102]


@pytest.mark.parametrize("train, test", [
    ("train", "test"), ("Train", "Test"), ("training", "testing"), ("TRAIN", "val"),
    ("train", "Validation"), ("seg_train", "seg_test"), ("Training Set", "Test Set")])
def test_usual_names_of_training_and_test_folders(tmp_path, train, test):
    for i, name in enumerate(("ant", "bee")):
        write_pictures(tmp_path / train / name, 8, 40 * i)
        write_pictures(tmp_path / test / name, 2, 40 * i + 20)
    data = load_folder(tmp_path)
    assert data.spec["classes"] == ["ant", "bee"]
    assert len(data.x_train) == 16 and data.x_test[:, 0, 0, 0].tolist() == [20, 21, 60, 61]


def test_of_val_and_test_the_test_is_taken(tmp_path, capsys):
    for part, count in (("train", 8), ("val", 3), ("test", 2)):
        for name in ("ant", "bee"):
            write_pictures(tmp_path / part / name, count)
    data = load_folder(tmp_path)
    assert len(data.x_train) == 16 and len(data.x_test) == 4
    assert "val" in capsys.readouterr().out


def test_a_third_folder_beside_train_and_test_is_refused(tmp_path):
    for part in ("train", "test", "unlabeled"):
        write_pictures(tmp_path / part / "ant")
    with pytest.raises(common.DataError, match="unlabeled"):
        load_folder(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "plane", "train"):
        write_pictures(tmp_path / name)
    assert load_folder(tmp_path).spec["classes"] == ["car", "plane", "train"]


def test_hidden_and_system_folders_are_no_classes(tmp_path):
    for name in ("ant", "bee", ".ipynb_checkpoints", "__MACOSX", ".git"):
        write_pictures(tmp_path / name)
    (tmp_path / "ant" / "._0.png").write_text("what some systems keep beside a file")
    data = load_folder(tmp_path)
    assert data.spec["classes"] == ["ant", "bee"] and len(data.names) == 16


def test_other_files_are_counted_and_deeper_ones_taken(tmp_path, capsys):
    for name in ("ant", "bee"):
        write_pictures(tmp_path / name, 4)
        write_pictures(tmp_path / name / "more", 4)
        for end in ("heic", "mp3", "txt"):
            (tmp_path / name / f"0.{end}").write_text("")
        picture(3).save(tmp_path / name / "x.gif")
        picture(3).save(tmp_path / name / "x.jfif", "JPEG")
    data = load_folder(tmp_path)
    assert len(data.names) == 20
    out = capsys.readouterr().out
    assert "6 files" in out and ".heic 2" in out and "8 of 20" in out


def test_links_that_lead_back_and_pipes(tmp_path):
    for name in ("ant", "bee"):
        write_pictures(tmp_path / name)
        (tmp_path / name / "back").symlink_to(tmp_path / name, target_is_directory=True)
        (tmp_path / name / "up").symlink_to(tmp_path, target_is_directory=True)
        os.mkfifo(tmp_path / name / "pipe.png")
        (tmp_path / name / "link.png").symlink_to(tmp_path / name / "pipe.png")
    assert len(load_folder(tmp_path).names) == 16


@pytest.mark.parametrize("folders", [["val", "test"], ["ant", "empty"], ["Train", "train"]])
def test_folders_that_can_not_be_used(tmp_path, folders):
    for name in folders:
        write_pictures(tmp_path / name / "bee", 8)
    if "empty" in folders:
        (tmp_path / "empty" / "bee").rename(tmp_path / "ant" / "more")
    with pytest.raises(common.DataError, match=folders[1]):
        load_folder(tmp_path)


def test_the_root_folder_is_refused_at_once():
    with pytest.raises(common.DataError):
        common.load_images("/", "data", CPU)


def test_images_are_read_as_they_are_shown(tmp_path):
    """Upright by EXIF; what is transparent, whatever colour hides there, is white."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 200  # the sky is above
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.fromarray(upright).save(tmp_path / name / f"{i}.png")
    turned, exif = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "ant" / "turned.png", exif=exif)
    rgba = np.dstack([np.full((16, 16, 3), 77, np.uint8), np.zeros((16, 16), np.uint8)])
    rgba[:8] = 200, 200, 200, 255
    Image.fromarray(rgba).save(tmp_path / "ant" / "rgba.png")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 255, 0, 200, 200, 200])
    palette.paste(0, (0, 8, 16, 16))
    palette.save(tmp_path / "bee" / "palette.png", transparency=0)
    data = load_folder(tmp_path)
    x = dict(zip(data.names[data.order], torch.cat([data.x_train, data.x_test])))
    assert torch.equal(x["ant/turned.png"], x["ant/0.png"])
    for name in ("ant/rgba.png", "bee/palette.png"):
        assert (x[name][:, :8] == 200).all() and (x[name][:, 8:] == 255).all()


def test_of_several_frames_the_first_is_taken_with_a_note(tmp_path, capsys):
    for name in ("ant", "bee"):
        write_pictures(tmp_path / name)
    picture(3).save(tmp_path / "ant" / "x.gif", save_all=True, append_images=[picture(90)])
    load_folder(tmp_path)
    assert "1 images hold several frames" in capsys.readouterr().out


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        write_pictures(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(common.DataError, match="0.png"):
        load_folder(tmp_path)


def test_images_that_do_not_fit_are_refused_before_they_are_read(tmp_path):
    for name in ("ant", "bee"):
        write_pictures(tmp_path / name)
    with pytest.raises(common.DataError, match="--image-size"):
        common.load_images(str(tmp_path), "data", CPU, image_size=10**6)


def test_new_images(tmp_path):
    for i, name in enumerate(("ant", "bee")):
        write_pictures(tmp_path / name, 8, 40 * i)
    data = load_folder(tmp_path)
    new = read_again(tmp_path, data)
    x = torch.cat([data.x_train, data.x_test])[torch.tensor(data.order).argsort()]
    assert torch.equal(new.x_train, x) and list(new.names) == list(data.names)
    torch.testing.assert_close(new.plain(new.x_train), data.plain(x))
    picture(5, (40, 32)).save(tmp_path / "new.png")  # resized as in training
    new = read_again(tmp_path / "new.png", data)
    assert new.x_train.shape == (1, 3, 16, 16) and new.names == ["new.png"]
    picture(5, (8, 8)).save(tmp_path / "new.png")
    with pytest.raises(common.DataError, match="8 x 8"):
        read_again(tmp_path / "new.png", data)


def test_features_are_in_the_datas_order(tmp_path):
    data = load(tmp_path / "my.csv", mixed())
    encoder = nn.Linear(sum(data.groups), 5)
    common.save_features(tmp_path / "f.npz", encoder, data, encoder)
    saved = np.load(tmp_path / "f.npz")
    with torch.no_grad():
        expected = encoder(in_order(data)).numpy()
    np.testing.assert_allclose(saved["features"], expected, rtol=1e-5)
    assert saved["features"].dtype == np.float32 and saved["row"].tolist() == list(range(N))
    assert (saved["classes"][saved["label"]] == KINDS).all()
    assert saved["test"].sum() == len(data.x_test)
    assert (saved["features"] == saved["untrained"]).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.npz", "my.csv"]


def test_many_test_examples_are_left_out_of_the_features(tmp_path):
    x, y = torch.rand(100_011, 3), torch.arange(100_011) % 2
    data = common.Dataset(x[:10], y[:10], x[10:], y[10:], 2, None, lambda x: x,
                          spec={"classes": ["a", "b"]}, order=np.arange(len(x)))
    for all_test, n in ((False, 10), (True, 100_011)):
        common.save_features(tmp_path / "f.npz", nn.Identity(), data, None, all_test)
        assert len(np.load(tmp_path / "f.npz")["features"]) == n


def test_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "my.csv")
    with pytest.raises(common.DataError, match="no file"):
        common.load_table(str(tmp_path / "my.csv"), "data", CPU)


def test_gzip(tmp_path):
    text = pd.DataFrame(column(PARTS)).to_csv(index=False)
    data = load(tmp_path / "my.csv.gz", gzip.compress(text.encode()))
    assert torch.equal(data.x_train, load(tmp_path / "my.csv", text).x_train)


# ----------------------------------------------------------------------- whole runs
def sklearn_table(name):
    from sklearn import datasets
    return getattr(datasets, f"load_{name}")(as_frame=True).frame.rename(
        columns={"target": "kind"})


def run_and_embed(script, dataset, out, *flags):
    """A short run on a data set, then its encoder on the same: both files of features."""
    flags = [*flags, "--epochs", "2", "--device", "cpu", "--out", str(out)]
    script.main(["--dataset", str(dataset), *flags])
    script.main(["--embed", str(dataset), "--out", str(out), "--device", "cpu"])
    saved, embedded = np.load(out / "features.npz"), np.load(
        out / f"features-{dataset.stem}.npz")
    np.testing.assert_allclose(saved["features"], embedded["features"], rtol=1e-4, atol=1e-5)
    assert len(saved["features"]) and np.ptp(saved["features"]) > 0
    return saved


@pytest.mark.parametrize("name", ["wine", "breast_cancer", "iris", "digits", "diabetes", "mixed"])
def test_tables_become_embeddings(tmp_path, capsys, name):
    """Batch size and width, not given, fit the table; the rows are the file's."""
    table = pd.DataFrame(mixed()) if name == "mixed" else sklearn_table(name)
    table.to_csv(tmp_path / "my.csv", index=False)
    saved = run_and_embed(npair_tabular, tmp_path / "my.csv", tmp_path / "run",
                          "--label-column", "kind")
    assert saved["row"].tolist() == list(range(len(table)))
    labels = saved["label"] if name == "diabetes" else saved["classes"][saved["label"]]
    assert labels.tolist() == table["kind"].astype(labels.dtype).tolist()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    score = "test_r2" if name == "diabetes" else "test_accuracy"
    assert {score, f"raw_{score}", f"untrained_{score}"} <= result.keys()
    assert "regression" in result["protocol"] and "raw columns" in capsys.readouterr().out


def test_images_without_labels_become_embeddings(tmp_path, capsys):
    for i, image in enumerate(common.load_digits().images[:40]):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{i:02}.png")
    saved = run_and_embed(simclr_imix, tmp_path / "images", tmp_path / "run", "--arch", "resnet18",
                          "--image-size", "8")
    assert saved["name"].tolist() == [f"{i:02}.png" for i in range(40)]
    assert (saved["label"] == -1).all() and "no evaluation" in capsys.readouterr().out
    runs.pictures(tmp_path / "run")
    assert "no label" not in (tmp_path / "run" / "tsne.svg").read_text()


def test_recordings_become_embeddings_and_pictures(tmp_path):
    for i in range(24):
        path = tmp_path / "clips" / ("ant", "bee")[i % 2] / f"{i:02}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", None))
            file.writeframes(np.int16(9000 * np.sin(np.arange(16000) * (i + 1) / 99)).tobytes())
    out = tmp_path / "runs" / "one"
    saved = run_and_embed(byol_imix, tmp_path / "clips", out, "--arch", "resnet18")
    assert saved["name"].tolist() == sorted(saved["name"].tolist()) and len(saved["name"]) == 24
    assert (saved["classes"][saved["label"]] == [n.split("/")[0] for n in saved["name"]]).all()

    runs.pictures(out)
    tsne = (out / "tsne.svg").read_text()
    assert tsne.count("<circle") == 2 * saved["test"].sum() and ">ant<" in tsne and ">bee<" in tsne
    assert (out / "loss.svg").read_text().count("<circle") == 2  # a point an epoch
    table = runs.table(tmp_path / "runs").splitlines()
    result = json.loads((out / "result.json").read_text())
    assert len(table) == 3 and f"{result['test_accuracy']:.4f}" in table[2]
    assert "byol_imix" in table[2] and "one" in table[2]


def test_supervised_wants_all_labels(tmp_path, capsys):
    table = pd.DataFrame(mixed())
    table.loc[3, "kind"] = ""
    table.to_csv(tmp_path / "my.csv", index=False)
    with pytest.raises(SystemExit):
        npair_tabular.main(["--dataset", str(tmp_path / "my.csv"), "--label-column", "kind",
                            "--supervised", "--out", str(tmp_path / "run")])
    assert "--supervised" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_embed_without_a_finished_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        npair_tabular.main(["--embed", "my.csv", "--out", str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err
