"""The end of a log: short, in bounded memory, and with the failure in it however far back it stands."""

import tracemalloc
from pathlib import Path

import pytest
from gpusup.supervisor.core.diagnosis import clean_lines
from gpusup.supervisor.log_ending import CHUNK_BYTES, TAIL_BYTES, read_ending, squeeze
from hypothesis import given, settings
from hypothesis import strategies as st

OOM = b"RuntimeError: CUDA out of memory. Tried to allocate 1.54 GiB.\n"
STEP = b"iter 7: loss 3.1, time 20ms\n"


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def test_short_log_is_read_whole(tmp_path: Path) -> None:
    assert read_ending(write(tmp_path / "log", STEP, OOM)) == STEP + OOM
    assert read_ending(write(tmp_path / "log")) == b""


def test_bars_of_hours_do_not_push_the_traceback_out_of_sight(tmp_path: Path) -> None:
    bar = b"".join(b"\r 12%%|##   | %d/9999 [00:12<00:30, 5.0it/s]" % i for i in range(200_000))
    found = read_ending(write(tmp_path / "log", OOM, bar, b"\n", STEP))
    assert found.splitlines()[0] + b"\n" == OOM
    assert found.endswith(b" 12%|##   | 199999/9999 [00:12<00:30, 5.0it/s]\n" + STEP)


def test_failure_far_before_the_end_comes_with_what_surrounds_it_and_the_end(tmp_path: Path) -> None:
    far = STEP * (5 * TAIL_BYTES // len(STEP))
    found = read_ending(write(tmp_path / "log", far, OOM, far, b"the end\n"))
    assert OOM in found
    assert found.endswith(STEP + b"the end\n")
    assert len(found) < 3 * TAIL_BYTES


@pytest.mark.parametrize("shift", [-20, -1, 0, 1])
def test_failure_across_two_chunks_is_found(tmp_path: Path, shift: int) -> None:
    after = b"x" * (4 * CHUNK_BYTES - len(OOM) // 2 + shift)
    assert OOM in read_ending(write(tmp_path / "log", b"y\n" * CHUNK_BYTES, OOM, after))


def test_line_without_an_end_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "log", b"x" * (40 * CHUNK_BYTES))
    tracemalloc.start()
    clean_lines(read_ending(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * CHUNK_BYTES


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_log_that_powershell_wrote_is_read(tmp_path: Path, encoding: str) -> None:
    text = (STEP * 200_000 + OOM).decode()
    assert clean_lines(read_ending(write(tmp_path / "log", text.encode(encoding))))[-1] == OOM.decode().strip()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"bc", b"\r", b"\n", b"\r\n", b" "]), max_size=30))
def test_squeezing_leaves_what_a_terminal_would_show(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    assert clean_lines(squeeze(data)) == clean_lines(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, data: bytes, times: int) -> None:
    path = write(tmp_path_factory.mktemp("log") / "log", data * 10**times)
    assert clean_lines(read_ending(path))[-1:] == clean_lines(path.read_bytes())[-1:]
