"""prepare.py interrupted at any moment continues, and the result is the same to the byte."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from gpusup.trainer import sources
from trainer_runs import ROOT

SHARD = ROOT / "data" / "prose" / "000_00000.parquet"
DEADLINE_S = 120
# The command, but with small tasks, each made durable: whatever the moment, there is something to continue.
OFTEN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, the tests may ignore it
from gpusup.trainer import preparation, prepare, sources
sources.BATCH_BYTES = preparation.TASK_BYTES = 1 << 15
preparation.COMMIT_EVERY_S = 0.0
prepare.main()
"""


def start(out: Path, *options: str, source: Path = SHARD) -> "subprocess.Popen[str]":
    arguments = ["-o", str(out), "--workers", "2", "--encoder", "tiktoken", "--shard-tokens", "100000", *options]
    return subprocess.Popen(
        [sys.executable, "-c", OFTEN, str(source), *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(out: Path, *options: str, source: Path = SHARD) -> "tuple[int, str]":
    child = start(out, *options, source=source)
    _, errors = child.communicate(timeout=DEADLINE_S)
    return child.returncode, errors


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def progress(out: Path) -> dict[str, int]:
    """What the unfinished work says, or nothing while it does not exist."""
    try:
        found: dict[str, int] = json.loads((out / "unfinished" / "progress.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def wait_for_rows(out: Path, child: "subprocess.Popen[str]", rows: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while progress(out).get("row", 0) < rows:
        assert child.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of the command without an interruption, small tasks or several workers."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "trainer/prepare.py", str(SHARD), "-o", str(out), "--shard-tokens", "100000"]
    subprocess.run([*command, "--workers", "1"], cwd=ROOT, check=True, capture_output=True, timeout=DEADLINE_S)
    return content(out)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So much text that it is not prepared before a signal comes."""
    path = tmp_path_factory.mktemp("large") / "large.parquet"
    pyarrow.parquet.write_table(pyarrow.concat_tables([pyarrow.parquet.read_table(SHARD)] * 10), path)
    return path


def is_worker(process: psutil.Process) -> bool:
    return "spawn_main" in " ".join(process.cmdline())


def wait_for_the_moment(out: Path, child: "subprocess.Popen[str]", chance: random.Random) -> None:
    """Any moment: of starting, or a moment after something new was made durable; or the end."""
    reached = progress(out)
    working = chance.random() < 0.7
    deadline_s = time.monotonic() + (DEADLINE_S if working else chance.uniform(0, 1))
    while child.poll() is None and time.monotonic() < deadline_s and not (working and progress(out) != reached):
        time.sleep(0.002)
    if working:
        with suppress(subprocess.TimeoutExpired):
            child.wait(chance.uniform(0, 0.3))


def kill_at_random(out: Path, undisturbed: dict[str, bytes], kills: int, seed: int) -> int:
    """Kill so many times, the parent or a worker, beginning anew whenever it is done; how often work was continued."""
    chance = random.Random(seed)
    done = continued = 0
    while done < kills:
        child = start(out)
        wait_for_the_moment(out, child, chance)
        with suppress(psutil.NoSuchProcess):  # it was done before
            parent = psutil.Process(child.pid)
            workers = [process for process in parent.children() if is_worker(process)]
            victim = chance.choice(workers) if workers and chance.random() < 0.5 else parent
            if child.poll() is None:
                victim.kill()
                done += 1
        _, errors = child.communicate(timeout=DEADLINE_S)
        continued += "continuing after" in errors
        if child.returncode == 0:
            assert content(out) == undisturbed
            shutil.rmtree(out)
        else:
            assert child.returncode in (2, -signal.SIGKILL), errors
    status, errors = run(out)
    assert status == 0, errors
    assert content(out) == undisturbed
    return continued


def test_result_is_the_same_after_kills_at_random_moments(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert kill_at_random(tmp_path / "out", undisturbed, kills=10, seed=1) >= 3


@pytest.mark.soak
def test_result_is_the_same_after_a_hundred_kills(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert kill_at_random(tmp_path / "out", undisturbed, kills=100, seed=2) >= 25


def test_killed_parent_takes_its_workers_along_and_finished_work_is_not_repeated(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    child = start(out)
    wait_for_rows(out, child, 300)
    workers = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    child.communicate(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    reached = progress(out)
    child = start(out)
    assert child.stderr is not None
    first_line = child.stderr.readline()
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert first_line == f"continuing after {reached['text_bytes'] / 1e6:,.0f} MB of text\n"
    assert child.returncode == 0, errors
    assert content(out) == undisturbed


def test_killed_worker_ends_the_command_with_a_sentence(tmp_path: Path, large: Path) -> None:
    out = tmp_path / "out"
    child = start(out, source=large)
    wait_for_rows(out, child, 100)
    worker = next(filter(is_worker, psutil.Process(child.pid).children()))
    worker.kill()
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 2
    assert "a worker was killed" in errors
    assert "it continues" in errors


def test_interrupt_is_answered_with_a_sentence(tmp_path: Path, large: Path) -> None:
    out = tmp_path / "out"
    child = start(out, source=large)
    wait_for_rows(out, child, 100)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130
    assert errors.endswith("prepare.py: interrupted; the same command continues\n")


def test_changed_source_or_option_is_noticed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out, source = tmp_path / "out", tmp_path / SHARD.name
    shutil.copy(SHARD, source)
    child = start(out, source=source)
    wait_for_rows(out, child, 100)
    child.kill()
    child.communicate(timeout=DEADLINE_S)
    status, errors = run(out, "--val-fraction", "0.5", source=source)
    assert status == 2
    assert "val_fraction was 0.01, is 0.5" in errors
    table = pyarrow.parquet.read_table(SHARD)
    pyarrow.parquet.write_table(table, source)
    status, errors = run(out, source=source)
    assert status == 2
    assert f"{SHARD.name} is not the same file" in errors
    assert "--restart" in errors
    shutil.copy(SHARD, source)
    assert run(out, "--restart", source=source)[0] == 0
    assert content(out) == undisturbed


def test_source_written_to_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / SHARD.name
    shutil.copy(SHARD, source)
    child = start(out, source=source)
    wait_for_rows(out, child, 100)
    os.utime(source)
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 2
    assert f"{source}: changed while it was read" in errors
    assert not list(out.iterdir())


def test_second_command_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = start(out)
    wait_for_rows(out, child, 100)
    status, errors = run(out)
    child.kill()
    child.communicate(timeout=DEADLINE_S)
    assert status == 2
    assert "another prepare.py is at work" in errors


@pytest.mark.parametrize("limit_bytes", [1_000, 150_000])
def test_file_that_cannot_grow_leaves_nothing_under_a_final_name_and_is_continued(
    tmp_path: Path, undisturbed: dict[str, bytes], limit_bytes: int
) -> None:
    """The kernel refuses to write beyond a size, in a shard, in its header's place, or in meta.json."""
    out = tmp_path / "out"
    child = start(out)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 2, errors
    assert "the disk is full" in errors
    assert errors.strip().count("\n") == 0
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    assert run(out)[0] == 0
    assert content(out) == undisturbed


def test_full_disk_is_said_and_continued_when_there_is_room(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """A file system of one megabyte, then of more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        status, errors = run(disk / "out")
        assert status == 2
        assert "the disk is full (No space left on device)" in errors
        assert [path.name for path in (disk / "out").iterdir()] == ["unfinished"]
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert run(disk / "out")[0] == 0
        assert content(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", disk], check=True)


def test_immense_row_group_is_read_in_little_memory(tmp_path: Path) -> None:
    """Two hundred megabytes of text in one row group: what reading it adds is a small part of that."""
    path = tmp_path / "immense.parquet"
    texts = pyarrow.array([f"{number:08d} " + "x" * 4000 for number in range(50_000)])
    table = pyarrow.table({"text": texts, "other": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=len(table), use_dictionary=False, compression="zstd")
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    script = (
        "import resource, sys; from pathlib import Path; from gpusup.trainer import sources\n"
        "source = sources.ParquetSource(Path(sys.argv[1]), 'text')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = sum(batch.rows for batch in source.batches(0))\n"
        "print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    rows, added_kb = map(int, done.stdout.split())
    assert rows == 50_000
    assert added_kb < 50_000


def test_reading_goes_on_at_any_row() -> None:
    source = sources.ParquetSource(SHARD, "text")
    texts = [bytes(document) for batch in source.batches(0) for document in batch.documents]
    for row in (0, 1, 249, 250, 251, 700, len(texts) - 1, len(texts)):
        assert [bytes(document) for batch in source.batches(row) for document in batch.documents] == texts[row:]
    assert os.path.getsize(SHARD) < len(b"".join(texts))
