# SPDX-License-Identifier: MIT
"""BYOL with i-Mix on images, speech and tables: Section 3.3 of Lee et al., "i-Mix: A Domain-Agnostic Strategy for
Contrastive Representation Learning", ICLR 2021, https://arxiv.org/abs/2010.08887.

    python byol_imix.py                                         # CIFAR-10, BYOL + i-Mix: the paper's recipe
    python byol_imix.py --alpha 0                               # the same without i-Mix
    python byol_imix.py --ema 0 --symmetric --alpha 0           # SimSiam: the target from the online network
    python byol_imix.py --dataset covtype --width 8             # a table, half an hour on a CPU: test accuracy 66.7 %
    python byol_imix.py --dataset covtype --width 8 --alpha 0   # without i-Mix: 61.8 % (one seed; README.md)
    python byol_imix.py --dataset speech_commands               # speech, its recipe
    python byol_imix.py --dataset my_images --arch resnet18     # your own: train/CLASS/* and test/CLASS/*; WORD/*.wav
    python byol_imix.py --dataset my.csv --label-column kind    # your own table
"""

import argparse
import contextlib
import copy
import glob
import json
import math
import os
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

# ------------------------------------------------------------------------------------------------- mixing (Section 2)
def mixup(x, alpha):
    """Mix each example with a random partner: MixUp (Section 2).

    x: (N, ...) float; alpha > 0, of Beta(alpha, alpha). Returns x_mix (N, ...); perm (N,) int64, each example's
    partner j; lam (N,) in [0.5, 1], the share that x_i keeps (folded to the larger share, as in the published code).
    """
    a = torch.full((len(x),), float(alpha), device=x.device)
    lam = torch.distributions.Beta(a, a, validate_args=False).sample()  # lambda_i ~ Beta(alpha, alpha)  (N,)
    lam = torch.maximum(lam, 1 - lam)
    perm = torch.randperm(len(x), device=x.device)  # j = perm[i]  (N,)
    lam_x = lam.view(-1, *[1] * (x.dim() - 1))  # (N, 1, ...)
    return lam_x * x + (1 - lam_x) * x[perm], perm, lam  # Mix(x_i, x_j; lambda) = lambda x_i + (1 - lambda) x_j


