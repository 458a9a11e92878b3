# SPDX-License-Identifier: MIT
"""200 bad inputs: each ends in one line on stderr, without a traceback; nothing half done stays."""

import fcntl
import io
import os
import signal
import struct
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import byol_imix
import moco_imix
import npair_tabular
import simclr_imix

ROOT = Path(__file__).parent.parent
DIGITS = ["--dataset", "digits", "--width", "1", "--batch-size", "64", "--epochs", "2",
          "--linear-epochs", "1", "--device", "cpu"]


def assert_ends(capsys, script, flags):
    capsys.readouterr()
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        script.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert end.value.code in (1, 2)
    assert error.count("\n") == 1 and error.startswith(f"{Path(script.__file__).name}: ")
    assert len(error) < 2200 and error[:-1].isprintable()
    assert time.monotonic() - start < 10


# ----------------------------------------------------------------------- flags
VALUES = ["", "x", "nan", "-1", "1e400", "0x", "9" * 5000, "1\n2", "\x1b[31m"]
NUMBERS = ["alpha", "epochs", "lr", "batch-size", "temperature", "warmup-epochs", "seed", "width"]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("name", NUMBERS)
def test_bad_values(capsys, name, value):
    assert_ends(capsys, moco_imix, ["--dataset=digits", f"--{name}={value}"])


@pytest.mark.parametrize("script, flags", [
    (npair_tabular, "--nothing"), (npair_tabular, "--alpha"), (npair_tabular, "stray"),
    (npair_tabular, "--ep 3 --e 5"), (npair_tabular, "--probe=svm"),
    (npair_tabular, "--missing=no"),
    (npair_tabular, "--finetune --probe=logistic"), (npair_tabular, "--finetune --eval-every=1"),
    (npair_tabular, "--supervised --labels=0.1"), (npair_tabular, "--dataset="),
    (npair_tabular, "--dataset=cifar10"), (npair_tabular, "--dataset=nowhere.csv"),
    (npair_tabular, "--device=cuda:99"), (npair_tabular, "--device="),
    (npair_tabular, "--embed=x.csv --out=nowhere"), (npair_tabular, "--dataset=a\x00b.csv"),
    (simclr_imix, "--dataset=nowhere"), (simclr_imix, "--dataset=covtype"),
    (simclr_imix, "--dataset=/dev/null"), (simclr_imix, "--dataset=/"),
    (simclr_imix, "--loss=supcon --alpha=1"), (simclr_imix, "--loss=nt-xent --supervised"),
    (moco_imix, "--mix=cutmix --dataset=digits"), (moco_imix, "--head=big"),
    (moco_imix, "--dataset=digits --queue=0"), (byol_imix, "--dataset=/proc/self/mem"),
    (byol_imix, "--dataset=digits --ema=2"), (byol_imix, "--dataset=" + "d" * 5000)])
