"""The exception that ends a Python process is written down, and nothing else about that process is different."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpusup.supervisor.core.verdict import TrainerFailure
from gpusup.supervisor.exception_records import read_failure
from gpusup.supervisor.launch_env import BOOT

ENDS = {
    "value error": "raise ValueError('no such thing')",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise RuntimeError('with a cause') from error",
    "exit with a message": "raise SystemExit('leaving')",
    "exit with a code": "import sys; sys.exit(7)",
    "interrupt": "raise KeyboardInterrupt",
    "no memory": "raise MemoryError",
    "recursion": "def f(): f()\nf()",
    "group": "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])",
    "syntax": "exec('1 +')",
    "a hook of its own": "import sys\nsys.excepthook = lambda *told: print('mine', told[0].__name__)\nraise ValueError",
    "a hook that calls the one before": "import sys\nbefore = sys.excepthook\n"
    "sys.excepthook = lambda *told: (print('mine'), before(*told))\nraise ValueError",
    "standard error closed": "import os\nos.close(2)\nraise ValueError",
    "a message that cannot be made": "class E(Exception):\n    def __str__(self): raise TypeError\nraise E",
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "in a thread": "import threading\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()",
}


class Python:
    """Runs a script file with the record on or off."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = 0

    def run(self, script: str, recorded: bool, **more: str) -> tuple[int, str, str]:
        path = self.folder / "script.py"
        path.write_text(script)
        after = more.pop("PATH_AFTER", "")
        environment = {**os.environ, **more}
        if recorded:
            search = os.pathsep.join(filter(None, (str(BOOT), after)))
            environment |= {"PYTHONPATH": search, "GPUSUP_EXCEPTIONS": str(self.folder / "exceptions.jsonl")}
        child = subprocess.Popen(
            [sys.executable, str(path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.pid = child.pid
        out, err = child.communicate(timeout=60)
        return child.returncode, out, err

    def failure(self) -> TrainerFailure | None:
        return read_failure(self.folder, self.pid)


@pytest.fixture
def python(tmp_path: Path) -> Python:
    return Python(tmp_path)


@pytest.mark.parametrize("end", list(ENDS))
def test_exit_status_and_output_are_those_without_the_record(python: Python, end: str) -> None:
    assert python.run(ENDS[end], recorded=True) == python.run(ENDS[end], recorded=False)


def test_record_tells_type_message_and_phase(python: Python) -> None:
    raises = "raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')"
    script = f"class Trainer:\n    def evaluate(self):\n        {raises}\nTrainer().evaluate()\n"
    status, _, _ = python.run(script, recorded=True)
    assert status == 1
    failure = python.failure()
    assert failure == TrainerFailure(
        source="exception record",
        phase="eval",
        type="RuntimeError",
        message="CUDA out of memory. Tried to allocate 2 GiB",
    )
    (line,) = (python.folder / "exceptions.jsonl").read_text().splitlines()
    assert json.loads(line)["frames"][-1] == [
        str(python.folder / "script.py"), "evaluate", raises,
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["exit with a message", "exit with a code", "killed", "in a thread"])
def test_nothing_is_recorded_where_no_exception_ends_the_process(python: Python, end: str) -> None:
    python.run(ENDS[end], recorded=True)
    assert python.failure() is None


def test_record_that_cannot_be_written_changes_nothing(python: Python) -> None:
    (python.folder / "exceptions.jsonl").mkdir()
    assert python.run(ENDS["value error"], recorded=True) == python.run(ENDS["value error"], recorded=False)


def test_helper_of_the_trainer_is_not_taken_for_it(python: Python) -> None:
    helper = f"import subprocess, sys, os, signal\nsubprocess.run([sys.executable, '-c', {ENDS['value error']!r}])\n"
    status, _, _ = python.run(helper + "os.kill(os.getpid(), signal.SIGKILL)", recorded=True)
    assert status == -signal.SIGKILL
    assert (python.folder / "exceptions.jsonl").stat().st_size > 0
    assert python.failure() is None


def test_of_several_ranks_the_one_out_of_memory_counts(python: Python) -> None:
    python.run("raise ConnectionError('Connection closed by peer')", recorded=True, RANK="0")
    python.run("raise RuntimeError('CUDA out of memory')", recorded=True, RANK="3")
    python.run("raise ConnectionError('Connection closed by peer')", recorded=True, RANK="1")
    failure = read_failure(python.folder, os.getpid())  # the launcher's
    assert failure is not None
    assert (failure.rank, failure.message) == (3, "CUDA out of memory")


def test_helper_of_a_rank_is_no_rank(python: Python) -> None:
    helper = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'raise MemoryError'])\n"
    python.run(helper + "raise ValueError('the cause')", recorded=True, RANK="0")
    lines = [json.loads(line) for line in (python.folder / "exceptions.jsonl").read_text().splitlines()]
    assert [(line["type"], line["rank"]) for line in lines] == [("MemoryError", None), ("ValueError", 0)]


def test_hook_that_the_systems_own_sitecustomize_sets_is_called_too(python: Python) -> None:
    """Ubuntu's reports crashes."""
    (python.folder / "theirs").mkdir()
    (python.folder / "theirs" / "sitecustomize.py").write_text(
        "import sys\nbefore = sys.excepthook\nsys.excepthook = lambda *told: (print('theirs'), before(*told))\n"
    )
    _, out, err = python.run(ENDS["value error"], True, PATH_AFTER=str(python.folder / "theirs"))
    assert out == "theirs\n"
    assert err.endswith("ValueError: no such thing\n")
    failure = python.failure()
    assert failure is not None
    assert failure.type == "ValueError"


def test_message_that_is_no_text_is_kept_as_far_as_it_is(python: Python) -> None:
    python.run("raise ValueError('a\\udcffb')", recorded=True)
    failure = python.failure()
    assert failure is not None
    assert failure.message == "a?b"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff\xfe", b'{"message": 3}', b'{"message": {"message": null}}', b'{"message": "no colon"}',
    ],
)  # fmt: skip
def test_error_file_that_makes_no_sense_tells_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "error.json").write_bytes(content)
    (tmp_path / "exceptions.jsonl").write_bytes(content + b'\n{"pid": 1}\n{"pid": 1, "frames": 3, "rank": 0}\n')
    assert read_failure(tmp_path, 1) is None


def test_error_file_of_pytorch_is_read(tmp_path: Path) -> None:
    told = {"message": {"message": "OutOfMemoryError: CUDA out of memory. Tried", "extraInfo": {"timestamp": "1"}}}
    (tmp_path / "error.json").write_text(json.dumps(told))
    assert read_failure(tmp_path, 1) == TrainerFailure(
        source="torch error file", type="OutOfMemoryError", message="CUDA out of memory. Tried"
    )
