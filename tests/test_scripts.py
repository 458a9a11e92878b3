# SPDX-License-Identifier: MIT
"""The scripts as commands: the run folder, kill and resume, bad input, each file on its own."""

import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import pytest
import torch
from PIL import Image

import byol_imix
import common
import moco_imix
import npair_tabular
import simclr_imix

ROOT = Path(__file__).parent.parent
SCRIPTS = [npair_tabular, simclr_imix, moco_imix, byol_imix]
KILLS = int(os.environ.get("KILLS", 2))  # a script; KILLS=20 for more
TABLE = "--dataset digits --width 2 --batch-size 128 --linear-epochs 5 --device cpu".split()
IMAGES = ("--dataset digits --train-size 64 --batch-size 16 --arch resnet18 --linear-epochs 5 "
          "--device cpu").split()


def small(script):
    return IMAGES if script is simclr_imix else TABLE


def command(script, *flags):
    return [sys.executable, script.__file__, *small(script), *map(str, flags)]


def log_without_rate(out):
    return [line.rsplit(",", 1)[0] for line in (out / "log.csv").read_text().splitlines()]


def result_without_time(out):
    return json.loads((out / "result.json").read_text()) | {"seconds": 0}


def write_images(folder, n=40, size=8):
    for i in range(n):
        path = folder / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.byte().numpy()).save(path)
    return folder


def write_clips(folder, n=40):
    for i in range(n):
        path = folder / ("ant", "bee")[i % 2] / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", None))
            file.writeframes(bytes(range(i, 200 + i)) * 100)
    return folder


# ----------------------------------------------------------------------- run folder
def test_a_run_writes_its_folder_and_learns(tmp_path, capsys):
    out = tmp_path / "run"
    npair_tabular.main([*TABLE, "--epochs", "12", "--linear-epochs", "50", "--eval-every", "6",
                        "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt", "config.json", "data.json", "encoder.pt", "features.npz", "lock",
        "log.csv", "result.json"]
    config = json.loads((out / "config.json").read_text())
    assert config["alpha"] == 2.0 and config["epochs"] == 12 and config["device"] == "cpu"
    assert config["torch"] == torch.__version__
    assert config["data_digest"]
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,lr,examples_per_s"
    assert [line.split(",")[0] for line in lines[1:]] == [str(epoch) for epoch in range(1, 13)]
    result = json.loads((out / "result.json").read_text())
    assert result.keys() == {"test_accuracy", "train_accuracy", "protocol", "seconds",
                             "raw_test_accuracy", "untrained_test_accuracy"}
    assert result["untrained_test_accuracy"] < result["test_accuracy"]
    assert 0.8 < result["test_accuracy"] <= 1 and 0.8 < result["train_accuracy"] <= 1
    encoder = npair_tabular.MLP5Layer([64], 2)
    encoder.load_state_dict(torch.load(out / "encoder.pt", weights_only=True))
    shown = capsys.readouterr().out
    line = r"^epoch \d+/12  loss \d+\.\d+  lr 0\.\d+  [\d,]+ examples/s  \d+:\d\d:\d\d left$"
    assert len(re.findall(line, shown, re.M)) == 12
    assert shown.count("test accuracy 0.") == 2 and f"{result['test_accuracy']:.4f}" in shown


@pytest.mark.parametrize("script, flags", [
    (simclr_imix, []), (simclr_imix, ["--mix", "cutmix"]), (simclr_imix, ["--alpha", "0"]),
    *((simclr_imix, ["--loss", *flags.split()]) for flags in (
        "nt-xent --alpha 0", "supcon --alpha 0", "triplet", "triplet --supervised --mix cutmix",
        "barlow-twins --dim 64", "dare", "n-pair --supervised")), (moco_imix, []),
    (moco_imix, ["--mix", "cutmix"]), (byol_imix, []), (byol_imix, ["--alpha", "0"]),
    (simclr_imix, ["--no-augment", "--inputmix"]), (moco_imix, ["--image-size", "72"])])
def test_images(tmp_path, script, flags):
    out = tmp_path / "run"
    images = write_images(tmp_path / "images", size=72)
    script.main(["--dataset", str(images), "--image-size", "8",
                 "--batch-size", "8", "--arch", "resnet18", "--epochs", "2", "--linear-epochs", "2",
                 "--device", "cpu", "--out", str(out), *flags])
    assert len(log_without_rate(out)) == 3
    assert 0 <= result_without_time(out)["test_accuracy"] <= 1
    encoder = script.resnet("resnet18", 3, 72 if "72" in flags else 8)
    encoder.load_state_dict(torch.load(out / "encoder.pt", weights_only=True))


@pytest.mark.parametrize("script, flags", [(moco_imix, ["--queue", "300"]), (byol_imix, []),
                                           (moco_imix, ["--alpha", "0"]), (byol_imix, ["--ema=0"]),
                                           (byol_imix, ["--alpha", "0", "--symmetric"])])
def test_tables(tmp_path, script, flags):
    script.main([*TABLE, "--epochs", "12", "--linear-epochs", "50", "--out", str(tmp_path), *flags])
    assert result_without_time(tmp_path)["test_accuracy"] > 0.6
    encoder = script.MLP5Layer([64], 2)
    encoder.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))


