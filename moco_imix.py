# SPDX-License-Identifier: MIT
"""MoCo with i-Mix on images, speech and tables: Section 3.2 of Lee et al., "i-Mix: A
Domain-Agnostic Strategy for Contrastive Representation Learning", ICLR 2021,
https://arxiv.org/abs/2010.08887

    python moco_imix.py                                         # CIFAR-10, MoCo + i-Mix
    python moco_imix.py --alpha 0                               # MoCo's own loss, without i-Mix
    python moco_imix.py --dataset covtype                       # a table, its recipe
    python moco_imix.py --dataset covtype --width 8             # 63.3 %; with --alpha 0: 60.5 %
    python moco_imix.py --dataset speech_commands               # speech, its recipe
    python moco_imix.py --dataset my_images --arch resnet18     # your own: CLASS/* or WORD/*.wav
    python moco_imix.py --dataset my.csv --label-column kind    # your own table
    torchrun --nproc_per_node=4 moco_imix.py                    # four GPUs, the same batch of N

MoCo v2's recipe for ImageNet, on a folder of large images; the second line makes it v1's, but for
the views, which blur, and the linear evaluation, which is that of CIFAR:

    python moco_imix.py --dataset my_images --image-size 224 --alpha 0 --epochs 200 --lr 0.03 \
        --warmup-epochs 0 --queue 65536 --head mlp-no-bn
        --head linear --temperature 0.07 --schedule step

One step, in the paper's symbols:

    x, x_tilde = view(images), view(images)     # two views of N examples
    x, perm, lam = mixup(x, alpha)              # x_i <- lam_i x_i + (1 - lam_i) x_j,  j = perm[i]
    f, f_ema = model(x), ema(x_tilde)           # (N, D) each; f_ema, the keys, without gradient
    loss = lam * l(f, i) + (1 - lam) * l(f, j)  # l(f, n): cross-entropy of f_ema_n among all keys
    theta <- theta - lr * gradient; theta_EMA <- m theta_EMA + (1 - m) theta; queue <- f_ema
"""

import argparse
import copy
import fcntl
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# ---------------------------------------------------------------------------- mixing (Section 2)
def mixup(x, alpha):
    """MixUp: mix each example with a random partner.

    x: (N, ...) float; alpha > 0. Returns x_mix (N, ...); perm (N,) int64, the partners j; lam (N,)
    in [0.5, 1], the share that x_i keeps: x_mix[i] = lam[i] x[i] + (1 - lam[i]) x[perm[i]].
    """
    N = len(x)
    concentration = torch.full((N,), float(alpha), device=x.device)
    beta = torch.distributions.Beta(concentration, concentration, validate_args=False)
    lam = beta.sample()  # lambda_i ~ Beta(alpha, alpha)  (N,)
    lam = torch.maximum(lam, 1 - lam)  # x_i keeps the larger share, as in the published code
    perm = torch.randperm(N, device=x.device)  # j = perm[i]  (N,)
    share = lam.view(N, *[1] * (x.dim() - 1))  # (N, 1, ...)
    return share * x + (1 - share) * x[perm], perm, lam


def cutmix(x, alpha):
    """CutMix: paste a box of a random partner into each image; one box serves the batch.

    x: (N, C, H, W) float; alpha > 0. Returns x_mix, perm, lam as mixup does; lam is the share of
    pixels that x_i really keeps. The box has an even number of pixels a side, as published.
    """
    concentration = torch.full((1,), float(alpha), device=x.device)
    beta = torch.distributions.Beta(concentration, concentration, validate_args=False)
    lam = beta.sample()  # lambda ~ Beta(alpha, alpha)  (1,)
    side = (1 - torch.maximum(lam, 1 - lam)).sqrt()  # the box's, as a share of the image's
    perm = torch.randperm(len(x), device=x.device)  # j = perm[i]  (N,)
    inside = []
    for length in x.shape[2:]:
        half, middle = (side * length).long() // 2, torch.randint(length, (1,), device=x.device)
        offset = torch.arange(length, device=x.device) - middle
        inside.append((-half <= offset) & (offset < half))  # cut off at the border  (H,), (W,)
    box = inside[0][:, None] & inside[1]  # where M is 0  (H, W)
    lam = (1 - box.float().mean()).expand(len(x))
    return torch.where(box, x[perm], x), perm, lam  # M * x_i + (1 - M) * x_j


