# SPDX-License-Identifier: MIT
"""What MoCo's and BYOL's steps cost beyond their networks: loss, EMA and queue.

    python tests/bench_ema.py

Rows of CovType's shape at --width 32, N = 512, K = 4096. The step is pretrain()'s, views and mixing
included, by the second epoch's clock; loss with its gradient, EMA update and queue are timed alone,
on tensors of the step's shapes.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import byol_imix as byol
import common
import moco_imix as moco
from bench_npair import AMP, DEVICE, DTYPES, GROUPS, N, ROWS, second_epoch, seconds, where


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    D, K = 128, flags.queue
    torch.manual_seed(0)
    loader = common.TwoViews(torch.randn(ROWS, sum(GROUPS), device=DEVICE), lambda x: x, N)
    f, f_ema = torch.randn(2, N, D, device=DEVICE)
    f.requires_grad_()
    queue = F.normalize(torch.randn(K, D, device=DEVICE), dim=1)
    perm, lam = torch.randperm(N, device=DEVICE), torch.rand(N, device=DEVICE)

    def networks(script):
        nets = [script.MLP5Layer(GROUPS, flags.width), script.projection_head(32 * flags.width, D)]
        if script is byol:
            nets.append(script.projection_head(D, D))
        return [net.to(DEVICE) for net in nets]

    print(f"w = {flags.width}, N = {N}, K = {K}, {where()}, {DTYPES[AMP]}, "
          f"medians of {flags.rounds} rounds")
    for script, own in ((moco, {"queue": K, "bn_groups": 1}), (byol, {})):
        model = nn.Sequential(*networks(script)[:2])
        ema = copy.deepcopy(model)
        parts = {
            "loss": lambda: moco.moco_loss(f, f_ema, queue, 0.1, perm, lam).backward(),
            "EMA": lambda: script.update_ema(ema, model, 0.999),
            "queue": lambda: torch.cat([F.normalize(f_ema, dim=1), queue])[: len(queue)],
        }
        if script is byol:
            parts = {"loss": lambda: byol.byol_loss(f, f_ema, perm, lam).backward(),
                     "EMA": parts["EMA"]}
        args = script.Args(epochs=2, warmup_epochs=0, **own)
        times = {name: [] for name in ("step", *parts)}
        for _ in range(flags.rounds):
            times["step"].append(second_epoch(script, networks(script), loader, args))
            for name, part in parts.items():
                part()  # warms up
                times[name].append(seconds(part, 20))
        medians = {name: statistics.median(values) for name, values in times.items()}
        step = medians.pop("step")
        share = sum(medians.values()) / step
        text = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in medians.items())
        print(f"  {script.__name__}: step {1000 * step:.1f} ms; {text}: {share:.1%} of the step")


if __name__ == "__main__":
    main()
