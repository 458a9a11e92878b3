# SPDX-License-Identifier: MIT
"""How fast two views of a batch of images or clips are made, against what a user would use.

    python tests/bench_views.py

Ours: common.image_view and common.speech_view on the whole batch, on the device. The others make
their views one by one, in a DataLoader with a worker a core. PIL: torchvision's transforms on PIL
images, what the paper's code does. v2: torchvision.transforms.v2 on tensors. torchaudio: its
transforms. Rates are two-view examples a second and, on the CPU, a core. Also SimCLR's
pre-training step against the bare network step on resident tensors, and the views' share of it.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
import torchvision.transforms as v1
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import simclr_imix as simclr
from bench_npair import (AMP, CORES, DEVICE, DTYPES, bare_step, in_workers, second_epoch, seconds,
                         where)

MEAN, STD = common.CIFAR["cifar10"][1:]


def smooth_images(n):
    """uint8 images (n, 3, 32, 32) of smooth shapes: hue, crop and contrast have something to do."""
    images = torch.rand(n, 3, 6, 6)
    images = F.interpolate(images, size=32, mode="bicubic").clamp(0, 1)
    return images.mul(255).byte()


class TwoImageViews(torch.utils.data.Dataset):
    def __init__(self, images, to_float, t):
        self.images = images
        self.transform = t.Compose([
            t.RandomResizedCrop(32, scale=(0.2, 1.0)),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2), t.RandomHorizontalFlip(), to_float, t.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


class TwoClipViews(torch.utils.data.Dataset):
    """What common.speech_view does by torchaudio: a resampling filter, a phase vocoder."""

    def __init__(self, clips, noise):
        t = torchaudio.transforms
        speeds = [0.84, 0.88, 0.92, 0.96, 1.04, 1.08, 1.12, 1.16, 1.2]
        self.clips, self.noise = clips, noise
        self.speed = t.SpeedPerturbation(16000, speeds)
        self.spectrogram = t.Spectrogram(2048, hop_length=512, power=None)
        self.stretch = t.TimeStretch(512, 1025)
        self.mel = t.MelScale(32, 16000, 0, 8000, 1025, "slaney", "slaney")
        self.decibel = t.AmplitudeToDB("power", top_db=80)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.view(self.clips[i] / 32768), self.view(self.clips[i] / 32768)

    def distorted(self, x):
        if random.random() < 0.5:
            x = x * random.uniform(0.7, 1.1)
        if random.random() < 0.5:
            x = self.speed(x)[0]
            x = F.pad(x[:16000], [0, max(0, 16000 - len(x))])
        s = self.spectrogram(x)
        if random.random() < 0.5:
            s = self.stretch(s, random.uniform(0.8, 1.2))
        frames = s.shape[1]
        shift = random.randint(-8, 8) if random.random() < 0.5 else 0
        s = F.pad(s, [max(0, -shift), max(0, shift)])[:, max(0, shift):][:, :frames]
        return F.pad(s, [0, 32])[:, :32]

    def view(self, x):
        s = self.distorted(x)
        if random.random() < 0.5:
            start, share = random.randrange(len(self.noise) - 16000), random.uniform(0, 0.45)
            s = s * (1 - share) + share * self.distorted(self.noise[start : start + 16000])
        level = self.decibel(self.mel(s.abs().square())[None])
        return level - level.max()


def compare(title, loaders, examples, rounds):
    """Print each loader's rate, in all and a core, and how often ours is as fast, by round."""
    rates = {name: [] for name in loaders}
    for _ in range(1 + rounds):  # the first warms up and starts the workers
        for name, loader in loaders.items():
            rates[name].append(examples / seconds(lambda: [None for _ in loader]))
    print(f"Two views of {title}, {where()}, medians of {rounds} rounds")
    for name, (_, *values) in rates.items():
        rate = statistics.median(values)
        times = statistics.median(a / b for a, b in zip(rates["ours"][1:], values))
        share = f"{rate / CORES:10,.0f} a core"
        if name == "ours" and DEVICE.type == "cuda":
            share = "on the device"
        print(f"  {name:10} {rate:10,.0f} examples/s  {share}   ours is {times:.1f} times as fast",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    n = flags.batch_size
    torch.manual_seed(0)
    images = smooth_images(max(8, CORES) * n)
    resident = images.to(DEVICE)
    mean, std = (torch.tensor(values, device=DEVICE)[:, None, None] for values in (MEAN, STD))

    def view(x):
        return (common.image_view(x / 255) - mean) / std

    ours = common.TwoViews(resident, view, n)
    as_pil = [v1.functional.to_pil_image(image) for image in images]
    pil = in_workers(TwoImageViews(as_pil, v1.ToTensor(), v1), n)
    tensors = in_workers(TwoImageViews(images, v2.ToDtype(torch.float32, scale=True), v2), n)
    compare(f"32 x 32 images, batch {n}", {"ours": ours, "PIL": pil, "v2": tensors}, len(images),
            flags.rounds)
    del pil, tensors  # and their workers

    def networks():
        nets = simclr.resnet("resnet18", 3, 32), simclr.projection_head(512, 128)
        return [net.to(DEVICE, memory_format=torch.channels_last) for net in nets]

    steps = 32 if DEVICE.type == "cuda" else 2
    args = simclr.Args(epochs=2, warmup_epochs=0)
    step, both = bare_step(networks(), args.temperature), view(resident[:n].repeat(2, 1, 1, 1))
    loader = common.TwoViews(resident.repeat(4, 1, 1, 1)[: steps * n], view, n)
    step(both)  # warms up
    bare, loop, views = [], [], []
    for _ in range(min(3, flags.rounds)):
        bare.append(seconds(lambda: step(both), steps))
        loop.append(second_epoch(simclr, networks(), loader, args))
        views.append(seconds(lambda: (view(resident[:n]), view(resident[:n])), 10))
    of_bare = statistics.median(a / b for a, b in zip(bare, loop))
    of_loop = statistics.median(a / b for a, b in zip(views, loop))
    rate = n / statistics.median(loop)
    print(f"  pre-training step of resnet18, {DTYPES[AMP]}: {rate:,.0f} examples/s, {of_bare:.1%} "
          f"of the bare step's; views take {of_loop:.1%} of it", flush=True)

    clips = torch.randint(-9000, 9000, (max(2, CORES) * n, 16000), dtype=torch.int16)
    noise = torch.randn(20, 16000) / 9
    resident, resident_noise = clips.to(DEVICE), noise.to(DEVICE)
    ours = common.TwoViews(resident, lambda x: common.speech_view(x / 32768, resident_noise), n)
    others = in_workers(TwoClipViews(clips, noise.flatten()), n)
    compare(f"clips of a second, batch {n}", {"ours": ours, "torchaudio": others}, len(clips),
            flags.rounds)


if __name__ == "__main__":
    main()
