# SPDX-License-Identifier: MIT
"""The scripts as commands: recipes and flags, the run folder, kill and resume, bad input."""

import dataclasses
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Child, refuse, run, start, succeed
from small import (FILES, TABLE, Stop, assert_same_run, every_epoch_is_saved, every_script,
                   quick, result_of, small, without_rate)

import byol_imix as byol
import common
import moco_imix as moco
import npair_tabular as npair
import simclr_imix as simclr

KILLS = int(os.environ.get("KILLS", 2))  # a script, at random moments; KILLS=20 for more


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A CSV file of 60 rows, with and without classes."""
    path = tmp_path_factory.mktemp("table") / "my.csv"
    rows = [f"{i * i % 17 / 3},{i % 5},{'ab'[i % 2]}" for i in range(60)]
    path.write_text("\n".join(["p,q,kind", *rows]) + "\n")
    return path


# ----------------------------------------------------------------------- recipes
BASE = {"lr": 0.125, "weight_decay": 1e-4, "dim": 128, "seed": 0}
IMAGE = BASE | {"alpha": 1.0, "mix": "mixup", "batch_size": 256, "schedule": "cosine",
                "warmup_epochs": 10, "temperature": 0.2, "arch": "resnet50", "inputmix": False,
                "no_augment": False}
SPEECH = IMAGE | {"epochs": 500, "schedule": "step", "warmup_epochs": 5, "temperature": 0.5}
COVTYPE = BASE | {"alpha": 2.0, "batch_size": 512, "epochs": 500, "schedule": "cosine",
                  "warmup_epochs": 5, "temperature": 0.1, "width": 64, "mask": 0.0}
MOMENTUM = {"ema": 0.999, "symmetric": False, "queue": 4096, "n_plus_k": False, "head": "mlp",
            "bn_groups": 2}
PLAIN = {"--alpha=0": {"alpha": 0.0}}  # the row without i-Mix: what differs
PUBLISHED = [  # script, flags, recipe, and by further flags what differs from it
    (npair, "covtype", COVTYPE | {"mask": 0.2}, PLAIN),
    (simclr, "cifar10", IMAGE | {"epochs": 4000, "loss": "n-pair"},
     {"--alpha=0": {"alpha": 0.0, "epochs": 2000}, "--mix=cutmix": {"mix": "cutmix"},
      "--loss=supcon --alpha=0": {"alpha": 0.0, "epochs": 2000, "loss": "supcon",
                                  "temperature": 0.1},
      "--loss=barlow-twins": {"loss": "barlow-twins", "dim": 2048}}),
    (simclr, "cifar100", IMAGE | {"epochs": 2000}, {"--alpha=0": {"alpha": 0.0, "epochs": 4000}}),
    (simclr, "speech_commands", SPEECH, PLAIN | {"--no-augment": {"no_augment": True}}),
    (moco, "covtype", COVTYPE | MOMENTUM | {"bn_groups": 1},
     {"--alpha=0": {"alpha": 0.0, "mask": 0.2},
      "--alpha=0 --mask=0": {"alpha": 0.0}}),  # Table 3
    (moco, "cifar10", IMAGE | MOMENTUM | {"epochs": 4000},
     {"--alpha=0": {"alpha": 0.0, "epochs": 1000},
      "--no-augment": {"no_augment": True, "epochs": 1000},
      "--no-augment --alpha=0": {"no_augment": True, "alpha": 0.0, "epochs": 500,
                                 "warmup_epochs": 5}}),
    (moco, "cifar100", IMAGE | MOMENTUM | {"epochs": 2000},
     {"--alpha=0": {"alpha": 0.0, "epochs": 1000},
      "--no-augment": {"no_augment": True, "epochs": 500, "warmup_epochs": 5},
      "--no-augment --alpha=0": {"no_augment": True, "alpha": 0.0, "epochs": 1000}}),
    (moco, "speech_commands", SPEECH | MOMENTUM,
     PLAIN | {"--no-augment": {"no_augment": True, "temperature": 0.2}}),
    (byol, "covtype", COVTYPE | MOMENTUM, {"--alpha=0": {"alpha": 0.0, "mask": 0.2}}),
    (byol, "cifar10", IMAGE | MOMENTUM | {"epochs": 2000},
     {"--alpha=0": {"alpha": 0.0, "epochs": 1000}}),
    (byol, "cifar100", IMAGE | MOMENTUM | {"epochs": 4000},
     {"--alpha=0": {"alpha": 0.0, "epochs": 1000}}),
    (byol, "speech_commands", SPEECH | MOMENTUM, PLAIN)]


@pytest.mark.parametrize("script, dataset, recipe, flags, differs", [
    (script, dataset, recipe, flags, differs) for script, dataset, recipe, rows in PUBLISHED
    for flags, differs in ({"": {}} | rows).items()],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""))
def test_recipes_are_those_published(script, dataset, recipe, flags, differs):
    """Field by field, as far as the script has the field."""
    args = vars(script.parse_args([f"--dataset={dataset}", *flags.split()], common.describe))
    wanted = recipe | differs
    assert wanted.keys() - {"ema", "symmetric", "queue", "n_plus_k", "head", "bn_groups",
                            "temperature", "loss", "mask", "width"} <= args.keys()
    assert args == args | {name: wanted[name] for name in wanted.keys() & args.keys()}


@every_script
def test_flags_overrule_the_recipe(script):
    dataset = "cifar10" if script is simclr else "covtype"
    flags = [f"--dataset={dataset}", "--alpha=0", "--epochs=3", "--lr=0.5", "--warmup-epochs=1"]
    args = script.parse_args(flags, common.describe)
    assert (args.epochs, args.lr, args.alpha, args.warmup_epochs) == (3, 0.5, 0.0, 1)
    for epochs, warmup in ((40, 5), (500, 5), (501, 10)):
        args = script.parse_args([f"--dataset={dataset}", f"--epochs={epochs}"], common.describe)
        assert args.warmup_epochs == warmup


@pytest.mark.parametrize("script", [npair, moco, byol])
def test_ones_own_table_has_a_recipe_of_its_own(script, table):
    """Alpha 2 and masking 0 are CovType's tuning: masking 0 would make both views the same."""
    args = script.parse_args([f"--dataset={table}"], common.describe)
    assert args.alpha == 1.0 and args.mask == 0.2 and args.width < 64 and args.batch_size < 512


