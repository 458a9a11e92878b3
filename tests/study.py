# SPDX-License-Identifier: MIT
"""The study of the README: what i-Mix gains on CovType.

    python tests/study.py             # runs what is missing, then prints the tables
    python tests/study.py --only 40   # of these epochs

Runs lie in runs/study/; two go at a time, on one core each. A card runs the paper's scale instead,
w = 64, three at a time. What is finished is skipped, what was stopped goes on.
tests/study.csv keeps a line of every finished run; tests/pictures/results.svg shows them.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RUNS, RECORD = ROOT / "runs/study", ROOT / "tests/study.csv"
PICTURE = ROOT / "tests/pictures/results.svg"
COLUMNS = ["run", "test_accuracy", "train_accuracy", "loss", "examples_per_s", "torch", "date"]


@dataclass
class Row:
    """A row of the table: for each seed a run without and a run with i-Mix."""

    method: str
    width: int | None
    epochs: int
    seeds: int
    mask: str = "0.2"  # probability of masking: of both runs, or without -> with i-Mix
    flags: str = ""  # of both runs
    without: str = ""  # further ones of the run without i-Mix
    with_imix: str = ""  # further ones of the run with i-Mix

    def runs(self, seed):
        """The command lines."""
        width = f"--width {self.width}" if self.width else ""
        flags = f"{width} --epochs {self.epochs} {self.flags}"
        return [" ".join(f"{SCRIPTS[self.method]} {flags} {end} --seed {seed}".split())
                for end in (f"--alpha 0 {self.without}", self.with_imix)]


SCRIPTS = {
    "N-pair": "npair_tabular.py",
    "MoCo": "moco_imix.py --dataset covtype",
    "BYOL": "byol_imix.py --dataset covtype",
    "N-pair, CIFAR-10": "simclr_imix.py",
    "N-pair, speech": "simclr_imix.py --dataset speech_commands"}
ON_CARD = [
    Row("N-pair", 64, 500, 3),
    Row("MoCo", 64, 500, 3, "0.2 -> 0"),
    Row("BYOL", 64, 500, 3, "0.2 -> 0"),
    Row("N-pair, CIFAR-10", None, 200, 1, "none"),
    Row("N-pair, speech", None, 100, 1, "none"),
]
STUDY = [
    Row("N-pair", 8, 500, 3),
    Row("N-pair", 8, 500, 1, with_imix="--alpha 1.0"),
    Row("MoCo", 8, 500, 3, "0.2 -> 0"),
    Row("BYOL", 8, 500, 3, "0.2 -> 0"),
    Row("N-pair", 16, 500, 2),
    Row("N-pair", 8, 150, 1, "0", flags="--mask 0"),
    Row("MoCo", 8, 150, 1, "0", without="--mask 0"),  # with i-Mix that is the recipe
    Row("BYOL", 8, 150, 1, "0", without="--mask 0"),
    Row("N-pair", 8, 40, 3),
    Row("MoCo", 8, 40, 3, with_imix="--mask 0.2"),
    Row("BYOL", 8, 40, 3, with_imix="--mask 0.2"),
    Row("N-pair", 8, 40, 3, flags="--supervised"),
    Row("N-pair", 8, 40, 3, flags="--supervised", with_imix="--alpha 0.2"),
]


def folder(run):
    """The run folder of a command line."""
    return RUNS / run.replace(".py", "").replace(" --", "-").replace(" ", "")


def cost(run):
    """A run's share of the work: its epochs times the square of its width; a ResNet is as 14."""
    words = run.split()
    width = int(words[words.index("--width") + 1]) if "--width" in words else 14
    return int(words[words.index("--epochs") + 1]) * width**2


