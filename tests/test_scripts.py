# SPDX-License-Identifier: MIT
"""The scripts as commands: the run folder, kill and resume, bad input, and each file on its own."""

import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
import warnings
import wave
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import byol_imix
import common
import moco_imix
import npair_tabular
import simclr_imix

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if path.name != "common.py"]
SMALL = "--dataset digits --width 2 --batch-size 128 --linear-epochs 5 --device cpu".split()


TINY = "--dataset digits --train-size 64 --batch-size 16 --arch resnet18 --linear-epochs 5 --device cpu".split()


def command(*flags, script="npair_tabular.py", small=SMALL):
    return [sys.executable, str(ROOT / script), *small, *map(str, flags)]


def log_without_rate(out):
    return [line.rsplit(",", 1)[0] for line in (out / "log.csv").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------- run folder
def test_a_run_writes_its_folder_and_learns(tmp_path, capsys):
    out = tmp_path / "run"
    npair_tabular.main([*SMALL, "--epochs", "12", "--linear-epochs", "50", "--eval-every", "6", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "config.json", "encoder.pt", "log.csv",
                                                           "result.json"]
    config = json.loads((out / "config.json").read_text())
    assert config["alpha"] == 2.0 and config["epochs"] == 12 and config["torch"] == torch.__version__
    assert config["device"] == "cpu" and config["warmup_epochs"] == 3 and "commit" in config
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,lr,examples_per_s" and [line.split(",")[0] for line in lines[1:]] == \
        [str(epoch) for epoch in range(1, 13)]
    result = json.loads((out / "result.json").read_text())
    assert result.keys() == {"test_accuracy", "train_accuracy", "protocol", "seconds"}
    assert 0.8 < result["test_accuracy"] <= 1 and 0.8 < result["train_accuracy"] <= 1
    encoder = npair_tabular.MLP5Layer([64], 2)
    encoder.load_state_dict(torch.load(out / "encoder.pt", weights_only=True))
    shown = capsys.readouterr().out
    assert len(re.findall(r"^epoch \d+/12  loss \d+\.\d+  lr 0\.\d+  [\d,]+ examples/s  \d+:\d\d:\d\d left$", shown,
                          re.M)) == 12
    assert "\nepoch 6: test accuracy 0." in shown and f"{result['test_accuracy']:.4f}" in shown


@pytest.mark.parametrize("flags", [["--alpha", "1"], ["--mix", "cutmix"], ["--alpha", "0"],
                                   ["--alpha", "0", "--loss", "nt-xent"]], ids=" ".join)
def test_simclr_runs_on_digits(tmp_path, flags):
    simclr_imix.main([*TINY, "--epochs", "2", "--out", str(tmp_path), *flags])
    assert len(log_without_rate(tmp_path)) == 3
    encoder = simclr_imix.resnet("resnet18", 1, 8)
    encoder.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    assert 0 <= json.loads((tmp_path / "result.json").read_text())["test_accuracy"] <= 1


@pytest.mark.parametrize("script, flags", [(moco_imix, ["--queue", "300"]), (moco_imix, ["--alpha", "0"]), (byol_imix, []),
                                           (byol_imix, ["--alpha", "0", "--symmetric"]), (byol_imix, ["--ema", "0"])])
def test_moco_and_byol_run_on_a_table(tmp_path, script, flags):
    script.main([*SMALL, "--epochs", "12", "--linear-epochs", "50", "--out", str(tmp_path), *flags])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mask"] == (0.2 if "--alpha" in flags else 0.0) and config["batch_size"] == 128
    assert json.loads((tmp_path / "result.json").read_text())["test_accuracy"] > 0.7
    encoder = script.MLP5Layer([64], 2)
    encoder.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))


