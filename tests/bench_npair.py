# SPDX-License-Identifier: MIT
"""How fast npair_tabular.py pre-trains, against the bare network step and against torch.mm, in one run.

    python tests/bench_npair.py --width 32

Real loop: pretrain() with the shuffling loader, views, mixing, log and checkpoints as often as main() writes them, on
rows of CovType's shape.
Bare step: the same networks, loss and SGD on resident tensors: no views, no mixing, nothing else.
torch.mm: the largest layer's product, (2N, 64 w) x (64 w, 128 w), in the networks' dtype.
The three take turns; each figure is the median over the rounds.
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

N, ROWS, GROUPS, TAU = 512, 15_120, [10, 4, 40], 0.1


def seconds(function, device):
    """Wall-clock seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="bare steps, and products, a round")
    parser.add_argument("--device", type=npair.pick_device, default="auto")
    args = parser.parse_args()
    device, width = args.device, args.width
    amp = npair.autocast_dtype("auto", device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    x = torch.randn(ROWS, sum(GROUPS), device=device)

    def networks():
        encoder, head = npair.MLP5Layer(GROUPS, width), npair.projection_head(32 * width, 128)
        return encoder.to(device), head.to(device)

    def view(x):
        keep = torch.rand(len(x), GROUPS[0], device=x.device) >= 0.2
        return torch.cat([x[:, : GROUPS[0]] * keep, x[:, GROUPS[0] :]], dim=1)

    encoder, head = networks()
    model = nn.Sequential(encoder, head)
    optimizer = torch.optim.SGD(model.parameters(), 0.25, momentum=0.9, weight_decay=1e-4, fused=True)
    both = x[: 2 * N]

    def bare_step():
        with torch.autocast(device.type, amp, enabled=amp is not None):
            f, f_tilde = model(both).chunk(2)
        loss = npair.n_pair_loss(f, f_tilde, TAU)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    loop_encoder, loop_head = networks()
    loader = common.TwoViews(x, view, N)
    folder = Path(tempfile.mkdtemp())

    due = 0.0

    def after_epoch(log, get_state):  # main()'s
        nonlocal due
        with open(folder / "log.csv", "a") as file:
            print(*log[-1].values(), sep=",", file=file)
        start = time.monotonic()
        if start > due:
            npair.save(get_state(), folder / "checkpoint.pt")
            due = time.monotonic() + 100 * (time.monotonic() - start)

    def loop():  # two epochs
        with contextlib.redirect_stdout(io.StringIO()):
            npair.pretrain(loop_encoder, loop_head, loader, epochs=2, warmup_epochs=0, temperature=TAU, amp=amp,
                           after_epoch=after_epoch)

    dtype = amp or torch.float32
    a = torch.randn(2 * N, 64 * width, device=device, dtype=dtype)
    b = torch.randn(64 * width, 128 * width, device=device, dtype=dtype)

    with FlopCounterMode(display=False) as counter:
        bare_step()
    step_flop, mm_flop = counter.get_total_flops(), 2 * a.shape[0] * b.shape[0] * b.shape[1]
    loop(), torch.mm(a, b)  # warm up
    times = {"loop": [], "bare": [], "mm": []}
    for _ in range(args.rounds):
        times["mm"].append(seconds(lambda: [torch.mm(a, b) for _ in range(5 * args.steps)], device) / (5 * args.steps))
        times["bare"].append(seconds(lambda: [bare_step() for _ in range(args.steps)], device) / args.steps)
        times["loop"].append(seconds(loop, device) / (2 * len(loader)))
    share_of_bare = statistics.median(b / l for b, l in zip(times["bare"], times["loop"]))
    share_of_mm = statistics.median((step_flop / l) / (mm_flop / m) for m, l in zip(times["mm"], times["loop"]))
    mm, bare, real = (statistics.median(times[name]) for name in ("mm", "bare", "loop"))
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"npair_tabular.py, w = {width}, N = {N}, {name}, {dtype}, torch {torch.__version__}, {args.rounds} rounds")
    print(f"  torch.mm      {mm_flop / mm / 1e9:8,.0f} GFLOP/s")
    print(f"  bare step     {step_flop / bare / 1e9:8,.0f} GFLOP/s  {N / bare:10,.0f} examples/s")
    print(f"  real loop     {step_flop / real / 1e9:8,.0f} GFLOP/s  {N / real:10,.0f} examples/s")
    print(f"  real loop / bare step {share_of_bare:.1%}, real loop / torch.mm {share_of_mm:.1%}")
    print(f"  peak memory {memory / 2**30:.2f} GiB{' of the process' * (device.type != 'cuda')}, two copies of the networks")


if __name__ == "__main__":
    main()
