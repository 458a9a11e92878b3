# SPDX-License-Identifier: MIT
"""SimCLR pre-training end to end, by simclr_imix.py and by what a user would take otherwise.

    pip install lightly      # for this benchmark alone; without it, the other two are measured
    python tests/bench_peers.py

The same network (resnet18), images (32 x 32, in memory), batch and epochs by: ours, pretrain() with
--loss nt-xent, on CUDA in bf16 and in float32; lightly, the loop and transform of its documented
SimCLR example; plain, a DataLoader with torchvision's transforms and the bare step. DataLoaders
have a worker a core. Each runs in a process of its own, in turn. Examples/s are of the epochs after
the first; memory is the process's own, without its workers', and on CUDA the card's; the first
step's seconds begin with the process.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as v1
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import simclr_imix as simclr
from bench_npair import AMP, DEVICE, DTYPES, in_workers, where
from bench_views import MEAN, STD, TwoImageViews, smooth_images

LIGHTLY = importlib.util.find_spec("lightly") is not None


class Timed:
    """A loader that notes when each epoch begins and when its first step has ended."""

    def __init__(self, loader):
        self.loader, self.epochs, self.first_step = loader, [], None

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.epochs.append(now())
        for batch in self.loader:
            yield batch
            if self.first_step is None:
                self.first_step = now()


def now():
    """Seconds, the device's work done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.time()


def networks():
    """The same in each case; channels_last, as ours has it, is ours alone."""
    torch.manual_seed(0)
    return simclr.resnet("resnet18", 3, 32), simclr.projection_head(512, 128)


def by_ours(images, n, epochs, amp="auto"):
    nets = [net.to(DEVICE, memory_format=torch.channels_last) for net in networks()]
    mean, std = (torch.tensor(values, device=DEVICE)[:, None, None] for values in (MEAN, STD))
    loader = common.TwoViews(images.to(DEVICE),
                             lambda x: (common.image_view(x / 255) - mean) / std, n)
    loader = Timed(loader)
    args = simclr.Args(alpha=0.0, loss="nt-xent", epochs=epochs, amp=amp)
    simclr.pretrain(*nets, loader, args)
    return loader


def by_ours_in_float32(images, n, epochs):
    return by_ours(images, n, epochs, amp="off")


class Views(torch.utils.data.Dataset):
    """What a transform that returns a list of views makes of each PIL image."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def by_lightly(images, n, epochs):
    from lightly.loss import NTXentLoss
    from lightly.transforms.simclr_transform import SimCLRTransform
    model = nn.Sequential(*networks()).to(DEVICE)
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    loader = Timed(in_workers(Views(as_pil(images), transform), n))
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for _ in range(epochs):
        for x, x_tilde in loader:
            loss = criterion(model(x.to(DEVICE)), model(x_tilde.to(DEVICE)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return loader


def by_plain_loop(images, n, epochs):
    model = nn.Sequential(*networks()).to(DEVICE)
    loader = Timed(in_workers(TwoImageViews(as_pil(images), v1.ToTensor(), v1), n))
    optimizer = torch.optim.SGD(model.parameters(), 0.125, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for x, x_tilde in loader:
            f, f_tilde = model(torch.cat([x, x_tilde]).to(DEVICE)).chunk(2)
            loss = simclr.nt_xent_loss(f, f_tilde, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loader


def as_pil(images):
    return [v1.functional.to_pil_image(image) for image in images]


CASES = {"ours": by_ours, "lightly": by_lightly, "plain": by_plain_loop}
if DEVICE.type == "cuda":
    CASES["ours, float32"] = by_ours_in_float32


def measure(name, start, n, steps, epochs):
    """Run a case in this process, and print what it took as JSON."""
    with contextlib.redirect_stdout(io.StringIO()):
        loader = CASES[name](smooth_images(n * steps), n, epochs)
    seconds = now() - loader.epochs[1]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    card = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    print(json.dumps({"rate": n * steps * (epochs - 1) / seconds, "memory": memory / 2**30,
                      "card": card / 2**30, "first_step": loader.first_step - start}))


def main():
    on_card = DEVICE.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=256 if on_card else 128)
    parser.add_argument("--steps", type=int, default=195 if on_card else 2, help="an epoch")
    parser.add_argument("--epochs", type=int, default=3 if on_card else 2, help="2 or more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    sizes = flags.batch_size, flags.steps, flags.epochs
    if flags.case:
        return measure(flags.case, flags.start, *sizes)

    if not LIGHTLY:
        print("lightly is not installed and left out: pip install lightly")
    results = {name: [] for name in CASES if name != "lightly" or LIGHTLY}
    names = ["--batch-size", "--steps", "--epochs"]
    sizes = [str(word) for pair in zip(names, sizes) for word in pair]
    for _ in range(flags.rounds):
        for name, values in results.items():
            command = [sys.executable, __file__, *sizes, "--case", name, "--start"]
            output = subprocess.run([*command, str(time.time())], check=True, capture_output=True)
            values.append(json.loads(output.stdout))
    print(f"SimCLR, resnet18, 32 x 32, batch {flags.batch_size}, {where()}, {DTYPES[AMP]}, "
          f"medians of {flags.rounds} rounds")
    for name, values in results.items():
        rate, memory, card, first_step = (statistics.median(value[key] for value in values)
                                          for key in ("rate", "memory", "card", "first_step"))
        times = statistics.median(a["rate"] / b["rate"] for a, b in zip(results["ours"], values))
        print(f"  {name:14} {rate:8,.1f} examples/s, ours is {times:.2f} times as fast; "
              f"{memory:.2f} GiB, card {card:.2f} GiB; first step after {first_step:.1f} s")


if __name__ == "__main__":
    main()