def start(run):
    """Run or go on with a command line, on one core; returns it and its exit status."""
    script, *flags = run.split()
    command = [sys.executable, script, *flags, "--out", folder(run), "--resume"]
    with open(f"{folder(run)}.txt", "a") as output:
        return run, subprocess.call(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"})


def work(runs):
    """Run what is not finished of runs, and record it as it comes."""
    RUNS.mkdir(parents=True, exist_ok=True)
    begin, done, total = time.monotonic(), 0, sum(map(cost, runs))
    with ThreadPoolExecutor(3 if torch.cuda.is_available() else 2) as pool:
        try:
            for future in as_completed(pool.submit(start, run) for run in runs):
                run, code = future.result()
                if code:
                    print(f"{run}: ended with {code}, see {folder(run)}.txt", flush=True)
                    continue
                done += cost(run)
                left = timedelta(seconds=round((time.monotonic() - begin) * (total / done - 1)))
                print(f"{run}: {record()[run]:.2%}; {left} left", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped; the same command goes on")


def record():
    """Bring tests/study.csv up to date with the run folders; returns {run: test accuracy}."""
    rows = {}
    if RECORD.exists():
        rows = {row["run"]: row for row in csv.DictReader(RECORD.read_text().splitlines())}
    for run in all_runs():
        result = folder(run) / "result.json"
        if result.exists():
            *_, last = csv.DictReader((folder(run) / "log.csv").read_text().splitlines())
            values = last | json.loads(result.read_text())
            values |= {"run": run, "torch": torch.__version__,
                       "date": date.fromtimestamp(result.stat().st_mtime)}
            rows[run] = {name: values[name] for name in COLUMNS}
    with open(RECORD, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[run] for run in all_runs() if run in rows)
    return {run: float(row["test_accuracy"]) for run, row in rows.items()}


def all_runs(rows=()):
    """Every run of rows, by default of the study, once, the first seeds first."""
    runs = []
    for seed in range(3):
        for row in rows or ON_CARD + STUDY:
            if seed < row.seeds:
                runs += row.runs(seed)
    return list(dict.fromkeys(runs))


def mean(values, sign="-"):
    """Mean and standard deviation of accuracies, in %; sign "+": of what is gained."""
    text = f"{100 * statistics.mean(values):{sign}.1f}"
    if len(values) > 1:
        text += f"\u00b1{100 * statistics.stdev(values):.1f}"
    return text


def pairs(row, accuracy):
    """The accuracies of a row's runs, of each of its seeds that has all."""
    seeds = [[accuracy.get(run) for run in row.runs(seed)] for seed in range(row.seeds)]
    return [seed for seed in seeds if None not in seed]


def title(row):
    """A row's method, with its width and flags where they aren't the study's and the recipe's."""
    flags = [f"`{flags}`" for flags in (row.flags, row.with_imix)
             if flags and "--mask" not in flags]
    width = [f"w = {row.width}"] if row.width not in (8, None) else []
    return ", ".join([row.method, *width, *flags])


def table(accuracy):
    """The README's table, of {run: test accuracy}."""
    lines = ["| method | epochs | masking | seeds | without i-Mix | with i-Mix | gain |",
             "|---|---|---|---|---|---|---|"]
    for row in ON_CARD + STUDY:
        if not pairs(row, accuracy):
            continue
        without, with_imix = zip(*pairs(row, accuracy))
        gain = [b - a for a, b in pairs(row, accuracy)]
        lines.append(f"| {title(row)} | {row.epochs} | {row.mask} | {len(gain)} | {mean(without)} "
                     f"| {mean(with_imix)} | {mean(gain, '+')} |")
    return "\n".join(lines)


def picture(accuracy):
    """The table in SVG: a dot is a run, grey without and orange with i-Mix, at its accuracy."""
    parts, rows = [], [row for row in ON_CARD + STUDY if pairs(row, accuracy)]
    for percent in range(30, 110, 10):
        x = 360 + 6 * (percent - 30)
        parts.append(f'<path d="M{x} 20V{20 * len(rows) + 25}" stroke="#808080" opacity="0.3"/>'
                     f'<text x="{x}" y="{20 * len(rows) + 40}" text-anchor="middle">'
                     f'{percent} %</text>')
    for i, row in enumerate(rows):
        y, words = 30 + 20 * i, f"{title(row)}, {row.epochs} epochs, masking {row.mask}"
        words = words.replace("`", "").replace("->", "\u2192")
        parts.append(f'<text x="345" y="{y + 4}" text-anchor="end">{words}</text>')
        for pair in pairs(row, accuracy):
            for value, colour in zip(pair, ("#808080", "#e08a3c")):
                x = 360 + 6 * (100 * value - 30)
                parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="800" '
                      f'height="{20 * len(rows) + 50}" font-family="sans-serif" font-size="12" '
                      'fill="#808080">', *parts, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", type=int, help="run those of so many epochs alone")
    only = parser.parse_args().only
    rows = ON_CARD if torch.cuda.is_available() else STUDY
    runs = [run for run in all_runs(rows) if not (folder(run) / "result.json").exists()]
    work([run for run in runs if only is None or f"--epochs {only} " in run])
    accuracy = record()
    PICTURE.write_text(picture(accuracy))
    print(table(accuracy))


if __name__ == "__main__":
    main()
