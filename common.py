# SPDX-License-Identifier: MIT
"""What the i-Mix scripts share: data sets as tensors on the training device, and the linear evaluation.

    data = load("covtype", "data", device)              # a Dataset: tensors, labels, views
    loader = TwoViews(data.x_train, data.view, 512)     # yields (x, x_tilde), shuffled on the device
    result = linear_eval(encoder, data)                 # {"test_accuracy": ..., "train_accuracy": ..., ...}
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.datasets import fetch_covtype, load_digits
from sklearn.model_selection import train_test_split
from torch import nn


COVTYPE_TRAIN, COVTYPE_TEST = 15_120, 565_892  # rows


class DataError(Exception):
    """Data that can't be used; the message is one line that says what to do."""


@dataclass
class Dataset:
    """A data set, whole, on the training device.

    x_train, x_test: (n, ...) raw examples: float32 rows. y_train, y_test: (n,) int64 class indices.
    view: raw batch -> one random float32 view of it. plain: raw batch -> the float32 input without augmentation.
    groups: tables only, the number of columns in each column group, in column order.
    """

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    view: Callable[[torch.Tensor], torch.Tensor]
    plain: Callable[[torch.Tensor], torch.Tensor]
    groups: list[int] | None = None


class TwoViews:
    """Iterates once over x in random order, yielding (view(batch), view(batch)): two independent views of each batch.

    The order is drawn on x's device, and a last incomplete batch is dropped (the published recipe).
    """

    def __init__(self, x, view, batch_size):
        self.x, self.view, self.batch_size = x, view, batch_size

    def __len__(self):
        return len(self.x) // self.batch_size

    def __iter__(self):
        order = torch.randperm(len(self.x), device=self.x.device)
        for index in order.split(self.batch_size)[: len(self)]:
            batch = self.x[index]
            yield self.view(batch), self.view(batch)


def load(dataset, data_dir, device, *, mask=0.2, standardize="train", label_column=None, test_share=0.2):
    """Load 'covtype', 'digits' or the CSV file at the path `dataset` onto `device`, as a Dataset.

    mask: the probability that a view zeroes a continuous value (after standardising, zero is its mean).
    standardize: whose mean and standard deviation count, the 'train' rows' or 'all' rows'.
    label_column, test_share: how to read a CSV file. Raises DataError when the data is missing or can't be used.
    """
    if dataset == "covtype":
        table = read_covtype(Path(data_dir))
    elif dataset == "digits":
        x, y = load_digits(return_X_y=True)
        table = (*split(x, y, 0.2), [x.shape[1]], x.shape[1])
    else:
        table = read_csv(Path(dataset), label_column, test_share)
    x_train, y_train, x_test, y_test, groups, continuous = table

    rows = (x_train if standardize == "train" else np.concatenate([x_train, x_test]))[:, :continuous]
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    std[std == 0] = 1  # constant in these rows, as the digits' corner pixels are
    for x in (x_train, x_test):
        x[:, :continuous] = (x[:, :continuous] - mean) / std

    def view(x):
        keep = torch.rand(len(x), continuous, device=x.device) >= mask
        return torch.cat([x[:, :continuous] * keep, x[:, continuous:]], dim=1)

    x_train, x_test = (torch.tensor(x, dtype=torch.float32, device=device) for x in (x_train, x_test))
    num_classes = int(max(y_train.max(), y_test.max())) + 1
    y_train, y_test = (torch.tensor(y, dtype=torch.int64, device=device) for y in (y_train, y_test))
    return Dataset(x_train, y_train, x_test, y_test, num_classes, view, lambda x: x, groups)


# ---------------------------------------------------------------------------------------------------------- tables


def split(x, y, test_share):
    """Split rows x and class indices y into x_train, y_train, x_test, y_test: stratified, the same at every call."""
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=test_share, stratify=y, random_state=0)
    return x_train, y_train, x_test, y_test


