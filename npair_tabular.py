# SPDX-License-Identifier: MIT
"""N-pair contrastive learning with i-Mix on tables: Section 3.1 of Lee et al., "i-Mix: A
Domain-Agnostic Strategy for Contrastive Representation Learning", ICLR 2021,
https://arxiv.org/abs/2010.08887

    python npair_tabular.py                                     # CovType, the paper's recipe
    python npair_tabular.py --alpha 0                           # the baseline, without i-Mix
    python npair_tabular.py --width 8               # half an hour on a CPU core: 63.6 %
    python npair_tabular.py --width 8 --alpha 0     # 58.0 % (two seeds; README.md has more)
    python npair_tabular.py --width 8 --epochs 40   # 2 minutes: 59.7 %; with --alpha 0: 55.5 %
    python npair_tabular.py --dataset my.csv --label-column kind --width 8    # your own table
    torchrun --nproc_per_node=4 npair_tabular.py                # four GPUs, the same batch of N

One step, in the paper's symbols:

    x, x_tilde = view(rows), view(rows)         # two views of N examples
    x, perm, lam = mixup(x, alpha)              # x_i <- lam_i x_i + (1 - lam_i) x_j,  j = perm[i]
    f, f_tilde = model([x, x_tilde])            # (N, D) each, in one pass
    loss = lam * l(f, i) + (1 - lam) * l(f, j)  # l(f, n): cross-entropy of f~_n against all of f~
    theta <- theta - lr * gradient              # SGD with momentum
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


# ---------------------------------------------------------------------------- loss (Section 3.1)
def n_pair_loss(f, f_tilde, temperature, perm=None, lam=None, y=None):
    """l_N-pair; with i-Mix where mixing has given perm and lam, (N,) each.

    f: (N, D), raw embeddings of the (mixed) anchors; f_tilde: (N, D), of their other views, which
    are the N classes. Gradients flow into both. y: (N,), class indices, for the supervised loss:
    the views of i's class share its virtual label. Returns the batch mean. The loss is linear in
    the virtual label, so that of lambda v_i + (1 - lambda) v_j is the same mix of two losses.
    """
    with torch.autocast(f.device.type, enabled=False):  # bf16 would round s / tau away
        f = F.normalize(f.float(), dim=1)
        f_tilde = F.normalize(f_tilde.float(), dim=1)
        logits = f @ f_tilde.T / temperature  # s(f_i, f~_n) / tau  (N, N)
        log_p = F.log_softmax(logits, dim=1)  # over the classes n  (N, N)
        y = torch.arange(len(f), device=f.device) if y is None else y  # each its own class
        same = (y[:, None] == y).float()  # [y_n = y_i]  (N, N)
        v = same / same.sum(1, keepdim=True)  # v_in, shared by i's class  (N, N)
        loss = -(v * log_p).sum(1)  # l(x_i, v_i)  (N,)
        if perm is not None:
            loss_j = -(v[perm] * log_p).sum(1)  # l(x_i, v_j)  (N,)
            loss = lam * loss + (1 - lam) * loss_j
        return loss.mean()


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
    """The recipe published for CovType; each field is a flag. pretrain() reads those up to seed."""

    alpha: float = flag(2.0, "lambda ~ Beta(alpha, alpha); 0: without i-Mix", 0, 1e6)
    supervised: bool = flag(False, "all views of a class are positives: supervised N-pair")
    temperature: float = flag(0.1, "tau", 1e-12)
    epochs: int = flag(500, "epochs of pre-training", 1, 1e6)
    lr: float = flag(0.125, "learning rate per 256 examples", 1e-12)
    schedule: str = flag("cosine", "decay of the learning rate", choices=["cosine", "step"])
    warmup_epochs: int = flag(None, "at most a quarter of --epochs; 5 up to 500, else 10", 0, 1e6)
    weight_decay: float = flag(1e-4, "weight decay of SGD", 0)
    amp: str = flag("auto", "auto: bf16 or fp16 on CUDA", choices=["auto", "bf16", "fp16", "off"])
    compile: bool = flag(False, "torch.compile the networks")
    eval_every: int = flag(0, "epochs between linear evaluations; 0: only at the end", 0, 1e6)
    seed: int = flag(0, "seed of weights, order, views and mixing", 0, 1e6)

    batch_size: int = flag(512, "N, of all processes together; own table: by its size", 2, 1e6)
    mask: float = flag(0.2, "chance that a view zeroes a continuous value", 0, 1)
    no_augment: bool = flag(False, "both views are the plain input")
    width: int = flag(64, "w; representations are 32 w long; own table: by its size", 1, 1e6)
    dim: int = flag(128, "D, the embeddings' size", 1, 1e6)
    linear_epochs: int = flag(100, "epochs of the linear evaluation", 1, 1e6)
    linear_lr: float = flag(10.0, "its learning rate", 1e-12)
    linear_batch_size: int = flag(512, "its batch size", 1, 1e6)
    labels: float = flag(None, "share of the training labels that it uses; default: all", 1e-12, 1)
    probe: str = flag(None, "its classifier; default: sgd, for one's own data logistic regression",
                      choices=["sgd", "logistic"])
    finetune: bool = flag(False, "it trains a copy of the encoder along with the classifier")
    finetune_lr: float = flag(0.05, "--finetune: the encoder's rate per 256 examples", 1e-12)

    dataset: str = flag("covtype", "covtype, digits, or the path of a CSV file")
    data_dir: str = flag("data", "where covtype lies, or is downloaded to")
    label_column: str = flag(None, "CSV: the labels, if any, for evaluation and --supervised")
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
        if self.supervised and self.labels:
            raise ValueError("--labels: the supervised loss sees all labels: leave out one of both")


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
    same; with args.supervised also y (N,), class indices. args: read from alpha to seed. out: Path
    of an existing folder for checkpoint.pt and log.csv; if it holds a checkpoint, training resumes
    from it, and torch is seeded in each epoch, so that this is exact. evaluate(): called every
    args.eval_every epochs. stop(): asked before each step; once it is true, training ends, the last
    epoch's state saved. Under torchrun every process gets the same batches, weights and out. Raises
    FloatingPointError once loss or weights are no longer finite.
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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    for p in model.parameters():  # fused SGD leaves it undefined where fp16 skips the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    log = load_checkpoint(out, parts, log=[])["log"]
    next_save, saved = 0.0, len(log)  # seconds, and the epoch that the checkpoint is of
    if log and rank == 0:
        print(f"going on after epoch {len(log)}", flush=True)

    for epoch in range(len(log) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10**6 + epoch)  # in each epoch, so that resuming is exact
        model.train()
        start = shown = time.monotonic()
        loss_sum = torch.zeros((), device=device)

        for i, (x, x_tilde, *rest) in enumerate(loader):
            if stop and stop() and (i == 0 or saved == epoch - 1):  # so that no epoch is lost
                if out and saved < epoch - 1:
                    save_checkpoint(out, parts, log)
                return log

            x = x.to(device, non_blocking=True)  # (N, ...)
            x_tilde = x_tilde.to(device, non_blocking=True)  # (N, ...)
            y = None
            if args.supervised:
                if not rest:
                    raise ValueError("the supervised loss needs a loader of (x, x_tilde, y)")
                y = rest[0].to(device, non_blocking=True).view(len(x))  # (N,)
            N = len(x)
            lr = learning_rate((epoch - 1) * steps + i, steps, args) * N / 256
            optimizer.param_groups[0]["lr"] = lr
            n = N // world
            rows = slice(rank * n, (rank + 1) * n)  # of the batch's, those that this process embeds

            # i-Mix: the anchors are mixed, never the views that they are compared with.
            perm = lam = None
            if args.alpha > 0:
                x, perm, lam = mixup(x, args.alpha)

            # Embeddings: one pass over both views, so that BatchNorm sees both.
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                f, f_tilde = net(torch.cat([x[rows], x_tilde[rows]])).chunk(2)
            f, f_tilde = gather(f), gather(f_tilde)  # (N, D) each

            loss = n_pair_loss(f, f_tilde, args.temperature, perm, lam, y)

            # Update. Each process has its rows' gradient; DDP takes their mean, not their sum.
            optimizer.zero_grad()
            scaler.scale(world * loss).backward()
            scaler.step(optimizer)
            scaler.update()

            # The loss stays on the device, so that no step waits for the one before.
            loss_sum += loss.detach()
            if rank == 0 and sys.stdout.isatty() and time.monotonic() - shown > 1:
                shown = time.monotonic()
                rate = (i + 1) * N / (shown - start)
                print(f"epoch {epoch}/{args.epochs}  step {i + 1}/{steps}  {rate:,.0f} "
                      "examples/s  ", end="\r", flush=True)

        mean_loss = loss_sum.item() / steps
        finite = torch.stack([t.isfinite().all() for t in model.state_dict().values()]).all()
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
            save_checkpoint(out, parts, log)
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


def parse_args(argv):
    """The flags, checked before any data is touched."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0],
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    for f in fields(Args):
        name, kind = "--" + f.name.replace("_", "-"), {"action": "store_true"}
        if f.type is not bool:
            kind = {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(name, help=f"{f.metadata['help']} (default: {f.default})", **kind)
    given = vars(parser.parse_args(argv))
    recipe = {}
    if given.get("dataset", Args.dataset) not in ("covtype", "digits"):
        recipe = {"batch_size": None, "width": None}  # by the table's size
    try:
        return Args(**recipe | given)
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


def main(argv=None):
    import common  # here, so that a script that is copied alone can be imported
    args = parse_args(argv)
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
                                MLP5Layer(data.groups, was["width"]))
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
        data = common.load("table", args, device)
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
    encoder = MLP5Layer(data.groups, args.width).to(device)
    head = projection_head(32 * args.width, args.dim).to(device)
    view = data.plain if args.no_augment else data.view
    y = data.y_train if args.supervised else None
    loader = common.TwoViews(data.x_train, view, args.batch_size, y)
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
