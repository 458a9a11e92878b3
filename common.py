# SPDX-License-Identifier: MIT
"""What the i-Mix scripts share: data sets as tensors on the training device, linear evaluation.

    data = load_table("covtype", "data", device)     # or load_images, load_speech: a Dataset
    loader = TwoViews(data.x_train, data.view, 512)  # yields (x, x_tilde), shuffled on the device
    result = linear_eval(encoder, data)              # {"test_accuracy": ..., ...}
"""

import contextlib
import copy
import glob
import hashlib
import io
import math
import os
import sys
import tempfile
import time
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
from PIL import Image
from sklearn.datasets import fetch_covtype, load_digits
from sklearn.model_selection import train_test_split
from torch import nn


class DataError(ValueError):
    """Data that can't be used; the message is one line that says what to do."""


@dataclass
class Dataset:
    """A data set, whole, on the training device.

    x_train, x_test: raw examples: rows (n, columns) float32, images (n, C, H, W) uint8, or clips
    (n, samples) int16. y_train, y_test: (n,) int64 class indices. view: raw batch -> one random
    float32 view of it. plain: raw batch -> the float32 input. eval_view: raw batch -> the view of
    the training examples in the linear evaluation, where that is not plain. groups: tables only,
    the number of columns in each column group, in column order.
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

    def digest(self):
        """A short SHA-256 of the training examples, to tell whether a data set has changed."""
        return hashlib.sha256(self.x_train.cpu().contiguous().numpy()).hexdigest()[:16]


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
    """Split x and class indices y, stratified and the same at every call, into training and test.

    Returns x_train, y_train, x_test, y_test.
    """
    parts = train_test_split(x, y, test_size=test_share, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = parts
    return x_train, y_train, x_test, y_test


def subset(x, y, size):
    """A stratified subset of size training examples, the same at every call; None: all of them."""
    if size in (None, len(y)):
        return x, y
    try:
        return split(x, y, len(y) - size)[:2]
    except ValueError:
        classes = len(np.unique(y))
        raise DataError(f"--train-size {size} of the {len(y):,} training examples: give {classes} "
                        f"to {len(y) - classes:,}, with two examples or more of each class, or "
                        "leave it out") from None


def progress(text):
    """Show text on the terminal's last line; silent where the output is no terminal."""
    if sys.stdout.isatty():
        print(f"{text:<70}", end="\r", flush=True)


def domain(dataset, known):
    """Which of the known domains, of "table", "image" and "speech", a --dataset is of.

    digits are a table where tables are known, else images.
    """
    is_file = dataset.endswith((".csv", ".csv.gz")) or os.path.isfile(dataset)
    if dataset == "covtype" or is_file or (dataset == "digits" and "table" in known):
        found = "table"
    elif dataset == "speech_commands" or any(glob.iglob(f"*/{WAV}", root_dir=dataset)):
        found = "speech"
    else:
        found = "image"
    if found not in known:
        raise DataError(f"--dataset {dataset} is {found} data, and this script takes "
                        f"{' and '.join(known)} data: take one of the other scripts")
    return found