def read_covtype(data_dir):
    """UCI Covertype in its original order: the first 15,120 rows (2,160 of each class) to train on, the rest to test.

    Read from data_dir in any form that UCI ships or people keep, else downloaded there by scikit-learn, which checks
    the digest. Copyright Jock A. Blackard and Colorado State University.
    """
    names = ("covtype.data.gz", "covtype.data", "covtype.csv", "covtype.csv.gz")
    path = next((data_dir / name for name in names if (data_dir / name).exists()), None)
    try:
        if path is None:
            x, y = fetch_covtype(data_home=data_dir, return_X_y=True)
            rows = np.column_stack([x, y])
        else:
            first = pd.read_csv(path, header=None, nrows=1, dtype=str).iat[0, 0]
            rows = pd.read_csv(path, header=None if first.isdigit() else 0, dtype=np.float64).to_numpy(copy=True)
    except Exception as error:  # no network, a file cut short, text in it: whatever the reason, the remedy is the same
        what = f"{path} can't be read" if path else f"CovType is not in {data_dir} and could not be downloaded"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{what} ({reason}): run `make covtype`, or put UCI's covtype.data.gz there") from None
    counts = [(rows[:COVTYPE_TRAIN, -1] == label).sum() for label in range(1, 8)]
    if rows.shape != (COVTYPE_TRAIN + COVTYPE_TEST, 55) or counts != [COVTYPE_TRAIN // 7] * 7:
        raise DataError(f"{path or data_dir} is not UCI's CovType in its original order, which has 581,012 rows of 55 "
                        f"columns, each class alike often in the first 15,120, but {rows.shape[0]:,} rows of "
                        f"{rows.shape[1]}: run `make covtype`, or put UCI's covtype.data.gz there")
    x, y = rows[:, :54], rows[:, 54].astype(np.int64) - 1
    return x[:COVTYPE_TRAIN], y[:COVTYPE_TRAIN], x[COVTYPE_TRAIN:], y[COVTYPE_TRAIN:], [10, 4, 40], 10


def read_csv(path, label_column, test_share):
    """A table of one's own, CSV or CSV.gz with a header line, split with a fixed seed.

    Numeric columns are standardised, those with two values kept as they are, text columns made one-hot; a column that
    is constant or only counts the rows is left out, with a note. Rows are counted from 1, below the header.
    """
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""], low_memory=False)
    except Exception as error:  # not there, a folder, not text, cut short, ragged: pandas says which
        raise DataError(f"{path} can't be read as CSV ({' '.join(str(error).split()) or type(error).__name__}): "
                        "--dataset takes covtype, digits, or the path of a CSV file with a header line") from None
    if label_column not in frame:
        hint = "say which column holds the labels with --label-column" if label_column is None else \
            f"there is no column '{label_column}'"
        raise DataError(f"{path}: {hint}; its columns are: {', '.join(map(str, frame.columns))}")
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"{path}: the rows have more fields than the header line: give each column a name")
    if frame.empty:
        raise DataError(f"{path}: no rows below the header line")
    for column in frame:
        if (missing := frame[column].isna()).any():
            raise DataError(f"{path}: column '{column}', row {missing.argmax() + 1}: the value is missing: fill it in, "
                            "or remove the row or the column")

    labels = frame.pop(label_column)
    classes, y, counts = np.unique(labels.to_numpy(), return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"{path}: column '{label_column}' holds one class, '{classes[0]}': give rows of two or more")
    if counts.min() < 2:
        once = classes[counts.argmin()]
        raise DataError(f"{path}: column '{label_column}', row {(labels == once).argmax() + 1}: the label '{once}' is "
                        "seen only once, and a class needs a row to train on and one to test: remove the row or merge "
                        "the label into another")

    numbers, binaries, one_hots, left_out = [], [], [], []
    for column, values in frame.items():
        different = values.nunique()
        if different == 1:
            left_out.append(f"'{column}' (constant)")
        elif pd.api.types.is_numeric_dtype(values):
            bad = ~(values.astype(np.float64).abs() <= np.finfo(np.float32).max)
            if bad.any():
                raise DataError(f"{path}: column '{column}', row {bad.argmax() + 1}: {values[bad.argmax()]} is not a "
                                "finite number of single precision: correct it, or remove the row or the column")
            if different == len(values) > 2 and pd.api.types.is_integer_dtype(values) and \
                    values.max() - values.min() == len(values) - 1:
                left_out.append(f"'{column}' (counts the rows)")
            else:
                (binaries if different == 2 else numbers).append(values.to_numpy(np.float64))
        else:
            not_numbers = pd.to_numeric(values, errors="coerce").isna()
            if not_numbers.mean() < 0.5:
                raise DataError(f"{path}: column '{column}', row {not_numbers.argmax() + 1}: "
                                f"'{values[not_numbers.argmax()]}' is not a number, and most of the column is: correct "
                                "it, or remove the row or the column")
            if different > 256 or different == len(values):
                raise DataError(f"{path}: column '{column}', row 1 and on: {different:,} different texts are too many "
                                "for one-hot: remove the column, or group its values")
            one_hots.append(pd.get_dummies(values).to_numpy(np.float64))
    if left_out:
        print(f"{path}: left out {', '.join(left_out)}", flush=True)
    if not numbers + binaries + one_hots:
        raise DataError(f"{path}: no column is left beside the labels '{label_column}'")
    x = np.column_stack(numbers + binaries + one_hots)
    groups = [size for size in (len(numbers), len(binaries), *(h.shape[1] for h in one_hots)) if size]
    try:
        return *split(x, y, test_share), groups, len(numbers)
    except ValueError as error:  # too few rows for the classes
        raise DataError(f"{path}: {error}: add rows or change --test-share") from None