def test_a_terminal_sees_the_line_move(tmp_path):
    """On a terminal the line is rewritten in place, within the epoch too."""
    import pty
    leader, follower = pty.openpty()
    flags = "--width 24 --epochs 1 --batch-size 16 --out".split()  # an epoch of some seconds
    process = subprocess.Popen(command(npair_tabular, *flags, tmp_path / "run"), stdout=follower)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert re.search(rb"epoch 1/1  step \d+/89  [\d,]+ examples/s *\r", shown), shown
    assert b"evaluation: 0%" in shown


# ----------------------------------------------------------------------- recipes and flags
def args_of(script, *flags):
    if script is npair_tabular:
        return script.parse_args(list(flags))
    return script.parse_args(list(flags), common.domain)[0]


def test_recipes_follow_the_data_set():
    everywhere = {"lr": 0.125, "weight_decay": 1e-4, "dim": 128, "linear_epochs": 100,
                  "linear_lr": 10.0, "seed": 0}
    image = {"alpha": 1.0, "batch_size": 256, "schedule": "cosine", "warmup_epochs": 10,
             "temperature": 0.2, "arch": "resnet50", "ema": 0.999, "queue": 4096, "mix": "mixup",
             "head": "mlp", "linear_batch_size": 256}
    speech = image | {"epochs": 500, "schedule": "step", "warmup_epochs": 5, "temperature": 0.5}
    table = image | {"alpha": 2.0, "epochs": 500, "batch_size": 512, "temperature": 0.1,
                     "warmup_epochs": 5, "width": 64, "mask": 0.0, "linear_batch_size": 512}
    for script in SCRIPTS:
        recipes = {"cifar10": image, "speech_commands": speech, "covtype": table}
        if script is simclr_imix:
            del recipes["covtype"]
        if script is npair_tabular:
            recipes = {"covtype": table | {"mask": 0.2}}
        for dataset, recipe in recipes.items():
            args = vars(args_of(script, "--dataset", dataset))
            wanted = everywhere | {name: recipe[name] for name in recipe.keys() & args.keys()}
            assert args == args | wanted, (script.__name__, dataset)
        if "covtype" in recipes:
            assert args_of(script, "--dataset", "covtype", "--alpha", "0").mask == 0.2
    assert args_of(moco_imix, "--dataset", "covtype", "--mask", "0.1", "--alpha", "0").mask == 0.1
    speech = "--dataset", "speech_commands", "--no-augment"
    assert args_of(moco_imix, *speech).temperature == 0.2
    assert args_of(simclr_imix, *speech).temperature == 0.5


@pytest.mark.parametrize("script, dataset, without, with_imix", [
    (simclr_imix, "cifar10", 2000, 4000), (simclr_imix, "cifar100", 4000, 2000),
    (moco_imix, "cifar10", 1000, 4000), (moco_imix, "cifar100", 1000, 2000),
    (moco_imix, "cifar10 --no-augment", 500, 1000), (moco_imix, "cifar100 --no-augment", 1000, 500),
    (byol_imix, "cifar10", 1000, 2000), (byol_imix, "cifar100", 1000, 4000)])