def inputmix(x, alpha):
    """InputMix: mix each example with two random partners, in place of an augmentation.

    x: (N, ...) float; alpha > 0. Returns x_mix (N, ...). No label is touched, as x_i keeps at least
    a half: 1/2 + d_0/2, beside d_1/2 and d_2/2 of its partners, d ~ Dirichlet(alpha, alpha, alpha).
    """
    N = len(x)
    concentration = torch.full((N, 3), float(alpha), device=x.device)
    d = torch.distributions.Dirichlet(concentration, validate_args=False).sample()  # (N, 3)
    d = (d / 2).view(N, 3, *[1] * (x.dim() - 1)).unbind(1)  # (N, 1, ...) each
    partners = [x[torch.randperm(N, device=x.device)] for _ in range(2)]
    return (0.5 + d[0]) * x + d[1] * partners[0] + d[2] * partners[1]


# ---------------------------------------------------------------------------- loss (Section 3.2)
def moco_loss(f, f_ema, queue, temperature, perm=None, lam=None):
    """l_MoCo of N + K classes; with i-Mix where mixing has given perm and lam, (N,) each.

    f: (N, D), raw embeddings of the (mixed) anchors; f_ema: (N, D), the EMA encoder's of their
    other views, the keys; queue: (K, D), normalised keys of earlier batches. No gradient flows
    into either. Returns the batch mean. With all N keys of the batch beside the queue x_j's key is
    a class of x_i, so that the labels can be mixed.
    """
    with torch.autocast(f.device.type, enabled=False):  # bf16 would round s / tau away
        f = F.normalize(f.float(), dim=1)
        f_ema = F.normalize(f_ema.float(), dim=1)
        keys = torch.cat([f_ema, queue]).detach()  # f~EMA_n, mu_k  (N + K, D)
        logits = f @ keys.T / temperature  # s(f_i, key) / tau  (N, N + K)
        log_p = F.log_softmax(logits, dim=1)  # over the N + K classes
        loss = -log_p.diagonal()  # l(x_i, v_i)  (N,)
        if perm is not None:
            loss_j = -log_p.gather(1, perm[:, None]).squeeze(1)  # l(x_i, v_j)  (N,)
            loss = lam * loss + (1 - lam) * loss_j
        return loss.mean()


def moco_own_loss(f, f_ema, queue, temperature):
    """MoCo's own loss, of 1 + K classes: the baseline of the paper's tables.

    Shapes, gradient and mean as for moco_loss; x_j's key is no class of x_i, so no label is mixed.
    """
    with torch.autocast(f.device.type, enabled=False):  # bf16 would round s / tau away
        f = F.normalize(f.float(), dim=1)
        f_ema = F.normalize(f_ema.detach().float(), dim=1)
        positive = (f * f_ema).sum(1, keepdim=True)  # s(f_i, f~EMA_i)  (N, 1)
        negatives = f @ queue.detach().T  # s(f_i, mu_k)  (N, K)
        logits = torch.cat([positive, negatives], dim=1) / temperature  # (N, 1 + K)
        return -F.log_softmax(logits, dim=1)[:, 0].mean()  # class 0 is one's own key


def enqueue(queue, f_ema):
    """The queue (K, D) after a step: the keys f_ema (N, D) enter, normalised, the oldest leave."""
    keys = F.normalize(f_ema.detach().float(), dim=1)
    return torch.cat([keys, queue])[: len(queue)]


@torch.no_grad()
def update_ema(ema, model, m):
    """theta_EMA <- m theta_EMA + (1 - m) theta, in place.

    As in MoCo, BatchNorm's running statistics are not averaged: each network keeps its own.
    """
    for theta_ema, theta in zip(ema.parameters(), model.parameters()):
        theta_ema.lerp_(theta, 1 - m)


