# SPDX-License-Identifier: MIT
"""How fast npair_tabular.py pre-trains, against the bare network step, in one run.

    python tests/bench_npair.py    # w = 64 on a card, else 8

Bare step: the networks, loss and SGD on resident tensors: no views, no mixing, nothing else. Real
loop: pretrain(), with the shuffling loader, views, mixing and log, by its own clock; checkpoints,
apart, take 1 % of a run. DataLoader: the bare step, fed by a DataLoader with a worker a core that
makes each row's views. All without and with torch.compile, on CUDA in float32 and in bf16, on rows
of CovType's shape. The three take turns; each rate is the median over the rounds, and each ratio
the median of the rounds' ratios.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import npair_tabular as npair

N, ROWS, GROUPS = 512, 15_120, [10, 4, 40]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AMP = "bf16" if DEVICE.type == "cuda" else "off"  # as --amp auto
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16}
CORES = torch.get_num_threads()


def seconds(function, times=1):
    """Wall-clock seconds of a call, the device's work included, over as many calls as that."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def where():
    """The device and torch's version, for a title."""
    name = f"cpu, {CORES} threads"
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


def in_workers(data, n):
    """A DataLoader with a worker a core, as one would have it on a training machine."""
    return torch.utils.data.DataLoader(data, n, shuffle=True, drop_last=True, num_workers=CORES,
                                       persistent_workers=True, pin_memory=DEVICE.type == "cuda")


def bare_step(nets, temperature, amp=AMP, compiled=False):
    """A function that trains nets on two views, both (2N, ...), and does no more."""
    model = nn.Sequential(*nets)
    net = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4,
                                fused=True)

    def step(both):
        with torch.autocast(DEVICE.type, DTYPES[amp], enabled=amp != "off"):
            f, f_tilde = net(both).chunk(2)
        loss = npair.n_pair_loss(f, f_tilde, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def second_epoch(script, nets, loader, args):
    """The seconds a step that pretrain() takes in the second of two epochs, by its own clock."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        log = script.pretrain(*nets, loader, args, Path(out))
    return loader.batch_size / log[1]["examples_per_s"]


def view(x):
    """Masked rows (..., 54): each number with probability 0.2, as the recipe has it."""
    keep = torch.rand(*x.shape[:-1], GROUPS[0], device=x.device) >= 0.2
    return torch.cat([x[..., : GROUPS[0]] * keep, x[..., GROUPS[0] :]], dim=-1)


class TwoRowViews(torch.utils.data.Dataset):
    """Rows one by one, as an ordinary loop has them."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return view(self.x[i]), view(self.x[i])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--width", type=int, default=64 if DEVICE.type == "cuda" else 8)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    width = flags.width
    torch.manual_seed(0)
    rows = torch.randn(ROWS, sum(GROUPS))
    resident = rows.to(DEVICE)
    ours, workers = common.TwoViews(resident, view, N), in_workers(TwoRowViews(rows), N)
    steps = ROWS // N

    def networks():
        nets = npair.MLP5Layer(GROUPS, width), npair.projection_head(32 * width, 128)
        return [net.to(DEVICE) for net in nets]

    def ordinary_epoch(step):
        for views in workers:
            step(torch.cat(views).to(DEVICE, non_blocking=True))

    print(f"npair_tabular.py, w = {width}, N = {N}, {where()}, {flags.rounds} rounds")
    for amp in dict.fromkeys(("off", AMP)):
        for compiled in (False, True):
            args = npair.Args(epochs=2, warmup_epochs=0, width=width, amp=amp, compile=compiled)
            step = bare_step(networks(), args.temperature, amp, compiled)
            times = {"bare step": [], "real loop": [], "DataLoader": []}
            for _ in range(1 + flags.rounds):  # the first warms up
                times["bare step"].append(seconds(lambda: step(resident[: 2 * N]), steps))
                times["real loop"].append(second_epoch(npair, networks(), ours, args))
                times["DataLoader"].append(seconds(lambda: ordinary_epoch(step)) / steps)
            print(f"  {DTYPES[amp]}, torch.compile {'on' if compiled else 'off'}", flush=True)
            for name, (_, *values) in times.items():
                rate = N / statistics.median(values)
                of_bare = statistics.median(p / q for p, q in zip(times["bare step"][1:], values))
                print(f"    {name} {rate:10,.0f} examples/s  {of_bare:6.1%} of the bare step")


if __name__ == "__main__":
    main()
