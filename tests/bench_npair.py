# SPDX-License-Identifier: MIT
"""How fast npair_tabular.py pre-trains, against the bare network step and torch.mm, in one run.

    python tests/bench_npair.py --width 32

Real loop: pretrain(), with the shuffling loader, views, mixing and log, on rows of CovType's
shape, by its clock; checkpoints, apart, take 1 % of a run. Bare step: the same networks, loss, SGD
on resident tensors: no views, no mixing, nothing else. torch.mm: the largest layer's product,
(2N, 64 w) x (64 w, 128 w), in the networks' dtype. The three take turns; each figure is the median
over the rounds, and each ratio the median of the rounds' ratios.
"""

import argparse
import contextlib
import io
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import npair_tabular as npair

N, ROWS, GROUPS = 512, 15_120, [10, 4, 40]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AMP = torch.bfloat16 if DEVICE.type == "cuda" else None  # as --amp auto


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
    name = f"cpu, {torch.get_num_threads()} threads"
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    return f"{name}, {AMP or 'float32'}, torch {torch.__version__}"


def bare_step(nets, both, temperature):
    """A function that trains nets on the resident views both, (2N, ...), and does no more."""
    model = nn.Sequential(*nets)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4,
                                fused=True)

    def step():
        with torch.autocast(DEVICE.type, AMP, enabled=AMP is not None):
            f, f_tilde = model(both).chunk(2)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    width = flags.width
    torch.manual_seed(0)
    x = torch.randn(ROWS, sum(GROUPS), device=DEVICE)

    def networks():
        nets = npair.MLP5Layer(GROUPS, width), npair.projection_head(32 * width, 128)
        return [net.to(DEVICE) for net in nets]

    def view(x):
        keep = torch.rand(len(x), GROUPS[0], device=x.device) >= 0.2
        return torch.cat([x[:, : GROUPS[0]] * keep, x[:, GROUPS[0] :]], dim=1)

    args = npair.Args(epochs=2, warmup_epochs=0, width=width)
    step = bare_step(networks(), x[: 2 * N], args.temperature)
    loader = common.TwoViews(x, view, N)
    a = torch.randn(2 * N, 64 * width, device=DEVICE, dtype=AMP)
    b = torch.randn(64 * width, 128 * width, device=DEVICE, dtype=AMP)
    with FlopCounterMode(display=False) as counter:
        step()
    step_flop, mm_flop = counter.get_total_flops(), 2 * a.shape[0] * b.shape[0] * b.shape[1]

    times = {"mm": [], "bare": [], "loop": []}
    for _ in range(1 + flags.rounds):  # the first warms up
        times["mm"].append(seconds(lambda: torch.mm(a, b), 50))
        times["bare"].append(seconds(step, 15))
        times["loop"].append(second_epoch(npair, networks(), loader, args))
    mm, bare, loop = (times[name][1:] for name in ("mm", "bare", "loop"))
    of_bare = statistics.median(p / q for p, q in zip(bare, loop))
    of_mm = statistics.median(step_flop / q / (mm_flop / p) for p, q in zip(mm, loop))
    mm, bare, loop = (statistics.median(values) for values in (mm, bare, loop))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if DEVICE.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    print(f"npair_tabular.py, w = {width}, N = {N}, {where()}, {flags.rounds} rounds")
    print(f"  torch.mm   {mm_flop / mm / 1e9:8,.0f} GFLOP/s")
    print(f"  bare step  {step_flop / bare / 1e9:8,.0f} GFLOP/s  {N / bare:10,.0f} examples/s")
    print(f"  real loop  {step_flop / loop / 1e9:8,.0f} GFLOP/s  {N / loop:10,.0f} examples/s")
    print(f"  real loop / bare step {of_bare:.1%}, real loop / torch.mm {of_mm:.1%}; "
          f"peak memory {memory / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
