"""The real command line, run with real trainers in a home of its own. Used by tests of whole runs."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAKES = ROOT / "tests" / "fake_trainers"
GPUSUP = Path(sys.executable).parent / "gpusup"
TIMEOUT_S = 120.0


class Gpusup:
    """The program, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "GPUSUP_HOME": str(folder / "home"),
            "VIRTUAL_ENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [GPUSUP, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """In the background; both streams in one pipe."""
        process = subprocess.Popen(
            [GPUSUP, *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def log(self, run: str = "-1") -> dict[str, Any]:
        done = self("log", run, "-o", "json")
        assert done.returncode == 0, done.stderr
        content = json.loads(done.stdout)
        assert isinstance(content, dict)
        return content

    def policy(self, text: str) -> str:
        path = self.folder / "policy.yaml"
        path.write_text("version: 1\n" + text)
        return str(path)

    def attempts(self) -> list[Path]:
        return sorted((self.folder / "home" / "runs").glob("*/attempts/*"))


def read_until(process: subprocess.Popen[bytes], wanted: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
    """The output of `process` up to and including `wanted`."""
    assert process.stdout is not None
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        assert ready, f"{wanted!r} did not come; so far: {seen.decode(errors='replace')[-3000:]}"
        data = os.read(process.stdout.fileno(), 1 << 16)
        assert data, f"{wanted!r} did not come before the end; all: {seen.decode(errors='replace')[-3000:]}"
        seen += data
    return seen


def finish(process: subprocess.Popen[bytes], timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """Exit code and the rest of the output."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output.decode(errors="replace")


def wait_gone(pid: int, timeout_s: float = TIMEOUT_S) -> None:
    """Until the process has ended, told by the kernel."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], timeout_s)[0], f"process {pid} is still there"
    finally:
        os.close(fd)


def kinds(log: dict[str, Any]) -> list[str]:
    return [event["kind"] for event in log["events"]]


def of_kind(log: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in log["events"] if event["kind"] == kind]


def end_trainer(attempt: Path) -> None:
    """No trainer of a failed test may outlive it."""
    start = attempt / "start.json"
    if start.exists() and not (attempt / "exit.json").exists():
        try:
            os.killpg(json.loads(start.read_text())["pid"], signal.SIGKILL)
        except ProcessLookupError:
            return
