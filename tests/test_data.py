# SPDX-License-Identifier: MIT
"""Data sets and people's files: one rule a kind, said in a line; what can't be used is refused."""

import argparse
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

import common

CPU = torch.device("cpu")
ALL = ("table", "image", "speech")
N = 60
RNG = np.random.default_rng(0)
NOISE = RNG.permutation(N) * 1.5 + 0.25  # numbers that say nothing, in no order
WHOLE = RNG.integers(1000, 99999, N)
KINDS = np.array(["cat", "dog", "emu"])[np.arange(N) % 3]


def refused(load, *args, **options):
    """The message of the DataError that load(*args, **options) ends with: one line."""
    with pytest.raises(common.DataError) as error:
        load(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000
    return str(error.value)


def write(path, content):
    """Write bytes, a text, or a table of columns."""
    if isinstance(content, dict):
        content = pd.DataFrame(content).to_csv(index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(path, content, label_column="kind", **options):
    return common.load_table(str(write(path, content)), "data", CPU, label_column=label_column,
                             **options)


def table(values, **others):
    return {"c": values, "noise": NOISE, **others, "kind": KINDS}


def in_order(data, of="x"):
    """The rows, or "y", the labels, as in the file."""
    both = torch.cat([getattr(data, f"{of}_train"), getattr(data, f"{of}_test")])
    return both[torch.tensor(data.names.argsort())]


def by_name(data):
    return dict(zip(sorted(data.names), in_order(data)))


def read_again(path, data):
    """New examples as data.json, as it comes back from the run folder, has them read."""
    return common.load_new(str(path), json.loads(json.dumps(data.spec)), CPU)


def saved(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


PNG = saved(Image.effect_noise((16, 16), 50))


def offline(*_, **__):
    raise OSError("Network is\nunreachable")


# ----------------------------------------------------------------------- which kind of data
@pytest.mark.parametrize("dataset, domains, domain, own", [
    ("covtype", ALL, "table", False), ("digits", ALL, "table", False),
    ("cifar100", ALL, "image", False), ("speech_commands", ALL, "speech", False),
    ("my.csv", ALL, "table", True), ("words", ALL, "speech", True),
    ("pictures", ALL[1:], "image", True), ("music", ALL, "speech", True)])
def test_describe(tmp_path, monkeypatch, dataset, domains, domain, own):
    monkeypatch.chdir(tmp_path)
    for name in ("my.csv", "words/train/yes/a.WAV", "pictures/ant/a.png", "pictures/ant/a.mp3",
                 "pictures/ant/b.png", "music/jazz/1.mp3", "music/jazz/2.flac", "music/jazz/c.jpg"):
        write(Path(name), "")
    assert common.describe(dataset, domains) == {"domain": domain, "own": own}
    others = tuple(name for name in ALL if name != domain)
    if dataset == "digits":
        assert common.describe(dataset, others)["domain"] == "image"
        others = ("speech",)
    assert "other scripts" in refused(common.describe, dataset, others)


@pytest.mark.parametrize("dataset", ["nowhere", "nowhere.csv", "", "/dev/null", "a\0b"])
def test_a_path_that_is_no_data_is_refused_first(dataset):
    for domains in (ALL, ("table",)):
        assert "no such" in refused(common.describe, dataset, domains)


def test_load_takes_a_scripts_flags(tmp_path):
    path = write(tmp_path / "my.csv", table(NOISE[::-1]))
    args = argparse.Namespace(dataset=str(path), data_dir="data", mask=0.0, standardize="train",
                              label_column="kind", supervised=True)
    data = common.load(args, ("table",), CPU)
    assert data.num_classes == 3 and data.own
    args.label_column = ""
    assert "--supervised" in refused(common.load, args, ("table",), CPU)


def test_tables_need_neither_torchvision_nor_torchaudio(tmp_path):
    """And `import common` alone imports none of the large packages."""
    write(tmp_path / "my.csv", table(NOISE[::-1]))
    for package in ("torchvision", "torchaudio"):
        write(tmp_path / package / "__init__.py", "raise RuntimeError('built for another torch')")
    folder = str(Path(common.__file__).parent)
    code = (f"import sys, torch; sys.path[:0] = [{folder!r}, {str(tmp_path)!r}]\n"
            "import common; print(*{'pandas', 'scipy', 'PIL'} & set(sys.modules))\n"
            f"common.load_table({str(tmp_path / 'my.csv')!r}, '', torch.device('cpu'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout[0] == "\n", done.stderr


# ----------------------------------------------------------------------- tables: files
@pytest.mark.parametrize("change", [
    lambda text: text.replace(",", ";"), lambda text: text.replace(",", "\t"),
    lambda text: text.replace(",", "|"), lambda text: text.replace(",", ", "),
    lambda text: "\n\n" + text, lambda text: "\ufeff" + text, lambda text: text + "\n\n",
    lambda text: text.replace("\n", "\r\n"), lambda text: text.replace("c,", '"c",', 1),
    lambda text: gzip.compress(text.encode())])
def test_separators_and_line_ends(tmp_path, change):
    text = pd.DataFrame(table(NOISE[::-1])).to_csv(index=False)
    plain, content = load(tmp_path / "plain.csv", text), change(text)
    data = load(tmp_path / ("my.csv.gz" if isinstance(content, bytes) else "my.csv"), content)
    assert data.spec == plain.spec and torch.equal(data.x_train, plain.x_train)


def test_the_separator_parts_every_line_alike(tmp_path):
    rows = [f"{i * i % 23},5;{i % 7};{KINDS[i]}" for i in range(N)]
    text = "\n".join(["Weight, kg;Height, cm;kind", *rows])
    assert "Weight, kg" in refused(load, tmp_path / "my.csv", text)  # has decimal commas
    data = load(tmp_path / "my.csv", text.replace(",5;", ";"))
    assert [column["name"] for column in data.spec["columns"]] == ["Weight, kg", "Height, cm"]


def test_numbers_in_a_row_may_be_names(tmp_path):
    for names in (["2019", "2020"], ["0", "1"]):
        columns = dict(zip(names, RNG.integers(0, 2, (2, N)))) | {"kind": KINDS}
        assert load(tmp_path / "my.csv", columns).groups == [2]


ROWS = "".join(f"{i * i % 17 / 3},{i % 5},{'abc'[i % 3]}\n" for i in range(40))
TABLE = "p,q,kind\n" + ROWS
BAD_FILES = {  # content, and what the message holds
    "empty": ("", ""), "blanks": ("\n \n", ""), "a header line": ("p,q,kind\n", "p,q"),
    "a NUL": ("p,\0,kind\n" + ROWS, "binary"), "zip": (b"PK\3\4\0\0" + bytes(99), "binary"),
    "parquet": (b"PAR1\x15\0\x15" + bytes(99), "binary"), "zeros": (bytes(99), "binary"),
    "utf-16": (TABLE.encode("utf-16"), "binary"), "all bytes": (bytes(range(256)) * 9, ""),
    "latin": (TABLE.replace("a", "ä").encode("latin-1"), "utf-8"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:5e\nsize 734\n", "git-lfs"),
    "sep=;": ("sep=;\n" + TABLE.replace(",", ";"), "sep=;"), "sep=,": ("sep=,\n" + TABLE, "sep=,"),
    "sep=; of two": ("sep=;\na;b\n" + "1;2\n" * 9, "sep=;"),
    "arff": ("@relation iris\n@data\n" + ROWS, "@relation"),
    "html": ("<!DOCTYPE html>\n<p>a,b</p>\n" * 9, "<!DOCTYPE"),
    "html's table": ("<table>,a\n" + "1,2\n" * 9, "<table>"),
    "json": ('[{"a": 1, "b": 2},\n' * 9, "[{"), "json's lines": ('{"a": 1, "b": 2}\n' * 9, "{"),
    "not found": ("404: Not Found\n", "404"), "a title": ("My table\n" + TABLE, "My table"),
    "libsvm": ("1 1:0.5 2:0.3\n" * 9, "1 1:0.5"), "a long line": ("x" * 10**6, "xxx"),
    "blanks between": (TABLE.replace(",", " "), "p q kind"), "a quote": (TABLE + '"1,2,a\n', ""),
    "another separator": (TABLE.replace(",", "~"), "p~q~kind"),
    "one column": ("kind\n" + "a\nb\n" * 9, "kind"), "a long row": (TABLE + "1,2,3,4\n", "fields"),
    "late": (TABLE + ROWS * 9 + "1,2,3,4\n" + ROWS, "fields"),
    "row names": ("p,q\n" + ROWS, "fields"), "names": ("1.5,7,kind\n" + ROWS, "1.5"),
    "a long cell": (TABLE + "x" * 10**6 + ",1,a\n", ""), "control": ("a\x1b[31m,b\n1\n", "\\x1b"),
    "no such label": (TABLE.replace("kind", "sort"), "'kind'"), "repeated": (TABLE * 2, "repeated"),
    "twice": (TABLE.replace("q", "p"), "'p'"), "twice, blank": (TABLE.replace("q", "p "), "'p'"),
    "twice the label": (TABLE.replace("q", "kind"), "'kind'"),
    "a class once": (TABLE + "1,2,d", "'d'"),
    "twice in another form": ("é,e\u0301,kind\n" + ROWS, "'é'"),
    "few rows": ("p,q,kind\n1.5,2,a\n2.5,3,a\n1,7,b\n2,9,b\n", ""),
    "labels alone": ("id,kind\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40)), "no column"),
    "constant": ("p,kind\n" + "1,a\n1,b\n" * 9, "no column"),
    # without a header line, which is told before that there is no such label
    "numbers": ("30.83,0,b\n24.5,0,a\n30.83,4,b\n", "no header"),
    "numbers seen once": ("5.1,3,b\n4.9,2,c\n4.7,7,d\n", "no header"),
    "mushrooms": ("p,x,s,n\ne,x,s,y\np,b,y,n\n", "no header"),
    "texts that differ": ("usual,proper\nbad,proper\nusual,critical\n", "no header"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_table_are_refused(tmp_path, name):
    content, told = BAD_FILES[name]
    content = content if isinstance(content, bytes) else content.encode()
    for name, content in (("a.csv", content), ("a.csv.gz", gzip.compress(content))):
        message = refused(load, tmp_path / name, content)
        assert str(tmp_path / name) in message and told in message
    assert "b.csv.gz" in refused(load, tmp_path / "b.csv.gz", b"p,q\n1,2\n")  # not compressed
    assert "nowhere.csv" in refused(common.load_table, str(tmp_path / "nowhere.csv"), "", CPU)


def test_no_data_file_starts_a_program(tmp_path, monkeypatch):
    """A pickle is bytes; a pipe is not waited for; EPS would have PIL start gs."""
    code = b"cos\nsystem\n(S'touch " + str(tmp_path / "started").encode() + b"'\ntR."
    write_images(tmp_path / "i")
    two_words(tmp_path / "w")
    refused(load, tmp_path / "my.csv", code)
    for path, read in (("i/ant/x.png", load_images), ("w/ant/x.wav", load_speech)):
        write(tmp_path / path, code)
        assert "x." in refused(read, tmp_path / path[0])
        (tmp_path / path).unlink()
        os.mkfifo(tmp_path / path)
        assert "x." in refused(read, tmp_path / path[0])
    gs = write(tmp_path / "bin" / "gs", f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(gs.parent), prepend=os.pathsep)
    (tmp_path / "i/ant/x.png").unlink()
    write(tmp_path / "i/ant/x.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n"
          "%%EndComments\nshowpage\n%%EOF\n")
    assert "x.png" in refused(load_images, tmp_path / "i")
    assert not (tmp_path / "started").exists()


# ----------------------------------------------------------------------- tables: columns
def test_columns_by_kind(tmp_path, capsys):
    colours = np.resize(["red", "green", "blue", "blue"], N)
    data = load(tmp_path / "my.csv", table(WHOLE, colour=colours, flag=WHOLE % 2 == 0))
    assert data.groups == [2, 3, 2] and data.own
    x, train = in_order(data), data.names[: len(data.x_train)]
    expected = (WHOLE - WHOLE[train].mean()) / WHOLE[train].std()
    np.testing.assert_allclose(x[:, 0], expected, rtol=1e-4)
    assert (np.array(["blue", "green", "red"])[x[:, 2:5].argmax(1)] == colours).all()
    assert (x[:, 2:].sum(1) == 2).all() and (x[:, 6].numpy() == (WHOLE % 2 == 0)).all()
    assert "2 columns of numbers, 2 of texts" in capsys.readouterr().out
    again = load(tmp_path / "my.csv", table(WHOLE, colour=colours, flag=WHOLE % 2 == 0))
    assert torch.equal(data.x_train, again.x_train) and data.digest() == again.digest()


@pytest.mark.parametrize("name, values", [
    ("", np.arange(N)), ("Unnamed: 0", np.arange(N) % 30), ("Unnamed: 0.1", RNG.permutation(N)),
    ("index", np.arange(N) % 7), ("c", np.arange(N) + 7), ("c", -3 * np.arange(N)),
    ("c", np.sort(RNG.choice(10**9, N, replace=False)) * 1.0), ("ID", RNG.permutation(N)),
    ("customer_id", RNG.permutation(10 * N)[:N]), ("userId", np.arange(N) // 4),
    ("c", [f"A-{i}" for i in RNG.permutation(N)]), ("uuid", [f"{i}f2e" for i in range(N)]),
    ("c", np.full(N, 3)), ("c", np.full(N, "same"))])
def test_what_tells_the_row_is_left_out(tmp_path, capsys, name, values):
    data = load(tmp_path / "my.csv", {name: values, "noise": NOISE, "kind": KINDS})
    said = capsys.readouterr().out
    assert data.groups == [1] and f"{name or 'Unnamed: 0'!r}: " in said
    assert ("constant" in said) == (len(set(values)) == 1)


def test_a_real_feature_is_kept(tmp_path):
    features = {"humid": NOISE, "paid": RNG.permutation(500)[:N], "grid": RNG.integers(0, 9, N),
                "price": np.sort(NOISE**1.5), "age": np.sort(RNG.integers(1, 60, N)),
                "solid": RNG.permutation(N), "kind": KINDS}
    assert load(tmp_path / "my.csv", features).groups == [6]


NUMBERS = [  # how people write numbers, amounts and dates
    "{} CC", "{}kg", "${}", "€ {}", "Rs. {}", "USD {}", "{} EUR", "{}%", "~{}", "({})", "{},5",
    "{},000", "{}'000", "{} 000", "1.{}.2", "0x{}", "{}+", "\N{MINUS SIGN}{}", "{}-12-01", "1/2/{}",
    "{}:30", "1 Mar {}", "Mar {}", "{}T10:00:00", "{}Nm@ 2000rpm", "{}-{}"]
UNUSABLE = {text: ([text.format(value, value) for value in WHOLE], "plain number")
            for text in NUMBERS}
UNUSABLE |= {text: ([text, *map(str, WHOLE[1:])], f"{text!r}") for text in (
    "None", "-", "x", "no garage", "unknown", "--", "n. a.", "$")}
UNUSABLE |= {
    "two marks": (["lost", "none", *map(str, WHOLE[2:])], "'lost', 'none'"),
    "inf": ([np.inf, *NOISE[1:]], "infinite"), "-inf": ([-np.inf, *NOISE[1:]], "infinite"),
    "1e39": ([1e39, *NOISE[1:]], "infinite"), "1e400": (["1e400", *NOISE[1:]], "infinite"),
    "texts": ([f"t{i % 31}" for i in range(N)], "31"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_columns_that_could_be_misread_are_refused(tmp_path, kind):
    values, told = UNUSABLE[kind]
    for label in ("kind", "c") if kind != "texts" else ("kind",):
        message = refused(load, tmp_path / "my.csv", table(values), label)
        assert "'c' (" in message and told in message


def test_all_columns_that_can_not_be_used_are_named_at_once(tmp_path):
    columns = {f"{i}th": values for i, (values, _) in enumerate(UNUSABLE.values()) if i % 3 == 0}
    message = refused(load, tmp_path / "my.csv", table(WHOLE, **columns), "nothing")
    assert all(f"{name!r} (" in message for name in [*columns, "nothing"])


@pytest.mark.parametrize("values", [
    ["red", "green", "blue"], ["A1", "A2", "B1"], ["2", "3", "4", "5more"], ["1.2.3", "1.2.4"],
    ["10th", "11th", "12th", "Bachelors"], ["a,b", "c;d", "$"], ["None", "Mild", "Severe"],
    ["may", "march", "jan"], ["<=50K", ">50K"], ["a" + " " * 20_000 + "b", "d"]])
def test_few_texts_are_categories(tmp_path, values):
    data = load(tmp_path / "my.csv", table(np.resize(values, N)[RNG.permutation(N)]))
    assert data.spec["columns"][0]["values"] == sorted(values)


def test_equal_texts_are_equal_in_any_unicode_form_and_with_any_blanks(tmp_path):
    blanks = np.resize(["", " ", "\N{NO-BREAK SPACE}", "\t"], N)
    composed = np.char.add(np.resize(["é", "e\u0301", "ö"], N)[RNG.permutation(N)], blanks)
    columns = table(composed, **{"ü ": composed[::-1]})
    data = load(tmp_path / "my.csv", columns, label_column=" u\u0308")
    assert data.spec["classes"] == data.spec["columns"][0]["values"] == ["é", "ö"]


def test_missing_values_are_the_median_or_a_text_of_their_own(tmp_path, capsys):
    number = NOISE.astype(object)
    text = np.resize(["red", "green", "red", "blue"], N).astype(object)
    number[::7], text[3::7] = "NA", "?"
    gap = np.resize(["", "x"], N)[RNG.permutation(N)]
    data = load(tmp_path / "my.csv", table(number, colour=text, gap=gap))
    assert data.groups == [3, 4, 2] and "c 9, colour 9, gap 30" in capsys.readouterr().out
    x, train, known = in_order(data), data.names[: len(data.x_train)], number != "NA"
    filled = np.where(known, number, np.median(number[train][known[train]])).astype(float)
    expected = (filled - filled[train].mean()) / filled[train].std()
    np.testing.assert_allclose(x[:, 0], expected, rtol=1e-4, atol=1e-6)
    assert ((x[:, 1] > 0).numpy() == ~known).all()  # the indicator
    assert (x[:, 3].numpy() == (text == "?")).all()


def test_a_view_masks_numbers_alone_each_on_its_own(tmp_path, capsys):
    texts = {"cap": np.resize(list("pqrst"), N), "kind": KINDS}
    data = load(tmp_path / "my.csv", texts, mask=0.9)
    assert torch.equal(data.view(data.x_train), data.x_train)
    assert "--mask does nothing" in capsys.readouterr().out
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    columns = {"a": rng.normal(size=3000), "b": rng.normal(size=3000),
               "c": rng.choice(["x", "y"], 3000)}
    data = load(tmp_path / "my.csv", columns, label_column=None, mask=0.2)
    x, x_tilde = data.view(data.x_train), data.view(data.x_train)
    masked, masked_tilde = x[:, :2] == 0, x_tilde[:, :2] == 0
    for event, share in ((masked, 0.2), (masked & masked_tilde, 0.04),
                         (masked[:, 0] & masked[:, 1], 0.04)):
        assert abs(event.float().mean() - share) < 0.02
    assert torch.equal(x[:, 2:], data.x_train[:, 2:])
    assert torch.equal(x[:, :2][~masked], data.x_train[:, :2][~masked])


# ----------------------------------------------------------------------- tables: labels
def test_whole_numbers_with_ten_rows_each_are_classes(tmp_path):
    n = 400
    columns = {"a": RNG.normal(size=n), "kind": np.arange(n) % 40 * 5 + 2}
    data = load(tmp_path / "my.csv", columns)
    assert data.num_classes == 40 and data.spec["classes"][:2] == ["2", "7"]
    assert (in_order(data, "y").numpy() == np.arange(n) % 40).all()
    for labels in (np.arange(n) % 41, np.arange(n) % 40 + 0.5, RNG.normal(size=n)):
        data = load(tmp_path / "my.csv", columns | {"kind": labels})
        assert data.num_classes == 0 and data.y_train.dtype == torch.float64
        assert (in_order(data, "y").numpy() == labels).all()


def test_rows_without_a_label_only_train(tmp_path, capsys):
    labels = KINDS.astype(object)
    labels[::5] = ["", "NA", "?", "nan"] * 3
    data = load(tmp_path / "my.csv", table(WHOLE) | {"kind": labels})
    assert (data.y_train == -1).sum() == 12 and (data.y_test >= 0).all()
    assert len(data.x_train) + len(data.x_test) == N and "12 missing" in capsys.readouterr().out
    for labels in (None, np.full(N, "all"), np.full(N, ""), np.full(N, 3)):  # none to tell apart
        columns, label = table(WHOLE) | {"kind": labels}, None if labels is None else "kind"
        data = load(tmp_path / "my.csv", columns, label)
        assert len(data.x_train) == N and data.num_classes == 0 and (data.y_train == -1).all()


# ----------------------------------------------------------------------- tables as people have them
def people(n=400):
    """Tables in the manner of well-known ones: columns, the label, and those to remove first."""
    rng = np.random.default_rng(3)

    def pick(*values):
        return rng.choice(np.array(values, object), n)

    def gaps(values, share=0.2):
        return np.where(rng.random(n) < share, "", np.array(values, object))

    titanic = {
        "PassengerId": np.arange(1, n + 1), "Survived": rng.integers(0, 2, n),
        "Pclass": rng.integers(1, 4, n), "Name": [f"Doe, Mr. John {i}" for i in range(n)],
        "Sex": pick("male", "female"), "Age": gaps(rng.integers(1, 80, n)),
        "Ticket": [f"{rng.integers(1000, 9999)}" if i % 3 else f"A/5 {i}" for i in range(n)],
        "Fare": rng.gamma(2, 10, n).round(4), "Embarked": gaps(pick("S", "C", "Q"), 0.01),
        "Cabin": gaps([f"C{i}" for i in rng.integers(1, 60, n)], 0.7)}
    adult = {
        "age": rng.integers(17, 90, n), "workclass": pick("Private", "State-gov", "?"),
        "fnlwgt": rng.integers(10_000, 999_999, n), "sex": pick(" Male", " Female"),
        "education": pick("11th", "9th", "HS-grad", "Bachelors", "7th-8th", "10th", "12th"),
        "capital-gain": rng.integers(0, 2, n) * 2174, "income": pick("<=50K", ">50K")}
    houses = {
        "Id": np.arange(1, n + 1), "LotFrontage": gaps(rng.integers(20, 200, n)),
        "Street": pick("Pave", "Pave", "Grvl"), "Alley": pick("NA", "NA", "Pave"),
        "YearBuilt": rng.integers(1900, 2010, n), "PoolQC": np.full(n, "NA"),
        "GarageYrBlt": gaps(rng.integers(1950, 2010, n), 0.1), "CentralAir": pick("Y", "N"),
        "SaleDate": [f"{rng.integers(1, 13)}/{rng.integers(1, 28)}/2010" for _ in range(n)],
        "SalePrice": rng.permutation(10 * n)[:n] * 100}
    cars = {
        "Unnamed: 0": np.arange(n), "name": [f"Maruti {i % 70}" for i in rng.permutation(n)],
        "year": rng.integers(1995, 2021, n), "fuel": pick("Diesel", "Petrol", "CNG"),
        "mileage": gaps([f"{v:.1f} kmpl" for v in rng.uniform(9, 30, n)], 0.03),
        "engine": gaps([f"{v} CC" for v in rng.integers(600, 3000, n)], 0.03),
        "torque": [f"{v}Nm@ 2000rpm" for v in rng.integers(60, 400, n)],
        "max_power": ["null" if i % 50 == 0 else f"{i % 90 + 40} bhp" for i in range(n)],
        "seats": gaps(rng.integers(2, 9, n) * 1.0, 0.03), "registered": rng.random(n) < 0.5,
        "selling_price": rng.permutation(10 * n)[:n] * 1000}
    return {"titanic": (titanic, "Survived", ["Ticket"]), "adult": (adult, "income", []),
            "houses": (houses, "SalePrice", ["SaleDate"]),
            "cars": (cars, "selling_price", ["engine", "max_power", "mileage", "torque"])}


@pytest.mark.parametrize("name", ["titanic", "adult", "houses", "cars"])
def test_realistic_tables_take_at_most_one_round_of_corrections(tmp_path, capsys, name):
    columns, label, wrong = people()[name]
    if wrong:
        message = refused(load, tmp_path / "my.csv", columns, label)
        assert {word for word in columns if f"{word!r} (" in message} == set(wrong)
    kept = {key: values for key, values in columns.items() if key not in wrong}
    data = load(tmp_path / "my.csv", kept, label)
    assert data.x_train.isfinite().all() and len(data.x_train) + len(data.x_test) == 400
    assert data.num_classes == (2 if name in ("titanic", "adult") else 0)
    assert capsys.readouterr().out.count("\n") == 1
    assert torch.equal(read_again(tmp_path / "my.csv", data).x_train, in_order(data))


# ----------------------------------------------------------------------- tables: new rows
def mixed():
    colour = np.resize(["red", "green", "blue", "2", "3", ""], N)
    gaps = np.where(np.arange(N) % 9, NOISE, np.nan)
    return pd.DataFrame(table(WHOLE, colour=colour, flag=WHOLE % 2 == 0, id=range(N), gaps=gaps))


def test_new_rows_in_another_company_are_coded_alike(tmp_path, capsys):
    """A row's input does not depend on the rows beside it, nor on the order of the columns."""
    whole = mixed()
    data = load(tmp_path / "my.csv", whole.to_csv(index=False))
    for index in ([5, 17, 40], [3], [4, 10, 16], [9]):
        some = whole.iloc[index]
        for new in (some, some[some.columns[::-1]].assign(more=1), some.drop(columns="kind")):
            new.to_csv(tmp_path / "new.csv", index=False)
            x = read_again(tmp_path / "new.csv", data).x_train
            assert torch.equal(x, in_order(data)[index])
    assert "'more'" in capsys.readouterr().out


@pytest.mark.parametrize("change, told", [
    (lambda t: t.drop(columns=["noise", "c"]), ["'noise'", "'c'"]),
    (lambda t: t.assign(colour="pink"), ["'colour'", "'pink'"]),
    (lambda t: t.assign(c=["$5", *WHOLE[1:]], noise="many"), ["'c'", "'noise'"]),
    (lambda t: t.assign(noise=1e300), ["finite"])])
def test_new_rows_that_do_not_fit_are_refused(tmp_path, change, told):
    data = load(tmp_path / "my.csv", mixed().to_csv(index=False))
    change(mixed()).to_csv(tmp_path / "new.csv", index=False)
    message = refused(read_again, tmp_path / "new.csv", data)
    assert all(part in message for part in told)


# ----------------------------------------------------------------------- named tables
def tiny_covtype(monkeypatch):
    """21 rows in CovType's form, 14 of them to train on; and their text."""
    monkeypatch.setattr(common, "COVTYPE_TRAIN", 14)
    monkeypatch.setattr(common, "COVTYPE_TEST", 7)
    rows = np.column_stack([RNG.integers(-100, 7000, (21, 10)), RNG.integers(0, 2, (21, 44)),
                            np.resize(np.arange(1, 8), 21)])
    return rows, "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["covtype.data.gz", "covtype.data", "covtype.csv"])
@pytest.mark.parametrize("standardize", ["train", "all"])
def test_covtype(tmp_path, monkeypatch, name, standardize):
    rows, text = tiny_covtype(monkeypatch)
    if name.endswith(".csv"):
        text = ",".join(f"c{i}" for i in range(55)) + "\n" + text
    write(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    data = common.load_table("covtype", tmp_path, CPU, standardize=standardize)
    part = rows[:14, :10] if standardize == "train" else rows[:, :10]
    expected = np.hstack([(rows[:, :10] - part.mean(0)) / part.std(0), rows[:, 10:54]])
    np.testing.assert_allclose(in_order(data), expected, rtol=1e-4, atol=1e-6)
    assert (in_order(data, "y").numpy() == rows[:, 54] - 1).all() and len(data.x_train) == 14
    assert data.groups == [10, 4, 40] and data.num_classes == 7 and not data.own


@pytest.mark.parametrize("change", [lambda text: text[:500], lambda text: "a" + text,
                                    lambda text: text + text, lambda text: ""])
def test_what_is_not_covtype_is_refused(tmp_path, monkeypatch, change):
    write(tmp_path / "covtype.data", change(tiny_covtype(monkeypatch)[1]))
    assert "covtype.data" in refused(common.load_table, "covtype", tmp_path, CPU)


def test_digits_are_a_table_and_images_with_one_split():
    as_table = common.load_table("digits", "data", CPU)
    data = common.load_images("digits", "data", CPU)
    assert data.x_train.shape == (1437, 1, 8, 8) and data.x_train.max() == 255
    assert as_table.groups == [64] and torch.equal(data.y_test, as_table.y_test)


# ----------------------------------------------------------------------- folders
def write_images(folder, count=6, size=(16, 16), mode="RGB"):
    """count images each of ant and bee: the i-th ant is of red (or gray) i, the bee of 40 + i."""
    for name, first in (("ant", 0), ("bee", 40)):
        for i in range(first, first + count):
            image = Image.new(mode, size, (i, 90, 200) if mode == "RGB" else i)
            write(folder / name / f"{i - first}.png", saved(image))


def load_images(path):
    return common.load_images(str(path), "data", CPU, image_size=16)


def test_a_folders_classes_are_its_first_folders_and_a_fifth_is_the_test(tmp_path, capsys):
    write_images(tmp_path, 10, size=(40, 32))
    for name, red in (("ant", 0), ("bee", 40)):  # without a class
        write(tmp_path / f"{name}.png", saved(Image.new("RGB", (16, 16), (red, 90, 200))))
    data = load_images(tmp_path)
    assert (data.y_train == -1).sum() == 2 and data.y_test.bincount().tolist() == [2, 2]
    reds = {name: x[0, 0, 0] for name, x in by_name(data).items()}
    assert reds["ant/3.png"] == 3 and reds["bee/7.png"] == 47 and reds["bee.png"] == 40
    said = capsys.readouterr().out
    assert "ant 10" in said and "2 files without one" in said
    again, new, x = load_images(tmp_path), read_again(tmp_path, data), in_order(data)
    assert torch.equal(data.x_train, again.x_train) and (data.names == again.names).all()
    assert torch.equal(in_order(new), x) and sorted(new.names) == sorted(data.names)
    torch.testing.assert_close(new.plain(x), data.plain(x))
    assert data.plain(x).isfinite().all()  # though two channels are constant


@pytest.mark.parametrize("train, test", [
    ("train", "test"), ("Training", "TESTING"), ("train", "val"), ("TRAIN", "Validation"),
    ("training", "valid")])
def test_folders_for_training_and_test(tmp_path, capsys, train, test):
    for part, count in ((train, 6), (test, 2), ("more", 3)):
        write_images(tmp_path / part, count)
    data = load_images(tmp_path)
    assert "more/ 6" in capsys.readouterr().out
    assert len(data.x_train) == 12 and data.y_test.tolist() == [0, 0, 1, 1]
    assert data.spec["classes"] == ["ant", "bee"] and data.names[0] == f"{train}/ant/0.png"


def test_what_a_system_puts_there_is_no_class_and_is_counted(tmp_path, capsys):
    write_images(tmp_path)
    for name in (".git", "_cache", "@eaDir", "#recycle", "$BIN", "System Volume Information"):
        write_images(tmp_path / "ant" / name)
        write_images(tmp_path / name)
    for name in ("Thumbs.db", "desktop.ini", "._0.png", "notes.TXT"):
        write(tmp_path / "bee" / name, "x")
    (tmp_path / "ant" / "up").symlink_to(tmp_path, target_is_directory=True)
    data = load_images(tmp_path)
    assert len(data.names) == 12 and data.spec["classes"] == ["ant", "bee"]
    said = capsys.readouterr().out
    for part in ("@eaDir/ 2", ".git/ 2", ".* 1", ".db 1", ".ini 1", ".txt 1"):
        assert part in said
    assert len(list(common.walk(tmp_path))) == 15


def test_folders_within_a_class_are_named_with_their_counts(tmp_path, capsys):
    for name in ("ant/images", "ant/masks", "bee/images", "bee/masks"):
        for i in range(6):
            write(tmp_path / name / f"{i}.png", PNG)
    load_images(tmp_path)
    assert "images 12, masks 12" in capsys.readouterr().out


BAD_FOLDERS = {  # the images in it, and what the message holds
    "nothing": ("", "no .jpg"), "no images": ("a/a.txt", ".txt 1"), "heic": ("a/a.heic", ".heic 1"),
    "one of each": ("ant/0.png bee/0.png", ""),
    "train alone": ("train/ant/0.png train/bee/0.png", "train"),
    "test alone": ("Test/ant/0.png ant/0.png ant/1.png", "test"),
    "val and test": ("val/ant/0.png val/bee/0.png test/ant/0.png test/bee/0.png", "train"),
    "train within a class": ("cat/train/0.png cat/train/1.png cat/test/0.png", "/t"),
    "val below": ("cat/a/Validation/0.png cat/a/Validation/1.png", "Validation"),
    "train in one folder": ("set/train/ant/0.png set/train/bee/0.png set/test/bee/0.png", "/t"),
    "a class in the test alone": ("train/ant/0.png train/bee/0.png test/cow/0.png", "cow"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(tmp_path, name):
    files, told = BAD_FOLDERS[name]
    for file in files.split():
        write(tmp_path / file, PNG)
    message = refused(load_images, tmp_path)
    assert str(tmp_path) in message and told in message


# ----------------------------------------------------------------------- images
def test_an_image_is_resized_and_its_middle_taken(tmp_path, capsys):
    image = Image.new("RGB", (48, 32), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 40, 32))
    write_images(tmp_path, size=(15, 16))
    write(tmp_path / "ant" / "x.png", saved(image))
    x = by_name(load_images(tmp_path))["ant/x.png"]
    assert x[2, :, 1:15].min() > 250 and x[0, :, 1:15].max() < 5
    assert "smaller than 16 pixels, enlarged 12" in capsys.readouterr().out  # these are enlarged


def test_gray_folders_keep_one_channel(tmp_path):
    write_images(tmp_path, mode="L")
    Image.new("LA", (16, 16), (7, 255)).save(tmp_path / "ant" / "x.png")
    data = load_images(tmp_path)
    assert data.x_train.shape == (10, 1, 16, 16) and data.plain(data.x_train).shape[1] == 1
    assert read_again(tmp_path, data).x_train.shape == (13, 1, 16, 16)
    Image.new("RGB", (16, 16)).save(tmp_path / "ant" / "y.png")
    assert "colour" in refused(read_again, tmp_path, data)
    data = load_images(tmp_path)
    assert data.x_train.shape[1] == 3
    (tmp_path / "ant" / "y.png").unlink()
    assert read_again(tmp_path, data).x_train.shape == (13, 3, 16, 16)


def test_images_are_read_as_they_are_shown(tmp_path, capsys):
    """Upright by EXIF; what is transparent, whatever colour hides there, is white; one frame."""
    upright, exif = np.zeros((16, 16, 3), np.uint8), Image.Exif()
    upright[:8], exif[0x0112] = 200, 6
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    rgba = np.dstack([np.full((16, 16, 3), 77, np.uint8), np.zeros((16, 16), np.uint8)])
    rgba[:8] = 200, 200, 200, 255
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 255, 0, 200, 200, 200])
    palette.paste(0, (0, 8, 16, 16))
    frames = [Image.new("RGB", (16, 16), (value,) * 3) for value in (3, 90)]
    images = {"upright": saved(Image.fromarray(upright)), "turned": saved(turned, exif=exif),
              "rgba": saved(Image.fromarray(rgba)), "palette": saved(palette, transparency=0),
              "gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:])}
    write_images(tmp_path)
    for name, content in images.items():
        write(tmp_path / "ant" / f"{name}.png", content)
    x = by_name(load_images(tmp_path))
    assert torch.equal(x["ant/turned.png"], x["ant/upright.png"])
    for name in ("ant/rgba.png", "ant/palette.png"):
        assert (x[name][:, :8] == 200).all() and (x[name][:, 8:] == 255).all()
    assert (x["ant/gif.png"] == 3).all() and "first of several frames 1" in capsys.readouterr().out


def test_cifar_by_torchvision(tmp_path, monkeypatch):
    from torchvision import datasets

    class Reader:
        classes = ["a", "b", "c", "d"]

        def __init__(self, root, train, download):
            self.targets = [0, 1, 2, 3] if train else [3, 0]
            self.data = np.arange(len(self.targets) * 3072).astype(np.uint8).reshape(-1, 32, 32, 3)

    monkeypatch.setattr(datasets, "CIFAR10", Reader)
    data = common.load_images("cifar10", tmp_path, CPU)
    assert data.x_train[1, 2, 3, 4] == (3072 + 3 * 96 + 4 * 3 + 2) % 256
    assert data.y_train.tolist() == [0, 1, 2, 3] and data.y_test.tolist() == [3, 0]
    assert data.spec["mean"][0] == 0.4914 and not data.own


JPG = saved(Image.effect_noise((64, 64), 50), "JPEG")
BAD_IMAGES = {
    "empty": (b"", ""), "text": (b"hello", ""), "zeros": (bytes(999), ""), "cut": (PNG[:-30], ""),
    "cut early": (PNG[:20], ""), "cut jpeg": (JPG[:-200], ""), "damaged": (
        PNG[:40] + b"x" + PNG[41:], ""), "a jpeg's head": (b"\xff\xd8\xff\xe0" + bytes(50), ""),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", ""), "svg": (b"<svg/>", ""),
    "html": (b"<html>404</html>", ""), "pdf": (b"%PDF-1.4\n" + bytes(99), ""),
    "ico": (saved(Image.new("RGB", (16, 16)), "ICO"), ""), "no pixels": (b"P6 0 16 255\n", ""),
    "bomb": (b"P6 60000 60000 255\n" + bytes(999), ""),
    "gray of 16 bits": (saved(Image.fromarray(np.zeros((16, 16), np.uint16))), "8 bits"),
    "gray of 32 bits": (saved(Image.new("I", (16, 16)), "TIFF"), "8 bits"),
    "floats": (saved(Image.new("F", (16, 16)), "TIFF"), "8 bits"),
    "colour of 16 bits": (b"P6 16 16 65535\n" + bytes(6 * 256), "8 bits"),
    "a fourth band": (saved(Image.new("RGBA", (16, 16)), "TIFF"), "three bands"),
    "ink": (saved(Image.new("CMYK", (16, 16)), "TIFF"), "three bands"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_can_not_be_read_are_refused(tmp_path, name):
    content, told = BAD_IMAGES[name]
    write_images(tmp_path)
    write(tmp_path / "bee" / "x.png", content)
    message = refused(load_images, tmp_path)
    assert str(tmp_path / "bee" / "x.png") in message and told in message


# ----------------------------------------------------------------------- recordings
def tone(hertz, seconds=1.0, rate=16000):
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def wav(samples, rate=16000, width=2):
    """A WAV file, bytes, of samples (n,) or (n, channels) in [-1, 1]; width: bytes a sample."""
    samples = np.asarray(samples).reshape(len(samples), -1 if len(samples) else 1)
    scaled = (samples * (2 ** (8 * width - 1) - 1)).round().astype("<i8") + 128 * (width == 1)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", None))
        file.writeframes(scaled.reshape(-1, 1).view(np.uint8)[:, :width].tobytes())
    return content.getvalue()


def extensible(raw, width):
    """A WAV file with a "fmt " chunk of 40 bytes, as many programs write it."""
    form = b"\xfe\xff" + raw[22:36] + struct.pack("<HHI", 22, 8 * width, 3)
    form += b"\x01\x00" + bytes.fromhex("000000001000800000aa00389b71")
    return raw[:16] + struct.pack("<I", 40) + form + raw[36:]


def float_wav(samples, rate=16000, dtype="<f4"):
    content = io.BytesIO()
    wavfile.write(content, rate, samples.astype(dtype))
    return content.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4, "<f4", "<f8"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_recordings_of_any_kind(tmp_path, width, rate):
    left, right = 0.8 * tone(440, 1.5, rate), 0.2 * tone(440, 1.5, rate)
    if isinstance(width, str):
        contents = [float_wav((left + right) / 2, rate, width)]
    else:
        plain = wav(np.stack([left, right], axis=1), rate, width)
        contents = [plain, extensible(plain, width)]
    for content in contents:
        x, seconds = common.read_wav(write(tmp_path / "a.wav", content))
        assert x.dtype == np.int16 and abs(len(x) - 24000) <= 20 and seconds == 1.5
        error = np.abs(x / 32768 - 0.5 * tone(440, len(x) / 16000))[200:-200]
        assert error.max() < (0.01 if width == 1 else 0.003)
        first, _ = common.read_wav(tmp_path / "a.wav", 1.1)  # what follows changes nothing
        assert np.array_equal(first[:16000], x[:16000])


@pytest.mark.parametrize("notes", [b"", b"LIST\x08\0\0\0a data b"])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_recordings_written_into_a_pipe_are_read_to_the_end(tmp_path, size, notes):
    raw = bytearray(wav(np.zeros(0)) + np.arange(5000, dtype="<i2").tobytes())
    raw[4:8] = raw[40:44] = size.to_bytes(4, "little")
    raw[36:36] = notes
    assert np.array_equal(common.read_wav(write(tmp_path / "a.wav", raw))[0], np.arange(5000))


def test_a_long_recording_is_not_read_whole(tmp_path, monkeypatch, capsys):
    """A file of 5 minutes, of which all but the first two seconds is a hole."""
    second = np.stack([tone(440, rate=48000), tone(440, rate=48000)], axis=1)
    content = bytearray(wav(second, 48000))
    content[40:44] = (300 * 48000 * 4).to_bytes(4, "little")
    write(tmp_path / "a.wav", bytes(content) + content[44:])
    os.truncate(tmp_path / "a.wav", 44 + 300 * 48000 * 4)
    common.read_wav(tmp_path / "a.wav", 1.1)  # imports
    tracemalloc.start()
    clips = common.read_clips(tmp_path, ["a.wav"])
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert np.abs(clips[0] / 32768 - tone(440))[200:-200].max() < 0.003
    said = capsys.readouterr().out
    assert "1 are longer" in said and "300.0 s" in said and "first second" in said


def two_words(folder, count=5, names=("ant", "bee")):
    for k, word in enumerate(names):
        for i in range(count):
            write(folder / word / f"{i}.wav", wav(0.5 * tone(300 + 600 * k + 20 * i, 0.5)))
    return folder


def load_speech(folder):
    return common.load_speech(str(folder), None, CPU)


WAV = wav(tone(440))
BAD_RECORDINGS = {
    "empty": b"", "text": b"hello, I am no sound\n" * 9, "git-lfs": b"version https://git-lfs.git",
    "cut": WAV[:-100], "header": WAV[:44], "cut header": WAV[:30], "no samples": wav(np.zeros(0)),
    "mp3": b"ID3" + bytes(999), "flac": b"fLaC" + bytes(999), "ogg": b"OggS" + bytes(999),
    "aiff": b"FORM\0\0\1\0AIFFCOMM" + bytes(99), "slow": WAV[:24] + struct.pack("<I", 1) + WAV[28:],
    "fast": WAV[:24] + struct.pack("<I", 10**9) + WAV[28:], "no block": WAV[:32] + bytes(2) +
    WAV[34:], "no channels": WAV[:22] + bytes(2) + WAV[24:], "adpcm": WAV[:20] + b"\2\0" + WAV[22:],
    "64 bits": WAV[:32] + struct.pack("<HH", 8, 64) + WAV[36:],
    "a-law": WAV[:20] + b"\6\0" + WAV[22:], "no fmt": WAV[:12] + b"junk" + WAV[16:],
    "not finite": float_wav(np.full(999, np.nan)), "zeros": bytes(999),
}


@pytest.mark.parametrize("name", BAD_RECORDINGS)
def test_recordings_that_can_not_be_read_are_refused(tmp_path, name):
    path = write(two_words(tmp_path) / "ant" / "x.wav", BAD_RECORDINGS[name])
    assert str(path) in refused(load_speech, tmp_path)


def test_a_folder_of_recordings(tmp_path, capsys):
    two_words(tmp_path, 10)
    for name in ("ant/x.mp3", "bee/y.flac", "bee/notes.txt"):
        write(tmp_path / name, "x")
    write(tmp_path / "_background_noise_" / "hum.wav", wav(0.1 * tone(50, 2.5)))
    before = sorted(tmp_path.rglob("*"))
    data = load_speech(tmp_path)
    assert data.y_train.bincount().tolist() == [8, 8] and data.y_test.bincount().tolist() == [2, 2]
    assert data.x_train.shape == (16, 16000) and not data.x_train[:, 8000:].any()
    said = capsys.readouterr().out
    assert ".mp3 1" in said and ".flac 1" in said and ".txt 1" in said
    assert sorted(tmp_path.rglob("*")) == before  # no file of ours
    assert data.view(data.x_train).shape == data.plain(data.x_train).shape == (16, 1, 32, 32)
    new = read_again(tmp_path, data)
    assert torch.equal(new.x_train, in_order(data))
    assert torch.equal(new.plain(new.x_train), data.plain(new.x_train))


@pytest.mark.parametrize("kinds", [["mp3"], ["flac", "m4a"], ["ogg"]])
def test_recordings_that_are_no_wav_are_to_be_converted(tmp_path, kinds):
    for i, kind in enumerate(kinds * 3):
        write(tmp_path / "jazz" / f"{i}.{kind}", "x")
    write_images(tmp_path / "covers", 1)
    assert common.describe(str(tmp_path), ALL)["domain"] == "speech"
    message = refused(load_speech, tmp_path)
    assert ".wav" in message and "convert" in message and f".{kinds[0]} " in message


def test_the_papers_twelve_classes(tmp_path):
    words = ["bed", "go", "yes"]
    folder = two_words(tmp_path / "SpeechCommands" / "speech_commands_v0.01", 12, words)
    for part, clips in (("validation", [3]), ("testing", [0, 7, 9])):
        lines = "".join(f"{word}/{i}.wav\n" for word in words for i in clips)
        write(folder / f"{part}_list.txt", lines)
    data = common.load_speech("speech_commands", tmp_path, CPU)
    yes, go, unknown, silence = 0, 9, 10, 11
    train, test = (y.bincount(minlength=12) for y in (data.y_train, data.y_test))
    assert train[[yes, go, unknown, silence]].tolist() == [8, 8, 8, 2] and train.sum() == 26
    assert test[[yes, go, unknown]].tolist() == [3, 3, 3] and test.sum() == 9
    loudest = data.x_train.abs().amax(1)
    assert ((loudest == 0) == (data.y_train == silence)).all()
    assert data.spec["classes"][-2:] == ["unknown", "silence"] and not data.own
    assert load_speech(folder).spec["classes"] == words  # named as a folder
    (folder / "testing_list.txt").unlink()
    assert "testing_list.txt" in refused(common.load_speech, "speech_commands", tmp_path, CPU)


def test_lists_part_a_folder_and_what_is_not_there_is_counted(tmp_path, capsys):
    two_words(tmp_path)
    write(tmp_path / "testing_list.txt", "\ufeffant/0.wav\r\n./bee/1.wav \r\n\r\nbee/gone.wav\r\n")
    write(tmp_path / "validation_list.txt", "bee/3.wav\n")
    data = load_speech(tmp_path)
    assert data.y_train.bincount().tolist() == [4, 3] and data.y_test.tolist() == [0, 1]
    said = capsys.readouterr().out
    assert "not there 1" in said and "validation list 1" in said


def test_data_sets_that_can_not_be_had(tmp_path, monkeypatch):
    import torchaudio
    import torchvision

    monkeypatch.setattr(torchaudio.datasets.speechcommands, "download_url_to_file", offline)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    assert "Network is unreachable" in refused(common.load_images, "cifar100", tmp_path, CPU)
    assert "Network is unreachable" in refused(common.load_speech, "speech_commands", tmp_path, CPU)
    assert [path.name for path in tmp_path.rglob("*")] == ["SpeechCommands"]