def test_epochs_of_images_are_those_published(script, dataset, without, with_imix):
    flags = ["--dataset", *dataset.split()]
    assert args_of(script, *flags).epochs == with_imix
    assert args_of(script, *flags, "--alpha", "0").epochs == without
    assert args_of(script, *flags, "--alpha", "0", "--epochs", "3").epochs == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_warm_up_is_5_epochs_up_to_500_else_10(script):
    for epochs, warmup in ((40, 5), (500, 5), (501, 10), (4000, 10)):
        assert args_of(script, "--epochs", str(epochs)).warmup_epochs == warmup
    assert args_of(script, "--epochs", "40", "--warmup-epochs", "7").warmup_epochs == 7


def test_a_folder_called_as_a_recipe_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "table")
    expected = moco_imix.Args(dataset="table", batch_size=None, width=None)
    assert args_of(moco_imix, "--dataset", "table") == expected


FLAGS = ("--alpha 0.7 --epochs 7 --lr 0.5 --weight-decay 0.01 --warmup-epochs 1 --amp bf16 "
         "--compile --seed 5 --linear-epochs 9 --linear-lr 0.6 "
         "--linear-batch-size 30 --labels 0.5 --finetune --finetune-lr 0.04 --dim 32 "
         "--no-augment").split()
OWN = {npair_tabular: "--temperature 0.3 --mask 0.3",
       simclr_imix: "--temperature 0.3 --mix cutmix --schedule step --inputmix",
       moco_imix: "--temperature 0.3 --queue 300 --ema 0.9",
       byol_imix: "--symmetric --ema 0.9 --inputmix"}
OWN = {script: flags.split() for script, flags in OWN.items()}


@pytest.mark.parametrize("script, domain", [
    (npair_tabular, "table"), (simclr_imix, "image"), (simclr_imix, "speech"),
    (moco_imix, "table"), (moco_imix, "image"), (moco_imix, "speech"), (byol_imix, "table"),
    (byol_imix, "image"), (byol_imix, "speech")])
def test_flags_reach_the_loop(monkeypatch, tmp_path, script, domain):
    calls, evaluated = [], []
    monkeypatch.setattr(script, "pretrain",
                        lambda *args: calls.append(args) or range(args[-4].epochs))
    monkeypatch.setattr(common, "linear_eval", lambda *args: evaluated.append(args) or
                        {"test_accuracy": 0.0, "train_accuracy": 0.0})
    write = {"table": lambda _: "digits", "image": write_images, "speech": write_clips}[domain]
    data = ["--dataset", str(write(tmp_path / "data")), "--batch-size=16", "--device=cpu",
            "--probe=sgd"]
    data += ["--width=1"] if domain == "table" else ["--arch=resnet18"]
    data += ["--image-size=8"] if domain == "image" else []
    for name, flags in (("plain", []), ("with", FLAGS + OWN[script])):
        script.main([*data, "--out", str(tmp_path / name), *flags])
    (*plain_nets, plain_loader, _, _, _, _), (*nets, loader, args, out, _, _) = calls
    values = vars(args)
    given = FLAGS + OWN[script]
    for name, value in zip(given, [*given[1:], "--"]):
        if name.startswith("--"):
            found = values[name[2:].replace("-", "_")]
            assert found is True if value.startswith("--") else str(found) == value, name
    assert out == tmp_path / "with" and json.loads((out / "config.json").read_text()).items() >= \
        {key: value for key, value in values.items()}.items()
    assert not torch.equal(*(next(nets[0].parameters()) for nets in (plain_nets, nets)))  # seed
    (x, x_tilde), (plain, plain_tilde) = next(iter(plain_loader)), next(iter(loader))
    assert len(x) == 16 and torch.equal(plain, plain_tilde)  # --no-augment
    assert not torch.equal(x, x_tilde) or (domain == "table" and script is not npair_tabular)
    (encoder, _, *rest), (untrained, _, *of_untrained) = evaluated[2:]
    assert encoder is nets[0]
    assert rest == [9, 30, 0.6, 5, 0.5, 0.04]  # epochs, batch, lr, seed, labels, the encoder's lr
    assert of_untrained == rest and untrained is not encoder
    torch.testing.assert_close(untrained.state_dict(), encoder.state_dict())
    assert all(list(net.parameters())[-1].shape == (32,) for net in nets[1:])


