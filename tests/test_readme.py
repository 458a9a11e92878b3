# SPDX-License-Identifier: MIT
"""The README: its blocks run in the order of the page, its commands parse, and it stays short."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import byol_imix
import common
import moco_imix
import npair_tabular
import simclr_imix

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {f"{script.__name__}.py": script
           for script in (npair_tabular, simclr_imix, moco_imix, byol_imix)}


def test_the_blocks_run_in_the_order_of_the_page(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for i in range(16):
            image = Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8))
            image.save(tmp_path / "my_images" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 2 and torch.isfinite(names["loss"])


def commands():
    lines = re.findall(r"^    (?:torchrun --nproc_per_node=\d+|python) (\w+\.py.*)$", README, re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_its_commands_parse(command, tmp_path, monkeypatch):
    script, *flags = command
    if script == "common.py":
        monkeypatch.chdir(tmp_path)
        with pytest.raises(common.DataError):  # there is no such run
            common.main(["RUN"] + flags[1:])
    else:
        SCRIPTS[script].parse_args(flags, lambda *_: {"domain": "table", "own": True})


def test_it_is_short_and_begins_with_an_accuracy():
    assert len(README.split()) <= 1700
    assert "%" in "\n".join(README.splitlines()[:25])
