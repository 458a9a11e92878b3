# SPDX-License-Identifier: MIT
"""What the i-Mix scripts share: data sets as tensors on the training device, linear evaluation.

    data = load_table("covtype", "data", device)     # or load_images, load_speech: a Dataset
    loader = TwoViews(data.x_train, data.view, 512)  # yields (x, x_tilde), shuffled on the device
    result = linear_eval(encoder, data)              # {"test_accuracy": ..., ...}
"""

import collections
import contextlib
import copy
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
import warnings
import wave
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchaudio
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from sklearn.datasets import fetch_covtype, load_digits
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn


class DataError(ValueError):
    """Data that can't be used; the message is one line that says what to do."""


@dataclass
class Dataset:
    """A data set, whole, on the training device.

    x_train, x_test: raw examples: rows (n, columns) float32, images (n, C, H, W) uint8, or clips
    (n, samples) int16. y_train, y_test: (n,), their labels: int64 class indices, or float64 numbers
    to predict, on the CPU; -1 or NaN: it has none. num_classes: 0 where there are no classes. view:
    raw batch -> one random float32 view of it. plain: raw batch -> the float32 input. eval_view:
    raw batch -> the view of the training examples in the linear evaluation, where that is not
    plain. groups: tables only, the number of columns in each column group, in column order.
    labelled: so many of the training examples, the first, have labels; None: all. spec: what
    reading further examples takes, as data.json has it. order: (n_train + n_test,), the place of
    each example in the file or in names, the names of files; -1: none. probe: the usual classifier
    of the evaluation, sgd or logistic.
    """

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    view: Callable[[torch.Tensor], torch.Tensor]
    plain: Callable[[torch.Tensor], torch.Tensor]
    eval_view: Callable[[torch.Tensor], torch.Tensor] | None = None
    groups: list[int] | None = None
    labelled: int | None = None
    spec: dict | None = None
    order: np.ndarray | None = None
    names: np.ndarray | None = None
    probe: str = "sgd"

    def digest(self):
        """A short SHA-256 of the examples and labels and of spec, to tell other data by."""
        digest = hashlib.sha256(json.dumps(self.spec).encode())
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


class TwoViews:
    """Iterates once over x in random order, yielding two independent views of each batch.

    view: a raw batch (n, ...) -> a random view of each example. y: class indices (n,), where each
    batch's are to be yielded, too. The order is drawn on x's device; a last incomplete batch is
    dropped, as published.
    """

    def __init__(self, x, view, batch_size, y=None):
        self.x, self.view, self.batch_size, self.y = x, view, batch_size, y

    def __len__(self):
        return len(self.x) // self.batch_size

    def __iter__(self):
        order = torch.randperm(len(self.x), device=self.x.device)
        for index in order.split(self.batch_size)[: len(self)]:
            if self.x.device.type == "cpu":  # the smaller, the more of it stays in the cache
                batch = self.x[index]
                views = self.view(batch), self.view(batch)
            else:  # both at once: half as many launches
                views = self.view(self.x[index.repeat(2)]).chunk(2)
            yield views if self.y is None else (*views, self.y[index])


def split(x, y, test_share):
    """Split x in two, for training and test, the same at every call; stratified by y, if any."""
    return train_test_split(x, test_size=test_share, stratify=y, random_state=0)


def labelled_first(train, y):
    """The training rows, those that have a label first, and how many these are."""
    known = y[train] >= 0 if y.dtype == np.int64 else np.isfinite(y[train])
    return np.concatenate([train[known], train[~known]]), int(known.sum())


def subset(x, y, size):
    """A stratified subset of size of the training rows x, the same at every call; None: all."""
    if size in (None, len(y)):
        return x
    try:
        return split(x, y, len(y) - size)[0]
    except ValueError:
        classes = len(np.unique(y))
        raise DataError(f"--train-size {size} of the {len(y):,} training examples: give {classes} "
                        f"to {len(y) - classes:,}, with two examples or more of each class, or "
                        "leave it out") from None


def one_line(error):
    """What an exception says, without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def quote(text):
    """A name or value for a message: quoted, without line breaks, and not too long."""
    text = str(text)
    return repr(text if len(text) <= 60 else text[:60] + "...")


def progress(text):
    """Show text on the terminal's last line; silent where the output is no terminal."""
    if sys.stdout.isatty():
        print(f"{text:<70}", end="\r", flush=True)


def domain(dataset, known):
    """Which of the known domains, of "table", "image" and "speech", a --dataset is of.

    digits are a table where tables are known, else images. A folder is of what most files are.
    """
    if dataset == "covtype" or dataset.endswith((".csv", ".csv.gz")) or os.path.isfile(dataset):
        found = "table"
    elif dataset == "digits":
        found = "table" if "table" in known else "image"
    else:
        files = (file for depth in ("*", "*/*", "*/*/*", "*/*/*/*")
                 for file in glob.iglob(depth, root_dir=dataset))
        kinds = collections.Counter(os.path.splitext(file)[1].lower()
                                    for file in itertools.islice(files, 100_000))
        recordings, images = kinds[".wav"], sum(kinds[kind] for kind in IMAGES)
        found = "image"
        if dataset == "speech_commands" or recordings > images:
            found = "speech"
    if found not in known:
        raise DataError(f"--dataset {quote(dataset)} is {found} data, and this script takes "
                        f"{' and '.join(known)} data: take one of the other scripts")
    return found


def load(domain, args, device):
    """The Dataset, of that domain, that a script's flags name."""
    source = args.dataset, args.data_dir, device
    if domain == "table":
        data = load_table(*source, mask=args.mask, standardize=args.standardize,
                          label_column=args.label_column, test_share=args.test_share,
                          missing=args.missing)
    elif domain == "speech":
        data = load_speech(*source, version=args.speech_version, train_size=args.train_size)
    else:
        data = load_images(*source, image_size=args.image_size, train_size=args.train_size)
    if getattr(args, "supervised", False):
        if not data.num_classes or data.labelled < len(data.y_train):
            raise DataError("--supervised needs the class of every training example")
    if data.labelled and args.labels:
        few_labels(data, args.labels)  # refused now rather than after the training
    if data.y_train.is_floating_point() and (args.probe == "sgd" or args.finetune):
        raise DataError("the labels are numbers to predict: leave out --probe sgd and --finetune")
    return data


def batch_size_for(data):
    """A batch size for data of one's own: a power of two that gives an epoch at least 4 steps."""
    published = 512 if data.groups else 256
    n = max(len(data.x_train), 8)
    batch_size = min(published, 2 ** int(math.log2(n / 4)))
    print(f"--batch-size {batch_size}, by the data's size", flush=True)
    return batch_size


def width_for(data):
    """A width of the encoder for a table of one's own: w = 8, or 32 from 100,000 rows on."""
    width = 8 if len(data.x_train) < 100_000 else 32
    print(f"--width {width}, by the table's size", flush=True)
    return width


def load_new(path, spec, device):
    """New rows, images or recordings, read as data.json says: a Dataset's x_train, order, names."""
    path, names, plain = Path(path), None, plain_speech
    if spec["domain"] == "table":
        x, plain = standardized(read_new_rows(path, spec), spec, device), lambda x: x
    else:
        what, types = {"image": ("images", IMAGES), "speech": ("recordings", (".wav",))}[
            spec["domain"]]
        folder, names = path.parent, np.array([path.name])
        if not path.is_file():
            folder, names = path, list_examples(path, types, what)[0]
        if spec["domain"] == "image":
            x = read_images(folder, names, spec["image_size"], len(spec["mean"]))
            to_input = input_of(spec, device)

            def plain(x):
                return to_input(x / 255)
        else:
            x = read_clips(folder, names)
        x = torch.tensor(x, device=device)
    y = torch.full([len(x)], -1)
    return Dataset(x, y, x[:0], y[:0], 0, plain, plain, groups=spec.get("groups"), spec=spec,
                   order=np.arange(len(x)), names=names)