def test_flags_of_the_data_reach_the_loaders(tmp_path, monkeypatch):
    data, seen = common.load_table("digits", "data", torch.device("cpu")), {}
    for kind in ("table", "images", "speech"):
        monkeypatch.setattr(common, f"load_{kind}",
                            lambda *args, kind=kind, **kwargs: seen.update({kind: (args, kwargs)})
                            or data)
    flags = "--train-size 24 --image-size 16 --speech-version v0.02 --data-dir d".split()
    flags += "--mask 0.3 --standardize all --label-column y".split()
    flags += "--test-share 0.4 --missing impute".split()
    for dataset in ("my.csv", "cifar100", "speech_commands"):
        args, domain = moco_imix.parse_args(["--dataset", dataset, *flags], common.domain)
        common.load(domain, args, "device")
    assert seen == {
        "table": (("my.csv", "d", "device"), {"mask": 0.3, "standardize": "all",
                                              "label_column": "y", "test_share": 0.4,
                                              "missing": "impute"}),
        "images": (("cifar100", "d", "device"), {"image_size": 16, "train_size": 24}),
        "speech": (("speech_commands", "d", "device"), {"version": "v0.02", "train_size": 24})}


# ----------------------------------------------------------------------- kill and resume
def start(script, *flags):
    """The command, once it has finished an epoch."""
    process = subprocess.Popen(command(script, *flags), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.first_epoch = 0
    for line in process.stdout:
        if match := re.match(r"epoch (\d+)/", line):
            process.first_epoch = int(match[1])
            break
    return process


@pytest.mark.parametrize("script, flags", [
    (npair_tabular, "--epochs 50"), (simclr_imix, "--epochs 4 --mix cutmix"),
    (moco_imix, "--epochs 40 --queue 1000"), (byol_imix, "--epochs 40")])
def test_killed_and_resumed_is_bit_identical(tmp_path, script, flags):
    flags = flags.split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    script.main([*small(script), *flags, "--out", str(whole)])
    lasted = time.monotonic() - begin
    moments = random.Random(0)
    kills, begun = 0, []
    for _ in range(KILLS):
        process = start(script, *flags, "--out", killed, "--resume")
        begun.append(process.first_epoch)
        time.sleep(moments.uniform(0, lasted / 2 / KILLS))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1, f"the run of {lasted:.1f} s was over too soon to be killed"
    process = start(script, *flags, "--out", killed, "--resume")
    begun.append(process.first_epoch)
    assert process.communicate() and process.returncode == 0
    assert begun[0] == 1 and max(begun) > 1  # it goes on, and does not start anew
    assert log_without_rate(whole) == log_without_rate(killed)
    encoders = [torch.load(out / "encoder.pt", weights_only=True) for out in (whole, killed)]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())
    assert result_without_time(whole) == result_without_time(killed)


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    process = start(npair_tabular, "--epochs", "9999", "--out", tmp_path / "run")
    signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and error.count("\n") == 1 and "--resume" in error