# ----------------------------------------------------------------------------------------------- linear evaluation


def linear_eval(encoder, data, epochs=100, batch_size=256, lr=10.0, seed=0):
    """Test accuracy of a linear classifier on the frozen encoder's features, by the paper's protocol.

    SGD with momentum 0.9, no weight decay, lr per 256 examples, x 0.2 after 80, 90 and 95 % of the epochs; weights
    from N(0, 0.01^2). BatchNorm is in eval mode, everything in float32. Afterwards the encoder, its modes and the
    random number generators are as before. Returns {"test_accuracy", "train_accuracy" (both in [0, 1]), "protocol",
    "seconds"}.
    """
    start, device = time.monotonic(), data.x_train.device
    batch_size = min(batch_size, len(data.x_train))
    modes = [module.training for module in encoder.modules()]
    encoder.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.no_grad():
            features = torch.cat([encoder(data.plain(x)) for x in data.x_train.split(1024)])  # (n, feature size)
        classifier = nn.Linear(features.shape[1], data.num_classes, device=device)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        optimizer = torch.optim.SGD(classifier.parameters(), momentum=0.9, fused=True)
        for epoch in range(epochs):
            drops = sum(epoch >= share * epochs for share in (0.8, 0.9, 0.95))
            optimizer.param_groups[0]["lr"] = lr * batch_size / 256 * 0.2**drops
            order = torch.randperm(len(features), device=device)
            for index in order.split(batch_size)[: len(features) // batch_size]:
                optimizer.zero_grad()
                F.cross_entropy(classifier(features[index]), data.y_train[index]).backward()
                optimizer.step()
            progress(f"linear evaluation: epoch {epoch + 1}/{epochs}")
    with torch.no_grad():
        train_correct = (classifier(features).argmax(1) == data.y_train).sum()
        test_correct = torch.zeros_like(train_correct)
        batches = list(zip(data.x_test.split(1024), data.y_test.split(1024)))
        for i, (x, y) in enumerate(batches):
            test_correct += (classifier(encoder(data.plain(x))).argmax(1) == y).sum()
            progress(f"linear evaluation: test rows {i / len(batches):.0%}")
    progress("")
    for module, mode in zip(encoder.modules(), modes):
        module.training = mode
    return {
        "test_accuracy": int(test_correct) / len(data.y_test),
        "train_accuracy": int(train_correct) / len(data.y_train),
        "protocol": f"linear classifier on frozen features: SGD, momentum 0.9, lr {lr:g} x batch/256, batch "
                    f"{batch_size}, {epochs} epochs, x 0.2 after 80, 90 and 95 %",
        "seconds": round(time.monotonic() - start, 1),
    }


def progress(text):
    """Replace the terminal's last line by text; silent where the output is no terminal."""
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="", flush=True)