@every_script
def test_flags_reach_the_loop(script, monkeypatch, tmp_path, images):
    calls = []

    def pretrain(*args):
        calls.append(args)
        raise Stop

    monkeypatch.setattr(script, "pretrain", pretrain)
    values = {"alpha": 0.7, "epochs": 7, "lr": 0.5, "weight_decay": 0.01, "warmup_epochs": 1,
              "amp": "bf16", "compile": True, "seed": 5, "dim": 32, "eval_every": 3,
              "temperature": 0.3, "mask": 0.3, "mix": "cutmix", "no_augment": True, "queue": 300,
              "inputmix": True, "ema": 0.9, "symmetric": True, "schedule": "step",
              "batch_size": 16, "width": 2, "bn_groups": 4, "supervised": True}
    names = {field.name for field in dataclasses.fields(script.Args)}
    values = {name: value for name, value in values.items() if name in names}
    if script is not simclr:
        values |= {"mix": "mixup"} if "mix" in values else {}
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
             for name, value in values.items()]
    for name, more in (("plain", []), ("with", flags)):
        with pytest.raises(Stop):
            script.main([*small(script, images), f"--out={tmp_path / name}", *more])
    (*plain_nets, _, _, _, _), (*nets, loader, args, out, _) = calls
    assert values.items() <= vars(args).items() and out == tmp_path / "with"
    first, first_plain = (next(net.parameters()) for net in (nets[0], plain_nets[0]))
    assert first.shape != first_plain.shape or not torch.equal(first, first_plain)  # seed
    x, x_tilde, *_ = next(iter(loader))
    assert len(x) == 16 and (torch.equal(x, x_tilde) or "no_augment" not in values)
    assert all(list(net.parameters())[-1].shape == (32,) for net in nets[1:])


