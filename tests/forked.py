"""Processes of commands that begin with all imports done: imports take longer than what the tests let them do.

One server in each process of tests imports once, and forks. A script runs in the fork as in a process of its own, with
its own arguments, folder, environment, output, signals and end. What may differ between two interpreters, such as the
order of sets of words, is the same in all forks of a server: where that is the point, tests start processes of their
own.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SERVER = """
import importlib, json, os, runpy, signal, sys

for name in ("ddpm.cli", "ddpm.commands.train.training", "ddpm.training.trainer", "models.unet", "matplotlib.figure",
             "matplotlib.backends.backend_agg", "scipy.linalg", "sklearn.linear_model", "torch._dynamo",
             "torch.utils.tensorboard"):
    importlib.import_module(name)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a keeper ended


def write(path, number):
    with open(path + ".new", "w") as file:
        file.write(str(number))
    os.rename(path + ".new", path)


for line in sys.stdin:
    folder, where, sys.argv, environment = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # in the keeper, which waits for the process
    child = os.fork()
    if child:
        write(folder + "/pid", child)
        write(folder + "/ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(where)
    os.environ.clear()
    os.environ.update(environment)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
"""


@functools.cache
def _server() -> subprocess.Popen:
    """It ends with this process, whose end of its input is closed then."""
    environment = os.environ | {"PYTHONPATH": _with_repository(os.environ.get("PYTHONPATH")), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, text=True)


def _with_repository(path: str | None) -> str:
    return os.pathsep.join(filter(None, [str(REPOSITORY), path]))


class Forked:
    """A script that runs, with the part of `subprocess.Popen` that tests use.

    Args:
        words: the script, and its arguments.
        environment: its own variables, in full; those that an interpreter reads as it starts are the server's.
    """

    def __init__(self, words: list[str], environment: dict[str, str]):
        self._files = tempfile.TemporaryDirectory(prefix="forked_")
        self.folder, self.returncode, server = Path(self._files.name), None, _server()
        server.stdin.write(json.dumps([str(self.folder), os.getcwd(), words, environment]) + "\n")
        server.stdin.flush()
        while not (self.folder / "pid").exists():
            assert server.poll() is None, "the server has ended"
            time.sleep(0.005)
        self.pid = int((self.folder / "pid").read_text())

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None and (self.folder / "ended").exists():
            self.returncode = int((self.folder / "ended").read_text())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """The same, once it has ended; subprocess.TimeoutExpired if it does not."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it wrote, and its errors."""
        self.wait(timeout)
        return (self.folder / "out").read_text(), (self.folder / "err").read_text()

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """By SIGKILL."""
        self.send_signal(signal.SIGKILL)