def load(domain, args, device):
    """The Dataset, of that domain, that a script's flags name."""
    source = args.dataset, args.data_dir, device
    if domain == "table":
        return load_table(*source, mask=args.mask, standardize=args.standardize,
                          label_column=args.label_column, test_share=args.test_share)
    if domain == "speech":
        return load_speech(*source, version=args.speech_version, train_size=args.train_size)
    return load_images(*source, image_size=args.image_size, train_size=args.train_size)


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
    x, y = data.x_train, data.y_train
    if labels is not None:
        try:
            kept = split(np.arange(len(y)), y.cpu().numpy(), 1 - labels)[0]
        except ValueError as error:
            raise DataError(f"--labels {labels:g}: {error}: give another share") from None
        x, y = x[kept], y[kept]
    if len(x) < batch_size:
        batch_size, lr = len(x), lr * len(x) / batch_size
    modes = [module.training for module in encoder.modules()]
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
        batches = list(zip(data.x_test.split(512), data.y_test.split(512)))
        for i, (x_test, y_test) in enumerate(batches):
            test_correct += (classifier(model(data.plain(x_test))).argmax(1) == y_test).sum()
            progress(f"linear evaluation: test examples {i / len(batches):.0%}")
    for module, mode in zip(encoder.modules(), modes):
        module.training = mode
    trained = "frozen features" if finetune_lr is None else f"an encoder trained at {rates[1]:g}"
    protocol = (f"linear classifier on {trained}: SGD, momentum 0.9, lr {lr:g}, batch "
                f"{batch_size}, {epochs} epochs, x 0.2 after 80, 90 and 95 %, {len(x)} labels")
    return {"test_accuracy": int(test_correct) / len(data.y_test),
            "train_accuracy": int(train_correct) / len(y),
            "protocol": protocol, "seconds": round(time.monotonic() - start, 1)}


@torch.no_grad()
def encode(encoder, view, x):
    """The features (n, feature size) of these views of raw examples x, the encoder in eval mode."""
    encoder.eval()
    return torch.cat([encoder(view(batch)) for batch in x.split(512)])


# ---------------------------------------------------------------------------- tables
COVTYPE_TRAIN, COVTYPE_TEST = 15_120, 565_892  # rows


def load_table(dataset, data_dir, device, *, mask=0.2, standardize="train", label_column=None,
               test_share=0.2):
    """Load 'covtype', 'digits' or the CSV file at the path `dataset` onto `device`, as a Dataset.

    mask: the probability that a view zeroes a continuous value (after standardising, zero is its
    mean). standardize: whose mean and standard deviation count, the 'train' rows' or 'all' rows'.
    label_column, test_share: how to read a CSV file. Raises DataError on data that is missing or
    can't be used.
    """
    if dataset == "covtype":
        table = read_covtype(Path(data_dir))
    elif dataset == "digits":
        x, y = load_digits(return_X_y=True)
        table = (*split(x, y, 0.2), [64], 64)
    else:
        table = read_csv(Path(dataset), label_column, test_share)
    x_train, y_train, x_test, y_test, groups, continuous = table

    rows = x_train if standardize == "train" else np.concatenate([x_train, x_test])
    mean, std = rows[:, :continuous].mean(axis=0), rows[:, :continuous].std(axis=0)
    std[std == 0] = 1  # constant in these rows, as the digits' corner pixels are
    for x in (x_train, x_test):
        x[:, :continuous] = (x[:, :continuous] - mean) / std

    def view(x):
        keep = torch.rand(len(x), continuous, device=x.device) >= mask
        return torch.cat([x[:, :continuous] * keep, x[:, continuous:]], dim=1)

    x_train, x_test = (torch.tensor(x, dtype=torch.float32, device=device)
                       for x in (x_train, x_test))
    num_classes = int(max(y_train.max(), y_test.max())) + 1
    y_train, y_test = (torch.tensor(y, dtype=torch.int64, device=device) for y in (y_train, y_test))
    return Dataset(x_train, y_train, x_test, y_test, num_classes, view, lambda x: x, groups=groups)


