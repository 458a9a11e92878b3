# SPDX-License-Identifier: MIT
"""How fast two views of a batch of images or clips are made, against what a user would use otherwise, in one run.

    python tests/bench_views.py

Ours: common.image_view on the whole batch, on the device. The others make their views one by one, in a DataLoader with a
worker a core. PIL: torchvision's transforms on PIL images (what the paper's code does). v2: torchvision.transforms.v2 on
tensors. torchaudio, for speech: its transforms, against common.speech_view. Rates are two-view examples a second and, on
the CPU, a core. Also the share of a pre-training step that the views take, and that step against the bare network step on
resident tensors.
"""

import argparse
import contextlib
import io
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
import torchvision.transforms as v1
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import simclr_imix as simclr
from bench_npair import seconds

MEAN, STD = common.CIFAR["cifar10"][4:]


def in_workers(data, n, cores):
    return torch.utils.data.DataLoader(data, n, shuffle=True, drop_last=True, num_workers=cores, persistent_workers=True)


class TwoImageViews(torch.utils.data.Dataset):
    def __init__(self, images, to_float, t):
        self.images = images
        self.transform = t.Compose([
            t.RandomResizedCrop(32, scale=(0.2, 1.0)), t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2), t.RandomHorizontalFlip(), to_float, t.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


class TwoClipViews(torch.utils.data.Dataset):
    """The augmentations of common.speech_view by torchaudio: it resamples with a filter and stretches by phase vocoder."""

    def __init__(self, clips, noise):
        self.clips, self.noise = clips, noise
        self.speed = torchaudio.transforms.SpeedPerturbation(16000, [0.84, 0.88, 0.92, 0.96, 1.04, 1.08, 1.12, 1.16, 1.2])
        self.spectrogram = torchaudio.transforms.Spectrogram(2048, hop_length=512, power=None, pad_mode="constant")
        self.stretch = torchaudio.transforms.TimeStretch(512, 1025)
        self.mel = torchaudio.transforms.MelScale(32, 16000, 0, 8000, 1025, "slaney", "slaney")
        self.decibel = torchaudio.transforms.AmplitudeToDB("power", top_db=80)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.view(self.clips[i] / 32768), self.view(self.clips[i] / 32768)

    def view(self, x):
        if random.random() < 0.5:
            x = x * random.uniform(0.7, 1.1)
        if random.random() < 0.5:
            x = self.speed(x)[0]
            x = F.pad(x[:16000], [0, max(0, 16000 - len(x))])
        s = self.spectrogram(x)
        if random.random() < 0.5:
            s = self.stretch(s, random.uniform(0.8, 1.2))
        shift = random.randint(-8, 8) if random.random() < 0.5 else 0
        s = F.pad(s, [max(0, -shift), 40])[:, max(0, shift):][:, :32]
        if random.random() < 0.5:
            start, share = random.randrange(len(self.noise) - 16000), random.uniform(0, 0.45)
            s = s * (1 - share) + share * self.spectrogram(self.noise[start: start + 16000])
        level = self.decibel(self.mel(s.abs().square())[None])
        return level - level.max()


def bench_speech(n, rounds, device, cores):
    clips = torch.randint(-9000, 9000, (max(2, cores) * n, 16000), dtype=torch.int16)  # work for every worker
    noise = torch.randn(20, 16000) / 9
    resident, resident_noise = clips.to(device), common.stft(noise.to(device))
    one_by_one = in_workers(TwoClipViews(clips, noise.flatten()), n, cores)

    ours = common.TwoViews(resident, lambda x: common.speech_view(x / 32768, resident_noise), n)
    compare(f"clips of a second, batch {n}", {"ours": ours, "torchaudio": one_by_one}, len(clips), rounds, device, cores)


def compare(title, loaders, examples, rounds, device, cores):
    """Print a line for each loader: its rate, in all and per core, and how often ours is as fast, round by round."""
    rates = {name: [] for name in loaders}
    for _ in range(1 + rounds):
        for name, loader in loaders.items():
            rates[name].append(examples / seconds(lambda: [None for _ in loader], device))
    print(f"Two views of {title}, medians of {rounds} rounds")
    for name, (_, *values) in rates.items():  # the first warms up and starts the workers
        rate = statistics.median(values)
        times = statistics.median(a / b for a, b in zip(rates["ours"][1:], values))
        on_device = name == "ours" and device.type == "cuda"
        print(f"  {name:10} {rate:10,.0f} examples/s  {rate / (1 if on_device else cores):10,.0f} a "
              f"{'device' if on_device else 'core'}   ours is {times:.1f} times as fast", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=simclr.pick_device, default="auto")
    args = parser.parse_args()
    device, n, cores = args.device, args.batch_size, torch.get_num_threads()
    amp = simclr.autocast_dtype("auto", device)
    torch.manual_seed(0)
    # Images of smooth shapes, so that hue, crop and contrast have something to do.
    images = torch.rand(max(8, cores) * n, 3, 6, 6)
    images = nn.functional.interpolate(images, size=32, mode="bicubic").clamp(0, 1).mul(255).byte()
    resident = images.to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def view(x):
        return (common.image_view(x / 255) - mean) / std

    pil = in_workers(TwoImageViews([v1.functional.to_pil_image(image) for image in images], v1.ToTensor(), v1), n, cores)
    tensors = in_workers(TwoImageViews(images, v2.ToDtype(torch.float32, scale=True), v2), n, cores)
    loaders = {"ours": common.TwoViews(resident, view, n), "PIL": pil, "v2": tensors}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {cores} cores"
    compare(f"32 x 32 images, batch {n}, {where}, torch {torch.__version__}", loaders, len(images), args.rounds, device, cores)
    del loaders, pil, tensors  # and their workers

    def networks():
        encoder, head = simclr.resnet("resnet18", 3, 32), simclr.projection_head(512, 128)
        return encoder.to(device), head.to(device)

    model = nn.Sequential(*networks()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.125, momentum=0.9, weight_decay=1e-4, fused=True)
    both = torch.cat([view(resident[:n]), view(resident[:n])])

    def bare_step():
        with torch.autocast(device.type, amp, enabled=amp is not None):
            f, f_tilde = model(both).chunk(2)
        loss = simclr.n_pair_loss(f, f_tilde, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    loop_networks = networks()
    steps = 32 if device.type == "cuda" else 2
    loader = common.TwoViews(resident.repeat(4, 1, 1, 1)[: steps * n], view, n)

    def loop():
        with contextlib.redirect_stdout(io.StringIO()):
            simclr.pretrain(*loop_networks, loader, epochs=1, warmup_epochs=0, amp=amp)

    bare_step(), loop()  # warm up
    bare, real, views = [], [], []
    for _ in range(3):
        bare.append(seconds(lambda: [bare_step() for _ in range(steps)], device) / steps)
        real.append(seconds(loop, device) / steps)
        views.append(seconds(lambda: [view(resident[:n]) for _ in range(20)], device) / 10)
    print(f"  pre-training step of resnet18: {n / statistics.median(real):,.0f} examples/s, "
          f"{statistics.median(b / r for b, r in zip(bare, real)):.1%} of the bare step's; views take "
          f"{statistics.median(v / r for v, r in zip(views, real)):.1%} of it")
    bench_speech(n, args.rounds, device, cores)


if __name__ == "__main__":
    main()
