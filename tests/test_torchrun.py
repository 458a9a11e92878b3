# SPDX-License-Identifier: MIT
"""Several processes: equal to one, and as commands. Forks stand for torchrun, but in one test."""

import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import whole_batch
from conftest import Child, free_port, refuse, run_two, start, start_two, succeed
from small import (FILES, TABLE, Stop, assert_same_run, every_script, quick, recipe, result_of,
                   setup, small, stop, without_rate)

import byol_imix as byol
import moco_imix as moco
import npair_tabular as npair
import simclr_imix as simclr

CASES = {
    "npair": (npair, {}), "npair-supervised": (npair, {"supervised": True}),
    "simclr-cutmix": (simclr, {"mix": "cutmix"}),
    "simclr-nt-xent": (simclr, {"alpha": 0.0, "loss": "nt-xent"}),
    "simclr-supcon": (simclr, {"alpha": 0.0, "loss": "supcon"}),
    "simclr-triplet": (simclr, {"loss": "triplet", "supervised": True}),
    "simclr-barlow-twins": (simclr, {"loss": "barlow-twins"}),
    "simclr-dare": (simclr, {"loss": "dare"}),
    "moco": (moco, {}), "moco-alpha0": (moco, {"alpha": 0.0}),
    "moco-groups": (moco, {"bn_groups": 2}),
    "byol": (byol, {"inputmix": True}),
    "simsiam": (byol, {"symmetric": True, "ema": 0.0, "alpha": 0.0})}


