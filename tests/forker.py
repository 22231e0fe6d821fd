"""Python programs in forks of a process that has already imported the libraries: each start saves seconds."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

# Imported once, before the forks. Nothing here may compute: PyTorch's threads do not survive a fork.
PRELOAD = [
    "training.main",
    "languagebind.data.world.make",
    "languagebind.eval.evaluate",
    "open_clip",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "tyro",
    "wandb",
]


class Forked:
    """A Python program in a process of its own; offers what the tests use of `subprocess.Popen`.

    The program has its own environment, working directory, signals and output, as if it had been started anew.
    """

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], start_new_session: bool = False):
        """Start `command`: the words that would follow `python`, a script or `-m` and a module, with arguments."""
        self._output = tempfile.NamedTemporaryFile(prefix="output-")  # noqa: SIM115 - read until the object goes
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = (command, folder, environment, self._output.name, start_new_session)
        self._process = context.Process(target=run_program, args=arguments)
        with mock.patch.dict(os.environ, environment):  # the first start also starts the server, which keeps these
            self._process.start()
        self.pid = self._process.pid
        atexit.register(self._end)

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the number of the signal that killed the program, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; return the standard output and error together."""
        self._process.join(timeout)
        output = Path(self._output.name).read_text()
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0, output)
        return output, None

    def send_signal(self, number: int) -> None:
        """Send a signal to the program."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the program."""
        self.send_signal(signal.SIGKILL)

    def _end(self) -> None:
        if self.returncode is None:
            self.kill()


def run_program(
    command: list[str], folder: Path, environment: dict[str, str], output: str, start_new_session: bool
) -> None:
    """Turn this process into the program: its session, output, environment, folder and arguments, then its code."""
    multiprocessing.set_start_method(None, force=True)  # the default again, in place of the server's
    if start_new_session:
        os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # it was imported before the fork
    module = command[0] == "-m"
    sys.argv = command[module:]
    sys.path[:] = [str(folder if module else Path(command[0]).parent.resolve()), *sys.path]
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