# ----------------------------------------------------------------------- runs
@pytest.mark.parametrize("script, domain, flags", [
    (npair, "digits", "--supervised"), (npair, "table", "--label-column=kind"),
    (simclr, "images", "--mix=cutmix"), (simclr, "images", "--loss=nt-xent --alpha=0"),
    (simclr, "images", "--loss=supcon --alpha=0"),
    (simclr, "images", "--loss=triplet --supervised"), (simclr, "images", "--loss=dare"),
    (simclr, "images", "--loss=barlow-twins --dim=32 --no-augment --inputmix"),
    (simclr, "clips", ""), (moco, "digits", "--queue=300 --standardize=all"),
    (moco, "table", ""), (moco, "images", "--alpha=0 --head=mlp-no-bn"),
    (moco, "clips", "--bn-groups=1"), (byol, "digits", "--symmetric --ema=0 --alpha=0"),
    (byol, "images", "--mix=cutmix"), (byol, "clips", "--amp=bf16")])
def test_a_run(script, domain, flags, request, tmp_path):
    """It writes its folder, prints its recipe first and its accuracy last."""
    out = tmp_path / "run"
    dataset = "digits" if domain == "digits" else request.getfixturevalue(domain)
    flags = [f"--dataset={dataset}", "--epochs=2", f"--out={out}", *flags.split()]
    if domain in ("digits", "table"):
        flags += ["--width=2"] + (["--batch-size=128"] if domain == "digits" else [])
    else:
        flags += ["--batch-size=8", "--arch=resnet18"]
        flags += ["--image-size=8"] if domain == "images" else []
    shown = succeed(script, *flags, before=quick).out
    assert {path.name for path in out.iterdir()} == FILES
    assert shown.count("epoch 1/2") == shown.count("epoch 2/2") == 1
    recipe = shown.partition("epoch 1/2")[0]
    config = json.loads((out / "config.json").read_text())
    for name in ("alpha", "lr", "epochs", "weight_decay", "batch_size"):
        assert re.search(rf"{name}\W+{config[name]}", recipe), (name, recipe)
    assert "parameters" in recipe and "cpu" in recipe
    assert config["script"] == script.__name__ and config["data"]
    assert len(without_rate(out)) == 3
    result = result_of(out)
    if (script, domain) == (moco, "table"):  # without labels
        assert not any("accuracy" in name or "r2" in name for name in result)
    else:
        assert 0 <= result["test_accuracy"] <= 1 and 0 <= result["train_accuracy"] <= 1
        formats = (".1%", ".2%", ".3f", ".4f")
        assert any(format(result["test_accuracy"], form) in shown for form in formats)
    torch.load(out / "encoder.pt", weights_only=True)


@pytest.mark.parametrize("script, flags", [(npair, []), (moco, ["--queue=300", "--ema=0.9"]),
                                           (byol, ["--ema=0.9"])])
def test_it_learns(script, flags, tmp_path):
    """Accuracy on digits, of ten classes; and by --eval-every on the way, into log.csv."""
    succeed(script, "--dataset=digits", "--width=2", "--batch-size=128", "--epochs=12",
            "--eval-every=6", f"--out={tmp_path}", *flags)
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    place = header.split(",").index("test_accuracy")
    on_the_way = float(rows[5].split(",")[place])
    assert [bool(row.split(",")[place]) for row in rows[:6]] == [False] * 5 + [True]
    assert 0.4 < on_the_way < 1 and 0.6 < result_of(tmp_path)["test_accuracy"] < 1