# ---------------------------------------------------------------------------- networks
class MLP5Layer(nn.Module):
    """The encoder for tables of groups of so many columns: (N, sum(groups)) -> (N, 32 width)."""

    def __init__(self, groups, width):
        super().__init__()
        self.groups = list(groups)
        self.embed = nn.ModuleList(nn.Linear(columns, 64) for columns in groups)
        layers, size = [], 64 * len(groups)
        if len(groups) == 1:  # as the published encoder of Higgs
            layers += [nn.BatchNorm1d(64), nn.ReLU(inplace=True)]
        for out in (32 * width, 32 * width, 64 * width, 64 * width):
            layers += [nn.Linear(size, out), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
            size = out
        self.layers = nn.Sequential(*layers, nn.Linear(size, 128 * width))

    def forward(self, x):
        parts = x.split(self.groups, dim=1)
        h = [embed(part) for embed, part in zip(self.embed, parts)]  # (N, 64) each
        h = self.layers(torch.cat(h, dim=1))  # (N, 128 width)
        return h.unflatten(1, (-1, 4)).max(2).values  # maxout of four  (N, 32 width)


def resnet(arch, channels, size):
    """torchvision's ResNet without its last layer: (N, channels, size, size) -> (N, 512 or 2048).

    2048 is ResNet-50's. For images of up to 64 pixels the stem is a 3x3 convolution of stride 1
    without max-pool.
    """
    net = torchvision.models.get_model(arch)
    kernel, stride = (3, 1) if size <= 64 else (7, 2)
    net.conv1 = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if size <= 64:
        net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    return net


def projection_head(size, dim):
    """Linear - BatchNorm - ReLU - Linear - BatchNorm: (N, size) -> (N, dim)."""
    return nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.ReLU(inplace=True),
                         nn.Linear(size, dim), nn.BatchNorm1d(dim))


# ---------------------------------------------------------------------------- recipe
def flag(default, help, low=-math.inf, below=math.inf, choices=None):
    """A field of Args: its default, a line of help, and its bounds, low <= value < below."""
    return field(default=default, metadata=dict(help=help, low=low, below=below, choices=choices))