def read_covtype(data_dir):
    """UCI Covertype in its original order: the first 15,120 rows to train on, the rest to test.

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
            first = pd.read_csv(path, header=None, nrows=1, dtype=str).iat[0, 0]
            header = None if first[0].isdigit() else 0
            rows = pd.read_csv(path, header=header, dtype=np.float64).to_numpy(copy=True)
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
    x, y = rows[:, :54], rows[:, 54].astype(np.int64) - 1
    n = COVTYPE_TRAIN
    return x[:n], y[:n], x[n:], y[n:], [10, 4, 40], 10


def one_line(error):
    """What an exception says, without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def read_csv(path, label_column, test_share):
    """A table of one's own, CSV or CSV.gz with a header line, split with a fixed seed.

    Numeric columns are standardised, those with two values kept as they are, text columns made
    one-hot; a column that is constant or only counts the rows is left out, with a note. Rows are
    counted from 1, below the header.
    """
    def refuse(what):
        raise DataError(f"{path}: {what}")

    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""], low_memory=False)
    except Exception as error:  # not there, a folder, not text, cut short, ragged
        raise DataError(f"{path} can't be read as CSV ({one_line(error)}): --dataset takes "
                        "covtype, digits, or a CSV file with a header line") from None
    if label_column not in frame:
        hint = f"there is no column '{label_column}'"
        if label_column is None:
            hint = "say which column holds the labels with --label-column"
        refuse(f"{hint}; its columns are: {', '.join(map(str, frame.columns))}")
    if not isinstance(frame.index, pd.RangeIndex):
        refuse("the rows have more fields than the header line: give each column a name")
    if frame.empty:
        refuse("no rows below the header line")
    for column in frame:
        if (missing := frame[column].isna()).any():
            refuse(f"column '{column}', row {missing.argmax() + 1}: the value is missing: fill it "
                   "in, or remove the row or the column")

    labels = frame.pop(label_column)
    classes, y, counts = np.unique(labels.to_numpy(), return_inverse=True, return_counts=True)
    if len(classes) < 2:
        refuse(f"column '{label_column}' holds one class, '{classes[0]}': give rows of two or more")
    if counts.min() < 2:
        once = classes[counts.argmin()]
        refuse(f"column '{label_column}', row {(labels == once).argmax() + 1}: the label '{once}' "
               "is seen only once, and a class needs a row to train on and one to test: remove the "
               "row or merge the label into another")

    numbers, binaries, one_hots, left_out = [], [], [], []
    for column, values in frame.items():
        different = values.nunique()
        if different == 1:
            left_out.append(f"'{column}' (constant)")
        elif pd.api.types.is_numeric_dtype(values):
            bad = ~(values.astype(np.float64).abs() <= np.finfo(np.float32).max)
            if bad.any():
                row = bad.argmax()
                refuse(f"column '{column}', row {row + 1}: {values[row]} is not a finite number of "
                       "single precision: correct it, or remove the row or the column")
            if different == len(values) > 2 and pd.api.types.is_integer_dtype(values) and \
                    values.max() - values.min() == len(values) - 1:
                left_out.append(f"'{column}' (counts the rows)")
            else:
                (binaries if different == 2 else numbers).append(values.to_numpy(np.float64))
        else:
            not_numbers = pd.to_numeric(values, errors="coerce").isna()
            if 0 < not_numbers.mean() < 0.5:
                row = not_numbers.argmax()
                refuse(f"column '{column}', row {row + 1}: '{values[row]}' is not a number, and "
                       "most of the column is: correct it, or remove the row or the column")
            if different > 256 or different == len(values):
                refuse(f"column '{column}', row 1 and on: {different:,} different texts are too "
                       "many for one-hot: remove the column, or group its values")
            one_hots.append(pd.get_dummies(values).to_numpy(np.float64))
    if left_out:
        print(f"{path}: left out {', '.join(left_out)}", flush=True)
    if not numbers + binaries + one_hots:
        refuse(f"no column is left beside the labels '{label_column}'")
    x = np.column_stack(numbers + binaries + one_hots)
    sizes = [len(numbers), len(binaries), *(one_hot.shape[1] for one_hot in one_hots)]
    try:
        return *split(x, y, test_share), [size for size in sizes if size], len(numbers)
    except ValueError as error:  # too few rows for the classes
        refuse(f"{error}: add rows or change --test-share")