@every_script
def test_the_default_folder_tells_the_run(script, images, tmp_path):
    """Twice with another seed, alpha or size: three folders, named by what differs."""
    size = "--arch=resnet34" if script is simclr else "--width=2"
    for flags in ([], ["--seed=3"], ["--alpha=0.25"], [size]):
        succeed(script, *small(script, images), "--epochs=1", *flags, cwd=tmp_path, before=quick)
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 4
    for part in ("seed3", "alpha0.25", "resnet34" if script is simclr else "width2"):
        assert sum(part in name for name in names) == 1, names
    assert all(name.startswith(script.__name__) for name in names)


@every_script
def test_a_run_is_gone_on_with_or_left_alone(script, images, tmp_path):
    """Without --resume, or with another recipe, which is named; nothing in the folder changes."""
    out = tmp_path / "run"
    flags = [*small(script, images), "--epochs=2", f"--out={out}"]
    succeed(script, *flags, before=quick)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--resume" in refuse(script, *flags)
    others = {"lr": 0.2, "batch-size": 4, "weight-decay": 0.1, "epochs": 3, "seed": 1,
              "alpha": 0.5, "dim": 64, "schedule": "step", "warmup-epochs": 1}
    others |= {} if script is byol else {"temperature": 0.7}
    others |= {moco: {"queue": 50, "ema": 0.5, "bn-groups": 2}, byol: {"ema": 0.5},
               simclr: {"mix": "cutmix", "arch": "resnet34"}, npair: {"mask": 0.3}}[script]
    for name, value in others.items():
        line = refuse(script, *flags, "--resume", f"--{name}={value}", before=quick)
        assert name.replace("-", "_") in line.replace("-", "_") and str(value) in line, line
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    succeed(script, *flags, "--resume", "--eval-every=1", before=quick)  # no part of the recipe
    assert result_of(out) == json.loads(before["result.json"]) | {"seconds": 0}
    assert without_rate(out) == [row.rsplit(",", 1)[0]
                                 for row in before["log.csv"].decode().splitlines()]


def test_the_same_data_elsewhere_and_other_data(tmp_path, table):
    """A requeued job may stage its data in another folder; one changed value is noticed."""
    flags = ["--epochs=2", "--width=1", f"--out={tmp_path / 'run'}", "--label-column=kind"]
    succeed(npair, f"--dataset={table}", *flags)
    moved = tmp_path / "elsewhere" / "my.csv"
    moved.parent.mkdir()
    moved.write_text(table.read_text())
    succeed(npair, f"--dataset={moved}", *flags, "--resume")
    moved.write_text(table.read_text().replace("1,b", "2,b", 1))
    assert "data" in refuse(npair, f"--dataset={moved}", *flags, "--resume")
    moved.write_text(table.read_text().replace("1,b", "1,a", 1))
    assert "data" in refuse(npair, f"--dataset={moved}", *flags, "--resume")


@every_script
def test_a_folder_without_a_checkpoint_is_begun_anew(script, images, tmp_path):
    """As after Ctrl-C in the first epoch: with other flags, and without --resume."""
    def interrupted():
        def mixup(*_):
            raise KeyboardInterrupt
        script.mixup = mixup

    flags = [*small(script, images), "--epochs=2", f"--out={tmp_path}"]
    assert run(script, *flags, before=interrupted).rc != 0
    assert (tmp_path / "config.json").exists() and not (tmp_path / "checkpoint.pt").exists()
    succeed(script, *flags, "--lr=0.03", before=quick)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.03


# ----------------------------------------------------------------------- kill and resume
def killed_at(number, script):
    """What makes a Child kill itself just before it renames its file of this number."""
    def before():
        quick()
        every_epoch_is_saved(script)
        numbers, inner = itertools.count(1), os.replace

        def replace(*args):
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            inner(*args)

        os.replace = replace
    return before