@dataclass
class Args:
    """The recipe of images, for others see RECIPES; a field is a flag; pretrain() reads to seed."""

    alpha: float = flag(1.0, "lambda ~ Beta(alpha, alpha); 0: without i-Mix", 0, 1e6)
    mix: str = flag("mixup", "how i-Mix mixes; cutmix: not tables", choices=["mixup", "cutmix"])
    ema: float = flag(0.999, "m: theta_EMA <- m theta_EMA + (1 - m) theta", 0, 1)
    queue: int = flag(4096, "K, the keys of earlier batches", 1, 1e8)
    n_plus_k: bool = flag(False, "alpha 0: the loss of N + K classes, not MoCo's own of 1 + K")
    temperature: float = flag(0.2, "tau", 1e-12)
    inputmix: bool = flag(False, "InputMix on both views, for --no-augment")
    epochs: int = flag(1000, "epochs of pre-training", 1, 1e6)
    lr: float = flag(0.125, "learning rate per 256 examples", 1e-12)
    schedule: str = flag("cosine", "decay of the learning rate", choices=["cosine", "step"])
    warmup_epochs: int = flag(None, "at most a quarter of --epochs; 5 up to 500, else 10", 0, 1e6)
    weight_decay: float = flag(1e-4, "weight decay of SGD", 0)
    amp: str = flag("auto", "auto: bf16 or fp16 on CUDA", choices=["auto", "bf16", "fp16", "off"])
    compile: bool = flag(False, "torch.compile the networks")
    eval_every: int = flag(0, "epochs between linear evaluations; 0: only at the end", 0, 1e6)
    seed: int = flag(0, "seed of weights, order, views and mixing", 0, 1e6)

    batch_size: int = flag(256, "N, of all processes together; None: by the data's size", 2, 1e6)
    mask: float = flag(0.2, "table: chance that a view zeroes a continuous value", 0, 1)
    no_augment: bool = flag(False, "both views are the plain input")
    arch: str = flag("resnet50", "image, speech: encoder",
                     choices=["resnet18", "resnet34", "resnet50"])
    width: int = flag(64, "table: w of the encoder, whose representations are 32 w long", 1, 1e6)
    head: str = flag("mlp", "mlp-no-bn: MoCo v2's for ImageNet; linear: MoCo v1's",
                     choices=["mlp", "mlp-no-bn", "linear"])
    dim: int = flag(128, "D, the embeddings' size", 1, 1e6)
    linear_epochs: int = flag(100, "epochs of the linear evaluation", 1, 1e6)
    linear_lr: float = flag(10.0, "its learning rate", 1e-12)
    linear_batch_size: int = flag(256, "its batch size", 1, 1e6)
    labels: float = flag(None, "share of the training labels that it uses; default: all", 1e-12, 1)
    probe: str = flag(None, "its classifier; default: sgd, for one's own data logistic regression",
                      choices=["sgd", "logistic"])
    finetune: bool = flag(False, "it trains a copy of the encoder along with the classifier")
    finetune_lr: float = flag(0.05, "--finetune: the encoder's rate per 256 examples", 1e-12)

    dataset: str = flag("cifar10", "cifar10, cifar100, speech_commands, covtype, digits, or a path")
    data_dir: str = flag("data", "where data sets lie, or are downloaded to")
    image_size: int = flag(32, "folder: pixels to which its images are resized", 1, 4097)
    train_size: int = flag(None, "image, speech: train on a stratified subset of so many", 1)
    speech_version: str = flag("v0.01", "of Speech Commands", choices=["v0.01", "v0.02"])
    label_column: str = flag(None, "CSV: the labels, for the linear evaluation alone")
    test_share: float = flag(0.2, "CSV: share of the rows to test on", 1e-12, 1)
    missing: str = flag("refuse", "CSV: values that are missing", choices=["refuse", "impute"])
    standardize: str = flag("train", "with the mean of which rows", choices=["train", "all"])
    device: str = flag("auto", "auto (CUDA, else the CPU), cpu, cuda, cuda:1, mps")
    embed: str = flag(None, "with --out, a finished run: embed the new examples in this path")
    all_features: bool = flag(False, "features.npz of more than 100,000 test examples, too")
    out: str = flag(None, "run folder; default: runs/SCRIPT-DATASET-alphaA-seedS")
    resume: bool = flag(False, "go on with the run in the run folder, if there is one")

    def __post_init__(self):
        if self.warmup_epochs is None:
            self.warmup_epochs = 5 if self.epochs <= 500 else 10
        for f in fields(self):
            name, value = f.name.replace("_", "-"), getattr(self, f.name)
            low, below, choices = (f.metadata[key] for key in ("low", "below", "choices"))
            if f.type in (int, float) and value is not None and not low <= value < below:
                raise ValueError(f"--{name} {value}: not from {low:g} to below {below:g}")
            if choices and value not in (*choices, f.default):
                raise ValueError(f"--{name} {value}: not one of {', '.join(choices)}")
        if self.finetune and self.probe == "logistic":
            raise ValueError("--finetune trains by SGD: leave out --probe logistic")
        if self.finetune and self.eval_every:
            raise ValueError("--finetune comes after the pre-training: leave out --eval-every")
        if self.n_plus_k and self.alpha > 0:
            raise ValueError("--n-plus-k: i-Mix has N + K classes anyway: leave it out, or give "
                             "--alpha 0")


NAMED = "covtype digits cifar10 cifar100 speech_commands".split()
RECIPES = {  # what differs from Args, by domain and flags; where two rows fit, the later holds
    "speech": {"temperature": 0.5, "epochs": 500, "schedule": "step"},
    "speech, --no-augment": {"temperature": 0.2},
    "table": {"alpha": 2.0, "temperature": 0.1, "epochs": 500, "batch_size": 512, "mask": 0.0,
              "linear_batch_size": 512},
    "table, --alpha 0": {"mask": 0.2},
    "--dataset cifar10": {"epochs": 4000},
    "--dataset cifar10, --alpha 0": {"epochs": 1000},
    "--dataset cifar10, --no-augment": {"epochs": 1000},
    "--dataset cifar10, --no-augment, --alpha 0": {"epochs": 500},
    "--dataset cifar100": {"epochs": 2000},
    "--dataset cifar100, --alpha 0": {"epochs": 1000},
    "--dataset cifar100, --no-augment": {"epochs": 500},
    "--dataset cifar100, --no-augment, --alpha 0": {"epochs": 1000},
    "own data": {"batch_size": None, "width": None},  # by the data's size
}