# ---------------------------------------------------------------------------- images
CIFAR = {  # folder of the binary distribution, training and test files, label bytes, mean and std
    "cifar10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)],
                "test_batch.bin", 1, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ("cifar-100-binary", ["train.bin"],
                 "test.bin", 2, (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
}


def load_images(dataset, data_dir, device, *, image_size=32, train_size=None):
    """Load 'cifar10', 'cifar100', 'digits' (8 x 8) or a folder of images onto `device`.

    image_size: to which a folder's images are resized, in pixels. train_size: keep a stratified
    subset of so many training images, the same at every call. Raises DataError on data that is
    missing or can't be used.
    """
    if dataset in CIFAR:
        x_train, y_train, x_test, y_test = read_cifar(dataset, Path(data_dir))
    elif dataset == "digits":
        x, y = load_digits(return_X_y=True)
        x = (x * 255 / 16).round().astype(np.uint8).reshape(-1, 1, 8, 8)
        x_train, y_train, x_test, y_test = split(x, y, 0.2)
    else:
        x_train, y_train, x_test, y_test = read_image_folder(Path(dataset), image_size)
    x_train, y_train = subset(x_train, y_train, train_size)
    if dataset in CIFAR:
        mean, std = map(torch.tensor, CIFAR[dataset][4:])
    else:  # in float64, which not every device has
        channels = torch.as_tensor(x_train).unbind(1)
        mean = torch.stack([channel.double().mean() / 255 for channel in channels]).float()
        std = torch.stack([channel.double().std() / 255 for channel in channels]).float()
        std[std == 0] = 1  # a channel without content
    mean, std = mean[:, None, None].to(device), std[:, None, None].to(device)  # (C, 1, 1)
    num_classes = int(max(y_train.max(), y_test.max())) + 1
    tensors = [torch.as_tensor(a, device=device) for a in (x_train, y_train, x_test, y_test)]
    return Dataset(*tensors, num_classes, lambda x: (image_view(x / 255) - mean) / std,
                   lambda x: (x / 255 - mean) / std, lambda x: (padded_crop(x / 255) - mean) / std)


def read_cifar(name, data_dir):
    """CIFAR as uint8 images (n, 3, 32, 32) and labels: x_train, y_train, x_test, y_test.

    Read from the binary distribution in data_dir, else downloaded there by torchvision.
    """
    folder, train_files, test_file, label_bytes, *_ = CIFAR[name]
    remedy = f"put {folder}/ there, or take another --dataset (digits, or a folder of images)"
    if not os.path.exists(data_dir / folder):
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
        try:
            parts = [kind[name](data_dir, train=train, download=True) for train in (True, False)]
        except Exception as error:  # no network, or files that fail torchvision's digest check
            raise DataError(f"{name} is not in {data_dir} and could not be downloaded "
                            f"({one_line(error)}): {remedy}") from None
        train, test = ((part.data.transpose(0, 3, 1, 2).copy(), np.array(part.targets))
                       for part in parts)
        return *train, *test

    def read(names):
        records = []
        for path in (data_dir / folder / name for name in names):
            try:
                raw = np.fromfile(path, dtype=np.uint8)
            except OSError as error:
                raise DataError(f"{path} can't be read ({error.strerror}): {remedy}") from None
            if len(raw) == 0 or len(raw) % (label_bytes + 3072):
                raise DataError(f"{path} is cut short: {len(raw):,} bytes, {label_bytes + 3072:,} "
                                f"an image: {remedy}")
            records.append(raw.reshape(-1, label_bytes + 3072))
        records = np.concatenate(records)
        images, labels = records[:, label_bytes:], records[:, label_bytes - 1]
        return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)

    return *read(train_files), *read([test_file])


def read_image_folder(path, size):
    """A folder's images as uint8 (n, C, size, size) and labels: x_train, y_train, x_test, y_test.

    Of train/CLASS/* and test/CLASS/*, or of CLASS/*, to be split. An image's shorter side is
    resized to size, the longer one cropped to its middle. C is 1 where every image is gray.
    """
    def read(folder):
        try:
            files = torchvision.datasets.ImageFolder(folder)
        except OSError as error:  # not there, or a class without images
            raise DataError(f"{folder} is no folder of images, one folder a class ({error}): "
                            "--dataset takes cifar10, cifar100, digits, or the path of a folder "
                            "CLASS/* of images or WORD/*.wav") from None
        if len(files.classes) < 2:
            raise DataError(f"{folder} holds one class, '{files.classes[0]}': give images of two "
                            "or more")
        images = np.empty((len(files), 3, size, size), np.uint8)
        gray = True
        for i, (file, _) in enumerate(files.samples):
            try:
                with Image.open(file) as image:
                    if image.mode[0] in "IF":
                        raise ValueError(f"mode {image.mode}: more than 8 bits a channel")
                    gray &= image.mode in ("L", "1")
                    image = image.convert("RGB")
            except Exception as error:  # PIL raises many types on a damaged file
                raise DataError(f"{file} can't be read as an image ({error}): mend or remove "
                                "it") from None
            if min(image.size) < size:
                raise DataError(f"{file} is {image.width} x {image.height} pixels, smaller than "
                                f"--image-size {size}: remove it, or lower --image-size")
            image = TF.center_crop(TF.resize(image, size), size)
            images[i] = np.asarray(image).transpose(2, 0, 1)
            if i % 1000 == 0:
                progress(f"{folder}: {i:,} of {len(files):,} images read")
        return (images[:, :1] if gray else images), np.array(files.targets), files.classes

    if not os.path.isdir(path / "train"):
        x, y, _ = read(path)
        try:
            return split(x, y, 0.2)
        except ValueError as error:
            raise DataError(f"{path} can't be split into training and test images: "
                            f"{error}") from None
    x_train, y_train, classes = read(path / "train")
    x_test, y_test, test_classes = read(path / "test")
    if classes != test_classes or x_train.shape[1] != x_test.shape[1]:
        raise DataError(f"{path / 'train'} and {path / 'test'} differ in their classes, or only "
                        "one is gray: make them alike")
    return x_train, y_train, x_test, y_test


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
    train, test = list_words(folder)
    files, noise_files = sorted(train + test), sorted(glob.glob(f"{NOISE}/{WAV}", root_dir=folder))
    words, trained = ({word_of(file) for file in part} for part in (files, train))
    if not test or len(trained) < 2:
        raise DataError(f"{folder}: words: {len(words)}, clips to train on: {len(train)}, to test: "
                        f"{len(test)}: give clips of two words or more to train on, and some to "
                        "test")
    if words.isdisjoint(COMMANDS):
        classes, about = sorted(words), "none is one of the paper's ten, so each is a class"
        if words != trained:
            raise DataError(f"{folder}: no clip of '{min(words - trained)}' is left to train on: "
                            "shorten the lists")
    else:
        classes = [*COMMANDS, "unknown", "silence"]
        about = "the classes are the paper's ten, 'unknown' and 'silence'"
        train = train + ["silence/"] * (len(train) // 10)
    print(f"{folder}: {len(words)} words, {about}; recordings of background noise: "
          f"{len(noise_files)}", flush=True)
    y_train, y_test = ([classes.index(word if word in classes else "unknown")
                        for word in map(word_of, part)] for part in (train, test))
    train, y_train = subset(np.array(train), np.array(y_train), train_size)
    noise = [read_wav(folder / file) for file in noise_files] or [np.zeros(RATE, np.int16)]
    noise = np.concatenate(noise)
    noise.resize(math.ceil(len(noise) / RATE), RATE)  # clips of a second, the last one filled up
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    n = len(train) + len(test)
    size = 2 * n * RATE + 4 * noise.size  # bytes: clips in int16, noise in float32
    if size > memory:
        raise DataError(f"{folder}: {n:,} clips and {len(noise):,} s of noise take "
                        f"{size / 1e9:.1f} GB, and {device} has {memory / 1e9:.1f}: keep fewer "
                        "with --train-size")

    clips, row = cached_clips(folder, files), {file: i for i, file in enumerate(files)}
    x_train, x_test = (clips[[row.get(file, 0) for file in part]] for part in (train, test))
    x_train[train == "silence/"] = 0  # which is no file, so that another clip was taken
    tensors = [torch.as_tensor(a, device=device) for a in (x_train, y_train, x_test, y_test)]
    noise = torch.as_tensor(noise / 32768, dtype=torch.float32, device=device)
    return Dataset(*tensors, len(classes), lambda x: speech_view(x / 32768, noise),
                   lambda x: log_mel(squared_magnitude(stft(x / 32768))))


def word_of(file):
    """The word of a recording WORD/NAME.wav."""
    return file.split("/")[0]


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


def keep_existing(names, path):
    """Of the recordings that the list at path names, those that are there; others are noted."""
    there = [name for name in names if os.path.exists(path.parent / name)]
    if missing := set(names).difference(there):
        print(f"{path}: {len(missing):,} of {len(names):,} are not there, as {min(missing)}",
              flush=True)
    return there


def list_words(folder):
    """A folder's training and test files, WORD/NAME.wav, by lists as those of Speech Commands.

    Where testing_list.txt names no clip a stratified fifth is the test. What a list names and is
    not there is left out, with a note.
    """
    files = sorted(glob.glob(f"*/{WAV}", root_dir=folder))
    files = [file for file in files if word_of(file) != NOISE]

    def listed(name):
        path = folder / name
        lines = []
        if os.path.exists(path):
            lines = path.read_text("utf-8-sig", "replace").splitlines()
        return set(keep_existing({os.path.normpath(line.strip()) for line in lines if line.strip()},
                                 path))

    try:
        validation, testing = map(listed, LISTS)
        files = [file for file in files if file not in validation]
        if not testing:
            testing = set(split(files, list(map(word_of, files)), 0.2)[2])
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} can't be split into clips to train on and to test ({error}): "
                        "add recordings, or a testing_list.txt") from None
    train = [file for file in files if file not in testing]
    return train, [file for file in files if file in testing]


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
    made_from = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats)]
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    path = folder / f"imix_clips-{digest}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # it is not there, or was cut short
        return np.load(path, mmap_mode="r")
    clips = np.zeros((len(files), RATE), np.int16)
    for i, file in enumerate(files):
        clip = read_wav(folder / file)[:RATE]
        clips[i, : len(clip)] = clip
        if i % 1000 == 0:
            progress(f"{folder}: {i:,} of {len(files):,} clips read")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as part:  # so that it comes whole
            np.save(Path(part, path.name), clips)
            for old in set(folder.glob("imix_clips-*.npy")) - {path}:
                old.unlink(missing_ok=True)
            os.replace(Path(part, path.name), path)
    except OSError as error:
        raise DataError(f"{path} can't be written ({error.strerror}): the clips are kept there in "
                        f"one file of {clips.nbytes / 1e6:,.1f} MB: make room, or the folder "
                        "writable") from None
    return np.load(path, mmap_mode="r")


def read_wav(path):
    """The samples (n,) int16 of a PCM WAV file of 8 to 32 bit, at 16 kHz, its channels' mean."""
    try:
        raw = bytearray(path.read_bytes())
        tag = raw.find(b"fmt ") + 8
        if raw[tag : tag + 2] == b"\xfe\xff":  # "extensible", which Python 3.11 refuses
            raw[tag : tag + 2] = raw[tag + 24 : tag + 26]  # the format comes 24 bytes later
        with wave.open(io.BytesIO(raw)) as file:
            channels, width, rate, n, *_ = file.getparams()
            data = np.frombuffer(file.readframes(n), np.uint8)
        if width > 4 or not 1_000 <= rate <= 1_000_000:
            raise ValueError(f"{8 * width} bit, {rate:,} Hz")
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