@every_script
def test_killed_between_two_files_and_resumed(script, images, tmp_path):
    """At every file of two epochs that is renamed into its place; but for npair, every third."""
    flags = [*small(script, images), "--epochs=2", "--eval-every=1", "--queue=300"]
    flags = flags if script is moco else flags[:-1]
    whole = tmp_path / "whole"
    succeed(script, *flags, f"--out={whole}", before=quick)
    for number in itertools.count(1, 1 if script is npair else 3):
        out = tmp_path / str(number)
        child = run(script, *flags, f"--out={out}", before=killed_at(number, script))
        if child.rc == 0:
            break
        assert child.rc == -signal.SIGKILL, child.err
        succeed(script, *flags, f"--out={out}", "--resume", before=quick)
        assert_same_run(whole, out)
    assert number > 8


@pytest.mark.parametrize("script, flags", [
    (npair, "--epochs=20"), (simclr, "--epochs=6 --mix=cutmix"), (moco, "--epochs=10"),
    (byol, "--epochs=10")], ids=lambda value: getattr(value, "__name__", ""))
def test_killed_at_any_moment_and_resumed(script, flags, images, tmp_path):
    flags = [*small(script, images), *flags.split()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    succeed(script, *flags, f"--out={whole}", before=quick)
    lasted, moments, begun = time.monotonic() - begin, random.Random(0), []
    for _ in range(KILLS):
        child = start(script, *flags, f"--out={killed}", "--resume", before=quick)
        child.read(until="\nepoch ")
        time.sleep(moments.uniform(0, lasted / 2 / KILLS))
        child.kill()
        child.wait()
        begun += re.findall(r"^epoch (\d+)/", child.out, re.M)[:1]
    child = succeed(script, *flags, f"--out={killed}", "--resume", before=quick)
    begun += re.findall(r"^epoch (\d+)/", child.out, re.M)[:1]
    assert begun[0] == "1" and begun[-1] != "1"  # it goes on, and does not start anew
    assert_same_run(whole, killed)


def test_ctrl_c_ends_it_and_it_goes_on(tmp_path):
    flags = [*TABLE, "--epochs=30"]
    child = start(npair, *flags, f"--out={tmp_path / 'run'}", before=quick).read(until="epoch 3/")
    child.kill(signal.SIGINT)
    assert child.wait().rc != 0 and "epoch 30/" not in child.out
    succeed(npair, *flags, f"--out={tmp_path / 'run'}", "--resume", before=quick)
    succeed(npair, *flags, f"--out={tmp_path / 'whole'}", before=quick)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@every_script
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(script, images, tmp_path):
    flags = [*small(script, images), f"--out={tmp_path}"]

    def fills_up():
        quick()
        every_epoch_is_saved(script)
        inner, numbers = torch.save, itertools.count(1)

        def save(state, path):
            if next(numbers) == 6:  # the third epoch's checkpoint, after its encoder
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            inner(state, path)

        torch.save = save

    refuse(script, *flags, "--epochs=3", before=fills_up)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["log"]) == 2
    succeed(script, *flags, "--epochs=3", "--resume", before=quick)
    assert not list(tmp_path.glob("*.tmp"))


# ----------------------------------------------------------------------- bad input
BAD_FLAGS = {
    npair: "--alpha=nan --alpha=inf --alpha=-1 --alpha=much --epochs=0 --epochs=1.5 --epochs= "
    "--batch-size=0 --batch-size=1 --lr=-1 --lr=nan --lr=inf --weight-decay=-1e-4 --temperature=0 "
    "--temperature=nan --dim=0 --warmup-epochs=-1 --width=0 --mask=1.5 --mask=nan --seed=-1 "
    "--eval-every=x --amp=fp8 --standardize=none --schedule=linear --device=tpu --device=cuda:99 "
    "--device= --dataset=cifar10 --dataset=nowhere.csv --dataset= --fast stray --supervised=1",
    simclr: "--margin=-1 --image-size=0 --arch=vgg --mix=inputmix --loss=dino "
    "--temperature=0 --loss=nt-xent --loss=supcon --mask=0.1 "
    "--dataset=covtype --dataset=nowhere --dataset=/dev/null",
    moco: "--queue=-1 --ema=1.5 --ema=nan --mask=2 --head=none --bn-groups=0",
    byol: "--ema=-0.1 --ema=2 --symmetric=3 --temperature=0.1",
}


