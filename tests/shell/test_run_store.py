"""Finding runs: by a prefix, by name, by age; and what is said when there is none."""

import os
from pathlib import Path

import pytest
from gpusup.supervisor.core.events import RunCreated
from gpusup.supervisor.core.policy import Policy
from gpusup.supervisor.errors import NoSuchRun
from gpusup.supervisor.journal import Journal
from gpusup.supervisor.run_store import RunDirectory, create_run, find_run, list_runs, state_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPUSUP_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def add(run_id: str, name: str, age: float) -> RunDirectory:
    directory = RunDirectory(state_home() / "runs" / run_id)
    directory.path.mkdir(parents=True)
    created = directory.path / "created"
    created.touch()
    os.utime(created, (1e9 - age, 1e9 - age))
    journal = Journal(directory.journal)
    journal.append(
        RunCreated(
            run_id=run_id,
            name=name,
            policy_name="p",
            policy=Policy(),
            command=("x",),
            args_from=1,
            interpreter="",
            cwd="/",
            dialect="generic",
            settings={},
        )
    )
    journal.close()
    return directory


def test_runs_are_listed_newest_first_whatever_was_written_last() -> None:
    for run_id, age in (("aaa", 30), ("bbb", 10), ("ccc", 20)):
        add(run_id, "x", age)
    assert [run.id for run in list_runs()] == ["bbb", "ccc", "aaa"]


def test_run_is_found_by_prefix_by_name_and_by_age() -> None:
    add("a1b2c3", "gpt2", 30)
    add("a9zzzz", "gpt2", 20)
    add("m4m4m4", "mnist", 10)
    assert find_run("a1").id == "a1b2c3"
    assert find_run("a1b2c3").id == "a1b2c3"
    assert find_run("gpt2").id == "a9zzzz", "the newest of that name"
    assert [find_run(f"-{n}").id for n in (1, 2, 3)] == ["m4m4m4", "a9zzzz", "a1b2c3"]


def test_ambiguous_prefix_lists_the_runs() -> None:
    add("a1b2c3", "x", 1)
    add("a9zzzz", "x", 2)
    with pytest.raises(NoSuchRun, match=r"'a' matches 2 runs: a1b2c3, a9zzzz; type more of it"):
        find_run("a")


def test_whole_id_is_not_ambiguous_though_it_begins_another() -> None:
    add("a1", "x", 1)
    add("a1b2", "x", 2)
    assert find_run("a1").id == "a1"


@pytest.mark.parametrize("wanted", ["zzz", "-2", "-0", "-9", "no such name"])
def test_no_such_run_has_an_exit_code_of_its_own(wanted: str) -> None:
    add("a1b2c3", "x", 1)
    with pytest.raises(NoSuchRun) as caught:
        find_run(wanted)
    assert caught.value.exit_code == 3


def test_nothing_recorded_yet() -> None:
    assert list_runs() == []
    with pytest.raises(NoSuchRun):
        find_run("-1")


def test_damaged_journal_of_another_run_does_not_hide_a_name() -> None:
    add("good00", "wanted", 30)
    add("bad000", "other", 10).journal.write_bytes(b'{"broken\n{"broken\n')
    assert find_run("wanted").id == "good00"


def test_new_run_is_private_and_is_listed_once_it_has_a_journal() -> None:
    directory = create_run()
    assert directory.path.stat().st_mode & 0o077 == 0
    assert list_runs() == []
    Journal(directory.journal).close()
    assert [run.id for run in list_runs()] == [directory.id]
    assert abs(directory.created_at - directory.path.stat().st_mtime) < 60


def test_home_is_gpusups_own_then_the_xdg_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GPUSUP_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_home() == tmp_path / "xdg" / "gpusup"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert state_home() == tmp_path / "me" / ".local" / "state" / "gpusup"