def test_bad_flags(capsys, tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    assert_ends(capsys, script, flags.split())
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------- tables
ROWS = "".join(f"{i * i % 17 / 3},{i % 5},{'abc'[i % 3]}\n" for i in range(40))
TABLE = "p,q,kind\n" + ROWS


def with_column(*texts):
    """The table with a further column of these texts in turn."""
    return "c," + "".join(f"{texts[i % len(texts)] if i else 'c'},{line}\n" if i else f"{line}\n"
                          for i, line in enumerate(TABLE.splitlines()))


TABLES = {
    "empty": "", "blanks": "\n \n", "header": "p,q,kind\n", "one row": TABLE[:30],
    "numbers for names": TABLE.replace("p,q", "1.5,7", 1), "such names": TABLE.replace(
        "p", '"1,234"', 1),
    "zeros": "\0" * 99,
    "binary": bytes(range(256)) * 9, "latin": TABLE.replace("a", "ä").encode("latin-1"),
    "no gzip": b"\x1f\x8b\x08" + b"x" * 99, "ragged": TABLE + "1,2,3,4\n", "short": TABLE + "1\n",
    "quote": TABLE + '"1,2,a\n', "no such column": TABLE.replace("kind", "sort"),
    "labels alone": "kind\n" + "a\nb\n" * 9, "constant": "p,kind\n" + "1,a\n1,b\n" * 9,
    "twice": TABLE.replace("q", "p", 1), "labels twice": TABLE.replace("q", "kind", 1),
    "class once": TABLE + "1,2,d\n", "few": "p,q,kind\n1.5,2,a\n2.5,3,a\n1,7,b\n2,9,b\n",
    "utf-16 cut": TABLE.encode("utf-16")[:-1], "another separator": TABLE.replace(",", "~"),
    "long cell": TABLE + "x" * 10**6 + ",1,a\n", "a line": "x" * 10**6,
    "row number alone": "id,kind\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40)),
    **{f"cell {text!r}": with_column("1", "2", "3", text) for text in (
        "x", "inf", "-inf", "1e39", "NA", "?", "", "null", "1;2", "1,5".replace(",", "."), "0x1f",
        "--1", "1.2.3", "12 kg", "$", "%5%", "1 2", "½", "٣x") if text != "1.5"},
    **{f"dates {text}": with_column(text) for text in (
        "2024-01-01", "1/2/24", "12:30", "1 Jan 2024", "Jan 1, 24".replace(",", ""), "2024/5/6",
        "2024-01-01T00:00:00")},
    "texts": with_column(*(f"t{i}" for i in range(41))), "units": with_column("$5", "€6", "$7"),
    "mixed": with_column("5%", "6"), "decimals": with_column('"1,5"', "2.5"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_tables(capsys, tmp_path, name):
    text = TABLES[name]
    path = tmp_path / ("my.csv.gz" if name == "no gzip" else "my.csv")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_ends(capsys, npair_tabular, ["--dataset", path, "--label-column", "kind", "--epochs", 1,
                                        "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------- images and recordings
def png(**options):
    content = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(content, "PNG", **options)
    return content.getvalue()


def deep(mode, dtype):
    content = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), dtype)).save(content, "TIFF" if mode == "F" else "PNG")
    return content.getvalue()


IMAGES = {"empty": b"", "text": b"hello", "cut": png()[:-30], "cut early": png()[:20],
          "crc": png()[:40] + b"x" + png()[41:], "zeros": bytes(999), "gray of 16 bits":
          deep("I", np.uint16), "floats": deep("F", np.float32), "bomb":
          b"P6 60000 60000 255\n" + bytes(999), "colour of 16 bits":
          b"P6 16 16 65535\n" + bytes(6 * 256), "no pixels": b"P6 0 16 255\n", "svg": b"<svg/>",
          "html": b"<html>404</html>", "jpeg's head": b"\xff\xd8\xff\xe0" + bytes(50)}


def two_classes(tmp_path, name, content):
    for i in range(12):
        path = tmp_path / "data" / ("ant", "bee")[i % 2] / f"{i}{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "data"


@pytest.mark.parametrize("name", IMAGES)
def test_bad_images(capsys, tmp_path, name):
    data = two_classes(tmp_path, ".png", png())
    (data / "ant" / "bad.png").write_bytes(IMAGES[name])
    assert_ends(capsys, simclr_imix, ["--dataset", data, "--image-size", 16, "--epochs", 1,
                                      "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


def wav(rate=16000, width=2, samples=16000, channels=1):
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", None))
        file.writeframes(bytes(samples * width * channels))
    return content.getvalue()


RECORDINGS = {"empty": b"", "text": b"hello", "cut": wav()[:-100], "header": wav()[:44],
              "cut header": wav()[:30], "no samples": wav(samples=0), "mp3": b"ID3" + bytes(999),
              "slow": wav(rate=1), "fast": wav(rate=10**9), "flac": b"fLaC" + bytes(999),
              "float": wav()[:20] + struct.pack("<H", 3) + wav()[22:], "no channels":
              wav()[:22] + struct.pack("<H", 0) + wav()[24:],
              "metadata alone": wav(samples=0) + b"LIST" + struct.pack("<I", 20) + bytes(20),
              "24 bits in 4 bytes": wav()[:32] + struct.pack("<HH", 4, 24) + wav()[36:],
              "4 bits": wav()[:34] + struct.pack("<H", 4) + wav()[36:]}


@pytest.mark.parametrize("name", RECORDINGS)
def test_bad_recordings(capsys, tmp_path, name):
    data = two_classes(tmp_path, ".wav", wav())
    (data / "ant" / "bad.wav").write_bytes(RECORDINGS[name])
    assert_ends(capsys, simclr_imix, ["--dataset", data, "--epochs", 1, "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists() and not list(data.glob("imix*"))


@pytest.mark.parametrize("notes", [b"", b"LIST\x08\0\0\0a data b"])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_recordings_written_into_a_pipe_are_read_to_the_end(tmp_path, size, notes):
    raw = bytearray(wav(samples=0) + np.arange(5000, dtype="<i2").tobytes())
    raw[4:8] = raw[40:44] = size.to_bytes(4, "little")
    raw[36:36] = notes
    (tmp_path / "a.wav").write_bytes(raw)
    import common
    assert np.array_equal(common.read_wav(tmp_path / "a.wav"), np.arange(5000))


# ----------------------------------------------------------------------- folders and checkpoints
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a finished run, and what they hold."""
    out = tmp_path_factory.mktemp("finished")
    npair_tabular.main([*DIGITS, "--out", str(out)])
    return {path.name: path.read_bytes() for path in out.iterdir()}


def torch_bytes(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def changed(raw, change):
    """A checkpoint, loaded, changed and saved again."""
    state = torch.load(io.BytesIO(raw), weights_only=True)
    change(state)
    return torch_bytes(state)


CHECKPOINTS = {
    "empty": lambda raw: b"", "text": lambda raw: b"hello", "cut": lambda raw: raw[:-1000],
    "zeros": lambda raw: bytes(len(raw)), "a list": lambda raw: torch_bytes([1, 2]),
    "a tensor": lambda raw: torch_bytes(torch.zeros(3)), "no keys": lambda raw: torch_bytes({}),
    "code": lambda raw: torch_bytes({"model": Path}),
    "a key is missing": lambda raw: changed(raw, lambda state: state.pop("scaler")),
    "a further key": lambda raw: changed(raw, lambda state: state.update(more=1)),
    "weights are missing": lambda raw: changed(raw, lambda state: state["model"].popitem()),
    "other shapes": lambda raw: changed(raw, lambda state: state["model"].update(
        {"0.embed.0.weight": torch.zeros(3, 3)})),
    "no optimizer": lambda raw: changed(raw, lambda state: state.update(optimizer={"a": 1})),
    "another one's": lambda raw: changed(raw, lambda state: state.update(
        model=torch.nn.Linear(2, 2).state_dict())),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(capsys, tmp_path, finished, name):
    for file, content in finished.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "checkpoint.pt").write_bytes(CHECKPOINTS[name](finished["checkpoint.pt"]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert_ends(capsys, npair_tabular, [*DIGITS, "--out", tmp_path, "--resume"])
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name, content", [
    ("config.json", b""), ("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"\xff"),
    ("config.json", b'{"seed": 7}'), ("config.json", None)])
def test_bad_run_folders(capsys, tmp_path, finished, name, content):
    for file, whole in finished.items():
        (tmp_path / file).write_bytes(whole)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_ends(capsys, npair_tabular, [*DIGITS, "--out", tmp_path, "--resume"])


@pytest.mark.parametrize("name, content", [
    ("data.json", b"{"), ("data.json", b"{}"), ("config.json", b"{}"), ("encoder.pt", b"x"),
    ("encoder.pt", torch_bytes({"a": torch.zeros(1)})), ("data.json", None), ("encoder.pt", None)])
def test_bad_run_folders_to_embed_by(capsys, tmp_path, finished, name, content):
    for file, whole in finished.items():
        (tmp_path / file).write_bytes(whole)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    np.savetxt(tmp_path / "new.csv", np.zeros((3, 64)), delimiter=",")
    assert_ends(capsys, npair_tabular, ["--embed", tmp_path / "new.csv", "--out", tmp_path])


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nothing", "/dev/null"])
def test_bad_places_for_a_run(capsys, tmp_path, out):
    (tmp_path / "file").write_text("")
    assert_ends(capsys, npair_tabular, [*DIGITS, "--out", tmp_path / out])


# ----------------------------------------------------------------------- what clusters do
def start(tmp_path, *flags, **options):
    command = [sys.executable, ROOT / "npair_tabular.py", *DIGITS, "--epochs", "500", "--out",
               tmp_path / "run", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def test_sigterm_saves_the_last_epoch(tmp_path):
    process = start(tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 20/"):
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.count("\n") == 1 and "--resume" in error
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(log) >= 21 and f"epoch {len(log) - 1};" in error
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_stdout_that_is_closed(tmp_path):
    process = start(tmp_path)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 1 and error.count("\n") == 1, error


def test_two_processes_in_one_folder_and_the_lock_of_a_killed_one(tmp_path):
    first = start(tmp_path)
    for line in first.stdout:
        if line.startswith("epoch 2/"):
            break
    second = start(tmp_path, "--resume")
    _, error = second.communicate(timeout=60)
    assert second.returncode == 2 and error.count("\n") == 1 and "another process" in error
    first.kill()
    first.communicate()
    with open(tmp_path / "run" / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free again


@pytest.mark.parametrize("flags, limit", [
    (["--width", "3000"], 8 << 30), (["--batch-size", "1000", "--dim", "999999"], 8 << 30)])
def test_too_much_for_the_memory(tmp_path, flags, limit):
    import resource
    process = start(tmp_path, *flags, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_AS, (limit, limit)))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.count("\n") == 1 and "memory" in error


def test_a_disk_that_is_full(tmp_path):
    import resource
    process = start(tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, 50_000)))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_stdout_that_can_not_encode_a_name(tmp_path):
    (tmp_path / "データ.csv").write_text(TABLE.replace("kind", "種類"))
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "npair_tabular.py", "--dataset", tmp_path / "データ.csv",
               "--label-column", "種類", "--epochs", "1", "--out", tmp_path / "run"]
    process = subprocess.run(command, capture_output=True, env=environment)
    assert process.returncode == 0, process.stderr
