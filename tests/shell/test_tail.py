"""Following a file that grows: nothing lost, nothing twice, whatever the pieces."""

import re
from pathlib import Path

from gpusup.supervisor.tail import CHUNK_BYTES, MAX_LINE_BYTES, LineTail, Tail, last_bytes
from hypothesis import given
from hypothesis import strategies as st


def lines_of(tail: LineTail, final: bool = False) -> list[bytes]:
    found = []
    while data := tail.read():
        found += tail.lines(data)
    return found + (tail.lines(b"", final=True) if final else [])


def test_file_that_does_not_exist_yet_is_followed_from_its_start(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "late")
    assert tail.read() == b""
    (tmp_path / "late").write_bytes(b"here")
    assert tail.read() == b"here"
    assert tail.read() == b""
    tail.close()


def test_reading_goes_on_where_it_was_left(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"old new")
    tail = Tail(file, offset=4)
    assert tail.read() == b"new"
    with file.open("ab") as f:
        f.write(b"er")
    assert tail.read() == b"er"
    assert tail.offset == 9
    tail.close()


def test_large_output_comes_in_chunks(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"x" * (CHUNK_BYTES + 5))
    tail = Tail(file)
    assert [len(tail.read()) for _ in range(3)] == [CHUNK_BYTES, 5, 0]
    tail.close()


def test_progress_bar_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"10%\r20%\r30%\r\ndone\r\n\n")
    tail = LineTail(file)
    assert lines_of(tail) == [b"10%", b"20%", b"30%", b"done"]
    tail.close()


def test_partial_line_waits_for_its_end_or_for_the_end_of_the_file(tmp_path: Path) -> None:
    tail = LineTail(tmp_path / "log")
    assert tail.lines(b"iter 1") == []
    assert tail.lines(b"23: loss 2\nit") == [b"iter 123: loss 2"]
    assert tail.lines(b"", final=True) == [b"it"]
    assert tail.lines(b"", final=True) == []


def test_endless_line_does_not_fill_the_memory(tmp_path: Path) -> None:
    tail = LineTail(tmp_path / "log")
    piece = b"x" * 1000
    given_out = [line for _ in range(1000) for line in tail.lines(piece)]
    assert all(len(line) <= MAX_LINE_BYTES + len(piece) for line in given_out)
    assert sum(map(len, [*given_out, *tail.lines(b"", final=True)])) == 1_000_000


@given(st.lists(st.text("ab\r\n", max_size=8).map(str.encode), max_size=20))
def test_lines_are_the_same_however_the_output_is_cut(pieces: list[bytes]) -> None:
    tail = LineTail(Path("never opened"))
    found = [line for piece in pieces for line in tail.lines(piece)] + tail.lines(b"", final=True)
    assert found == [line for line in re.split(b"[\r\n]", b"".join(pieces)) if line]


def test_end_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"0123456789")
    assert last_bytes(file, 4) == b"6789"
    assert last_bytes(file, 100) == b"0123456789"
    assert last_bytes(tmp_path / "none", 4) == b""
