"""The journal survives what can happen to a file: torn ends, full disks, damage, a second writer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpusup.supervisor.core.events import (
    JOURNAL_VERSION,
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    CheckpointSaved,
    Note,
    Progress,
    RunCreated,
    SupervisorStarted,
)
from gpusup.supervisor.core.policy import Policy, Remediation
from gpusup.supervisor.core.state import State, evolve, fold
from gpusup.supervisor.core.verdict import ExitStatus
from gpusup.supervisor.errors import JournalError, RunLocked
from gpusup.supervisor.journal import Journal, is_locked, read

SETTINGS = {"batch_size": 12, "gradient_accumulation_steps": 4, "dtype": "bfloat16", "compile": True}
RUN = RunCreated(
    run_id="abc",
    name="träining \N{SNOWMAN}",
    policy_name="p",
    policy=Policy(remediations=(Remediation(name="smaller", step="micro_batch"),)),
    command=("python", "train.py", "line\nbreak"),
    args_from=2,
    interpreter="python",
    cwd="/",
    dialect="nanogpt",
    settings=SETTINGS,
    global_batch_size=48,
)
EVENTS: tuple[AnyEvent, ...] = (
    RUN,
    SupervisorStarted(pid=1),
    AttemptPlanned(attempt=1, settings=SETTINGS, because="first attempt"),
    AttemptStarted(attempt=1, pid=7, start_ticks=8),
    Progress(attempt=1, step=3, loss=float("nan"), step_s=0.5),
    CheckpointSaved(attempt=1, step=4, path="/out/ckpt.pt"),
    Note(text="a note: \u2028 \x00 \N{PILE OF POO} {}\n"),
    AttemptEnded(attempt=1, exit=ExitStatus(signal=9), step=5, diagnosis="crash"),
)


def written(path: Path, *events: AnyEvent) -> list[AnyEvent]:
    journal = Journal(path)
    stamped = [journal.append(event) for event in events]
    journal.close()
    return stamped


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_state_after_reopening_is_the_state_while_writing(path: Path) -> None:
    live = State()
    journal = Journal(path)
    for event in EVENTS:
        live = evolve(live, journal.append(event))
    journal.close()
    reopened = fold(Journal(path).events)
    assert live.attempts[0].loss != live.attempts[0].loss, "a loss of nan is journalled, and read as unknown"
    assert reopened.attempts[0].loss is None
    assert reopened.settings == live.settings
    assert reopened.checkpoints == live.checkpoints
    assert reopened.max_step == live.max_step
    assert reopened.last_seq == live.last_seq == len(EVENTS)


def test_one_event_is_one_line_numbered_and_stamped(path: Path) -> None:
    written(path, *EVENTS)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, len(EVENTS) + 1))
    assert {line["v"] for line in lines} == {JOURNAL_VERSION}
    assert all(line["at"].endswith("Z") for line in lines)
    assert [line["mono"] for line in lines] == sorted(line["mono"] for line in lines)
    assert path.stat().st_mode & 0o077 == 0, "a command line can hold secrets"


def test_torn_last_line_is_dropped_at_every_byte_and_the_next_append_is_whole(path: Path) -> None:
    stamped = written(path, *EVENTS)
    whole = path.read_bytes()
    last_line = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last_line, len(whole)):
        path.write_bytes(whole[:end])
        assert len(read(path)) == len(stamped) - 1
        journal = Journal(path)
        appended = journal.append(Note(text="after the crash"))
        journal.close()
        assert read(path)[-1] == appended
        assert appended.seq == len(stamped)


def test_last_line_of_garbage_is_dropped(path: Path) -> None:
    stamped = written(path, *EVENTS)
    for garbage in (b"\0" * 300, b"\0" * 300 + b"\n", b"\xff\xfe{\n", b'{"kind":"note","text":"x\n'):
        whole = path.read_bytes()
        path.write_bytes(whole + garbage)
        assert len(read(path)) == len(stamped)
        Journal(path).close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", range(len(EVENTS) - 1))
def test_damage_before_the_last_line_names_the_line(path: Path, line: int) -> None:
    written(path, *EVENTS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = b"\0" * (len(lines[line]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match=rf"journal\.jsonl:{line + 1}: this line is damaged"):
        read(path)
    before = path.read_bytes()
    with pytest.raises(JournalError):
        Journal(path)
    assert path.read_bytes() == before, "nothing is repaired that is not understood"


def test_missing_line_is_damage(path: Path) -> None:
    written(path, *EVENTS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(JournalError, match=r"journal\.jsonl:3: expected event 3 and found 4"):
        read(path)


def test_newer_version_is_refused_and_says_what_to_do(path: Path) -> None:
    written(path, *EVENTS)
    newer = {"kind": "teleported", "v": JOURNAL_VERSION + 1, "seq": len(EVENTS) + 1}
    path.write_bytes(path.read_bytes() + json.dumps(newer).encode() + b"\n")
    with pytest.raises(JournalError, match=r"written by a newer gpusup \(journal version 2\); upgrade gpusup"):
        read(path)


def test_unknown_fields_of_a_later_release_are_ignored(path: Path) -> None:
    later = {"kind": "note", "v": JOURNAL_VERSION, "seq": 1, "text": "x", "invented": 5}
    path.write_bytes(json.dumps(later).encode() + b"\n")
    assert read(path) == [Note(text="x", seq=1)]


def test_second_writer_is_refused_and_readers_are_not(path: Path) -> None:
    journal = Journal(path)
    journal.append(RUN)
    assert is_locked(path)
    with pytest.raises(RunLocked, match="another gpusup supervises this run"):
        Journal(path)
    assert len(read(path)) == 1
    journal.append(Note(text="still mine"))
    journal.close()
    assert not is_locked(path)
    Journal(path).close()


def test_lock_ends_with_the_process_that_held_it(path: Path) -> None:
    hold = "import sys; from pathlib import Path; from gpusup.supervisor.journal import Journal\n"
    hold += "j = Journal(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_locked(path)
        holder.kill()
        holder.wait(20)
    assert not is_locked(path)


def test_no_journal_is_not_locked(path: Path) -> None:
    assert not is_locked(path)


def test_event_that_did_not_fit_on_the_disk_leaves_the_journal_whole(path: Path) -> None:
    """A limit on the file's size stands for the full disk; it is lifted, as a disk is cleared, and writing goes on."""
    script = """
import os, resource, sys
from pathlib import Path
from gpusup.supervisor.core.events import Note
from gpusup.supervisor.errors import GpusupError
from gpusup.supervisor.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.append(Note(text="fits"))
size = os.path.getsize(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))
try:
    journal.append(Note(text="x" * 200))
    sys.exit("a short write went unnoticed")
except GpusupError:
    pass
assert os.path.getsize(sys.argv[1]) == size, "half a line was left behind"
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
journal.append(Note(text="fits again"))
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)
    assert [event.text for event in read(path) if isinstance(event, Note)] == ["fits", "fits again"]