def embed(path, out, device, make_encoder):
    """Write features-NAME.npz: the new examples at path, embedded by the finished run in out.

    make_encoder(data, config): the encoder for this Dataset, of the run with this config.json.
    """
    if not (out / "encoder.pt").exists():
        raise DataError(f"--embed: {out} holds no finished run: give its folder with --out")
    try:
        data = load_new(path, json.loads((out / "data.json").read_text()), device)
        encoder = make_encoder(data, json.loads((out / "config.json").read_text())).to(device)
        weights = torch.load(out / "encoder.pt", map_location=device, weights_only=True)
        encoder.load_state_dict(weights)
    except (DataError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a damaged file, almost any
        raise DataError(f"--embed: {out} can't be read as a finished run of this script "
                        f"({one_line(error)[:200]})") from None
    features = out / f"features-{Path(path).stem}.npz"
    save_features(features, encoder, data)
    print(f"{features}: the representations of {len(data.x_train):,} examples")


def save_features(path, encoder, data, untrained=None, all_test=True):
    """Write the representations of plain examples into an .npz file, in the data's order.

    features (n, size) float32; row (n,), of the table from 0, or name, of the file; test (n,), was
    it a test example; label (n,), and the classes that it counts; untrained (n, size), by that
    encoder. Without all_test, test examples are left out where they are more than 100,000.
    """
    parts = [data.x_train]
    if all_test or len(data.x_test) <= 100_000:
        parts.append(data.x_test)
    order = data.order[: sum(map(len, parts))]
    kept = order.argsort()
    kept = kept[order[kept] >= 0]  # without the clips of silence, which are of no file

    def features(encoder):
        encoded = [encode(encoder, data.plain, x, "cpu") for x in parts if len(x)]
        return torch.cat(encoded).numpy()[kept]

    arrays = {"features": features(encoder), "test": kept >= len(data.x_train),
              "label": torch.cat([data.y_train, data.y_test]).cpu().numpy()[kept],
              "classes": np.array(data.spec["classes"], str)}
    if untrained is not None:
        arrays["untrained"] = features(untrained)
    if data.names is None:
        arrays["row"] = order[kept]
    else:
        arrays["name"] = data.names[order[kept]]
    part = path.with_suffix(".tmp")
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    except BaseException:  # the disk is full, Ctrl-C
        part.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------- linear evaluation
def linear_eval(encoder, data, epochs=100, batch_size=256, lr=10.0, seed=0, labels=None,
                finetune_lr=None):
    """Test accuracy of a linear classifier on the frozen encoder's features, the paper's protocol.

    SGD with momentum 0.9, no weight decay, x 0.2 after 80, 90 and 95 % of the epochs; weights from
    N(0, 0.01^2). The published batch_size is 256 for images and speech and 512 for tables, lr 10
    for both; fewer training examples are one batch, and lr shrinks with it. BatchNorm is in eval
    mode, everything in float32. The training features are cached; where they are of random views
    (images), these are drawn anew each epoch, and train_accuracy is of the last. labels: the share
    of the training examples to use, stratified, the same at every call; default: all. finetune_lr:
    not frozen, but a copy of the encoder is trained along, in training mode, at this learning rate
    per 256 examples. Afterwards the encoder, its modes and the random number generators are as
    before. Returns {"test_accuracy", "train_accuracy" (both in [0, 1]), "protocol", "seconds"}.
    """
    start, device = time.monotonic(), data.x_train.device
    if not data.num_classes:
        raise DataError("--probe sgd and --finetune need classes, not numbers to predict")
    x, y = few_labels(data, labels)
    if len(x) < batch_size:
        batch_size, lr = len(x), lr * len(x) / batch_size
    model = encoder if finetune_lr is None else copy.deepcopy(encoder)
    view = data.eval_view or data.plain
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        features = encode(model, view, x if finetune_lr is None else x[:1])
        classifier = nn.Linear(features.shape[1], data.num_classes, device=device)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        groups, rates = [{"params": classifier.parameters()}], [lr]
        if finetune_lr is not None:
            groups.append({"params": model.parameters()})
            rates.append(finetune_lr * batch_size / 256)
        optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
        for epoch in range(epochs):
            if finetune_lr is not None:
                model.train()
            elif data.eval_view and epoch > 0:
                features = encode(model, view, x)
            drops = sum(epoch >= share * epochs for share in (0.8, 0.9, 0.95))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * 0.2**drops
            order = torch.randperm(len(x), device=device)
            for index in order.split(batch_size)[: len(x) // batch_size]:
                batch = features[index] if finetune_lr is None else model(view(x[index]))
                optimizer.zero_grad()
                F.cross_entropy(classifier(batch), y[index]).backward()
                optimizer.step()
            progress(f"linear evaluation: epoch {epoch + 1}/{epochs}")
        if finetune_lr is not None:
            features = encode(model, view, x)
    with torch.no_grad():
        train_correct = (classifier(features).argmax(1) == y).sum()
        test_correct = torch.zeros_like(train_correct)
        for x_test, y_test in zip(data.x_test.split(8192), data.y_test.split(8192)):
            features = encode(model, data.plain, x_test)  # not of all at once: CovType's are large
            test_correct += (classifier(features).argmax(1) == y_test).sum()
    trained = "frozen features" if finetune_lr is None else f"an encoder trained at {rates[1]:g}"
    protocol = (f"linear classifier on {trained}: SGD, momentum 0.9, lr {lr:g}, batch "
                f"{batch_size}, {epochs} epochs, x 0.2 after 80, 90 and 95 %, {len(x)} labels")
    return {"test_accuracy": int(test_correct) / len(data.y_test),
            "train_accuracy": int(train_correct) / len(y),
            "protocol": protocol, "seconds": round(time.monotonic() - start, 1)}


def few_labels(data, labels):
    """The labelled training examples and their labels; of these a share, unless labels is None."""
    x, y = data.x_train[: data.labelled], data.y_train[: data.labelled]
    if labels is None:
        return x, y
    try:
        classes = y.cpu().numpy() if data.num_classes else None
        kept = split(np.arange(len(y)), classes, 1 - labels)[0]
    except ValueError as error:
        raise DataError(f"--labels {labels:g}: {error}: give another share") from None
    return x[kept], y[kept]


def sklearn_eval(encoder, data, labels=None):
    """Test accuracy of scikit-learn's logistic regression on the frozen encoder's features.

    Features are of plain examples, in eval mode, standardised. Where labels are numbers it is
    ridge regression, its penalty chosen by leave-one-out, and {"test_r2", "train_r2"} are R^2.
    labels and what is returned otherwise: as of linear_eval.
    """
    start = time.monotonic()
    x, y = few_labels(data, labels)
    x, x_test = (encode(encoder, data.plain, part, "cpu").numpy() for part in (x, data.x_test))
    y, y_test = y.cpu().numpy(), data.y_test.cpu().numpy()
    model, name, score = LogisticRegression(max_iter=1000), "logistic regression", "accuracy"
    if not data.num_classes:
        model, name, score = RidgeCV(np.logspace(-3, 5, 17)), "ridge regression", "r2"
    with warnings.catch_warnings(action="ignore"):  # after 1,000 iterations
        model = make_pipeline(StandardScaler(), model).fit(x, y)
    return {f"test_{score}": model.score(x_test, y_test), f"train_{score}": model.score(x, y),
            "protocol": f"scikit-learn's {name} on standardised frozen features, at most 1,000 "
                        f"iterations, {len(x)} labels",
            "seconds": round(time.monotonic() - start, 1)}


def evaluate(encoder, data, args, untrained=None):
    """The evaluation that a script's flags ask for, as of linear_eval, or of sklearn_eval.

    With the untrained encoder given, also of that encoder and of the raw input, so that what was
    gained is seen: by the same classifier, but of raw input always by scikit-learn's, as SGD at the
    published learning rate does not converge on pixels. Without labels there is none.
    """
    if not len(data.y_test) or not (data.num_classes or data.y_test.is_floating_point()):
        return {"protocol": "none, for want of labels"}
    probe = args.probe or ("sgd" if args.finetune else data.probe)

    def result_of(encoder, finetune_lr=None):
        if probe == "logistic":
            return sklearn_eval(encoder, data, args.labels)
        return linear_eval(encoder, data, args.linear_epochs, args.linear_batch_size,
                           args.linear_lr, args.seed, args.labels, finetune_lr)

    finetune_lr = args.finetune_lr if args.finetune else None
    result = result_of(encoder, finetune_lr)
    if untrained is not None:
        score = "test_accuracy" if data.num_classes else "test_r2"
        result[f"raw_{score}"] = sklearn_eval(nn.Flatten(), data, args.labels)[score]
        result[f"untrained_{score}"] = result_of(untrained, finetune_lr)[score]
    return result


def in_words(result, data):
    """A line about an evaluation's result."""
    if result.keys() == {"protocol"}:
        return f"evaluation: {result['protocol']}"
    score, name = ("test_accuracy", "accuracy") if data.num_classes else ("test_r2", "R^2")
    beside = ""
    if f"raw_{score}" in result:
        raw = {"table": "raw columns", "image": "pixels", "speech": "log-mel"}[data.spec["domain"]]
        beside = (f" ({raw} {result[f'raw_{score}']:.4f}, untrained encoder "
                  f"{result[f'untrained_{score}']:.4f})")
    return (f"test {name} {result[score]:.4f}{beside}, train {name} "
            f"{result[score.replace('test', 'train')]:.4f}")


@torch.no_grad()
def encode(encoder, view, x, device=None):
    """The features (n, feature size) of views of raw examples x, by the encoder in eval mode.

    They are put on the device, by default where they are. Its modes are afterwards as before.
    """
    modes = [module.training for module in encoder.modules()]
    encoder.eval()
    batches, features = x.split(512), []
    for i, batch in enumerate(batches):
        features.append(encoder(view(batch)).to(device))
        progress(f"evaluation: {i / len(batches):.0%} of {len(x):,} examples")
    for module, mode in zip(encoder.modules(), modes):
        module.training = mode
    return torch.cat(features)


# ---------------------------------------------------------------------------- tables
COVTYPE_TRAIN, COVTYPE_TEST = 15_120, 565_892  # rows
MISSING = {"", "?", "na", "n/a", "#n/a", "nan", "-nan", "null", "<na>"}  # in lower case
GROUPED = r"[1-9]\d{0,2}([%s '’\u00a0\u2009\u202f]\d{3})+"  # 30,000
NUMBERS = {  # how numbers are written, by their decimal sign
    point: re.compile(rf"[-+]?(({GROUPED % comma}|\d+)([{point}]\d*)?|[{point}]\d+)(e[-+]?\d+)?|"
                      "[-+]?inf(inity)?", re.IGNORECASE) for point, comma in (".,", ",.")}
PLAIN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
MONTH = (r"(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|"
         r"oct(ober)?|nov(ember)?|dec(ember)?)")
DATE = re.compile(r"(\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d\d))"
                  r"([ T].*|Z)?|-?\d{1,2}:\d\d(:\d\d.*)?\s*([ap]m)?|"
                  rf"(\w{{3,9}},?\s+)?(\d+(st|nd|rd|th)?\W+)?{MONTH}\W.*\d.*|\d+-{MONTH}-\d+",
                  re.IGNORECASE)
ID_NAMES = ("id ids index idx key uuid guid row rownames rownumber row_number nr nr. no no. # sno "
            "s.no s.no. level_0").split()  # in lower case


def load_table(dataset, data_dir, device, *, mask=0.2, standardize="train", label_column=None,
               test_share=0.2, missing="refuse"):
    """Load 'covtype', 'digits' or the CSV file at the path `dataset` onto `device`, as a Dataset.

    mask: the probability that a view zeroes a continuous value (after standardising, zero is its
    mean). standardize: whose mean and standard deviation count, the 'train' rows' or 'all' rows'.
    label_column (None: no labels), test_share, missing ('refuse' or 'impute'): how to read a CSV
    file. Raises DataError on data that is missing or can't be used.
    """
    spec = {"domain": "table", "columns": None}
    if dataset == "covtype":
        x, y = read_covtype(Path(data_dir))
        train, test = np.split(np.arange(len(x)), [COVTYPE_TRAIN])
        spec |= {"groups": [10, 4, 40], "classes": [str(i) for i in range(1, 8)]}
        continuous = 10
    elif dataset == "digits":
        x, y = load_digits(return_X_y=True)
        train, test = split(np.arange(len(x)), y, 0.2)
        spec |= {"groups": [64], "classes": [str(i) for i in range(10)]}
        continuous = 64
    else:
        x, y, train, test, found = read_csv(Path(dataset), label_column, test_share, missing)
        spec |= found
        continuous = [column["kind"] for column in spec["columns"]].count("number")

    train, labelled = labelled_first(train, y)
    rows = x[train] if standardize == "train" else x
    mean, std = rows[:, :continuous].mean(axis=0), rows[:, :continuous].std(axis=0)
    std[std == 0] = 1  # constant in these rows, as the digits' corner pixels are
    spec |= {"mean": mean.tolist(), "std": std.tolist()}

    def view(x):
        keep = torch.rand(len(x), continuous, device=x.device) >= mask
        return torch.cat([x[:, :continuous] * keep, x[:, continuous:]], dim=1)

    x_train, x_test = (standardized(x[part], spec, device) for part in (train, test))
    y_train, y_test = (torch.tensor(y[part]) for part in (train, test))
    if spec["classes"]:  # numbers to predict stay on the CPU, in float64
        y_train, y_test = y_train.to(device), y_test.to(device)
    probe = "logistic" if spec["columns"] else "sgd"
    return Dataset(x_train, y_train, x_test, y_test, len(spec["classes"]), view, lambda x: x,
                   groups=spec["groups"], labelled=labelled, spec=spec,
                   order=np.concatenate([train, test]), probe=probe)


def standardized(x, spec, device):
    """Rows x (n, columns), which are overwritten, standardised as data.json says, in float32."""
    continuous = len(spec["mean"])
    x[:, :continuous] = (x[:, :continuous] - spec["mean"]) / spec["std"]
    return torch.tensor(x, dtype=torch.float32, device=device)


def read_covtype(data_dir):
    """UCI Covertype in its original order, 15,120 rows to train on first: x (n, 54) and classes y.

    Read from data_dir in any form that UCI ships or people keep, else downloaded there by
    scikit-learn, which checks the digest. The training rows hold each class 2,160 times. Copyright
    Jock A. Blackard and Colorado State University.
    """
    names = ("covtype.data.gz", "covtype.data", "covtype.csv", "covtype.csv.gz")
    path = next((data_dir / name for name in names if os.path.exists(data_dir / name)), None)
    remedy = "run `make covtype`, or put UCI's covtype.data.gz there"
    if path:
        remedy = f"move it away, then {remedy}"
    try:
        if path is None:
            with warnings.catch_warnings(action="ignore"):  # of each try to download
                x, y = fetch_covtype(data_home=data_dir, return_X_y=True)
            rows = np.column_stack([x, y])
        else:
            rows = read_numbers(path)
    except Exception as error:  # no network, a file cut short, text in it
        what = f"{path} can't be read"
        if path is None:
            what = f"CovType is not in {data_dir} and could not be downloaded"
        raise DataError(f"{what} ({one_line(error)}): {remedy}") from None
    counts = [(rows[:COVTYPE_TRAIN, -1] == label).sum() for label in range(1, 8)]
    if rows.shape != (COVTYPE_TRAIN + COVTYPE_TEST, 55) or counts != [COVTYPE_TRAIN // 7] * 7:
        raise DataError(f"{path or data_dir} is not UCI's CovType in its original order, which has "
                        "581,012 rows of 55 columns, each class alike often in the first 15,120, "
                        f"but {rows.shape[0]:,} rows of {rows.shape[1]}: {remedy}")
    return rows[:, :54], rows[:, 54].astype(np.int64) - 1


def read_numbers(path):
    """A CSV file of nothing but numbers, with or without a header line: (n, columns) float64."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    first = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].astype(str).str.strip()
    names = [str(i) for i in range(len(first))]  # as pandas has them
    header = None if all(map(PLAIN.fullmatch, first)) and first.tolist() != names else 0
    return pd.read_csv(path, header=header, dtype=np.float64).to_numpy(copy=True)


def read_csv(path, label_column, test_share, missing):
    """A table of one's own, CSV or CSV.gz with a header line, split with a fixed seed.

    Returns x (n, columns), y (n,), the training and the test rows, and data.json's part. Prints
    what was read. Rows are counted from 1, below the header.
    """
    frame, separator = read_cells(path)
    formats = number_formats(path, frame, separator)
    names = [name for name, column in formats.items() if column and number_format([name])[0]]
    are_years = all(map(str.isdecimal, names)) and names == sorted(set(names), key=int)
    if names and not are_years:
        raise DataError(f"{path}: is {quote(names[0])} a name? Give the file a header line")
    y, classes, about = read_labels(path, frame, label_column, formats)
    rows, n = labelled_first(np.arange(len(y)), y)
    known, train, test = rows[:n], rows, rows[:0]
    if n:
        try:
            train, test = split(known, y[known] if classes else None, test_share)
        except ValueError as error:  # too few rows for the classes
            raise DataError(f"{path}: {error}: add rows or change --test-share") from None
        train = np.concatenate([train, rows[n:]])
    columns, left_out = describe_columns(path, frame, formats, train, missing)
    if not columns:
        raise DataError(f"{path}: no column that can be used is left")
    x, groups = code_rows(path, frame, columns)

    kinds = [column["kind"] for column in columns]
    told = {"numbers": kinds.count("number"), "two-valued": kinds.count("binary"),
            "categories": kinds.count("category"), "indicators": kinds.count("missing")}
    parts = [f"{len(y):,} rows", *(f"{n} {kind}" for kind, n in told.items() if n), about]
    for column in columns:
        cells = frame[column["name"]]
        if "decimal" in column:
            odd = "." if column["decimal"] == "," else "\n"
            texts = cells[holds(cells, lambda text: odd in text or not PLAIN.fullmatch(text)) &
                          ~is_missing(cells)]
            for text, value in zip(texts[:1], read_values(path, column, texts[:1])):
                parts.append(f"{quote(text)} in {quote(column['name'])} is read as {value:g}")
    if left_out:
        parts.append("left out " + ", ".join(f"{quote(name)} ({why})"
                                             for name, why in left_out.items()))
    print(f"{path}: {'; '.join(parts)}", flush=True)
    return x, y, train, test, {"columns": columns, "groups": groups, "classes": classes,
                               "ignored": [*left_out, label_column]}


def read_new_rows(path, spec):
    """New rows of the table that data.json is of: x (n, columns) float64, not yet standardised."""
    if spec["columns"] is None:  # of CovType or digits
        n = sum(spec["groups"])
        try:
            x = read_numbers(path)
        except Exception as error:
            raise DataError(f"{path} can't be read as numbers ({one_line(error)})") from None
        fits = x.shape[1] == n
        if x.shape[1] == n + 1:  # with labels at its end, not with row numbers before them
            is_index = len(x) > 1 and tells_the_row("", x[:, 0])
            fits = not is_index and set(x[:, n]) <= set(map(float, spec["classes"]))
        if not fits:
            raise DataError(f"{path} has {x.shape[1]} columns, and in training there were {n}, and "
                            "the labels after them")
        if not np.isfinite(x).all():
            raise DataError(f"{path}: a value is missing or not finite: fill it in")
        return x[:, :n]
    frame, _ = read_cells(path)
    names = {column["name"] for column in spec["columns"]}
    if missing := names.difference(frame.columns):
        raise DataError(f"{path}: the column {quote(min(missing))} of the training is missing")
    if further := set(frame.columns).difference(names, spec["ignored"]):
        raise DataError(f"{path}: the column {quote(min(further))} was not there in training: "
                        "remove it")
    return code_rows(path, frame, spec["columns"])[0]


def read_cells(path):
    """A CSV file's cells, as text without blanks around it, and its separator.

    Of comma, semicolon, tab and bar it is that which makes most fields, as many in each line.
    """
    compression = "gzip" if path.suffix == ".gz" else None
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        with (gzip.open if compression else open)(path, "rb") as file:
            head = file.read(1 << 16)
        encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        if encoding != "utf-16" and b"\0" in head:
            raise UnicodeError
        lines = head.decode(encoding, "ignore").splitlines()[:50]
        separator = max(",;\t|", key=lambda sign: fields_alike(lines, sign))
        cells = pd.read_csv(path, header=None, dtype=object, keep_default_na=False, sep=separator,
                            skipinitialspace=True, encoding=encoding, compression=compression)
    except UnicodeError:
        raise DataError(f"{path} can't be read as CSV in UTF-8 or UTF-16: convert it, as by `iconv "
                        "-f latin1 -t utf-8`") from None
    except Exception as error:  # not there, a folder, cut short, ragged
        raise DataError(f"{path} can't be read as CSV ({one_line(error)}): --dataset takes "
                        "covtype, digits, or a CSV file with a header line") from None
    short = cells.isna().any(axis=1)
    if short.any():
        raise DataError(f"{path}, row {short.argmax()}: it has fewer fields than the header line")
    for column in cells:
        codes, texts = pd.factorize(cells[column])
        cells[column] = np.array([text.strip() for text in texts], object)[codes]
    names = [name or f"column {i}" for i, name in enumerate(cells.iloc[0], 1)]
    name, times = collections.Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path}: {times} columns are called {quote(name)}: rename or remove all "
                        "but one")
    if len(cells) == 1:
        raise DataError(f"{path}: no rows below the header line")
    return cells[1:].set_axis(names, axis=1).reset_index(drop=True), separator


def fields_alike(lines, separator):
    """The fields of the first of these lines, where all lines but the last have as many; else 1."""
    counts = [len(row) for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)
              if row]
    return counts[0] if counts and set(counts[:-1] or counts) == {counts[0]} else 1


def read_labels(path, frame, label_column, formats):
    """Take the labels out of a table's frame: y (n,), the classes, and what is to be said of them.

    y: int64, indices of the classes, -1 where the label is missing; or float64, NaN where missing,
    if these are numbers to predict, which have no classes: more than 20 different ones that are not
    all whole, or have less than ten rows each, or one of them a single row.
    """
    none = np.full(len(frame), -1), []
    if label_column is None:
        return *none, "no --label-column, so no evaluation"
    if label_column not in frame:
        names = ", ".join(map(quote, frame.columns[:100]))
        raise DataError(f"{path}: no column {quote(label_column)}; its columns are: {names}")
    column = {"name": label_column, **formats[label_column]}
    cells = frame.pop(label_column)
    known = ~is_missing(cells)
    about = f"labels {quote(label_column)}"
    if not known.all():
        about += f", missing in {(~known).sum():,} rows, which only train"
    labels = read_values(path, column, cells)
    values, first, y, counts = np.unique(labels[known], return_index=True, return_inverse=True,
                                         return_counts=True)
    if len(values) < 2:
        return *none, f"{about}: one value, so no evaluation"
    is_number = "decimal" in column
    why = tells_the_row(label_column, labels[known]) if is_number else "another in every row"
    if len(values) == known.sum() and why:
        return *none, f"{about}: {why}, so no evaluation"
    if is_number and len(values) > 20:
        whole = (values % 1 == 0).all()
        if not whole or len(values) > known.sum() / 10 or counts.min() < 2:
            return labels, [], f"{about}: numbers, evaluated by ridge regression"
    if counts.min() < 2:
        once = values[counts.argmin()]
        refuse_cell(path, label_column, (labels == once).argmax(), cells, "is a label seen only "
                    "once, and a class needs a row to train on and one to test")
    classes = cells.to_numpy(str)[known][first]
    indices = np.full(len(frame), -1)
    indices[known] = y
    return indices, classes.tolist(), f"{about}: {in_classes(classes, counts)}"


def in_classes(classes, counts):
    """How many classes there are, and where these are few, of how many examples each."""
    if len(classes) > 12:
        return f"{len(classes)} classes"
    return ", ".join(f"{quote(name)} {n:,}" for name, n in zip(classes, counts))


def holds(texts, test):
    """For which texts of a column test(text) is true: (n,) bool."""
    codes, different = pd.factorize(texts)
    return np.array([bool(test(text)) for text in different], bool)[codes]


def is_missing(texts):
    """Which of the texts of a column stand for a missing value: (n,) bool."""
    return holds(texts, lambda text: text.lower() in MISSING)


def describe_columns(path, frame, formats, train, missing):
    """How data.json has each column read, and {name: why} of those left out.

    {"name", "kind": "number"}, to be standardised; "binary" with its two "values", 0 and 1;
    "category" with its "values", one-hot. "decimal" and "unit" stand where texts are read as
    numbers. With missing="impute", "fill" is the training rows' median or most frequent value, and
    where one is missing {"name", "kind": "missing"} tells it. Left out is what is constant in the
    training rows, and what tells the row rather than the thing.
    """
    columns, left_out = [], {}
    for name, cells in frame.items():
        absent = is_missing(cells)
        if absent.all():
            left_out[name] = "empty"
            continue
        column = {"name": name, **formats[name]}
        decimal = "decimal" in column
        if not decimal:
            refuse_text(path, name, cells[~absent])
        if missing == "refuse" and absent.any():
            refuse_cell(path, name, absent.argmax(), cells, "is a missing value (--missing impute)")
        values = read_values(path, column, cells)
        known, different = values[train][~absent[train]], np.unique(values[~absent])
        if decimal and len(known) and np.ptp(known) <= 1e-12 * abs(known).max():
            different = different[:1]  # but for rounding
        if len(known) == 0 or len(different) == 1 or len(np.unique(known)) == 1:
            left_out[name] = "constant in the training rows"
            if absent[train].any() and len(known):
                columns.append({"name": name, "kind": "missing"})
            continue
        if len(different) == 2:
            column |= {"kind": "binary", "values": different.tolist()}
        elif not decimal:
            if len(different) > 256 or len(different) == len(cells):
                refuse_cell(path, name, 0, cells, f"is one of {len(different):,} different texts, "
                            "which are too many for one-hot")
            column |= {"kind": "category", "values": different.tolist()}
        elif why := tells_the_row(name, values[~absent]):
            left_out[name] = why
            continue
        else:
            column["kind"] = "number"
        if missing == "impute" and column["kind"] == "number":
            column["fill"] = float(np.median(known))
        elif missing == "impute":
            column["fill"] = pd.Series(known).mode()[0]
        columns.append(column)
        if absent[train].any():
            columns.append({"name": name, "kind": "missing"})
    return columns, left_out


def code_rows(path, frame, columns):
    """A table's frame as data.json's columns say: x (n, columns) float64, not yet standardised.

    Numbers come first, then what is 0 or 1, then each category. Returns the sizes of these groups,
    too. A value that was not seen in training is refused, as by scikit-learn's OneHotEncoder.
    """
    numbers, binaries, one_hots = [], [], []
    for column in columns:
        name, kind = column["name"], column["kind"]
        cells = frame[name]
        absent = is_missing(cells)
        if kind == "missing":
            binaries.append(absent)
            continue
        if absent.any() and "fill" not in column:
            refuse_cell(path, name, absent.argmax(), cells, "is a missing value")
        values = read_values(path, column, cells)
        if absent.any():
            values[absent] = column["fill"]
        if kind == "number":
            numbers.append(values)
            continue
        codes = pd.Index(column["values"]).get_indexer(values)
        if (codes < 0).any():
            refuse_cell(path, name, (codes < 0).argmax(), cells, "was not seen in training")
        if kind == "binary":
            binaries.append(codes)
        else:
            one_hots.append(np.eye(len(column["values"]))[codes])
    x = np.column_stack(numbers + binaries + one_hots).astype(np.float64)
    sizes = [len(numbers), len(binaries), *(one_hot.shape[1] for one_hot in one_hots)]
    return x, [size for size in sizes if size]


def read_values(path, column, cells):
    """A column's texts (n,) as they are, or as float64, NaN where missing, if it is of numbers."""
    if "decimal" not in column:
        return cells.to_numpy(object, copy=True)
    decimal = column["decimal"]
    other = {".": ",", ",": "."}[decimal]
    codes, texts = pd.factorize(cells)
    values = np.full(len(texts), np.nan)
    for i in np.flatnonzero(~is_missing(texts)):
        number, unit = bare_number(texts[i])
        if unit == column["unit"] and NUMBERS[decimal].fullmatch(number):
            number = re.sub(f"[{other} '’\u00a0\u2009\u202f]", "", number)
            values[i] = float(number.replace(decimal, "."))
        if not abs(values[i]) <= np.finfo(np.float32).max:
            refuse_cell(path, column["name"], (codes == i).argmax(), cells,
                        "is not a finite number of single precision, as the others are")
    return values[codes]


def bare_number(text):
    """A text without its unit, a currency or %, before or after the number; and that unit."""
    text = re.sub("[\u2212\u2013]", "-", text[:100])  # minus and dash
    sign = text[:1] if text[:1] in "+-" else ""
    number, unit = text[len(sign) :].strip(), ""
    for end in (slice(0, 1), slice(-1, None)):
        if unicodedata.category(number[end] or " ") == "Sc" or number[end] in ("%", "\u2030"):
            unit += number[end]
            number = number.replace(number[end], "", 1).strip()
    return sign + number, unit


def number_format(texts):
    """How all of these texts are numbers: their possible decimal signs, "" if none, and unit."""
    parts = [bare_number(text) for text in pd.unique(pd.Series(texts, dtype=object))]
    units = {unit for _, unit in parts}
    if len(units) != 1:
        return "", ""
    signs = [sign for sign, pattern in NUMBERS.items()
             if all(pattern.fullmatch(number) for number, _ in parts)]
    return "".join(signs), min(units)


def number_formats(path, frame, separator):
    """{name: {"decimal", "unit"}} of a table's columns, {} of those that are no numbers.

    1,234 and 1.234 are read as the file's other columns say. Where these say nothing, commas part
    thousands in a file of commas, and are refused in others.
    """
    formats = {name: number_format(cells[~is_missing(cells)]) for name, cells in frame.items()}
    in_file = {decimal for decimal, _ in formats.values() if len(decimal) == 1}
    for name, (decimal, unit) in formats.items():
        if len(decimal) == 2 and len(in_file) == 1:
            decimal = min(in_file)
        elif len(decimal) == 2 and separator != ",":
            commas = holds(frame[name], lambda text: "," in text)
            if commas.any():
                refuse_cell(path, name, commas.argmax(), frame[name],
                            "may have a decimal comma, or one that parts thousands")
        formats[name] = {"decimal": decimal[0], "unit": unit} if decimal else {}
    return formats


def refuse_text(path, name, cells):
    """Raise DataError where most of a column's texts are dates, or are numbers."""
    dates = holds(cells, DATE.fullmatch)
    if dates.mean() > 0.5:
        refuse_cell(path, name, cells.index[dates.argmax()], cells,
                    "is a date or a time: give numbers instead, as the days since the first")
    numbers = holds(cells, lambda text: number_format([text])[0])
    if numbers.mean() > 0.2:
        row = (~numbers).argmax()  # the first one where all are numbers, but written unlike
        refuse_cell(path, name, cells.index[row], cells, "is written unlike the column's numbers")


def refuse_cell(path, name, row, cells, what):
    """Raise DataError on a column's text in a row, counted from 0."""
    raise DataError(f"{path}: column {quote(name)}, row {row + 1}: {quote(cells[row])} {what}: "
                    "correct it, or remove the row or the column")


def tells_the_row(name, values):
    """Why numbers (n,) tell the row in the file, or its name, rather than the thing; "" if not.

    They tell its place if they rise or fall from each row to the next and are whole or in equal
    steps, as an index, with or without gaps; its name if they are whole and called an id: by a name
    that says nothing else, or one that ends so, where all differ or stand in order.
    """
    steps = np.diff(values)
    whole = (values % 1 == 0).all()
    even = np.ptp(steps) <= 1e-6 * abs(steps).max()
    if ((steps > 0).all() or (steps < 0).all()) and (whole or even):
        return "tells the row's place; shuffle the rows to keep it"
    in_order = (steps >= 0).all() or (steps <= 0).all()
    all_differ = len(np.unique(values)) == len(values)
    is_id = name.lower() in ID_NAMES or re.fullmatch(r"unnamed: \d+|column \d+", name.lower())
    ends_so = re.fullmatch(r".*[_ .-](id|ids|uuid|guid)", name.lower()) or re.fullmatch(
        r".*[a-z]I[dD]", name)
    if whole and (is_id or ends_so and (in_order or all_differ)):
        return "tells the row's name; call it otherwise to keep it"
    return ""


# ---------------------------------------------------------------------------- files in folders
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
          "valid": "val", "validation": "val", "dev": "val"}


def list_examples(path, types, what):
    """The files of a folder that are examples: names below path, and a class and a part of each.

    The class is the first folder below path, or below train and test where there are these, ""
    for files beside such folders. The part is "train" or "test", or "" where nothing tells it.
    """
    try:
        folders = visible(entry.name for entry in os.scandir(path) if entry.is_dir())
        words = [re.split(r"[\W_]+", name.lower()) for name in folders]
        roles = [next((SPLITS[word] for word in name if word in SPLITS), "") for name in words]
        parts = dict(zip(roles, folders)) or {"": ""}
        if "train" in parts and "test" in parts and "" in parts:
            raise DataError(f"{path} holds {parts['train']} and {parts['test']}, and beside them "
                            f"{quote(parts[''])}: move it away, or rename the two if they are "
                            "classes")
        if "" in parts:  # a class may be called train
            parts = {"": ""}
        elif "train" not in parts or len(parts) < len(folders):
            raise DataError(f"{path} holds {', '.join(map(quote, folders))}: give one folder train "
                            "and one folder test")
        elif "val" in parts and "test" in parts:
            print(f"{path}: {parts['val']} is left out, {parts['test']} is the test", flush=True)
        elif "val" in parts:
            parts["test"] = parts["val"]
        beside = [entry.name for entry in os.scandir(path)
                  if entry.name.lower().endswith(types) and entry.is_file()]
        if beside and "" not in parts:
            print(f"{path}: left out {len(beside):,} {what} beside {parts['train']}", flush=True)
        found = [(part, *file) for part, root in parts.items() if part != "val"
                 for file in list_files(path, root, types, what)]
    except OSError as error:
        raise DataError(f"{path} can't be read as a folder of {what} ({one_line(error)}): "
                        "--dataset takes a name (see --help), a CSV file, or a folder CLASS/* of "
                        "images or WORD/*.wav") from None
    if not found:
        raise DataError(f"{path} holds no {what} that can be read ({' '.join(types)}): --dataset "
                        "takes a name (see --help), a CSV file, or a folder")
    parts, classes, names = map(np.array, zip(*found))
    return names, classes, parts


def list_files(path, root, types, what):
    """[(class, name below path)] of the files of these types in path / root; others are counted."""
    found, others, deep = [], collections.Counter(), 0
    top = path / root
    classes = visible(entry.name for entry in os.scandir(top) if entry.is_dir())
    for name in ["", *classes]:
        before, seen = len(found), {os.path.realpath(top)} if name else set()
        for folder, folders, files in os.walk(top / name, onerror=reraise, followlinks=True):
            folders[:] = visible(folders) if name else []
            if os.path.realpath(folder) in seen:  # a link leads back
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            for file in visible(files):
                full = os.path.join(folder, file)
                usable = os.path.isfile(full) or not os.path.exists(full)  # a dangling link is read
                if file.lower().endswith(types) and usable:
                    found.append((name, os.path.relpath(full, path)))
                    if name and folder != str(top / name):
                        deep += 1
                elif name or not classes:
                    others[os.path.splitext(file)[1] or file] += 1
        if name and len(found) == before:
            raise DataError(f"{top / name} holds no {what} that can be read ({' '.join(types)}): "
                            "add some, or remove the folder")
    if others:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in others.most_common(5))
        print(f"{top}: left out {others.total():,} files of other kinds ({kinds})", flush=True)
    if deep:
        print(f"{top}: {deep:,} of {len(found):,} {what} are in folders within their class's",
              flush=True)
    return found


def reraise(error):
    """Raise what os.walk would pass over."""
    raise error


def visible(names):
    """Those of names that are neither hidden nor a system's, nor of background noise; sorted."""
    return sorted(name for name in names
                  if not name.startswith((".", "__MACOSX")) and name not in (NOISE, "lost+found"))


def split_examples(path, labels, parts):
    """y (n,), the classes, and the training and the test rows of labels ("": none) and parts."""
    classes, y, counts = np.unique(labels[labels != ""], return_inverse=True, return_counts=True)
    indices = np.full(len(labels), -1)
    train, test = np.flatnonzero(parts != "test"), np.flatnonzero(parts == "test")
    if not len(train):
        raise DataError(f"{path}: no file is left to train on")
    if len(classes) < 2:
        print(f"{path}: {len(labels):,} files of no or one class, so no evaluation", flush=True)
        return indices, [], train, test
    indices[labels != ""] = y
    print(f"{path}: {in_classes(classes, counts)}", flush=True)
    if "" in labels[test]:
        raise DataError(f"{path}: the test has files beside its classes' folders: move them")
    if missing := set(labels[test]) - set(labels[train]):
        raise DataError(f"{path}: the class {quote(min(missing))} is only in the test: give "
                        "examples to train on")
    if not len(test):
        known = np.flatnonzero(labels != "")
        try:
            train, test = split(known, indices[known], 0.2)
        except ValueError as error:
            raise DataError(f"{path} can't be split to train and to test ({error}): give more "
                            "examples") from None
        train = np.concatenate([train, np.flatnonzero(labels == "")])
    return indices, classes.tolist(), train, test


def check_memory(path, size, device, remedy):
    """Raise DataError where so many bytes do not fit on the device."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    if size > memory:
        raise DataError(f"{path}: the data take {size / 1e9:.1f} GB, and {device} has "
                        f"{memory / 1e9:.1f}: {remedy}")


# ---------------------------------------------------------------------------- images
CIFAR = {  # torchvision's reader; mean and std
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
}
IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif",
          ".ppm", ".pgm", ".pbm")


def load_images(dataset, data_dir, device, *, image_size=32, train_size=None):
    """Load 'cifar10', 'cifar100', 'digits' (8 x 8) or a folder of images onto `device`.

    image_size: to which a folder's images are resized, in pixels. train_size: keep a stratified
    subset of so many training images, the same at every call. Raises DataError on data that is
    missing or can't be used.
    """
    names, probe = None, "sgd"
    if dataset in CIFAR:
        x, y, classes, train, test = read_cifar(dataset, Path(data_dir))
    elif dataset == "digits":
        x, y = load_digits(return_X_y=True)
        x = (x * 255 / 16).round().astype(np.uint8).reshape(-1, 1, 8, 8)
        train, test = split(np.arange(len(x)), y, 0.2)
        classes = [str(i) for i in range(10)]
    else:
        x, y, classes, train, test, names = read_image_folder(Path(dataset), image_size, device)
        probe = "logistic"
    train, labelled = labelled_first(subset(train, y[train], train_size), y)
    if dataset in CIFAR:
        mean, std = CIFAR[dataset][1:]
    else:  # in float64, which not every device has
        channels = torch.as_tensor(x[train]).unbind(1)
        mean = [channel.double().mean().item() / 255 for channel in channels]
        std = [channel.double().std().item() / 255 or 1.0 for channel in channels]
    spec = {"domain": "image", "image_size": x.shape[2], "mean": mean, "std": std,
            "classes": classes}
    to_input = input_of(spec, device)
    tensors = [torch.as_tensor(a, device=device) for a in (x[train], y[train], x[test], y[test])]
    return Dataset(*tensors, len(classes), lambda x: to_input(image_view(x / 255)),
                   lambda x: to_input(x / 255), lambda x: to_input(padded_crop(x / 255)),
                   labelled=labelled, spec=spec, order=np.concatenate([train, test]),
                   names=names, probe=probe)


def input_of(spec, device):
    """The function that standardises images (N, C, H, W) in [0, 1], as data.json says."""
    mean, std = (torch.tensor(spec[name], device=device)[:, None, None] for name in ("mean", "std"))
    return lambda x: (x - mean) / std


def read_cifar(name, data_dir):
    """CIFAR as uint8 images (n, 3, 32, 32), labels, classes, the training and the test rows.

    Read by torchvision from data_dir, or downloaded there.
    """
    reader = getattr(torchvision.datasets, CIFAR[name][0])
    try:
        parts = [reader(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, or files that fail torchvision's digest check
        raise DataError(f"{name} is not whole in {data_dir} and could not be downloaded "
                        f"({one_line(error)}): put its Python version there, or take another "
                        "--dataset (digits, or a folder of images)") from None
    x = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    y = np.concatenate([part.targets for part in parts])
    train, test = np.split(np.arange(len(x)), [len(parts[0].data)])
    return x, y, parts[0].classes, train, test


def read_image_folder(path, size, device=torch.device("cpu")):
    """CLASS/* or train/CLASS/* and test/CLASS/*, or images alone: uint8 (n, C, size, size), labels,
    classes, training and test rows, names. Refused where they do not fit on the device.
    """
    names, labels, parts = list_examples(path, IMAGES, "images")
    y, classes, train, test = split_examples(path, labels, parts)
    check_memory(path, 3 * size**2 * len(names), device, "lower --image-size")
    return read_images(path, names, size), y, classes, train, test, names


def read_images(path, names, size, channels=None):
    """Files below path as uint8 (n, C, size, size), upright, without transparency (on white).

    An image's shorter side is resized to size, the longer one cropped to its middle. C is channels,
    or else 1 where every image is gray. Of an image of several frames the first is taken.
    """
    images = np.empty((len(names), 3, size, size), np.uint8)
    all_gray, frames = True, 0
    for i, name in enumerate(names):
        try:
            image, gray, several = read_image(path / name)
        except Exception as error:  # PIL raises many types on a damaged file
            raise DataError(f"{path / name} can't be read as an image ({one_line(error)}): mend or "
                            "remove it") from None
        if min(image.size) < size:
            raise DataError(f"{path / name} is {image.width} x {image.height} pixels, smaller than "
                            f"--image-size {size}: remove it, or lower --image-size")
        image = TF.center_crop(TF.resize(image, size), size)
        images[i] = np.asarray(image).transpose(2, 0, 1)
        all_gray, frames = all_gray and gray, frames + several
        if i % 1000 == 0:
            progress(f"{path}: {i:,} of {len(names):,} images read")
    if frames:
        print(f"{path}: {frames:,} images hold several frames; the first is taken", flush=True)
    if channels == 1 and not all_gray:
        raise DataError(f"{path}: there are images in colour, and in training all were gray: "
                        "convert them")
    return images[:, :1] if (channels or 3 - 2 * all_gray) == 1 else images


def read_image(file):
    """An image in RGB, whether it is gray, and whether it is the first of several frames."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file)
    with image:
        deep = (";16" in str(args) or codec == "ppm" and args[1] > 255
                for codec, _, _, args in image.tile)  # which PIL would cut to 8 bits
        if image.mode[0] in "IF" or any(deep):
            raise ValueError(f"mode {image.mode}, more than 8 bits a channel: convert it to 8")
        several = getattr(image, "n_frames", 1) > 1
        gray = image.mode in ("L", "1", "LA")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB"), gray, several


def image_view(x):
    """A random view of each image, SimCLR's: (N, C, H, H) in [0, 1] -> the same.

    RandomResizedCrop(scale 0.2 to 1), with probability 0.8 ColorJitter(0.4, 0.4, 0.4, 0.1),
    grayscale with probability 0.2, horizontal flip; for one channel the crop, brightness and
    contrast. Images of more than 64 pixels are blurred with probability 0.5. Distributions are
    torchvision's.
    """
    n, channels, size, device = len(x), x.shape[1], x.shape[2], x.device
    flip = torch.rand(n, device=device) < (0.5 if channels == 3 else 0.0)
    x = resized_crop(x, *random_resized_crop(n, size, device), flip, size)
    jitter = torch.rand(n, 1, device=device) < 0.8
    factors = torch.empty(n, 3, device=device).uniform_(0.6, 1.4)
    shift = torch.empty(n, 1, device=device).uniform_(-0.1, 0.1)
    order = torch.rand(n, 4, device=device).argsort(dim=1)
    factors, shift = torch.where(jitter, factors, 1.0), torch.where(jitter, shift, 0.0)
    x = color_jitter(x, factors, shift.squeeze(1), order)
    if channels == 3:
        x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.2, grayscale(x), x)
    if size > 64:
        x = blur(x, draw(n, 0.1, 2.0, 0.01, device))  # 0.01 pixels leave an image as it is
    return x


def draw(n, low, high, otherwise, device):
    """(n,): each with probability 0.5 uniform from low to high, else as otherwise says."""
    drawn = torch.empty(n, device=device).uniform_(low, high)
    return torch.where(torch.rand(n, device=device) < 0.5, drawn, otherwise)


def padded_crop(x):
    """RandomCrop(H, padding=4) of (N, C, H, H) in [0, 1], and for three channels flips."""
    n, channels, size, device = len(x), x.shape[1], x.shape[2], x.device
    top, left = torch.randint(0, 9, (2, n), device=device).float()
    side = torch.full((n,), float(size), device=device)
    flip = torch.rand(n, device=device) < (0.5 if channels == 3 else 0.0)
    return resized_crop(F.pad(x, [4, 4, 4, 4]), top, left, side, side, flip, size)


def random_resized_crop(n, size, device):
    """torchvision's RandomResizedCrop(scale=(0.2, 1)) of square images, in pixels.

    Returns top, left, height, width, each (n,). Area and aspect ratio are drawn up to ten times,
    until the crop fits; then the whole image is taken.
    """
    area = size * size * torch.empty(n, 10, device=device).uniform_(0.2, 1)
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (n, 10)
    fits = (0 < width) & (width <= size) & (0 < height) & (height <= size)
    first, any_fits = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)
    height = torch.where(any_fits, height.gather(1, first).squeeze(1), size)
    width = torch.where(any_fits, width.gather(1, first).squeeze(1), size)
    top = (torch.rand(n, device=device) * (size - height + 1)).floor()
    left = (torch.rand(n, device=device) * (size - width + 1)).floor()
    return top, left, height, width


def resized_crop(x, top, left, height, width, flip, size):
    """Crop each image to its own box, in pixels, resize it to (size, size), and flip it.

    x: (N, C, H, W) float; top, left, height, width: (N,) float; flip: (N,) bool. size: not below
    the boxes'. Bilinear interpolation is linear in rows and in columns, so a crop is one small
    matrix from the left and one from the right.
    """
    def weights(start, extent, length):  # (N, size, length): row r has output pixel r's weights
        at = (torch.arange(size, device=x.device) + 0.5) * (extent / size)[:, None] - 0.5
        at = start[:, None] + at.clamp(min=0).minimum(extent[:, None] - 1)
        distance = (at[:, :, None] - torch.arange(length, device=x.device)).abs_()
        return (1 - distance).clamp_(min=0)

    rows, columns = weights(top, height, x.shape[2]), weights(left, width, x.shape[3])
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    x = (x.flatten(1, 2) @ columns.mT).unflatten(1, x.shape[1:3])  # (N, C, H, size)
    return rows[:, None] @ x


def grayscale(x):
    """ITU-R 601-2 luma (N, 1, H, W) of (N, C, H, W); one channel is taken as it is."""
    if x.shape[1] == 1:
        return x
    return (x[:, :1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def color_jitter(x, factors, shift, order):
    """torchvision's ColorJitter, each image with its own parameters and order.

    x: (N, C, H, W) in [0, 1]; factors: (N, 3), of brightness, contrast and saturation; shift:
    (N,), of hue, in turns; order: (N, 4), a permutation of 0 brightness, 1 contrast, 2 saturation,
    3 hue. Hue, the dearest part, is computed once: after the blends that come before it in an
    image's order, and before the others. A factor of 1 leaves an image as it is.
    """
    factors = F.pad(factors, [0, 1], value=1.0).gather(1, order)  # in the image's order  (N, 4)
    hue_at = order.argmax(dim=1, keepdim=True)  # (N, 1)
    turn = torch.arange(4, device=x.device)
    before, after = (torch.where(turn < hue_at, factors, 1), torch.where(turn > hue_at, factors, 1))
    for k in (0, 1, 2):
        x = blend(x, before[:, k], order[:, k])
    if x.shape[1] == 3:
        x = adjust_hue(x, shift)
    for k in (1, 2, 3):
        x = blend(x, after[:, k], order[:, k])
    return x


def blur(x, sigma):
    """Blur each image of (N, C, H, H) by a Gaussian of its own sigma (N,), in pixels.

    SimCLR's kernel, a tenth of the image wide, and torchvision's border, reflected. A blur is
    linear in rows and in columns, so it is one matrix from the left and, transposed, from the
    right.
    """
    n, size = len(x), x.shape[2]
    taps = torch.arange(-(size // 20), size // 20 + 1, device=x.device)  # (T,)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None]) ** 2, dim=1)  # (N, T)
    source = (torch.arange(size, device=x.device)[:, None] + taps).abs()  # (H, T)
    source = source.minimum(2 * (size - 1) - source)
    weights = torch.zeros(n, size, size, device=x.device)
    weights.scatter_add_(2, source.expand(n, -1, -1), kernel[:, None].expand(-1, size, -1))
    return weights[:, None] @ x @ weights.mT[:, None]


def blend(x, factor, part):
    """Blend each image, by its factor (N,), with black, its mean gray, or its grayscale.

    part: (N,), 0, 1 or 2: that is its brightness, contrast or saturation.
    """
    factor, part = factor[:, None, None, None], part[:, None, None, None]
    gray = grayscale(x)  # (N, 1, H, W)
    other = torch.where(part == 2, gray, gray.mean(dim=(1, 2, 3), keepdim=True))
    return torch.lerp(other.mul_(part > 0), x, factor).clamp_(0, 1)


def adjust_hue(x, shift):
    """Shift the hue of RGB images (N, 3, H, W) by shift (N,), in turns; value, saturation stay."""
    red, green, blue = x.unbind(1)  # (N, H, W) each
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    scale = 1 / (6 * chroma.clamp(min=1e-8))
    hue = torch.where(high == red, (green - blue).mul_(scale), torch.where(
        high == green, (blue - red).mul_(scale).add_(1 / 3), (red - green).mul_(scale).add_(2 / 3)))
    hue += shift[:, None, None]
    # A channel is high within 1/6 turn of its own hue (0, 1/3, 2/3), low beyond 1/3.
    turns = torch.stack([hue, hue - 1 / 3, hue - 2 / 3], dim=1)  # (N, 3, H, W)
    share = turns.sub_(turns.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return share.mul_(chroma[:, None]).add_(low[:, None])


# ---------------------------------------------------------------------------- speech
COMMANDS = "yes no up down left right on off stop go".split()
NOISE, WAV = "_background_noise_", "*.[wW][aA][vV]"
LISTS = "validation_list.txt", "testing_list.txt"
RATE = 16_000  # Hz; a clip lasts a second
N_FFT, HOP, FRAMES, BANDS = 2048, 512, 32, 32


def load_speech(dataset, data_dir, device, *, version="v0.01", train_size=None):
    """Load 'speech_commands' or a folder of recordings WORD/*.wav onto `device`.

    Clips last a second at 16 kHz: longer ones are cut, shorter ones filled up with zeros. Where
    one of the ten COMMANDS is among the words, the classes are the paper's 12: these, 'unknown'
    for every other word, and 'silence', clips of zeros, a tenth as many as there are training
    clips; else the words are the classes. train_size: keep a stratified subset of so many training
    clips. Raises DataError on data that is missing, can't be used or does not fit.
    """
    folder = Path(dataset)
    if dataset == "speech_commands":
        folder = speech_commands(Path(data_dir), f"speech_commands_{version}")
    names, words, parts = list_examples(folder, (".wav",), "recordings")
    names, words, parts = by_lists(folder, names, words, parts)
    y, classes, train, test = split_examples(folder, words, parts)
    silence, about = 0, "the words are the classes" if classes else "no words to tell apart"
    if not set(classes).isdisjoint(COMMANDS):
        place = {word: 10 for word in classes} | {"silence": 11} | {
            word: i for i, word in enumerate(COMMANDS)}
        y = np.array([place.get(word, -1) for word in words])
        classes = [*COMMANDS, "unknown", "silence"]
        about = "the classes are the paper's ten words, 'unknown' and 'silence'"
        silence = len(train) // 10
    noise_files = [file for file in sorted(glob.glob(f"{NOISE}/{WAV}", root_dir=folder))
                   if os.path.isfile(folder / file)]
    print(f"{folder}: {about}; recordings of background noise: {len(noise_files)}", flush=True)
    y = np.append(y, len(classes) - 1)  # the last row is a clip of zeros
    train = np.concatenate([train, np.full(silence, len(names))])
    train, labelled = labelled_first(subset(train, y[train], train_size), y)
    noise = [read_wav(folder / file) for file in noise_files] or [np.zeros(RATE, np.int16)]
    noise = np.concatenate(noise)
    noise.resize(math.ceil(len(noise) / RATE), RATE)  # clips of a second, the last one filled up
    size = 2 * (len(train) + len(test)) * RATE + 4 * noise.size  # int16 clips, float32 noise
    check_memory(folder, size, device, "keep fewer with --train-size")

    clips = cached_clips(folder, names)
    x_train, x_test = (clips[np.where(part < len(names), part, 0)] for part in (train, test))
    x_train[train == len(names)] = 0
    tensors = [torch.as_tensor(a, device=device) for a in (x_train, y[train], x_test, y[test])]
    noise = torch.as_tensor(noise / 32768, dtype=torch.float32, device=device)
    probe = "sgd" if dataset == "speech_commands" else "logistic"
    return Dataset(*tensors, len(classes), lambda x: speech_view(x / 32768, noise), plain_speech,
                   labelled=labelled, spec={"domain": "speech", "classes": classes},
                   names=names, probe=probe,
                   order=np.concatenate([np.where(train < len(names), train, -1), test]))


def plain_speech(x):
    """The log-mel spectrograms (N, 1, 32, 32) of clips (N, 16000) int16."""
    return log_mel(squared_magnitude(stft(x / 32768)))


def speech_commands(data_dir, version):
    """The folder of Speech Commands, with its lists; downloaded by torchaudio if it is not there.

    torchaudio checks the download's digest.
    """
    folder = data_dir / "SpeechCommands" / version
    remedy = "put the data set's folders and lists there, or give any folder of WORD/*.wav"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as part:  # so that it comes whole
                torchaudio.datasets.SPEECHCOMMANDS(part, version, download=True)
                os.rename(Path(part, "SpeechCommands", version), folder)
        except Exception as error:  # no network, another digest
            raise DataError(f"{version} is not in {data_dir} and could not be downloaded "
                            f"({one_line(error)}): {remedy}") from None
    for name in LISTS:
        if not (folder / name).exists():
            raise DataError(f"{folder / name} is not there: {remedy}")
    return folder


def by_lists(folder, names, words, parts):
    """Recordings, their words and their parts, as lists like those of Speech Commands have them.

    What validation_list.txt names is left out, and what testing_list.txt names is the test; what
    they name and is not there is left out, with a note.
    """
    listed = []
    for path in (folder / name for name in LISTS):
        lines = []
        if path.is_file():
            lines = path.read_text("utf-8-sig", "replace").splitlines()
        listed.append({os.path.normpath(line.strip()) for line in lines if line.strip()})
        if missing := listed[-1].difference(names):
            print(f"{path}: {len(missing):,} of {len(listed[-1]):,} are not there, as "
                  f"{min(missing)}", flush=True)
    validation, testing = (np.isin(names, list(found)) for found in listed)
    if testing.any():
        parts = np.where(testing, "test", "train")
    return names[~validation], words[~validation], parts[~validation]


def cached_clips(folder, files):
    """The clips of files (n, 16000) int16, memory-mapped from a file in the folder.

    The file's name holds a digest of the recordings' names, sizes and times: where these change,
    it is made anew.
    """
    try:
        stats = [os.stat(folder / file) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename} can't be read ({error.strerror}): mend or remove "
                        "it") from None
    made_from = [(str(file), stat.st_size, stat.st_mtime_ns)
                 for file, stat in zip(files, stats)]
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    path = folder / f"imix_clips-{digest}.npy"
    with contextlib.suppress(Exception):  # it is not there, or damaged in whatever way
        clips = np.load(path, mmap_mode="r")
        if clips.shape == (len(files), RATE) and clips.dtype == np.int16:
            return clips
    clips = read_clips(folder, files)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:  # so that it comes whole
            np.save(Path(part, path.name), clips)
            for old in set(folder.glob("imix_clips-*.npy")) - {path}:
                old.unlink(missing_ok=True)
            os.replace(Path(part, path.name), path)
    except OSError as error:
        raise DataError(f"{path} can't be written ({error.strerror}): the clips are kept there in "
                        f"one file of {clips.nbytes / 1e6:,.1f} MB: make room, or the folder "
                        "writable") from None
    return np.load(path, mmap_mode="r")


def read_clips(folder, files):
    """The first second of recordings: (n, 16000) int16, filled up with zeros."""
    clips = np.zeros((len(files), RATE), np.int16)
    for i, file in enumerate(files):
        clip = read_wav(folder / file)[:RATE]
        clips[i, : len(clip)] = clip
        if i % 1000 == 0:
            progress(f"{folder}: {i:,} of {len(files):,} clips read")
    return clips


def read_wav(path):
    """The samples (n,) int16 of a PCM WAV file of 8 to 32 bit, at 16 kHz, its channels' mean."""
    try:
        raw = bytearray(path.read_bytes())
        chunks = wav_chunks(raw)
        form, block, bits = (int.from_bytes(raw[chunks[b"fmt "] + at :][:2], "little")
                             for at in (0, 12, 14))
        if form == 0xFFFE:  # "extensible", which Python 3.11 refuses: the format comes later
            raw[chunks[b"fmt "] : chunks[b"fmt "] + 2] = raw[chunks[b"fmt "] + 24 :][:2]
        raw[4:8] = (len(raw) - 8).to_bytes(4, "little")  # which is not known where it is piped
        with wave.open(io.BytesIO(raw)) as file:
            channels, width, rate, n, *_ = file.getparams()
            data = np.frombuffer(file.readframes(n), np.uint8)
        if width > 4 or bits < 8 or not 1_000 <= rate <= 1_000_000:
            raise ValueError(f"{bits} bit, {rate:,} Hz")
        if block != channels * width:
            raise ValueError(f"{block} bytes a sample of {channels} x {bits} bit")
        if not len(data):
            raise ValueError("no samples")
        if len(data) != n * channels * width:
            raise ValueError(f"{len(data):,} bytes of samples instead of {n * channels * width:,}")
        samples = np.zeros((n * channels, 4), np.uint8)  # of int32, whose high bytes they are
        samples[:, 4 - width :] = data.reshape(-1, width)
        if width == 1:  # 8 bit is unsigned
            samples[:, 3] ^= 128
        x = samples.view("<i4").reshape(n, channels).mean(axis=1) / 65536
        if rate != RATE:  # a ratio of small numbers, within 0.1 %, makes a small filter
            ratio = Fraction(rate, RATE).limit_denominator(1000)
            x = torchaudio.functional.resample(torch.from_numpy(x), ratio.numerator,
                                               ratio.denominator).numpy()
        return x.round().clip(-32768, 32767).astype(np.int16)
    except Exception as error:  # wave raises many types on a damaged file
        reason = str(error) or "cut short"
        raise DataError(f"{path} can't be read as a WAV file of 8 to 32 bit PCM ({reason}): "
                        "convert or remove it") from None


def wav_chunks(raw):
    """Where the chunks of a WAV file begin, {name: place}.

    Written into a pipe, the samples' size is 0 or the largest there is: then they go on to the end,
    and raw gets the size.
    """
    at, chunks = 12, {}
    while at + 8 <= len(raw):
        name, size = bytes(raw[at : at + 4]), int.from_bytes(raw[at + 4 : at + 8], "little")
        at += 8
        chunks.setdefault(name, at)
        if name == b"data":
            follows = bytes(raw[at : at + 4])
            if size > 0x7FFF0000 or (size == 0 and follows not in (b"LIST", b"id3 ", b"fact")):
                size = len(raw) - at
                raw[at - 4 : at] = size.to_bytes(4, "little")
        at += size + size % 2
    return chunks


def speech_view(x, noise):
    """A random view of each clip, the recipe's: (N, 16000) in [-1, 1) -> (N, 1, 32, 32) in dB.

    The clip distorted, and with probability 0.5 a share of up to 0.45 of noise, one of the clips
    of background noise (M, 16000), distorted on its own. A phase vocoder's phases are left out: the
    features are of magnitudes, and between a clip and noise each phase is as likely as another.
    Returns log-mel spectrograms.
    """
    n, device = len(x), x.device
    noise = distort(noise[torch.randint(len(noise), (n,), device=device)])  # (N, 32, 1025)
    share = draw(n, 0, 0.45, 0.0, device)[:, None, None]
    clip, noise = distort(x).mul_(1 - share), noise.mul_(share)
    cosine = torch.rand_like(clip).mul_(2 * math.pi).cos_()  # of the phase between them
    # |a + b|^2 = |a|^2 + |b|^2 + 2 |a| |b| cos
    power = clip.square() + noise.square() + cosine.mul_(2).mul_(clip).mul_(noise)
    return log_mel(power.clamp_(min=0))


def distort(x):
    """The magnitudes (N, 32, 1025) of clips (N, 16000), each distorted in its own way.

    Each with probability 0.5: amplitude times 0.7 to 1.1; speed and pitch changed so that the clip
    lasts up to 20 % more or less; time stretched at a rate of 0.8 to 1.2; a shift by up to 8
    frames.
    """
    n, device = len(x), x.device
    amplitude = draw(n, 0.7, 1.1, 1.0, device)[:, None]
    speed = 1 / (1 + draw(n, -0.2, 0.2, 0.0, device))
    rate, shift = 1 + draw(n, -0.2, 0.2, 0.0, device), draw(n, -8, 9, 0.0, device).floor()
    x = change_speed(x * amplitude, speed)
    return stretch_and_shift(squared_magnitude(stft(x)).sqrt_(), rate, shift)


def change_speed(x, speed):
    """Play clip i of x (N, n) speed[i] times as fast, its pitch with it.

    By linear interpolation, with zeros past the end.
    """
    at = torch.arange(x.shape[1], device=x.device) * speed[:, None]  # (N, n)
    low = at.long().clamp(max=x.shape[1])
    x = F.pad(x, [0, 2])
    return torch.lerp(x.gather(1, low), x.gather(1, low + 1), at - low)


def stft(x):
    """The short-time Fourier transform of clips (N, 16000), as librosa's: (N, 32, 1025) complex.

    A periodic Hann window of 2,048 samples every 512, the first around sample 0; beyond its ends
    the clip is reflected, as by librosa 0.8.0, which the recipe pins.
    """
    window = torch.hann_window(N_FFT, device=x.device)
    return torch.stft(x, N_FFT, HOP, window=window, pad_mode="reflect", return_complex=True).mT


def squared_magnitude(s):
    """|s|^2 of complex s."""
    return s.real.square().addcmul_(s.imag, s.imag)


def stretch_and_shift(magnitude, rate, shift):
    """Stretch clip i of magnitude (N, 32, bins) in time, then shift it.

    Its frame t is that at (t + shift[i]) rate[i]: interpolated between two frames, zero beyond the
    ends. A clip made shorter is cut to its new length before it is shifted, so that a frame t
    beyond that is zero, too. That is one product from the left.
    """
    t = torch.arange(FRAMES, device=magnitude.device)
    at = (t + shift[:, None]) * rate[:, None]  # (N, 32)
    inside = (at >= 0) & (t * rate[:, None] < FRAMES)  # (N, 32)
    weights = (1 - (at[:, :, None] - t).abs()).clamp(min=0) * inside[:, :, None]  # (N, 32, 32)
    return weights @ magnitude


def log_mel(power):
    """The log-mel spectrograms (N, 1, 32, 32) of power (N, 32, 1025): dB, from -80 to 0.

    Relative to the clip's maximum, as librosa's melspectrogram and power_to_db(ref=np.max), with
    its defaults: Slaney's mel scale and normalisation.
    """
    bands = power @ mel_filters(power.device)  # (N, 32 frames, 32 bands)
    level = 10 * bands.clamp(min=1e-10).log10()
    return (level - level.amax(dim=(1, 2), keepdim=True)).clamp(min=-80).mT[:, None]


@cache
def mel_filters(device):
    """The mel filters (1025, 32) of log_mel, from 0 to 8,000 Hz."""
    bins, top = N_FFT // 2 + 1, RATE / 2
    filters = torchaudio.functional.melscale_fbanks(bins, 0.0, top, BANDS, RATE, "slaney", "slaney")
    return filters.to(device)
