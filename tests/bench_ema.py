# SPDX-License-Identifier: MIT
"""What MoCo's and BYOL's steps cost beyond their networks: EMA update, queue and loss, as a share of the step.

    python tests/bench_ema.py

Rows of CovType's shape at --width 32, N = 512; on a GPU also resnet18 on 32 x 32 images, N = 256. The step is
pretrain()'s, with views and mixing, by the rate that it logs for an epoch; the parts are timed alone, on tensors of the
step's shapes, after each epoch but the first. So is the least that they can cost, bare operations written into tensors
that are there already: lerp of two vectors as long as all parameters, and for MoCo the products of N embeddings with
N + K keys, forward and backward, and the softmax of the logits between them; and MoCo's loss is compared with two
cross-entropies over all N + K logits.
"""

import argparse
import contextlib
import copy
import io
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
from bench_npair import seconds

GROUPS, D = [10, 4, 40], 128


def measure(name, x, view, n, K, networks, device, amp, rounds):
    """Print one line for MoCo and one for BYOL: the step, its parts, their share; and one for MoCo's loss."""
    f, f_ema = (torch.randn(n, D, device=device, requires_grad=grad) for grad in (True, False))
    queue = F.normalize(torch.randn(K, D, device=device), dim=1)
    own, perm, lam = torch.arange(n, device=device), torch.randperm(n, device=device), torch.rand(n, device=device) / 2 + 0.5
    model = nn.Sequential(*networks())
    ema = copy.deepcopy(model).requires_grad_(False)
    predictor = byol.projection_head(D, D).to(device)
    loader = common.TwoViews(x, view, n)
    keys, logits, product = (torch.randn(*size, device=device) for size in ((n + K, D), (n, n + K), (n, D)))
    theta, theta_ema = torch.randn(2, sum(p.numel() for p in model.parameters()), device=device)
    parts = {
        "MoCo": [lambda: moco.update_ema(ema, model, 0.999), lambda: moco.enqueue(queue, f_ema, 4000),
                 lambda: moco.moco_loss(f, f_ema, queue, 0.1, perm, lam).backward()],
        "BYOL": [lambda: byol.update_ema(ema, model, 0.999), lambda: byol.byol_loss(f, f_ema, perm, lam).backward()]}

    def least():
        theta_ema.lerp_(theta, 0.001)
        if method == "MoCo":
            torch.mm(f_ema, keys.T, out=logits)
            torch.softmax(logits, 1, out=logits)
            torch.mm(logits, keys, out=product)

    def cross_entropies():
        logits = F.normalize(f, dim=1) @ torch.cat([F.normalize(f_ema, dim=1), queue]).T / 0.1
        loss_i, loss_j = (F.cross_entropy(logits, label, reduction="none") for label in (own, perm))
        (lam * loss_i + (1 - lam) * loss_j).mean().backward()

    def cost(*functions):
        return sum(seconds(lambda: [function() for _ in range(10)], device) / 10 for function in functions)

    def after_epoch(log, get_state):
        step = n / log[-1]["examples_per_s"]
        measured.append([step, cost(*parts[method]) / step, cost(least) / step])

    options = {"epochs": 1 + rounds, "warmup_epochs": 0, "amp": amp, "after_epoch": after_epoch}
    loops = {"MoCo": lambda: moco.pretrain(*networks(), loader, queue_size=K, **options),
             "BYOL": lambda: byol.pretrain(*networks(), predictor, loader, **options)}
    for method, loop in loops.items():
        measured = []
        with contextlib.redirect_stdout(io.StringIO()):
            loop()
        step, share, bare = map(statistics.median, zip(*measured[1:]))  # the first epoch warms up
        print(f"  {method}, {name}: {n / step:,.0f} examples/s; EMA, {'queue, ' * (method == 'MoCo')}loss take {share:.1%} "
              f"of the step, of which the bare operations {bare:.1%}", flush=True)
    loss = parts["MoCo"][-1]
    ratio = statistics.median(cost(cross_entropies) / cost(loss) for _ in range(rounds))
    print(f"  moco_loss, N = {n}, K = {K}: {ratio:.1f} times as fast as two F.cross_entropy over all logits", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=moco.pick_device, default="auto")
    args = parser.parse_args()
    device = args.device
    amp = moco.autocast_dtype("auto", device)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"MoCo's and BYOL's steps, {where}, torch {torch.__version__}, medians of {args.rounds} rounds")

    def of_tables():
        nets = moco.MLP5Layer(GROUPS, args.width), moco.projection_head(32 * args.width, D)
        return [net.to(device) for net in nets]

    rows = torch.randn(15 * 512, sum(GROUPS), device=device)
    measure(f"w = {args.width}, N = 512", rows, lambda x: x, 512, args.queue, of_tables, device, amp, args.rounds)
    if device.type == "cuda":
        def of_images():
            return [net.to(device) for net in (moco.resnet("resnet18", 3, 32), moco.projection_head(512, D)[:-1])]

        images = torch.randint(256, (40 * 256, 3, 32, 32), dtype=torch.uint8, device=device)
        measure("resnet18, N = 256", images, lambda x: common.image_view(x / 255), 256, args.queue, of_images, device, amp,
                args.rounds)


if __name__ == "__main__":
    main()