@pytest.mark.parametrize("script", [moco_imix, byol_imix])
@pytest.mark.parametrize("flags", [["--mix", "mixup"], ["--mix", "cutmix"], ["--alpha", "0"]], ids=" ".join)
def test_moco_and_byol_run_on_images(tmp_path, script, flags):
    torch.manual_seed(0)
    for i in range(40):
        path = tmp_path / "images" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path)
    out = tmp_path / "run"
    script.main(["--dataset", str(tmp_path / "images"), "--image-size", "8", "--batch-size", "8", "--arch", "resnet18",
                 "--epochs", "2", "--linear-epochs", "2", "--device", "cpu", "--out", str(out), *flags])
    assert len(log_without_rate(out)) == 3
    config = json.loads((out / "config.json").read_text())
    assert config["alpha"] == (0.0 if "--alpha" in flags else 1.0)
    script.resnet("resnet18", 3, 8).load_state_dict(torch.load(out / "encoder.pt", weights_only=True))


def test_recipes_of_n_pair():
    table, images = vars(npair_tabular.parse_args([])), vars(simclr_imix.parse_args([]))
    speech = vars(simclr_imix.parse_args(["--dataset", "speech_commands"]))
    both = {"lr": 0.125, "weight_decay": 1e-4, "dim": 128, "linear_epochs": 100, "seed": 0}
    own = {"dataset": "covtype", "alpha": 2.0, "mask": 0.2, "epochs": 500, "batch_size": 512, "temperature": 0.1, "width": 64}
    assert table == table | both | own
    both |= {"alpha": 1.0, "batch_size": 256, "arch": "resnet50", "mix": "mixup", "loss": "n-pair"}
    own = {"dataset": "cifar10", "epochs": 1000, "temperature": 0.2, "schedule": "cosine", "warmup_epochs": 10}
    assert images == images | both | own
    assert speech == speech | both | {"epochs": 500, "temperature": 0.5, "schedule": "step", "warmup_epochs": 5}


@pytest.mark.parametrize("script", [moco_imix, byol_imix])
def test_recipes_follow_the_dataset(script):
    table, images = script.parse_args(["--dataset", "covtype"]), script.parse_args([])
    assert (table.alpha, table.epochs, table.batch_size, table.mask, table.warmup_epochs) == (2.0, 500, 512, 0.0, 10)
    assert (images.alpha, images.epochs, images.batch_size, images.warmup_epochs) == (1.0, 1000, 256, 10)
    assert script.parse_args(["--dataset", "covtype", "--alpha", "0"]).mask == 0.2
    assert script.parse_args(["--epochs", "200"]).warmup_epochs == 5
    assert table.ema == images.ema == 0.999 and table.lr == images.lr == 0.125 and table.weight_decay == 1e-4
    if script is moco_imix:
        assert (table.temperature, images.temperature) == (0.1, 0.2) and table.queue == images.queue == 4096


ALL = {"--epochs 7": ("epochs", 7), "--lr 0.5": ("lr", 0.5 * 16 / 256), "--weight-decay 0.01": ("weight_decay", 0.01),
       "--warmup-epochs 2": ("warmup_epochs", 2), "--amp bf16": ("amp", torch.bfloat16), "--compile": ("compile", True)}
TAU, STEP = {"--temperature 0.3": ("temperature", 0.3)}, {"--schedule step": ("schedule", "step_schedule")}
LOAD = {"table": {"--mask 0.3": ("mask", 0.3), "--standardize all": ("standardize", "all"), "--test-share 0.4":
                  ("test_share", 0.4), "--label-column y": ("label_column", "y")},
        "images": {"--train-size 24": ("train_size", 24)},
        "speech": {"--train-size 24": ("train_size", 24), "--speech-version v0.02": ("version", "v0.02")}}
MIXED = {"--alpha 0.7": ("alpha", 0.7), "--mix cutmix": ("mix", "cutmix")}


