"""One attempt's process, seen from the supervisor: launch through the shim, adopt, signal, learn its end.

A process is identified by pid, start time and boot id, never by its pid alone.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from msgspec import Struct

from . import shim
from .core.verdict import ExitStatus
from .errors import GpusupError

START_TIMEOUT_S = 30.0


class Ended(Struct, frozen=True, kw_only=True):
    """How the trainer left. `exec_error` (errno, text) when it never ran."""

    exit: ExitStatus
    user_s: float | None = None
    system_s: float | None = None
    exec_error: tuple[int, str] | None = None
    rebooted: bool = False
    """Nobody saw the end, and the machine has been started anew since."""


class TrainerProcess:
    """A live or finished trainer in `directory`, the attempt's own."""

    def __init__(self, directory: Path, pid: int, start_ticks: int, shim_pid: int, shim_start_ticks: int) -> None:
        self.directory = directory
        self.pid = pid
        self.start_ticks = start_ticks
        self._pidfd = open_pidfd(pid, start_ticks)
        self._shim_pidfd = open_pidfd(shim_pid, shim_start_ticks)

    @property
    def wait_fd(self) -> int | None:
        """Readable when the next thing to wait for (the trainer, then its shim) has ended; None when both have."""
        return self._pidfd if self._pidfd is not None else self._shim_pidfd

    def poll(self) -> Ended | None:
        """How it ended, once trainer and shim are both gone; the shim goes last, when nothing is left behind."""
        self._pidfd = _close_if_ended(self._pidfd)
        if self._pidfd is not None:
            return None
        self._shim_pidfd = _close_if_ended(self._shim_pidfd)
        if self._shim_pidfd is not None:
            return None
        return read_end(self.directory) or _unseen_end(self.directory)

    def signal(self, number: signal.Signals) -> None:
        """Send `number` to the trainer; to its whole process group when it is SIGKILL."""
        if self._pidfd is None:
            return
        try:
            if number == signal.SIGKILL:
                os.killpg(
                    self.pid, number
                )  # it leads its own session, and the pidfd says that the pid is still its own
            else:
                signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass


def launch(directory: Path, argv: tuple[str, ...], cwd: str, environment: dict[str, str]) -> TrainerProcess | Ended:
    """Start the attempt in `directory`, or find that it was started before. Idempotent.

    Returns the process, or how it ended if that is already known (it could not be executed, say).
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [sys.executable, "-I", "-S", shim.__file__, str(directory), cwd, *argv]
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with os.fdopen(os.open(directory / "shim.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            starter = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            code = starter.wait(START_TIMEOUT_S)
        found = adopt(directory)
        if found is not None or code != shim.BUSY or time.monotonic() > deadline:
            break
        time.sleep(0.02)  # another's shim is about to record the trainer, or to die without one
    if found is None:
        raise GpusupError(f"the attempt could not be started (code {code}); see {directory / 'shim.log'}")
    return found


def adopt(directory: Path) -> TrainerProcess | Ended | None:
    """The attempt in `directory` as it is now: running, ended, or None if it was never started."""
    started = _read_json(directory / "start.json")
    if started is None:
        return read_end(directory)
    if started["boot_id"] != shim.boot_id():
        return read_end(directory) or _unseen_end(directory)
    process = TrainerProcess(
        directory, started["pid"], started["start_ticks"], started["shim_pid"], started["shim_start_ticks"]
    )
    return process.poll() or process


def read_end(directory: Path) -> Ended | None:
    """What the shim recorded of the trainer's end."""
    end = _read_json(directory / "exit.json")
    if end is None:
        return None
    if "exec_error" in end:
        number, _, text = end["exec_error"].partition(" ")
        code = 127 if int(number) in (2, 20) else 126  # ENOENT, ENOTDIR: not found; else not executable
        return Ended(exit=ExitStatus(code=code), exec_error=(int(number), text))
    code = os.waitstatus_to_exitcode(end["status"])
    status = ExitStatus(code=code) if code >= 0 else ExitStatus(signal=-code)
    return Ended(exit=status, user_s=end["user_s"], system_s=end["system_s"])


def _unseen_end(directory: Path) -> Ended:
    started = _read_json(directory / "start.json")
    return Ended(exit=ExitStatus(), rebooted=started is not None and started["boot_id"] != shim.boot_id())


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """A descriptor for exactly this process, or None when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        if shim.start_ticks(pid) == start_ticks:
            return fd
    except (OSError, ValueError):
        pass
    os.close(fd)
    return None


def _close_if_ended(fd: int | None) -> int | None:
    if fd is None or not select.select([fd], [], [], 0)[0]:
        return fd
    os.close(fd)
    return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    assert isinstance(content, dict)
    return content