def train(case, folder, evaluate=lambda: 0.5):
    """Three epochs in float64, into a folder; BatchNorm sees the batches of all processes."""
    script, options = CASES[case]
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    *nets, loader = setup(script, y=torch.arange(64) % 4)
    if dist.is_initialized() and options.get("bn_groups") != 2:  # each of two has one of these
        nets = [whole_batch.convert(net) for net in nets]
    dim = {"dim": 4} if "dare" in case else {}
    args = recipe(script, epochs=3, warmup_epochs=0, eval_every=2, **options | dim)
    folder.mkdir(exist_ok=True)
    script.pretrain(*nets, loader, args, folder, evaluate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each case by one process, by two, and begun by one and ended by two."""
    folder = tmp_path_factory.mktemp("processes")

    def alone():
        for case in CASES:
            train(case, folder / f"one-{case}")
            with pytest.raises(Stop):
                train(case, folder / f"from-one-to-two-{case}", stop)

    def together(rank):
        for case in CASES:
            train(case, folder / f"two-{case}")
            train(case, folder / f"from-one-to-two-{case}")

    child = Child(alone).wait()
    assert child.rc == 0, child.err
    run_two(together)
    return folder


@pytest.mark.parametrize("many", ["two", "from-one-to-two"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(folder, case, many):
    """Weights, BatchNorm's statistics, momenta, EMA, queue, losses, std and learning rates.

    In MoCo's groups running statistics are those of the first process's groups.
    """
    outs = [folder / f"{name}-{case}" for name in ("one", many)]
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in outs)
    for row, row_two in zip(one.pop("log"), two.pop("log"), strict=True):
        assert row["test_accuracy"] == row_two["test_accuracy"]
        for name in ("epoch", "loss", "lr", "std"):
            assert row[name] == pytest.approx(row_two[name], rel=1e-10)
    if case == "moco-groups":
        for name in ("model", "ema"):
            for state in (one, two):
                state[name] = [t for key, t in state[name].items()
                               if "running" not in key and "num_batches" not in key]
    tensors = [torch.utils._pytree.tree_leaves(state) for state in (one, two)]
    assert len(tensors[0]) == len(tensors[1]) > 20
    for a, b in zip(*tensors):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------- commands
def two(script, *flags, **options):
    """The Children of a command in two processes, not yet at their end."""
    def call(rank):
        sys.argv = [script.__file__]
        script.main([str(flag) for flag in flags])

    return start_two(call, before=quick, **options)


def end_well(children):
    for child in children:
        child.wait()
    assert all(child.rc == 0 for child in children), "\n".join(child.err for child in children)
    return [child.out for child in children]


@every_script
def test_a_run_of_two_processes(tmp_path, script, images):
    """One run folder, each line once; and one process goes on with it."""
    flags = [*small(script, images), "--epochs=2", "--eval-every=1", f"--out={tmp_path}"]
    shown, of_the_other = end_well(two(script, *flags))
    assert shown.count("epoch 1/2") == shown.count("epoch 2/2") == 1
    assert "epoch 1" not in of_the_other
    assert {path.name for path in tmp_path.iterdir()} == FILES and len(without_rate(tmp_path)) == 3
    result = result_of(tmp_path)
    succeed(script, *flags, "--resume", before=quick)
    assert result == result_of(tmp_path)


def test_on_the_cpu_each_process_says_that_batch_norm_sees_its_own_rows(tmp_path):
    shown, _ = end_well(two(npair, *TABLE, "--epochs=1", f"--out={tmp_path}"))
    assert "BatchNorm" in shown.partition("epoch 1/1")[0]


@every_script
def test_two_processes_killed_and_resumed(tmp_path, script, images):
    """Both killed, or one alone, which ends the other; then they go on, to the bit."""
    flags = [*small(script, images), "--epochs=8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end_well(two(script, *flags, f"--out={whole}"))
    moments = random.Random(0)
    for victims in ((0, 1), (1,)):
        children = two(script, *flags, f"--out={killed}", "--resume")
        children[0].read(until="\nepoch ")
        time.sleep(moments.uniform(0, 0.2))
        for victim in victims:
            children[victim].kill()
        assert [child.wait().rc != 0 for child in children] == [True, True]
    end_well(two(script, *flags, f"--out={killed}", "--resume"))
    assert_same_run(whole, killed)


@pytest.mark.parametrize("groups, world", [(3, 2), (2, 4)])
def test_groups_that_processes_cannot_share_are_refused(tmp_path, groups, world):
    """Each process takes as many groups; one group is of the whole batch."""
    children = two(moco, *TABLE, "--epochs=1", f"--bn-groups={groups}", f"--out={tmp_path / 'run'}",
                   world=world)
    for child in children:
        child.wait()
        assert child.rc == 2 and "--bn-groups" in child.err and "Traceback" not in child.err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    for child in two(npair, "--dataset=digits", "--width=1", "--batch-size=127", "--epochs=1",
                     f"--out={tmp_path / 'run'}"):
        child.wait()
        assert child.rc == 2 and "Traceback" not in child.err, child.err
        assert "batch" in child.err and child.err.count("\n") == 1


@pytest.mark.parametrize("env", [
    {"WORLD_SIZE": "2"}, {"RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "0"}], ids=str)
def test_what_is_left_over_of_torchruns_environment(tmp_path, env):
    """As in a shell of a cluster's job: one line that names a variable, or a run of one process."""
    child = start(npair, *TABLE, "--epochs=1", f"--out={tmp_path / 'run'}", env=env,
                  before=quick).wait()
    if child.rc:
        assert child.rc == 2 and child.err.count("\n") == 1 and "Traceback" not in child.err
        assert any(name in child.err for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")), child.err


def test_a_port_in_use_ends_in_one_line(tmp_path):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        env = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost",
               "MASTER_PORT": str(server.getsockname()[1])}
        refuse(npair, *TABLE, "--epochs=1", f"--out={tmp_path / 'run'}", env=env)


def test_a_process_that_waits_for_the_others_says_so(tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost",
           "MASTER_PORT": str(free_port())}
    child = start(npair, *TABLE, f"--out={tmp_path / 'run'}", env=env).read(until="2 processes")
    child.kill()
    assert child.wait().rc == -signal.SIGKILL


def test_torchrun_itself(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               npair.__file__, *TABLE, "--epochs=2", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