@pytest.mark.parametrize("script, domain, last, options", [
    (npair_tabular, "table", [nn.BatchNorm1d], ALL | TAU | {"--alpha 0.7": ("alpha", 0.7)}),
    (simclr_imix, "images", [nn.BatchNorm1d], ALL | TAU | STEP | MIXED),
    (simclr_imix, "speech", [nn.BatchNorm1d], {"--alpha 0": ("alpha", 0), "--loss nt-xent": ("loss_function", "nt_xent_loss")}),
    *((moco_imix, domain, last, ALL | TAU | mixed | {"--queue 300": ("queue_size", 300), "--ema 0.9": ("m", 0.9)})
      for domain, last, mixed in (("table", [nn.BatchNorm1d], STEP), ("images", [nn.Linear], STEP | MIXED),
                                  ("speech", [nn.BatchNorm1d], MIXED))),
    *((byol_imix, domain, last, ALL | mixed | {"--symmetric": ("symmetric", True), "--ema 0.9": ("m", 0.9)})
      for domain, last, mixed in (("table", [nn.BatchNorm1d] * 2, STEP), ("images", [nn.Linear] * 2, STEP | MIXED),
                                  ("speech", [nn.BatchNorm1d, nn.Linear], MIXED)))])
def test_flags_and_recipe_reach_the_loop(capsys, monkeypatch, tmp_path, script, domain, last, options):
    """Each flag changes an argument of the loader, of pretrain, of the linear evaluation or the networks; head, and BYOL's
    predictor, end as the domain's recipe says; a second run into the same folder is refused."""
    for i in range(40):
        path = tmp_path / domain / ("ant", "bee")[i % 2] / str(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if domain == "images":
            Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(f"{path}.png")
        else:
            with wave.open(f"{path}.wav", "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", None))
                file.writeframes(bytes(range(200)) * 100)
    calls, evaluated, loaded = [], [], []
    monkeypatch.setattr(script, "pretrain", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(common, "linear_eval", lambda *args, **kwargs: evaluated.append((args, kwargs)) or {
        "test_accuracy": 0.0, "train_accuracy": 0.0})
    load = getattr(common, f"load_{domain}")
    monkeypatch.setattr(common, f"load_{domain}", lambda *args, **kwargs: loaded.append(kwargs) or load(*args, **kwargs))
    data = {"table": ["--dataset=digits", "--width=1"], "images": ["--image-size=8", "--arch=resnet18"],
            "speech": ["--arch=resnet18"]}[domain]
    data += [] if domain == "table" else [f"--dataset={tmp_path / domain}"]
    data += ["--batch-size=16", "--device=cpu"]
    flags = " ".join([*options, *LOAD[domain], "--seed 5 --linear-epochs 7 --dim 32"]).split()
    for out, more in (("plain", []), ("with", flags)):
        script.main([*data, "--out", str(tmp_path / out), *more])
    (plain_args, plain), (args, kwargs) = calls
    for wanted, (default, given) in ((options, (plain, kwargs)), (LOAD[domain], loaded)):
        for name, value in wanted.values():
            was, now = (getattr(a[name], "__name__", a[name]) for a in (default, given))
            assert now == value and was != value, name
    assert not torch.equal(*(next(a[0].parameters()) for a in (plain_args, args)))  # another seed, other weights
    (encoder, _, epochs), seed = evaluated[1]
    assert encoder is args[0] and epochs == 7 and seed == {"seed": 5}
    assert ends(capsys, [*data, "--out", tmp_path / "with"], script=script).startswith(f"{tmp_path / 'with'} already holds a run")
    heads = args[1:3] if script is byol_imix else args[1:2]
    assert [type(head[-1]) for head in heads] == last
    assert all(list(head.parameters())[-1].shape == (32,) for head in heads)


def pretrain_on(script, device, **options):
    """Three epochs of 8 steps of a script's pretrain, on its own encoder of tables or a ResNet."""
    networks = [script.MLP5Layer([10, 4, 40], 2), script.projection_head(64, 32)] if hasattr(script, "MLP5Layer") else \
        [script.resnet("resnet18", 1, 8), script.projection_head(512, 32)]
    networks += [script.projection_head(32, 32)] * (script is byol_imix)
    x = torch.randn(512, 54, device=device) if hasattr(script, "MLP5Layer") else torch.randn(64, 1, 8, 8, device=device)
    loader = common.TwoViews(x, lambda x: x * (torch.rand_like(x) > 0.2), len(x) // 8)
    log = script.pretrain(*(net.to(device) for net in networks), loader, epochs=3, warmup_epochs=0, **options)
    assert len(log) == 3


EVERY_STEP = [(npair_tabular, {}), (simclr_imix, {}), (simclr_imix, {"mix": simclr_imix.cutmix}),
              (simclr_imix, {"alpha": 0, "loss_function": simclr_imix.nt_xent_loss}), (moco_imix, {"queue_size": 100}),
              (byol_imix, {"symmetric": True})]


@pytest.mark.parametrize("script, options", EVERY_STEP)
def test_no_value_is_read_inside_an_epoch(monkeypatch, script, options):
    """What reads a tensor's value waits for the device: that is twice an epoch, its loss and the check of the weights."""
    reads = []
    for name in ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist"):
        def read(self, *args, name=name, inner=getattr(torch.Tensor, name), **kwargs):
            reads.append(name)
            return inner(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, read)
    pretrain_on(script, "cpu", **options)
    assert reads == ["__float__"] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("script, options", EVERY_STEP)
def test_no_synchronisation_inside_an_epoch_on_cuda(script, options):
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True, action="always") as seen:
            pretrain_on(script, "cuda", amp=torch.bfloat16, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) <= 2 * 3  # as above; none of 8 steps


def test_simclr_learns(tmp_path):
    """Each view is told from 32 others' better and better: log(32) = 3.47 is chance."""
    simclr_imix.main([*TINY, "--train-size", "256", "--batch-size", "32", "--epochs", "6", "--alpha", "0", "--out",
                      str(tmp_path)])
    losses = [float(line.split(",")[1]) for line in log_without_rate(tmp_path)[1:]]
    assert losses[-1] < 3.4 and losses[-1] < losses[0] - 0.1


def test_a_terminal_sees_the_line_move(tmp_path):
    """On a terminal the line is rewritten in place, within the epoch too."""
    import pty
    leader, follower = pty.openpty()
    flags = "--width 24 --epochs 1 --batch-size 16".split()  # an epoch of some seconds
    process = subprocess.Popen(command(*flags, "--out", tmp_path / "run"), stdout=follower, cwd=ROOT)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert re.search(rb"\r\x1b\[Kepoch 1/1  loss -  lr 0\.\d+  [\d,]+ examples/s  \d+:\d\d:\d\d left\r", shown), shown
    assert b"linear evaluation: test examples" in shown


def test_evaluating_on_the_way_changes_nothing(tmp_path):
    for name, flags in (("with", ["--eval-every", "1"]), ("without", [])):
        npair_tabular.main([*SMALL, "--epochs", "3", "--out", str(tmp_path / name), *flags])
    assert log_without_rate(tmp_path / "with") == log_without_rate(tmp_path / "without")


# ------------------------------------------------------------------------------------------------------ kill and resume
def start(out, *flags, **which):
    process = subprocess.Popen(command(*flags, "--out", out, **which), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)
    process.first_epoch = 0
    for line in process.stdout:
        if match := re.match(r"epoch (\d+)/", line):
            process.first_epoch = int(match[1])
            break
    return process


@pytest.mark.parametrize("script, small, flags", [
    ("npair_tabular.py", SMALL, ["--epochs", "30", "--width", "4"]),
    ("simclr_imix.py", TINY, ["--epochs", "4", "--mix", "cutmix"]),
    ("moco_imix.py", SMALL, ["--epochs", "30", "--width", "4", "--queue", "1000"]),
    ("byol_imix.py", SMALL, ["--epochs", "30", "--width", "4"])])
def test_killed_and_resumed_is_bit_identical(tmp_path, script, small, flags):
    which = {"script": script, "small": small}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole, *flags, **which)
    trained_from = time.monotonic()
    assert process.communicate() and process.returncode == 0
    lasted = time.monotonic() - trained_from
    moments = random.Random(0)
    kills, begun = 0, []
    for _ in range(3):
        process = start(killed, *flags, "--resume", **which)
        begun.append(process.first_epoch)
        time.sleep(moments.uniform(0, lasted / 6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1, f"the run of {lasted:.1f} s was over too soon to be killed"
    process = start(killed, *flags, "--resume", **which)
    begun.append(process.first_epoch)
    assert process.communicate() and process.returncode == 0
    assert begun[0] == 1 and max(begun) > 1  # it goes on, and does not start anew
    assert log_without_rate(whole) == log_without_rate(killed)
    encoders = [torch.load(out / "encoder.pt", weights_only=True) for out in (whole, killed)]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())
    results = [json.loads((out / "result.json").read_text()) | {"seconds": 0} for out in (whole, killed)]
    assert results[0] == results[1]


@pytest.mark.parametrize("script", [npair_tabular, simclr_imix, moco_imix, byol_imix])
def test_checkpoints_take_a_hundredth_of_the_time(monkeypatch, tmp_path, script):
    """Epochs of 30 s and a checkpoint of 1 s: after the first epoch, then 100 s after the last one, and at the end."""
    now, saved = [1000.0], []

    def pretrain(*args, after_epoch, **kwargs):
        log = []
        for epoch in range(1, 11):
            now[0] += 30
            log.append({"epoch": epoch, "loss": 1.0, "lr": 0.1, "examples_per_s": 1.0})
            after_epoch(log, lambda: {"log": log})

    def save(value, path):
        if path.name == "checkpoint.pt":
            saved.append(len(value["log"]))
            now[0] += 1

    monkeypatch.setattr(script, "pretrain", pretrain)
    monkeypatch.setattr(script, "save", save)
    monkeypatch.setattr(common, "linear_eval", lambda *_, **__: {"test_accuracy": 0.0, "train_accuracy": 0.0})
    monkeypatch.setattr(script, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    small = TINY if script is simclr_imix else SMALL
    script.main([*small, "--epochs", "10", "--out", str(tmp_path)])
    assert saved == [1, 5, 9, 10]


@pytest.mark.parametrize("script", [npair_tabular, simclr_imix, moco_imix, byol_imix])
def test_save_is_whole_or_not_at_all(monkeypatch, tmp_path, script):
    def full(value, path):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    path = tmp_path / "checkpoint.pt"
    script.save({"epoch": 1}, path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        script.save({"epoch": 2}, path)
    assert path.read_bytes() == before and torch.load(path, weights_only=True) == {"epoch": 1}


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background inherits SIGINT ignored
    process = start(tmp_path / "run", "--epochs", "9999")
    signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error == (f"npair_tabular.py: stopped; to go on: python {ROOT / 'npair_tabular.py'} {' '.join(SMALL)} --epochs "
                     f"9999 --out {tmp_path / 'run'} --resume\n")


def test_resume_of_a_finished_run_evaluates_again(tmp_path):
    for flags in ([], ["--resume"]):
        npair_tabular.main([*SMALL, "--epochs", "2", "--out", str(tmp_path), *flags])
        result = json.loads((tmp_path / "result.json").read_text()) | {"seconds": 0}
        before = result if not flags else before
    assert result == before and len(log_without_rate(tmp_path)) == 3


# ------------------------------------------------------------------------------------------------------------ bad input
def ends(capsys, flags, code=2, script=npair_tabular):
    """The one line on stderr that main(flags) ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert end.value.code == code and error.count("\n") == 1, error
    return error.removeprefix(f"{Path(script.__file__).name}: ").strip()


SOME, FROM_0, ABOVE_0 = "number from 0 to below 1e+06", "number from 0 to below inf", "number from 1e-12 to below inf"
COUNT, COUNT_0 = "whole number from 1 to below 1e+06", "whole number from 0 to below 1e+06"
BAD_FLAGS = {
    "--alpha nan": SOME, "--alpha inf": SOME, "--alpha -1": SOME, "--alpha much": SOME, "--alpha 1e39": SOME,
    "--epochs 0": COUNT, "--epochs 1.5": COUNT, "--epochs 1" + "0" * 400: COUNT, "--batch-size -5": "whole number from 2 to "
    "below 1e+06", "--batch-size 1": "whole number from 2 to below 1e+06", "--lr 0": ABOVE_0, "--lr nan": ABOVE_0,
    "--lr inf": ABOVE_0, "--weight-decay -1e-4": FROM_0, "--temperature 0": ABOVE_0, "--temperature -inf": ABOVE_0,
    "--warmup-epochs -1": COUNT_0, "--dim 0": COUNT, "--width 0": COUNT, "--mask 1": "number from 0 to below 1",
    "--mask nan": "number from 0 to below 1", "--test-share 0": "number from 1e-12 to below 1",
    "--test-share 1": "number from 1e-12 to below 1", "--seed -1": COUNT_0, "--eval-every x": COUNT_0,
    "--linear-epochs 0": COUNT,
}


@pytest.mark.parametrize("flag", BAD_FLAGS, ids=lambda flag: flag[:20])
def test_bad_flags(capsys, monkeypatch, flag):
    monkeypatch.setattr(common, "load_table", None)  # flags are checked before any data is touched
    name, value = flag.split()
    assert ends(capsys, [f"{name}={value}"]) == f"argument {name}: {value} is not a {BAD_FLAGS[flag]} (--help lists the flags)"


def test_more_bad_flags(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "load_table", None)
    assert ends(capsys, ["--epochs", 5, "--warmup-epochs", 6]) == \
        "--warmup-epochs 6 is more than --epochs 5 (--help lists the flags)"
    assert ends(capsys, ["--fast"]) == "unrecognized arguments: --fast (--help lists the flags)"
    assert ends(capsys, ["--amp", "fp8"]).startswith("argument --amp: invalid choice: 'fp8'")
    assert ends(capsys, ["--standardize", "none"]).startswith("argument --standardize: invalid choice: 'none'")
    for device in ("cuda:99", "tpu", "cpu:3"):
        assert ends(capsys, ["--device", device]).startswith(f"argument --device: {device} is not on this machine, which has ")


def test_bad_flags_of_simclr(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "load_images", None)
    for flag in ("--image-size=0", "--train-size=-1", "--arch=vgg", "--mix=inputmix", "--loss=triplet", "--temperature=0"):
        assert ends(capsys, [flag], script=simclr_imix).startswith(f"argument {flag.split('=')[0]}: ")
    assert ends(capsys, ["--loss", "nt-xent"], script=simclr_imix) == (
        "--loss nt-xent has no labels to mix, each anchor having its own classes (Section 3.1): give --alpha 0 too, or "
        "--loss n-pair (--help lists the flags)")
    monkeypatch.undo()
    out = ["--out", tmp_path / "run"]
    assert ends(capsys, ["--dataset", tmp_path / "none", *out], script=simclr_imix).startswith(
        f"{tmp_path / 'none'} is no folder of images")
    assert ends(capsys, [*TINY, "--batch-size", 65, *out], script=simclr_imix) == \
        "--batch-size 65 is more than the 64 training examples of digits"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [moco_imix, byol_imix])
def test_bad_flags_of_moco_and_byol(capsys, monkeypatch, tmp_path, script):
    for name in ("load_table", "load_images"):
        monkeypatch.setattr(common, name, None)
    for flag in ("--ema=1", "--ema=nan", "--ema=-0.1", "--mask=1", "--alpha=nan", "--epochs=0", "--lr=inf"):
        assert ends(capsys, [flag], script=script).startswith(f"argument {flag.split('=')[0]}: ")
    assert ends(capsys, ["--dataset", "covtype", "--mix", "cutmix"], script=script) == \
        "--mix cutmix pastes boxes into images: take --mix mixup for a table (--help lists the flags)"
    if script is moco_imix:
        assert ends(capsys, ["--queue=0"], script=script).startswith("argument --queue: 0 is not a whole number from 1")
    monkeypatch.undo()
    out = ["--out", tmp_path / "run"]
    assert ends(capsys, ["--dataset", tmp_path / "none.csv", *out], script=script).startswith(f"{tmp_path / 'none.csv'} can't")
    assert ends(capsys, ["--dataset", tmp_path / "none", *out], script=script).startswith(f"{tmp_path / 'none'} is no folder")
    assert ends(capsys, [*SMALL, "--batch-size", 1438, *out], script=script) == \
        "--batch-size 1438 is more than the 1437 training examples of digits"


def test_a_checkpoint_of_another_script_is_refused(capsys, tmp_path):
    moco_imix.main([*SMALL, "--epochs", "1", "--out", str(tmp_path)])
    for script in (byol_imix, npair_tabular):
        flags = [*SMALL, "--epochs", 1, "--out", tmp_path, "--resume"]
        assert ends(capsys, flags, script=script).startswith(f"{tmp_path / 'checkpoint.pt'} can't be read as this script's")


def test_bad_data_and_folders(capsys, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert ends(capsys, [*SMALL, *out, "--batch-size", 1438]) == \
        "--batch-size 1438 is more than the 1437 training rows of digits"
    assert ends(capsys, ["--dataset", tmp_path / "none.csv", *out]).startswith(f"{tmp_path / 'none.csv'} can't be read as CSV")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("mine")
    assert ends(capsys, [*SMALL, "--out", tmp_path / "file"]) == \
        f"{tmp_path / 'file'} can't be written (File exists): choose another folder with --out"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_not_overwritten_and_resume_checks_the_flags(capsys, tmp_path):
    flags = [*SMALL, "--epochs", "2", "--out", tmp_path]
    npair_tabular.main(list(map(str, flags)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert ends(capsys, flags) == \
        f"{tmp_path} already holds a run: go on with it with --resume, or choose another folder with --out"
    for flag, value, made_with in [("--alpha", "1.0", "2.0"), ("--epochs", "3", "2"), ("--seed", "1", "0")]:
        assert ends(capsys, [*flags, "--resume", flag, value]) == (
            f"{flag} {value} contradicts {tmp_path / 'checkpoint.pt'}, made with {made_with}: go on with the same flags, or "
            "start another run with --out")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["cut short", "empty", "text", "another's", "a list"])
def test_a_checkpoint_that_is_none_is_refused_and_left(capsys, tmp_path, kind):
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"a list": [1, 2]}.get(kind, {"flags": {"epochs": 2}, "model": {}}), checkpoint)
    content = {"cut short": checkpoint.read_bytes()[:300], "empty": b"", "text": b"hello"}.get(kind, checkpoint.read_bytes())
    checkpoint.write_bytes(content)
    assert ends(capsys, [*SMALL, "--out", tmp_path, "--resume"]) == \
        f"{checkpoint} can't be read as this script's checkpoint; it is left as it is: move it away to start anew"
    assert checkpoint.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_resume_with_other_data_is_refused(capsys, tmp_path):
    out, table = tmp_path / "run", tmp_path / "my.csv"
    flags = ["--dataset", table, "--label-column", "y", "--width", 1, "--batch-size", 8, "--epochs", 1, "--out", out]
    table.write_text("a,b,y\n" + "".join(f"{i / 7},{i % 5},{i % 2}\n" for i in range(40)))
    npair_tabular.main(list(map(str, flags)))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    table.write_text("a,b,c,y\n" + "".join(f"{i / 7},{i % 5},{i % 3},{i % 2}\n" for i in range(40)))
    assert ends(capsys, [*flags, "--resume"]) == (
        f"{table} has changed since {out / 'checkpoint.pt'} was made: training data [32, 2], now [32, 3]")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_paths_that_cannot_be(capsys, tmp_path):
    for flags in (["--out", "x" * 300], ["--dataset", "x" * 300, "--out", tmp_path / "run"],
                  ["--dataset", "covtype", "--data-dir", "x" * 300, "--out", tmp_path / "run"]):
        assert "File name too long" in ends(capsys, [*SMALL, *flags])
    assert "File name too long" in ends(capsys, ["--dataset", "x" * 300, "--out", tmp_path], script=simclr_imix)


def test_out_of_memory_is_one_line(capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

    monkeypatch.setattr(npair_tabular, "pretrain", full)
    assert ends(capsys, [*SMALL, "--out", tmp_path], code=1) == \
        "out of memory on cpu: a smaller --batch-size or encoder may fit, in another run with --out"


def test_a_loss_that_is_not_finite_ends_the_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(npair_tabular, "cosine_schedule", lambda step, *_: 1e30 if step >= 30 else 0.1)  # in epoch 3 of 11 steps
    error = ends(capsys, [*SMALL, "--epochs", 5, "--out", tmp_path], code=1)
    assert error == (f"the loss is no longer finite in epoch 3; the last good checkpoint, if any, stays in {tmp_path}: try "
                     "a lower --lr, with another --out")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 1 <= len(state["log"]) <= 2 and all(tensor.isfinite().all() for tensor in state["model"].values())
    assert len(log_without_rate(tmp_path)) == 3 and not (tmp_path / "result.json").exists()


def test_bad_input_ends_a_process_without_a_traceback(tmp_path):
    process = subprocess.run(command("--alpha", "nan"), capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == ("npair_tabular.py: argument --alpha: nan is not a number from 0 to below 1e+06 (--help lists "
                              "the flags)\n")


# ------------------------------------------------------------------------------------------------- each file on its own
TABLE = "x, encoder, size = torch.randn(256, 6), mine.MLP5Layer([4, 2], width=2), 64"
IMAGES = "x, encoder, size = torch.randn(256, 3, 8, 8), mine.resnet('resnet18', 3, 8), 512"


@pytest.mark.parametrize("script, networks", [("npair_tabular", TABLE), ("simclr_imix", IMAGES), ("moco_imix", TABLE),
                                              ("moco_imix", IMAGES), ("byol_imix", TABLE), ("byol_imix", IMAGES)])
def test_a_script_copied_alone_trains_on_ones_own_tensors(tmp_path, script, networks):
    (tmp_path / f"{script}.py").write_text((ROOT / f"{script}.py").read_text())
    predictor = "mine.projection_head(32, 32), " * (script == "byol_imix")
    (tmp_path / "user.py").write_text(f"""
import torch
import {script} as mine
{networks}
view = lambda x: x * (torch.rand_like(x) > 0.2)
loader = [(view(batch), view(batch)) for batch in x.split(64)]
log = mine.pretrain(encoder, mine.projection_head(size, 32), {predictor}loader, alpha=1.0, epochs=3, warmup_epochs=0)
assert len(log) == 3 and encoder(x).shape == (256, size)
""")
    subprocess.run([sys.executable, "user.py"], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})


def test_one_name_one_code():
    """A function or class that several scripts define under one name is the same in each, but for the scripts' own."""
    seen = {}
    for script in SCRIPTS:
        for node in ast.parse(script.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("main", "parse_args", "pretrain"):
                first = seen.setdefault(node.name, (script.name, ast.unparse(node)))
                assert first[1] == ast.unparse(node), f"{node.name} differs between {first[0]} and {script.name}"


def test_every_file_carries_its_licence():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        assert path.read_text().startswith("# SPDX-License-Identifier: MIT\n"), path