def cutmix(x, alpha):
    """Paste a box of a random partner into each image: CutMix (Section 2); one box and one lambda serve the batch.

    x: (N, C, H, W) float; alpha and what is returned: as of mixup, lam being the share of pixels that x_i really keeps.
    """
    a = torch.full((1,), float(alpha), device=x.device)
    lam = torch.distributions.Beta(a, a, validate_args=False).sample()  # lambda ~ Beta(alpha, alpha)  (1,)
    side = (1 - torch.maximum(lam, 1 - lam)).sqrt()  # the box's, as a share of the image's
    perm = torch.randperm(len(x), device=x.device)  # j = perm[i]  (N,)
    inside = []
    for length in x.shape[2:]:
        cut, middle = (side * length).long(), torch.randint(length, (1,), device=x.device)
        offset = torch.arange(length, device=x.device) - (middle - cut // 2)  # from the box's edge
        inside.append((offset >= 0) & (offset < cut))  # cut off at the border  (H,), (W,)
    box = inside[0][:, None] & inside[1]  # where M is 0  (H, W)
    lam = (1 - box.float().mean()).expand(len(x))
    return torch.where(box, x[perm], x), perm, lam  # M * x_i + (1 - M) * x_j


# ------------------------------------------------------------------------------------------------- loss (Section 3.3)
def byol_loss(g, f_ema, perm=None, lam=None):
    """BYOL's loss (Section 3.3), with i-Mix where perm and lam are what the mixing returned; a scalar, the batch mean.

    g: (N, D) raw predictions for the (mixed) anchors. f_ema: (N, D) raw embeddings of their other views, by the EMA
    encoder, without gradient: normalised, the columns of F~.
    """
    with torch.autocast(g.device.type, enabled=False):  # in float32
        g = F.normalize(g.float(), dim=1)  # (N, D)
        f_ema = F.normalize(f_ema.detach().float(), dim=1)  # (N, D)
        similarity = (g * f_ema).sum(1)  # <g_i, f~_i>  (N,)
        if perm is not None:
            similarity = lam * similarity + (1 - lam) * (g * f_ema[perm]).sum(1)  # <g_i, F~ v>  (N,)
        # |g - F~ v|^2 = 1 + |F~ v|^2 - 2 <g, F~ v>, and |F~ v| is 1 but for a mixed label; that term carries no
        # gradient, and 1 stands in for it, as in the published code.
        return (2 - 2 * similarity).mean()


# ------------------------------------------------------------------------------------------------ networks (recipes)
class MLP5Layer(nn.Module):
    """The recipe's encoder `mlp_5layer`: (N, sum(groups)) -> (N, 32 width); groups: each column group's columns."""

    def __init__(self, groups, width):
        super().__init__()
        self.groups = list(groups)
        self.embed = nn.ModuleList(nn.Linear(columns, 64) for columns in groups)
        sizes = [64 * len(groups), 32 * width, 32 * width, 64 * width, 64 * width]
        layers = [[nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True)] for a, b in zip(sizes, sizes[1:])]
        self.layers = nn.Sequential(*sum(layers, []), nn.Linear(64 * width, 128 * width))

    def forward(self, x):
        h = [embed(part) for embed, part in zip(self.embed, x.split(self.groups, dim=1))]  # (N, 64) each
        return self.layers(torch.cat(h, dim=1)).unflatten(1, (-1, 4)).max(2).values  # maxout: (N, 32 width)


def resnet(arch, channels, size):
    """torchvision's ResNet without its last layer: (N, channels, size, size) -> (N, 512 or, of ResNet-50, 2048).

    For images of up to 64 pixels the stem is a 3x3 convolution of stride 1 without max-pool.
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
    """The recipe's projection head, dropped after pre-training, and BYOL's predictor: (N, size) -> (N, dim).

    Without its last BatchNorm, projection_head(size, dim)[:-1], it is MoCo's and BYOL's head for images, and BYOL's
    predictor for images and speech.
    """
    return nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.ReLU(inplace=True),
                         nn.Linear(size, dim), nn.BatchNorm1d(dim))


# ------------------------------------------------------------------------------------------------------- pre-training
def cosine_schedule(step, steps, warmup):
    """The share of the learning rate at step 0, 1, ... of steps: linear warm-up to 1, then cosine decay towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def step_schedule(step, steps, warmup):
    """As cosine_schedule, but after the warm-up x 0.1 at 60 % and at 80 % of the steps: the recipe for speech."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))


def show(epoch, epochs, loss, lr, rate, left, end="\n"):
    """Print how far pre-training is, over the terminal's last line; rate in examples/s, left in examples."""
    left = timedelta(seconds=round(left / rate))
    text = f"epoch {epoch}/{epochs}  loss {loss}  lr {lr:.4f}  {rate:,.0f} examples/s  {left} left"
    print("\r\x1b[K" * sys.stdout.isatty() + text, end=end, flush=True)