@pytest.mark.parametrize("script, flag", [(script, flag) for script, flags in BAD_FLAGS.items()
                                          for flag in flags.split()],
                         ids=lambda value: getattr(value, "__name__", value))
def test_bad_flags(script, flag, tmp_path, images):
    """One line that names the flag or its value, and no folder."""
    flags = [] if flag.startswith("--dataset") else small(script, images)
    line = refuse(script, *flags, "--epochs=1", flag, cwd=tmp_path)
    name, _, value = flag.partition("=")
    assert name in line or (value or name) in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, flags", [
    (simclr, "--loss=nt-xent --supervised --alpha=0"), (simclr, "--loss=barlow-twins --supervised"),
    (moco, "--mix=cutmix"), (byol, "--mix=cutmix"), (moco, "--bn-groups=200")])
def test_flags_that_do_not_go_together(script, flags, images, tmp_path):
    refuse(script, *small(script, images), "--epochs=1", *flags.split(), cwd=tmp_path)


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nothing", "/dev/null"])
def test_bad_places_for_a_run(tmp_path, out):
    (tmp_path / "file").write_text("")
    refuse(npair, *TABLE, "--epochs=1", f"--out={tmp_path / out}")


@pytest.mark.parametrize("name, content", [
    ("config.json", b""), ("config.json", b"{"), ("config.json", b"{}"), ("config.json", None),
    ("checkpoint.pt", b"no checkpoint"), ("checkpoint.pt", b"")])
def test_a_damaged_run_folder(tmp_path, name, content):
    flags = [*TABLE, "--epochs=1", f"--out={tmp_path}"]
    succeed(npair, *flags, before=quick)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refuse(npair, *flags, "--resume")


def test_a_bug_shows_its_traceback(tmp_path):
    """Only what is meant for the user is made one line."""
    def before():
        def mixup(*_):
            raise RuntimeError("a bug")
        npair.mixup = mixup

    child = run(npair, *TABLE, f"--out={tmp_path}", before=before)
    assert child.rc == 1 and "Traceback" in child.err and "a bug" in child.err


# ----------------------------------------------------------------------- interpreters
def test_a_machine_with_nothing_but_pytorch_shows_the_help(tmp_path):
    """--help and errors in flags import no library; a broken torchvision stops no table."""
    for name in ("torchvision", "torchaudio"):
        (tmp_path / f"{name}.py").write_text("raise OSError('undefined symbol')")
    (tmp_path / "user.py").write_text(f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
import npair_tabular, simclr_imix, moco_imix, byol_imix
for script in (npair_tabular, simclr_imix, moco_imix, byol_imix):
    for flag in ("--help", "--alpha=-1"):
        try:
            script.main([flag])
        except SystemExit as end:
            print("ended", end.code)
loaded = {{"pandas", "sklearn", "scipy", "torchvision", "torchaudio", "PIL"}} & sys.modules.keys()
assert not loaded, loaded
npair_tabular.main(["--dataset=digits", "--width=1", "--epochs=1", "--out=run"])
""")
    done = subprocess.run([sys.executable, "user.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ended 0") == 4 and done.stdout.count("ended 2") == 4
    assert "epoch 1/1" in done.stdout


@every_script
def test_the_help_tells_every_flag(script):
    shown = succeed(script, "--help").out
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in shown and field.metadata["help"]
    assert "fcntl" not in Path(script.__file__).read_text()  # which Windows has not


def test_the_readmes_python_runs(tmp_path, images):
    """Its blocks of Python, one after the other, beside a folder of images."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    (tmp_path / "my_images").symlink_to(images)

    def user():
        exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "readme"})

    child = Child(user, cwd=tmp_path).wait()
    assert child.rc == 0, child.err
