# SPDX-License-Identifier: MIT
"""Several processes: equal to one, and as commands under torchrun."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import byol_imix
import moco_imix
import npair_tabular
import simclr_imix
import whole_batch
from test_pretrain import Stop, setup
from test_scripts import KILLS, SCRIPTS, command, log_without_rate, result_without_time, small

CASES = {
    "npair": (npair_tabular, {}), "npair-alpha0": (npair_tabular, {"alpha": 0.0}),
    "simclr": (simclr_imix, {}), "simclr-cutmix": (simclr_imix, {"mix": "cutmix"}),
    "simclr-nt-xent": (simclr_imix, {"alpha": 0.0, "loss": "nt-xent"}),
    "npair-supervised": (npair_tabular, {"supervised": True}),
    "simclr-supcon": (simclr_imix, {"alpha": 0.0, "loss": "supcon"}),
    "simclr-triplet": (simclr_imix, {"loss": "triplet", "supervised": True}),
    "simclr-barlow-twins": (simclr_imix, {"loss": "barlow-twins"}),
    "simclr-dare": (simclr_imix, {"loss": "dare"}),
    "simclr-inputmix": (simclr_imix, {"inputmix": True}),
    "moco": (moco_imix, {"queue": 40}), "moco-alpha0": (moco_imix, {"queue": 40, "alpha": 0.0}),
    "byol": (byol_imix, {}), "byol-symmetric": (byol_imix, {"symmetric": True}),
    "simsiam": (byol_imix, {"symmetric": True, "ema": 0.0, "alpha": 0.0}),
}


def run(case, folder, stop=False):
    """Two epochs of 4 steps in float64, into a folder; stop: end after the first epoch."""
    script, options = CASES[case]
    *nets, loader = setup(script)
    nets = [net.double() for net in nets]
    loader.x = loader.x[:64].double()
    if options.get("supervised") or options.get("loss") == "supcon":
        loader.y = torch.arange(64) % 4
    if dist.is_initialized():
        nets = [whole_batch.convert(net) for net in nets]

    def evaluate():
        if stop:
            raise Stop

    args = script.Args(epochs=2, lr=0.8, warmup_epochs=0, eval_every=1, **options)
    script.pretrain(*nets, loader, args, folder, evaluate)


def in_two_processes(rank, folder):
    """Each case from its beginning, and from a checkpoint that one process made."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        run(case, folder / f"two-{case}")
        run(case, folder / f"from-one-to-two-{case}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for case in CASES:
        for name in ("one", "two", "from-one-to-two"):
            (folder / f"{name}-{case}").mkdir()
        run(case, folder / f"one-{case}")
        with pytest.raises(Stop):
            run(case, folder / f"from-one-to-two-{case}", stop=True)
    torch.multiprocessing.spawn(in_two_processes, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("many", ["two", "from-one-to-two"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(folder, case, many):
    """Weights, BatchNorm's statistics, momenta, EMA, queue and losses."""
    one, two = (torch.load(folder / f"{name}-{case}" / "checkpoint.pt", weights_only=True)
                for name in ("one", many))
    assert len(one["log"]) == len(two["log"]) == 2
    for a, b in zip(one["log"], two["log"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)  # the loss is computed in float32
        assert a["lr"] == b["lr"]
    one.pop("log"), two.pop("log")
    tensors = [torch.utils._pytree.tree_leaves(state) for state in (one, two)]
    assert len(tensors[0]) == len(tensors[1]) > 20
    for a, b in zip(*tensors):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------- commands
def torchrun(script, *flags, n=2, wrapper=None):
    """The command in n processes, in a session of its own."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    if wrapper:
        run.append(str(wrapper))
    return subprocess.Popen([*run, *command(script, *flags)[1:]], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_of_two_processes(tmp_path, script):
    """One run folder, each line once; and one process goes on with it."""
    process = torchrun(script, "--epochs", 2, "--out", tmp_path)
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert shown.count("epoch 1/2") == shown.count("epoch 2/2") == 1
    assert shown.count("test accuracy") == 1 and shown.count("examples to train on") == 1
    assert "BatchNorm" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt", "config.json", "data.json", "encoder.pt", "features.npz", "lock",
        "log.csv", "result.json"]
    assert len(log_without_rate(tmp_path)) == 3
    result = result_without_time(tmp_path)
    script.main([*small(script), "--epochs", "2", "--out", str(tmp_path), "--resume"])
    assert json.dumps(result) == json.dumps(result_without_time(tmp_path))


def children(pid):
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by /proc")
@pytest.mark.parametrize("script, flags", [
    (npair_tabular, "--epochs 20"), *([
        (simclr_imix, "--epochs 4"), (moco_imix, "--epochs 40 --queue 1000"),
        (byol_imix, "--epochs 40")] if KILLS > 2 else [])])
def test_two_processes_killed_and_resumed(tmp_path, script, flags):
    """All of them killed, or one alone, which ends the other; then they go on, to the bit."""
    flags = flags.split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torchrun(script, *flags, "--out", whole).wait() == 0
    moments = random.Random(0)
    for kill in range(KILLS):
        process = torchrun(script, *flags, "--out", killed, "--resume")
        for line in process.stdout:
            if line.startswith("epoch "):
                break
        time.sleep(moments.uniform(0, 1 / KILLS))
        if kill % 2 == 0:
            os.killpg(process.pid, signal.SIGKILL)
        elif workers := children(process.pid):
            os.kill(random.Random(kill).choice(workers), signal.SIGKILL)
        process.communicate(timeout=60)
    process = torchrun(script, *flags, "--out", killed, "--resume")
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert log_without_rate(whole) == log_without_rate(killed)
    encoders = [torch.load(out / "encoder.pt", weights_only=True) for out in (whole, killed)]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())


WRAPPER = """
import os, runpy, sys, time
import common
import torch
rank, load = int(os.environ["RANK"]), common.load

def watched(*args):
    with open(r"{order}", "a") as file:
        file.write(f"{{rank}} begins\\n")
    time.sleep(1)
    data = load(*args)
    with open(r"{order}", "a") as file:
        file.write(f"{{rank}} ends\\n")
    return data

def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("out of memory")

common.load = watched
if rank == 1:
    torch.randperm = out_of_memory
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_one_process_that_fails_ends_all_with_one_line(tmp_path):
    """And before that the first process alone has loaded the data while the other waited."""
    wrapper, order = tmp_path / "wrapper.py", tmp_path / "order"
    wrapper.write_text(WRAPPER.format(order=order))
    os.environ["PYTHONPATH"] = str(Path(npair_tabular.__file__).parent)
    process = torchrun(npair_tabular, "--out", tmp_path / "run", wrapper=wrapper)
    del os.environ["PYTHONPATH"]
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("npair_tabular.py: ")]
    assert len(lines) == 1 and "out of memory" in lines[0], errors
    assert re.search(r"exitcode *: 1 ", errors)
    assert order.read_text().split("\n")[:4] == ["0 begins", "0 ends", "1 begins", "1 ends"]


@pytest.mark.parametrize("flags", [["--batch-size", 127], ["--alpha", "nan"]], ids=str)
def test_what_all_processes_refuse_is_said_once(tmp_path, flags):
    process = torchrun(npair_tabular, *flags, "--out", tmp_path / "run")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert errors.count("npair_tabular.py: ") == 1 and flags[0] in errors
    assert re.search(r"exitcode *: 2 ", errors)