@torch.no_grad()
def update_ema(ema, model, m):
    """theta_EMA <- m theta_EMA + (1 - m) theta, in place, in one call for all parameters.

    BatchNorm's running statistics are not averaged: as in MoCo, the EMA encoder keeps those of what it has seen.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - m)


def pretrain(encoder, head, predictor, loader, *, alpha=1.0, mix=mixup, m=0.999, symmetric=False, epochs=1000, lr=0.125,
             schedule=cosine_schedule, weight_decay=1e-4, warmup_epochs=10, amp=None, compile=False, state=None,
             after_epoch=lambda log, get_state: None):
    """Pre-train encoder, head and predictor, in place, on their device; returns the log, a dict an epoch.

    loader: any iterable with a len() that yields (x, x_tilde), two float views (N, ...) of one batch. alpha: of
    Beta(alpha, alpha); 0 is BYOL alone. mix: mixup or cutmix. m: of the EMA; 0 takes the target from the online
    network, without gradient: with symmetric, SimSiam. symmetric: both views are anchors in turn, and the loss is the
    mean of both (BYOL's paper has their sum, the recipe one view alone). lr: at this batch size, 0.125 N/256 in the
    recipe. schedule: cosine_schedule or step_schedule. amp: None, torch.bfloat16 or torch.float16. after_epoch(log,
    get_state) is called after each epoch; what get_state() returned in an earlier run, saved there and then, is the
    state to go on from. Raises FloatingPointError once the loss is no longer finite.
    """
    model, device = nn.Sequential(encoder, head), next(encoder.parameters()).device
    model.to(memory_format=torch.channels_last)  # in which convolutions are fastest
    ema = copy.deepcopy(model.train()).requires_grad_(False)  # stays in train mode: BatchNorm of the batch
    model.append(predictor)  # from here on g(f(x)): the EMA has no predictor
    forward, forward_ema = (torch.compile(net) if compile else net for net in (model, ema))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    for p in model.parameters():  # else fused SGD leaves them uninitialised where fp16 overflows in the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    if state:
        for name, part in parts.items():
            if state[name]:  # the scaler's is empty where fp16 was off
                part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["rng_cuda"][: torch.cuda.device_count()])
    log, steps, last_loss = list(state["log"]) if state else [], len(loader), "-"

    def get_state():
        rng = {"rng": torch.get_rng_state(), "rng_cuda": torch.cuda.get_rng_state_all()}
        return {name: part.state_dict() for name, part in parts.items()} | rng | {"log": log}

    for epoch in range(len(log) + 1, epochs + 1):
        model.train()
        start = shown = time.monotonic()
        total = torch.zeros((), device=device)
        for i, (x, x_tilde) in enumerate(loader):
            x, x_tilde = x.to(device, non_blocking=True), x_tilde.to(device, non_blocking=True)  # (N, ...) each
            step = (epoch - 1) * steps + i
            optimizer.param_groups[0]["lr"] = lr_now = lr * schedule(step, epochs * steps, warmup_epochs * steps)
            loss, pairs = 0, [(x, x_tilde), (x_tilde, x)] if symmetric else [(x, x_tilde)]
            for anchor, other in pairs:
                anchor, *mixed = mix(anchor, alpha) if alpha > 0 else (anchor,)  # only the anchors are mixed
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    g = forward(anchor)  # g(f_i)  (N, D)
                    with torch.no_grad():
                        f_ema = forward_ema(other)  # (N, D)
                loss = loss + byol_loss(g, f_ema, *mixed) / len(pairs)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            update_ema(ema, model[:2], m)
            total += loss.detach()
            if sys.stdout.isatty() and (now := time.monotonic()) - shown > 1:  # and no wait for this step's loss
                shown, rate = now, (i + 1) * len(x) / (now - start)
                show(epoch, epochs, last_loss, lr_now, rate, (epochs * steps - step - 1) * len(x), end="")
        mean_loss = float(total) / steps  # waits for the device, once an epoch
        weights = sum(p.detach().sum() for p in model.parameters())
        if not math.isfinite(mean_loss + float(weights)):  # the weights too: the last step may have broken them
            raise FloatingPointError(f"the loss is no longer finite in epoch {epoch}")
        rate, last_loss = steps * len(x) / (time.monotonic() - start), f"{mean_loss:.4f}"
        log.append({"epoch": epoch, "loss": mean_loss, "lr": lr_now, "examples_per_s": round(rate, 1)})
        show(epoch, epochs, last_loss, lr_now, rate, (epochs - epoch) * steps * len(x))
        after_epoch(log, get_state)
    return log


# ------------------------------------------------------------------------------------------------------- command line
def fail(message, code=2):
    """End the program with one line on stderr."""
    print("\r\x1b[K" * sys.stderr.isatty() + f"{Path(__file__).name}: {message}", file=sys.stderr)
    sys.exit(code)


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float, low <= number < high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) < high:
                return kind(text)
        whole = "whole " * (kind is int)
        raise argparse.ArgumentTypeError(f"{text} is not a {whole}number from {low:g} to below {high:g}")
    return parse


def pick_device(text):
    """An argparse type: the torch.device that auto, cpu, cuda, cuda:1 or mps stands for."""
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"] + ["mps"] * torch.mps.is_available()
    name = {"auto": here[0], "cuda": "cuda:0"}.get(text, text)
    if name not in here:
        raise argparse.ArgumentTypeError(f"{text} is not on this machine, which has {', '.join(here)}")
    return torch.device(name)


def autocast_dtype(amp, device):
    """What --amp stands for on this device: torch.bfloat16, torch.float16 (with a GradScaler), or None for float32."""
    if amp == "auto" and device.type == "cuda":
        with torch.cuda.device(device):
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def save(value, path):
    """Write value to path, as JSON or as torch.save does, whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    if path.suffix == ".json":
        part.write_text(json.dumps(value, indent=2, default=str) + "\n")
    else:
        torch.save(value, part)
    os.replace(part, path)


def load_checkpoint(path, flags):
    """The state saved at path by a run with the same flags; anything else ends the program."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = [flag for flag in flags | state["flags"] if state["flags"][flag] != flags[flag]]
    except Exception:  # a damaged file makes torch.load raise almost anything
        fail(f"{path} can't be read as this script's checkpoint; it is left as it is: move it away to start anew")
    if other:
        fail(f"--{other[0].replace('_', '-')} {flags[other[0]]} contradicts {path}, made with "
             f"{state['flags'][other[0]]}: go on with the same flags, or start another run with --out")
    return state


def is_table(dataset):
    """Whether a data set is a table (covtype, digits, a CSV file), and not images or speech."""
    return dataset in ("covtype", "digits") or dataset.endswith((".csv", ".csv.gz")) or os.path.isfile(dataset)


def is_speech(dataset):
    """Whether a data set is speech (speech_commands, a folder of WORD/*.wav), and not images."""
    return dataset == "speech_commands" or any(glob.iglob("*/*.[wW][aA][vV]", root_dir=dataset))


def parse_args(argv):
    """The flags, each checked before any data is touched; a bad one ends the program."""
    positive, count = number(float, 1e-12), number(int, 1, 1e6)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    add = parser.add_argument
    add("--dataset", default="cifar10",
        help="cifar10, cifar100, speech_commands, a folder of images or clips; covtype, digits, a CSV file")
    add("--data-dir", type=Path, default="data", help="where the data lie, or are downloaded to")
    add("--image-size", type=number(int, 1, 4097), default=32, help="folder: pixels to which its images are resized")
    add("--speech-version", choices=["v0.01", "v0.02"], default="v0.01", help="of Speech Commands")
    add("--train-size", type=count, help="images, speech: train on a stratified subset of so many")
    add("--label-column", metavar="NAME", help="CSV: the column that holds the labels")
    add("--test-share", type=number(float, 1e-12, 1), default=0.2, help="CSV: of the rows")
    add("--standardize", choices=["train", "all"], default="train", help="table: by which rows' mean and deviation")
    add("--mask", type=number(float, 0, 1), help="table: chance that a view zeroes a number; recipe: 0.2, with i-Mix 0")
    add("--mix", choices=["mixup", "cutmix"], default="mixup", help="how i-Mix mixes; cutmix: not of tables")
    add("--no-augment", action="store_true", help="both views are the plain input")
    add("--alpha", type=number(float, 0, 1e6), help="of Beta(alpha, alpha); 0: no i-Mix; recipe: 1, of tables 2")
    add("--symmetric", action="store_true", help="both views are anchors in turn, as in BYOL's paper; their mean")
    add("--ema", type=number(float, 0, 1), default=0.999, help="m of the EMA encoder; 0, with --symmetric: SimSiam")
    add("--epochs", type=count, help="of pre-training; recipe: 1000, of tables and speech 500")
    add("--batch-size", type=number(int, 2, 1e6), help="N; recipe: 256, of tables 512")
    add("--lr", type=positive, default=0.125, help="learning rate per 256 examples")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="of SGD")
    add("--warmup-epochs", type=number(int, 0, 1e6), help="5 up to 500 epochs, else 10; tables 10; at most a quarter")
    add("--schedule", choices=["cosine", "step"], help="of the learning rate; recipe: cosine, of speech step")
    add("--dim", type=count, default=128, help="D, the embedding's size")
    add("--arch", choices=["resnet18", "resnet34", "resnet50"], default="resnet50", help="images, speech: the encoder")
    add("--width", type=count, default=64, help="tables: w of the encoder, whose representations are 32 w long")
    add("--device", type=pick_device, default="auto", help="auto (CUDA, else the CPU), cpu, cuda:1, mps")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="auto: bf16 or fp16 on CUDA, else off")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=number(int, 0, 1e6), default=0, help="of all that is random but the data's split")
    add("--out", type=Path, help="run folder: runs/byol_imix-DATASET-alphaA-seedS unless given")
    add("--resume", action="store_true", help="go on with the run in the run folder, if there is one")
    add("--eval-every", type=number(int, 0, 1e6), default=0, help="epochs between evaluations; 0: only at the end")
    add("--linear-epochs", type=count, default=100, help="of the linear evaluation")
    args = parser.parse_args(argv)
    table = is_table(args.dataset)
    recipe = {"alpha": 1.0, "epochs": 1000, "batch_size": 256, "schedule": "cosine"}
    if table:
        recipe |= {"alpha": 2.0, "epochs": 500, "batch_size": 512}
    elif is_speech(args.dataset):
        recipe |= {"epochs": 500, "schedule": "step"}
    vars(args).update({flag: value for flag, value in recipe.items() if getattr(args, flag) is None})
    if args.mask is None:
        args.mask = 0.0 if args.alpha > 0 else 0.2
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10 if table or args.epochs > 500 else 5, args.epochs // 4)
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.mix == "cutmix" and table:
        parser.error("--mix cutmix pastes boxes into images: take --mix mixup for a table")
    dataset = Path(args.dataset).name.split(".")[0]
    args.out = args.out or Path(f"runs/byol_imix-{dataset}-alpha{args.alpha:g}-seed{args.seed}")
    return args