# ---------------------------------------------------------------------------- pre-training
def learning_rate(step, steps, args):
    """Per 256 examples, at step 0, 1, ... of the run, with so many steps an epoch.

    Linear warm-up, then cosine decay, or by steps, x 0.1 after 60 % and after 80 % of the run.
    """
    warmup = min(args.warmup_epochs, args.epochs // 4) * steps
    total = args.epochs * steps
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "step":
        return args.lr * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def autocast_dtype(amp, device):
    """torch.bfloat16, torch.float16 (which needs a GradScaler), or None for float32."""
    if amp == "auto" and device.type == "cuda":
        with torch.cuda.device(device):
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def gather(f):
    """Under torchrun, the rows f of all processes, (N, ...); only into one's own flows gradient."""
    if not dist.is_initialized():
        return f
    parts = [torch.empty_like(f) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, f.detach().contiguous())
    parts[dist.get_rank()] = f
    return torch.cat(parts)


def save(value, path):
    """Write value to path, whole or not at all: text as it is, all else by torch.save."""
    content, part = io.BytesIO(), path.with_suffix(".tmp")
    if isinstance(value, str):
        content.write(value.encode())
    else:
        torch.save(value, content)
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    except BaseException:  # the disk is full, Ctrl-C
        part.unlink(missing_ok=True)
        raise


def save_checkpoint(out, parts, log, **rest):
    """Write checkpoint.pt and log.csv into the folder out."""
    state = {name: part.state_dict() for name, part in parts.items()}
    save(state | rest | {"log": log}, out / "checkpoint.pt")
    rows = [",".join(map(str, row.values())) for row in log]
    save("\n".join(["epoch,loss,lr,examples_per_s", *rows, ""]), out / "log.csv")


def load_checkpoint(out, parts, **rest):
    """Load the checkpoint in out, if any, into parts; returns the rest as saved, else as given."""
    if out is None or not (out / "checkpoint.pt").exists():
        return rest
    try:
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        if state.keys() != parts.keys() | rest.keys():
            raise KeyError("another script's")
        for name, part in parts.items():
            if state[name]:  # a GradScaler's is empty where fp16 was off
                part.load_state_dict(state[name])
        return {name: state[name] for name in rest}
    except Exception as error:  # of a damaged file, almost any
        raise ValueError(f"{out / 'checkpoint.pt'} can't be read as a checkpoint of this script "
                         "and these networks: move it away to start anew") from error


def pretrain(encoder, head, loader, args, out=None, evaluate=None, stop=None):
    """Pre-train encoder and head, in place, on the device that they are on; returns the log.

    loader: has a len(), yields (x, x_tilde): two float views (N, ...) of a batch, N always the
    same. args: read from alpha to seed. out: Path of an existing folder for checkpoint.pt and
    log.csv; if it holds a checkpoint, training resumes from it, and torch is seeded in each epoch,
    so that this is exact. evaluate(): called every args.eval_every epochs. stop(): asked before
    each step; once it is true, training ends, the last epoch's state saved. Under torchrun every
    process gets the same batches, weights and out. Raises FloatingPointError once loss or weights
    are no longer finite.
    """
    device = next(encoder.parameters()).device
    steps = len(loader)  # an epoch
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dtype = autocast_dtype(args.amp, device)
    model = nn.Sequential(encoder, head)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = DistributedDataParallel(model, forward_sync_buffers=False) if world > 1 else model
    net = torch.compile(net) if args.compile else net
    ema = copy.deepcopy(model).requires_grad_(False)
    ema.train()  # its BatchNorm sees the batch, too
    ema_net = torch.compile(ema) if args.compile else ema
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    for p in model.parameters():  # fused SGD leaves it undefined where fp16 skips the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    D = list(head.parameters())[-1].shape[0]  # the bias of its last Linear or BatchNorm: (D,)
    torch.manual_seed(args.seed * 10**6)
    queue = F.normalize(torch.randn(args.queue, D, device=device), dim=1)  # mu, at first random
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    rest = load_checkpoint(out, parts, log=[], queue=queue)
    log, queue = rest["log"], rest["queue"].to(device)
    next_save, saved = 0.0, len(log)  # seconds, and the epoch that the checkpoint is of
    if log and rank == 0:
        print(f"going on after epoch {len(log)}", flush=True)
    mix = cutmix if args.mix == "cutmix" else mixup

    for epoch in range(len(log) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10**6 + epoch)  # in each epoch, so that resuming is exact
        model.train()
        start = shown = time.monotonic()
        loss_sum = torch.zeros((), device=device)

        for i, (x, x_tilde) in enumerate(loader):
            if stop and stop() and (i == 0 or saved == epoch - 1):  # so that no epoch is lost
                if out and saved < epoch - 1:
                    save_checkpoint(out, parts, log, queue=queue)
                return log

            x = x.to(device, non_blocking=True)  # (N, ...)
            x_tilde = x_tilde.to(device, non_blocking=True)  # (N, ...)
            N = len(x)
            lr = learning_rate((epoch - 1) * steps + i, steps, args) * N / 256
            optimizer.param_groups[0]["lr"] = lr
            n = N // world
            rows = slice(rank * n, (rank + 1) * n)  # of the batch's, those that this process embeds
            if args.inputmix:  # before i-Mix, the labels untouched; alpha as published
                x, x_tilde = inputmix(x, alpha=1.0), inputmix(x_tilde, alpha=1.0)

            # i-Mix: the anchors are mixed, never the views that they are compared with.
            perm = lam = None
            if args.alpha > 0:
                x, perm, lam = mix(x, args.alpha)

            # Queries by the encoder, keys by the EMA encoder. BatchNorm need not be shuffled: it
            # sees the whole batch (but for several processes on the CPU).
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                f = net(x[rows])
                with torch.no_grad():
                    f_ema = ema_net(x_tilde[rows])
            f, f_ema = gather(f), gather(f_ema)  # (N, D) each

            if args.alpha > 0 or args.n_plus_k:
                loss = moco_loss(f, f_ema, queue, args.temperature, perm, lam)
            else:
                loss = moco_own_loss(f, f_ema, queue, args.temperature)

            # Update. Each process has its rows' gradient; DDP takes their mean, not their sum.
            optimizer.zero_grad()
            scaler.scale(world * loss).backward()
            scaler.step(optimizer)
            scaler.update()
            update_ema(ema, model, args.ema)
            queue = enqueue(queue, f_ema)

            # The loss stays on the device, so that no step waits for the one before.
            loss_sum += loss.detach()
            if rank == 0 and sys.stdout.isatty() and time.monotonic() - shown > 1:
                shown = time.monotonic()
                rate = (i + 1) * N / (shown - start)
                print(f"epoch {epoch}/{args.epochs}  step {i + 1}/{steps}  {rate:,.0f} "
                      "examples/s  ", end="\r", flush=True)

        mean_loss = loss_sum.item() / steps
        tensors = [*model.state_dict().values(), *ema.state_dict().values()]
        finite = torch.stack([t.isfinite().all() for t in tensors]).all()
        if not (math.isfinite(mean_loss) and finite):
            raise FloatingPointError(f"loss or weights are no longer finite in epoch {epoch}: "
                                     "try a lower --lr")
        seconds = time.monotonic() - start
        left = timedelta(seconds=round((args.epochs - epoch) * seconds))
        rate = steps * N / seconds
        log.append({"epoch": epoch, "loss": mean_loss, "lr": lr, "examples_per_s": round(rate, 1)})
        if rank > 0:
            continue  # the first process speaks, saves and evaluates for all
        print(f"epoch {epoch}/{args.epochs}  loss {mean_loss:.4f}  lr {lr:.4f}  "
              f"{rate:,.0f} examples/s  {left} left", flush=True)
        if out and (time.monotonic() > next_save or epoch == args.epochs):
            save_start = time.monotonic()
            save_checkpoint(out, parts, log, queue=queue)
            saved = epoch
            seconds = time.monotonic() - save_start
            next_save = save_start + 100 * seconds  # so that saving takes 1 % of the time
        if evaluate and args.eval_every and epoch % args.eval_every == 0 and epoch < args.epochs:
            evaluate()
    return log


# ---------------------------------------------------------------------------- command line
def fail(message, code=2):
    """End the program with one line on stderr."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(2)  # torchrun ends this process meanwhile, if the first has failed too
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
    print(f"{Path(__file__).name}: {message[:2000]}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or the disk is full: nor should Python try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def parse_args(argv, find_domain):
    """The flags over the recipe of their data set's domain, and that domain."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0],
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    for f in fields(Args):
        name, kind = "--" + f.name.replace("_", "-"), {"action": "store_true"}
        if f.type is not bool:
            kind = {"type": f.type, "choices": f.metadata["choices"]}
        others = [f"{case}: {row[f.name]}" for case, row in RECIPES.items() if f.name in row]
        default = "; ".join([f"default: {f.default}", *others])
        parser.add_argument(name, help=f"{f.metadata['help']} ({default})", **kind)
    given = vars(parser.parse_args(argv))
    try:
        dataset = given.get("dataset", Args.dataset)
        domain = find_domain(dataset, ["image", "speech", "table"])
        active = {domain, f"--dataset {dataset}"}
        if dataset not in NAMED:
            active.add("own data")
        if given.get("alpha") == 0:
            active.add("--alpha 0")
        if given.get("no_augment"):
            active.add("--no-augment")
        recipe = {}
        for case, row in RECIPES.items():
            if active.issuperset(case.split(", ")):
                recipe |= row
        args = Args(**recipe | given)
        if domain == "table" and args.mix == "cutmix":
            raise ValueError("--mix cutmix pastes boxes into images: take mixup for a table")
        return args, domain
    except ValueError as error:
        fail(error)


def begin_run(out, config):
    """Begin the run folder, or see that the run in it has the same flags and data.

    Returns a file that is locked, for this process alone, until it is closed or the process ends.
    """
    path = out / "config.json"
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another process is at work in {out}: wait for it, or take another --out")
    except OSError as error:  # a file system without locks
        print(f"{out} can't be locked ({error.strerror}): start no second process in it")
    if not path.exists() and not (out / "checkpoint.pt").exists():
        save(json.dumps(config, indent=2) + "\n", path)
        return lock
    try:
        was = asdict(Args()) | dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        fail(f"{path} can't be read ({error}): move {out} away to start anew")
    may_change = ("data_dir device compile out resume eval_every torch labels probe all_features "
                  "linear_epochs linear_lr linear_batch_size finetune finetune_lr").split()
    for name in config:
        if name in may_change or was.get(name) == config[name]:
            continue
        if name == "data_digest":
            fail(f"{out} was begun with other data: values, order, labels or columns differ: give "
                 "the same data, or take another --out")
        fail(f"{out} was begun with {name} {was.get(name)}, not {config[name]}: keep to that, or "
             "take another --out")
    return lock


def make_encoder(data, arch, width):
    """The encoder for a Dataset of common.py: MLP5Layer for tables, else a ResNet."""
    if data.groups:
        return MLP5Layer(data.groups, width)
    encoder = resnet(arch, *data.plain(data.x_train[:1]).shape[1:3])
    return encoder.to(memory_format=torch.channels_last)  # fastest for convolutions


def main(argv=None):
    import common  # here, so that a script that is copied alone can be imported
    args, domain = parse_args(argv, common.domain)
    dataset = Path(args.dataset).name.split(".")[0][:100]
    run = f"{Path(__file__).stem}-{dataset}-alpha{args.alpha:g}-seed{args.seed}"
    out = Path(args.out or f"runs/{run}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever name is to be shown
    begun = (out / "config.json").exists() or (out / "checkpoint.pt").exists()
    if rank == 0 and begun and not (args.resume or args.embed):
        fail(f"{out} holds a run: --resume goes on with it, --out takes another folder")

    # One device, or under torchrun each process's own.
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if world > 1 and device.startswith("cuda:"):
        fail(f"--device {device}: under torchrun each process takes its own, by --device cuda")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()  # fails where there is no such device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 stays float32
    if args.embed and world > 1:
        fail("--embed needs no torchrun: start it alone")
    if args.embed:
        try:
            return common.embed(args.embed, out, device, lambda data, was:
                                make_encoder(data, was["arch"], was["width"]))
        except ValueError as error:
            fail(error)
        except OSError as error:
            fail(error, 1)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        dist.barrier()  # it may have to download the data or to write a cache

    try:
        data = common.load(domain, args, device)
        args.batch_size = args.batch_size or common.batch_size_for(data)
        args.width = args.width or common.width_for(data)
        if args.batch_size % world:
            fail(f"--batch-size {args.batch_size} can't be shared evenly by {world} processes")
        if args.batch_size > len(data.x_train):
            fail(f"--batch-size {args.batch_size}: there are {len(data.x_train)} training examples")
        if rank == 0:
            config = asdict(args) | {"script": Path(__file__).stem, "device": str(device),
                                     "torch": torch.__version__, "data_digest": data.digest(),
                                     "train_examples": len(data.x_train)}
            lock = begin_run(out, config)  # held to the end
            save(json.dumps(data.spec, indent=2) + "\n", out / "data.json")
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(error, 1)
    if rank == 0 and world > 1:
        dist.barrier()
    if not (out / "config.json").exists():
        fail(f"{out} is not seen by all processes: give them a folder in common")
    print(f"{args.dataset}: {len(data.x_train):,} examples to train on, {len(data.x_test):,} to "
          f"test, {data.num_classes} classes; {world} x {device}; {out}", flush=True)
    if world > 1 and device.type == "cpu":
        print("on the CPU, BatchNorm sees each process's own rows, not the whole batch")

    torch.manual_seed(args.seed)
    encoder = make_encoder(data, args.arch, args.width)
    size = 2048 if args.arch == "resnet50" else 512  # of a representation
    if domain == "table":
        size = 32 * args.width
    head = projection_head(size, args.dim)
    if domain == "image":
        head = head[:-1]  # the recipe of images ends without BatchNorm
    if args.head == "mlp-no-bn":
        head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, args.dim))
    elif args.head == "linear":
        head = nn.Linear(size, args.dim)
    encoder, head = encoder.to(device), head.to(device)
    view = data.plain if args.no_augment else data.view
    loader = common.TwoViews(data.x_train, view, args.batch_size)
    untrained = copy.deepcopy(encoder)

    def evaluate(beside=None):
        result = common.evaluate(encoder, data, args, beside)
        print(f"{common.in_words(result, data)}; {out}", flush=True)
        return result

    try:
        stopped = threading.Event()
        if world == 1:  # torchrun stops its processes itself
            signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        log = pretrain(encoder, head, loader, args, out, evaluate, stopped.is_set)
        if stopped.is_set():
            fail(f"stopped after epoch {len(log)}; the same command with --resume goes on", 1)
        if world == 1:
            signal.signal(signal.SIGTERM, lambda *_: fail("stopped; --resume evaluates", 1))
        if world > 1:
            dist.destroy_process_group()
        if rank == 0:
            weights = {name: tensor.cpu() for name, tensor in encoder.state_dict().items()}
            save(weights, out / "encoder.pt")
            labels = f"-labels{args.labels:g}" if args.labels else ""
            finetune = "-finetune" if args.finetune else ""
            probe = f"-{args.probe}" if args.probe else ""
            path = out / f"result{labels}{probe}{finetune}.json"
            save(json.dumps(evaluate(untrained), indent=2) + "\n", path)
            common.save_features(out / "features.npz", encoder, data, untrained, args.all_features)
            lock.close()
    except ValueError as error:
        fail(error)
    except (FloatingPointError, torch.OutOfMemoryError, OSError) as error:
        fail(f"{str(error).splitlines()[0]}; the last checkpoint, if any, stays in {out}", 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume goes on", 130)
    except (RuntimeError, MemoryError) as error:
        if dist.is_initialized():
            time.sleep(2)  # torchrun ends this process meanwhile, if another has failed
        if not re.search("out of memory|allocate|MemoryError|calculation overflowed", repr(error)):
            raise
        reason = str(error).partition("\n")[0]
        fail(f"out of memory ({reason}): lower --batch-size or the network's size; the last "
             "checkpoint, if any, stays", 1)