@pytest.mark.parametrize("script", [npair_tabular, simclr_imix, moco_imix])
def test_a_finished_run_serves_further_evaluations(tmp_path, script):
    """Of few labels, and with the encoder trained along: each has its own result."""
    run = [*small(script), "--epochs", "1", "--out", str(tmp_path)]
    script.main(run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for flags in (["--labels", "0.5"], ["--finetune"], ["--labels", "0.5", "--finetune"]):
        script.main([*run, "--resume", *flags])
    results = [json.loads((tmp_path / f"result{name}.json").read_text())
               for name in ("", "-labels0.5", "-finetune", "-labels0.5-finetune")]
    assert len({result["protocol"] for result in results}) == 4
    for name in ("result.json", "log.csv"):
        assert (tmp_path / name).read_bytes() == before[name]


def test_resume_of_a_finished_run_evaluates_again(tmp_path):
    run = [*TABLE, "--epochs", "2", "--out", str(tmp_path)]
    npair_tabular.main(run)
    result = result_without_time(tmp_path)
    (tmp_path / "result.json").unlink()
    npair_tabular.main([*run, "--resume"])
    assert result_without_time(tmp_path) == result and len(log_without_rate(tmp_path)) == 3


# ----------------------------------------------------------------------- bad input
def ends(capsys, script, *flags, code=2):
    """The one line on stderr that main(flags) ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert end.value.code == code and error.count("\n") == 1, error
    assert error.startswith(f"{Path(script.__file__).name}: ")
    return error


BAD_FLAGS = {
    npair_tabular: "--alpha=nan --alpha=inf --alpha=-1 --alpha=much --epochs=0 --epochs=1.5 "
    "--batch-size=1 --lr=0 --lr=nan --lr=inf --weight-decay=-1e-4 --temperature=0 --dim=0 "
    "--temperature=-inf --warmup-epochs=-1 --width=0 --mask=1 --mask=nan --test-share=0 "
    "--test-share=1 --seed=-1 --eval-every=x --linear-epochs=0 --linear-lr=0 "
    "--labels=0 --labels=1 --finetune-lr=0 --finetune=1 "
    "--linear-batch-size=0 --amp=fp8 --standardize=none --schedule=linear "
    "--device=cuda:99 --device=tpu --device=meta --fast",
    simclr_imix: "--loss=supcon --margin=-1 --image-size=0 --train-size=-1 --arch=vgg "
    "--mix=inputmix --loss=dino "
    "--temperature=0 --speech-version=3 --loss=nt-xent --mask=0.1",
    moco_imix: "--queue=0 --ema=1 --ema=nan --mask=1 --head=none "
    "--n-plus-k=1 --n-plus-k",
    byol_imix: "--ema=-0.1 --symmetric=3",
}


@pytest.mark.parametrize("script, flag", [(script, flag) for script, flags in BAD_FLAGS.items()
                                          for flag in flags.split()],
                         ids=lambda value: getattr(value, "__name__", value))
def test_bad_flags(capsys, monkeypatch, script, flag):
    monkeypatch.setattr(common, "load", None)  # flags are checked before any data is touched
    assert flag.split("=")[0] in ends(capsys, script, flag)


def test_a_data_set_of_another_domain(capsys, tmp_path):
    assert "table" in ends(capsys, simclr_imix, "--dataset", "my.csv")
    assert "mixup" in ends(capsys, moco_imix, "--dataset", "covtype", "--mix", "cutmix")
    folder = write_images(tmp_path / "images", 4)
    assert "can't be read as CSV" in ends(capsys, npair_tabular, "--dataset", folder)


def test_a_batch_larger_than_the_data_leaves_no_folder(capsys, tmp_path):
    out = tmp_path / "run"
    assert "--batch-size 65" in ends(capsys, simclr_imix, *IMAGES, "--batch-size", 65, "--out", out)
    assert "folder of images" in ends(capsys, simclr_imix, "--dataset", tmp_path / "none",
                                      "--out", out)
    assert not out.exists()


def test_a_folder_that_holds_a_run_is_never_overwritten(capsys, tmp_path):
    run = [*TABLE, "--epochs", "2", "--out", str(tmp_path)]
    npair_tabular.main(run)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "--resume" in ends(capsys, npair_tabular, *run)
    for flag, name in (("--epochs=3", "epochs"), ("--seed=1", "seed"), ("--mask=0.1", "mask"),
                       ("--alpha=0", "alpha")):
        assert name in ends(capsys, npair_tabular, *run, "--resume", flag)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    ends(capsys, npair_tabular, *run)
    (tmp_path / "other.json").rename(tmp_path / "config.json")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_data_that_have_changed_are_refused(capsys, tmp_path):
    rows = [f"{i % 7},{i * i % 11},{'ab'[i % 2]}" for i in range(60)]
    path = tmp_path / "my.csv"
    path.write_text("\n".join(["p,q,y", *rows]))
    run = ["--dataset", path, "--label-column", "y", "--width", "1", "--batch-size", "16",
           "--epochs", "2", "--linear-epochs", "2", "--out", tmp_path / "run", "--device", "cpu"]
    npair_tabular.main([str(flag) for flag in run])
    path.write_text("\n".join(["p,q,y", *rows]).replace("6,", "5,"))
    assert "other data" in ends(capsys, npair_tabular, *run, "--resume")


def test_a_damaged_run_folder(capsys, tmp_path):
    run = [*TABLE, "--epochs", "2", "--out", str(tmp_path)]
    npair_tabular.main(run)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert "checkpoint.pt can't be read" in ends(capsys, npair_tabular, *run, "--resume")
    (tmp_path / "config.json").write_text("{")
    ends(capsys, npair_tabular, *run, "--resume")
    file = tmp_path / "file"
    file.write_text("no folder")
    ends(capsys, npair_tabular, *TABLE, "--out", file / "run", code=1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"),
                                   OSError(28, "No space left on device"),
                                   FloatingPointError("the loss is no longer finite in epoch 3")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_ends_a_run_early_ends_in_one_line(capsys, monkeypatch, tmp_path, script, error):
    def pretrain(*_):
        raise error

    monkeypatch.setattr(script, "pretrain", pretrain)
    line = ends(capsys, script, *small(script), "--out", tmp_path, code=1)
    assert str(error) in line and str(tmp_path) in line


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(capsys, tmp_path):
    for script, flags in ((npair_tabular, ["--lr", "1e35"]), (moco_imix, ["--lr", "1e6"]),
                          (byol_imix, ["--lr", "1e6"])):
        out = tmp_path / script.__name__
        flags = [*TABLE, "--epochs", "40", "--warmup-epochs", "10", *flags, "--out", out]
        try:
            script.main([str(flag) for flag in flags])
        except SystemExit as end:
            assert end.code == 1 and not (out / "result.json").exists()
        if (out / "checkpoint.pt").exists():
            state = torch.load(out / "checkpoint.pt", weights_only=True)
            for name in {"model", "online", "predictor", "target", "ema"} & state.keys():
                assert all(tensor.isfinite().all() for tensor in state[name].values()), name


def test_bad_input_ends_a_process_without_a_traceback(tmp_path):
    process = subprocess.run(command(npair_tabular, "--alpha", "nan"), capture_output=True,
                             text=True, cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1


# ----------------------------------------------------------------------- each file on its own
OF_TABLE = "x, encoder, size = torch.randn(256, 6), mine.MLP5Layer([4, 2], width=2), 64"
OF_IMAGES = "x, encoder, size = torch.randn(32, 3, 8, 8), mine.resnet('resnet18', 3, 8), 512"


@pytest.mark.parametrize("script, networks", [
    (npair_tabular, OF_TABLE), (simclr_imix, OF_IMAGES), (moco_imix, OF_TABLE),
    (moco_imix, OF_IMAGES), (byol_imix, OF_TABLE), (byol_imix, OF_IMAGES)])
def test_a_script_copied_alone_trains_on_ones_own_tensors(tmp_path, script, networks):
    name = script.__name__
    (tmp_path / f"{name}.py").write_text(Path(script.__file__).read_text())
    predictor = "mine.prediction_head(32, size), " if script is byol_imix else ""
    (tmp_path / "user.py").write_text(f"""
import torch
import {name} as mine
{networks}
view = lambda x: x * (torch.rand_like(x) > 0.2)
loader = [(view(batch), view(batch)) for batch in x.split(32)]
head = mine.projection_head(size, 32)
log = mine.pretrain(encoder, head, {predictor}loader, mine.Args(alpha=1.0, epochs=2))
assert len(log) == 2 and encoder(x).shape == (len(x), size)
""")
    subprocess.run([sys.executable, "user.py"], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": ""})


def test_one_name_one_code():
    """What several scripts define under one name is the same in each, but for their own parts."""
    seen = {}
    for script in SCRIPTS:
        for node in ast.parse(Path(script.__file__).read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if node.name not in ("main", "parse_args", "pretrain", "Args"):
                first = seen.setdefault(node.name, (script.__name__, ast.unparse(node)))
                assert first[1] == ast.unparse(node), f"{node.name}: {first[0]}, {script.__name__}"


def test_every_file_carries_its_licence_and_fits_a_page():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        lines = path.read_text().splitlines()
        assert lines[0] == "# SPDX-License-Identifier: MIT", path
        assert max(map(len, lines)) <= 100, path


def test_the_readmes_python_runs(tmp_path):
    """Its blocks of Python, one after the other, as a user who copied the files would run them.

    That of CLIP, which needs images with captions, runs in test_clip.py.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    blocks = [block for block in blocks if "captions" not in block]
    assert len(blocks) == 3
    rows = [f"{i * i % 23},{i % 7},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "new.csv").write_text("\n".join(["p,q,kind", *rows]))  # which the last reads again
    npair_tabular.main(["--dataset", str(tmp_path / "new.csv"), "--label-column", "kind",
                        "--epochs", "1", "--out", str(tmp_path / "runs" / "my-run")])
    (tmp_path / "user.py").write_text("\n".join(blocks))
    subprocess.run([sys.executable, "user.py"], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
