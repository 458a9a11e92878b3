# SPDX-License-Identifier: MIT
"""How tests start commands: start() and run() fork this process, in which all is imported.

A start of an interpreter that imports PyTorch and the libraries takes seconds, a fork none.
"""

import os
import resource
import select
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path

# One thread, here and in the processes that tests start: their tensors are small, and where the
# machine is busy two threads wait for each other. No card: what has used one can't be forked.
# (test_cuda.py starts a process that may use one.)
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("CARD", "")}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import pandas  # noqa: E402, F401  these are what common.py imports inside its functions
import PIL.Image  # noqa: E402, F401
import pytest  # noqa: E402
import scipy.io.wavfile  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import sklearn.linear_model  # noqa: E402, F401
import sklearn.model_selection  # noqa: E402, F401
import sklearn.pipeline  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torchaudio  # noqa: E402, F401
import torchvision  # noqa: E402, F401

import common  # noqa: E402, F401

torch.set_num_threads(1)
torch.ones(1, requires_grad=True).sum().backward()  # once the fake card is seen, this would start
# a thread for it, after which PyTorch allows no fork


class Child:
    """A fork of this process that calls a function. stdout, stderr: files to read from.

    env: changes to its environment; limits: of its resources, {resource.RLIMIT_...: n}; cwd: its
    folder; before: called in it, first. It ends as an interpreter would: a SystemExit's text and a
    traceback go to its stderr.
    """

    def __init__(self, call, *, env=None, limits=None, cwd=None, before=None):
        pipes = [os.pipe() for _ in range(2)]
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                for (_, end), number in zip(pipes, (1, 2)):
                    os.dup2(end, number)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
                os.closerange(3, 1000)
                warnings.simplefilter("ignore")
                os.environ.update(env or {})
                os.chdir(cwd or ".")
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for which, limit in (limits or {}).items():
                    resource.setrlimit(which, (limit, limit))
                if before:
                    before()
                call()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int | None) else 1
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                code = 1
                traceback.print_exc(file=sys.stderr)
            finally:
                for file in (sys.stdout, sys.stderr):
                    try:
                        file.flush()
                    except OSError:
                        pass
                os._exit(code or 0)
        for _, end in pipes:
            os.close(end)
        self.stdout, self.stderr = (open(end, "rb", 0) for end, _ in pipes)
        self.shown, self.rc = {self.stdout: b"", self.stderr: b""}, None

    def read(self, until=None, timeout=120):
        """Read both pipes to their end, or until this text has been shown; kill it after that."""
        open_files = [file for file in self.shown if not file.closed]
        while open_files and not (until and until in self.shown[self.stdout].decode()):
            ready, _, _ = select.select(open_files, [], [], timeout)
            if not ready:
                self.kill()
                raise TimeoutError(self.shown)
            for file in ready:
                chunk = os.read(file.fileno(), 65536)
                self.shown[file] += chunk
                if not chunk:
                    open_files.remove(file)
        return self

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self, timeout=120):
        """Read it to its end; afterwards rc (minus the signal), out and err are there."""
        self.read(timeout=timeout)
        _, status = os.waitpid(self.pid, 0)
        self.rc = os.waitstatus_to_exitcode(status)
        self.out, self.err = (self.shown[file].decode() for file in (self.stdout, self.stderr))
        self.stdout.close(), self.stderr.close()
        return self


def start(script, *flags, **options):
    """script.main(flags), as a command, in a Child; options: of Child."""
    def call():
        sys.argv = [script.__file__]
        script.main([str(flag) for flag in flags])

    return Child(call, **options)


def run(script, *flags, timeout=120, **options):
    """The Child of start() at its end."""
    return start(script, *flags, **options).wait(timeout)


def succeed(script, *flags, **options):
    """As run(), of a command that is to succeed."""
    child = run(script, *flags, **options)
    assert child.rc == 0, child.err
    return child


def refuse(script, *flags, code=2, **options):
    """As run(), of a command that is to end in one line on stderr, which is returned."""
    child = run(script, *flags, **options)
    assert child.rc == code and "Traceback" not in child.err, child.err
    lines = child.err.splitlines()
    if lines and lines[0].startswith("usage:"):  # argparse's own form
        lines = lines[1:]
    assert len(lines) == 1, child.err
    return lines[0]


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start_two(call, world=2, **options):
    """Two Children that call(rank) with the environment that torchrun gives its processes."""
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [Child(lambda rank=rank: call(rank), **options,
                  env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)]


def run_two(call, **options):
    """The Children of start_two() at their end; they are to succeed."""
    def joined(rank):
        dist.init_process_group("gloo")
        call(rank)
        dist.destroy_process_group()

    children = [child.wait() for child in start_two(joined, **options)]
    assert all(child.rc == 0 for child in children), "\n".join(child.err for child in children)
    return children


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 24 images of 8 pixels, of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of 24 recordings of two words."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        samples = np.random.default_rng(i).integers(-9999, 9999, 16000, dtype=np.int16)
        scipy.io.wavfile.write(folder / "ab"[i % 2] / f"{i}.wav", 16000, samples)
    return folder


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    torch.manual_seed(0)