def main(argv=None):
    args = parse_args(argv)
    import common
    free = "data_dir device compile out resume eval_every linear_epochs".split()  # these may change on --resume
    flags = {flag: value for flag, value in vars(args).items() if flag not in free}
    out, checkpoint, device = args.out, args.out / "checkpoint.pt", args.device
    source, table, speech = (args.dataset, args.data_dir, device), is_table(args.dataset), is_speech(args.dataset)
    if not args.resume and (os.path.exists(out / "config.json") or os.path.exists(checkpoint)):
        fail(f"{out} already holds a run: go on with it with --resume, or choose another folder with --out")
    state = load_checkpoint(checkpoint, flags) if os.path.exists(checkpoint) else None
    try:
        if table:
            data = common.load_table(*source, mask=args.mask, standardize=args.standardize,
                                     label_column=args.label_column, test_share=args.test_share)
        elif speech:
            data = common.load_speech(*source, version=args.speech_version, train_size=args.train_size)
        else:
            data = common.load_images(*source, image_size=args.image_size, train_size=args.train_size)
    except common.DataError as error:
        fail(error)
    if args.batch_size > len(data.x_train):
        fail(f"--batch-size {args.batch_size} is more than the {len(data.x_train)} training examples of {args.dataset}")
    shape = list(data.x_train.shape)
    if state and state["shape"] != shape:
        fail(f"{args.dataset} has changed since {checkpoint} was made: training data {state['shape']}, now {shape}")
    git = subprocess.run("git rev-parse -q --verify HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save(vars(args) | {"torch": torch.__version__, "commit": git.stdout.decode()[:-1] or None}, out / "config.json")
        log = [",".join(map(str, row.values())) + "\n" for row in (state["log"] if state else [])]
        (out / "log.csv").write_text("epoch,loss,lr,examples_per_s\n" + "".join(log))
    except OSError as error:
        fail(f"{out} can't be written ({error.strerror}): choose another folder with --out")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 stays float32
    amp = autocast_dtype(args.amp, device)
    torch.manual_seed(args.seed)
    predictor = projection_head(args.dim, args.dim)
    if table:
        encoder, head = MLP5Layer(data.groups, args.width), projection_head(32 * args.width, args.dim)
    else:
        encoder = resnet(args.arch, *data.plain(data.x_train[:1]).shape[1:3])
        head = projection_head(2048 if args.arch == "resnet50" else 512, args.dim)
        head, predictor = head if speech else head[:-1], predictor[:-1]  # as the recipe ends with BatchNorm or without
    encoder, head, predictor = encoder.to(device), head.to(device), predictor.to(device)
    print(f"{args.dataset}: {len(data.x_train):,} examples to train on, {len(data.x_test):,} to test, "
          f"{data.num_classes} classes; {device}, autocast {amp or 'off'}, TF32 off; {out}", flush=True)
    view = data.plain if args.no_augment else data.view
    due = 0.0  # when the next checkpoint is to be written

    def after_epoch(log, get_state):
        nonlocal due
        with open(out / "log.csv", "a") as file:
            print(*log[-1].values(), sep=",", file=file)
        start = time.monotonic()
        if start > due or len(log) == args.epochs:
            save(get_state() | {"flags": flags, "shape": shape}, checkpoint)
            due = time.monotonic() + 100 * (time.monotonic() - start)  # so that they take at most 1 % of the time
        if args.eval_every and len(log) % args.eval_every == 0 and len(log) < args.epochs:
            result = common.linear_eval(encoder, data, args.linear_epochs, seed=args.seed)
            print(f"epoch {len(log)}: test accuracy {result['test_accuracy']:.4f}")

    try:
        pretrain(encoder, head, predictor, common.TwoViews(data.x_train, view, args.batch_size), alpha=args.alpha,
                 mix=cutmix if args.mix == "cutmix" else mixup, m=args.ema, symmetric=args.symmetric,
                 schedule=step_schedule if args.schedule == "step" else cosine_schedule, epochs=args.epochs,
                 lr=args.lr * args.batch_size / 256, weight_decay=args.weight_decay,
                 warmup_epochs=args.warmup_epochs, amp=amp, compile=args.compile, state=state, after_epoch=after_epoch)
    except FloatingPointError as error:
        fail(f"{error}; the last good checkpoint, if any, stays in {out}: try a lower --lr, with another --out", 1)
    except torch.OutOfMemoryError:
        fail(f"out of memory on {device}: a smaller --batch-size or encoder may fit, in another run with --out", 1)
    save({name: tensor.cpu() for name, tensor in encoder.state_dict().items()}, out / "encoder.pt")
    result = common.linear_eval(encoder, data, args.linear_epochs, seed=args.seed)
    save(result, out / "result.json")
    print(f"test accuracy {result['test_accuracy']:.4f}, train accuracy {result['train_accuracy']:.4f}; {out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail(f"stopped; to go on: python {shlex.join(sys.argv)}" + " --resume" * ("--resume" not in sys.argv), 130)
