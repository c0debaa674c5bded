"""Checkpoints: whole or not at all, the newest few, one before when the newest is damaged, and written meanwhile."""

import fcntl
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from gpusup.supervisor import checkpoints as supervisor
from gpusup.trainer import checkpoint, checkpoint_writer, rng, safetensors_file
from gpusup.trainer.allocator import empty_at_page
from gpusup.trainer.checkpoint import Checkpointer, Saved, SaveFailed
from gpusup.trainer.errors import TrainerError
from gpusup.trainer.rng import RngState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CPU = torch.device("cpu")
LARGE = 3 << 20  # values: several pieces
TIMEOUT_S = 60.0


def write(folder: Path, *steps: int, size: int = 1000, keep: int = 2) -> list[Path]:
    checkpointer = Checkpointer(folder, keep)
    saved: list[Saved] = []
    for step in steps:
        checkpointer.save(step, {"model.weight": torch.full((size,), float(step))}, {"sample": step * 10})
        saved += checkpointer.wait()
    return [each.path for each in saved]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-400] ^= 1
    path.write_bytes(content)


@contextmanager
def disk_full_beyond(size_bytes: int) -> Iterator[None]:
    """No file of this process may grow larger: the kernel refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_save_keeps_the_newest_k(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 30, 100_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-00000030", "ckpt-100000000"]
    write(tmp_path / "more", 1, 2, 3, 4, keep=3)
    assert [step for step, _ in checkpoint.stored(tmp_path / "more")] == [2, 3, 4]


def test_keeping_one_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="keep_latest_k=1 is too few: were the newest checkpoint damaged"):
        Checkpointer(tmp_path, 1)


def test_save_drops_later_ones_when_the_run_went_back(tmp_path: Path) -> None:
    """They belong to a course that was left; the next resume must not return to it."""
    write(tmp_path, 100, 120, 110)
    assert [step for step, _ in checkpoint.stored(tmp_path)] == [100, 110]


def test_save_of_a_step_that_is_there_already_takes_its_place(tmp_path: Path) -> None:
    write(tmp_path, 100, 110, size=5)
    write(tmp_path, 110, size=7)
    assert checkpoint.load_newest(tmp_path).tensors["model.weight"].shape == (7,)
    assert [step for step, _ in checkpoint.stored(tmp_path)] == [100, 110]


def test_leftovers_of_dead_processes_are_removed_by_the_next_save_those_of_a_live_one_are_not(
    tmp_path: Path,
) -> None:
    (before,) = write(tmp_path, 1)
    for name in ("ckpt-00000002.partial", "ckpt-00000004.partial", "ckpt-00000003"):  # the last: killed while deleting
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path).path == before
    holder = os.open(tmp_path / "ckpt-00000004.partial", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)  # as its writer does
    write(tmp_path, 5)
    os.close(holder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ckpt-00000001",
        "ckpt-00000004.partial",
        "ckpt-00000005",
    ]
    write(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-00000005", "ckpt-00000006"]


# --- written while training goes on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_save_holds_the_values_at_its_call_though_they_change_after_before_update(
    tmp_path: Path, asynchronous: bool
) -> None:
    tensors = {
        "model.large": torch.randn(LARGE),
        "model.scattered": torch.randn(300, 200).t(),
        "model.half": torch.randn(LARGE // 8).bfloat16(),
        "optimizer.step": torch.tensor(5.0),
        "model.none": torch.zeros(0, 3),
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    meta: dict[str, object] = {"best_val_loss": 0.1 + 0.2, "config": {"dtype": "float32"}}
    checkpointer = Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpointer.save(7, tensors, meta)
    assert checkpointer.in_flight_step == 7
    meta["best_val_loss"] = 9.0
    checkpointer.before_update()
    for tensor in tensors.values():
        tensor.add_(1)
    (saved,) = checkpointer.wait()
    assert checkpointer.in_flight_step is None
    loaded = checkpoint.load(saved.path)
    assert (loaded.step, loaded.meta) == (7, {"best_val_loss": 0.1 + 0.2, "config": {"dtype": "float32"}})
    assert loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.items())
    assert loaded.part("optimizer").keys() == {"step"}
    assert supervisor.check(saved.path) == supervisor.Checked(path=saved.path, step=7, bytes=saved.bytes)


@pytest.mark.parametrize("fits", [True, False])
def test_before_update_copies_what_is_left_or_writes_it_where_a_copy_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """No patience, and memory that is or is not there; either way the values at the call are what is saved."""
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_S", 0.0)
    monkeypatch.setattr(checkpoint_writer, "headroom_bytes", lambda: 1 << 40 if fits else 0)
    copied = []
    real = checkpoint_writer.Source.copy_rest
    monkeypatch.setattr(checkpoint_writer.Source, "copy_rest", lambda source: (copied.append(True), real(source)))
    weight = torch.randn(10 * LARGE)
    expected = weight.clone()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"model.weight": weight}, {})
    checkpointer.before_update()
    weight.zero_()
    (saved,) = checkpointer.wait()
    assert torch.equal(checkpoint.load(saved.path).tensors["model.weight"], expected)
    assert bool(copied) == fits
    assert saved.stall_s > 0


def test_save_waits_for_the_one_in_flight_and_poll_tells_each_once(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    tensors = {"model.weight": torch.randn(LARGE)}
    checkpointer.save(1, tensors, {})
    checkpointer.save(2, tensors, {})
    assert checkpointer.in_flight_step == 2
    told: list[Saved] = []
    deadline = time.monotonic() + TIMEOUT_S
    while len(told) < 2:
        assert time.monotonic() < deadline
        told += checkpointer.poll()
    assert [(saved.step, saved.path.name) for saved in told] == [(1, "ckpt-00000001"), (2, "ckpt-00000002")]
    assert checkpointer.poll() == checkpointer.wait() == []


def test_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    tensors: dict[str, Tensor] = {
        "model.a": torch.randn(3, 5), "model.b": torch.arange(7), "rng.torch": torch.get_rng_state(),
        "model.c": torch.randn(9).bfloat16(), "model.d": torch.tensor([True]), "model.e": torch.randn(2).double(),
    }  # fmt: skip
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, tensors, {})
    (saved,) = checkpointer.wait()
    theirs = library.load_file(saved.path / "state.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
    library.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours = safetensors_file.read(tmp_path / "theirs")
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


PAGE = 4096
sizes = st.sampled_from(
    [0, 4, PAGE - 4, PAGE, 5 * PAGE, (64 << 10) - 4, 64 << 10, 70_000, 17 * PAGE + 8, (16 << 20) + PAGE]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(sizes, st.booleans(), st.sampled_from(["F32", "BF16", "U8"])), min_size=1, max_size=6))
def test_file_is_right_whatever_can_be_written_from_where_it_is(made: list[tuple[int, bool, str]]) -> None:
    """Tensors at a page and not, of whole pages and not, in any mixture."""
    tensors = {}
    for number, (size_bytes, at_page, kind) in enumerate(made):
        values = torch.randint(256, (size_bytes,), dtype=torch.uint8).view(safetensors_file.DTYPES[kind])
        shifted = torch.empty(size_bytes // values.itemsize + 1, dtype=values.dtype)[1:]
        tensors[f"model.{number}"] = (empty_at_page(values) if at_page else shifted).copy_(values)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder))
        checkpointer.save(1, tensors, {})
        (saved,) = checkpointer.wait()
        loaded = checkpoint.load(saved.path)
        assert supervisor.check(saved.path).problem == ""
        for name, tensor in tensors.items():
            assert torch.equal(safetensors_file.bytes_of(loaded.tensors[name]), safetensors_file.bytes_of(tensor))


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_disk_that_fills_up_costs_only_the_checkpoint_under_way(tmp_path: Path, asynchronous: bool) -> None:
    checkpointer = Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpointer.save(1, {"model.weight": torch.ones(LARGE)}, {})
    (before,) = checkpointer.wait()
    with disk_full_beyond(2 << 20):
        checkpointer.save(2, {"model.weight": torch.ones(LARGE)}, {})
        checkpointer.before_update()
        with pytest.raises(SaveFailed, match=r"File too large: .*ckpt-00000002 was not saved"):
            checkpointer.wait()
    assert list(tmp_path.iterdir()) == [before.path]
    assert checkpoint.load_newest(tmp_path).path == before.path
    assert checkpointer.poll() == [], "told once"
    checkpointer.save(3, {"model.weight": torch.ones(LARGE)}, {})
    assert [saved.step for saved in checkpointer.wait()] == [3]


def test_save_into_a_file_in_place_of_the_directory_fails_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    checkpointer = Checkpointer(tmp_path / "out")
    checkpointer.save(2, {"model.weight": torch.ones(5)}, {})
    with pytest.raises(SaveFailed, match="was not saved"):
        checkpointer.wait()


def test_meta_that_is_not_json_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Checkpointer(tmp_path).save(1, {}, {"best_val_loss": math.inf})


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit flipped", "manifest torn", "manifest flipped", "gone"])
def test_load_falls_back_one_generation_when_the_newest_is_damaged(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, newest = write(tmp_path, 1, 2)
    state, manifest = newest / "state.safetensors", newest / "manifest.json"
    match damage:
        case "truncated" | "empty":
            state.write_bytes(state.read_bytes()[: 3000 if damage == "truncated" else 0])
        case "bit flipped":
            flip_a_bit(state)
        case "manifest torn":
            manifest.write_bytes(manifest.read_bytes()[:100])
        case "manifest flipped":
            manifest.write_bytes(manifest.read_bytes().replace(b'"step": 2', b'"step": 3'))
        case "gone":
            state.unlink()

    (tmp_path / f"{newest.name}.damaged").mkdir()  # of an earlier night
    assert supervisor.check(newest).problem
    loaded = checkpoint.load_newest(tmp_path)
    assert (loaded.path, loaded.step, loaded.meta) == (before, 1, {"sample": 10})
    assert f"{newest} is damaged" in (message := capsys.readouterr().err)
    assert f"set aside as {newest.name}.damaged.2, trying the one before" in message
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(newest.with_name(f"{newest.name}.damaged.2"))


def test_load_is_refused_when_nothing_is_whole(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="no whole checkpoint to resume from; start with --init_from=scratch"):
        checkpoint.load_newest(tmp_path / "missing")
    (only,) = write(tmp_path, 1)
    flip_a_bit(only / "state.safetensors")
    with pytest.raises(TrainerError, match="no whole checkpoint"):
        checkpoint.load_newest(tmp_path)
    with pytest.raises(TrainerError, match="no such checkpoint"):
        checkpoint.load(only)


def test_load_is_refused_when_the_version_is_another(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    newer = checkpoint_writer.manifest(1, {}, "{}").replace(b'"version": 1', b'"version": 2')
    signed = newer[: newer.rindex(b'"crc32": ')]
    (path / "manifest.json").write_bytes(signed + f'"crc32": "{zlib.crc32(signed):08x}"}}\n'.encode())
    with pytest.raises(TrainerError, match="version 2, this trainer reads 1"):
        checkpoint.load(path)


def test_random_generators_continue_after_save_and_load(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))

    random.gauss(0.0, 1.0)
    np.random.normal()  # leaves a second value for the next call
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"model.a": torch.ones(3)}, {"rng": RngState(CPU).to_json()})
    (saved,) = checkpointer.wait()
    drawn = draw()
    loaded = checkpoint.load(saved.path)
    rng.restore(loaded.meta["rng"], CPU)
    assert draw() == drawn


SAVE_FOR_EVER = """
import os, sys
from pathlib import Path
import torch
from gpusup.trainer.allocator import empty_at_page
from gpusup.trainer.checkpoint import Checkpointer, load_newest, stored

folder, children = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
for _ in range(children):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        step = load_newest(folder).step if stored(folder) else 0
        checkpointer = Checkpointer(folder)
        weight = torch.full((1 << 20,), float(step))
        while True:
            step += 1
            weight.fill_(step)
            checkpointer.save(step, {"model.weight": weight}, {})
            checkpointer.before_update()
            if checkpointer.poll():
                os.write(tell, b".")
    os.close(tell)
    assert os.read(told, 1) == b"."  # at least one was committed
    os.close(told)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    kills, rng = 25, random.Random(5)
    parent = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(kills)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        last = 0
        for line in parent.stdout:
            threading.Event().wait(rng.uniform(0, 0.03))
            os.kill(int(line), signal.SIGKILL)
            stored = checkpoint.stored(tmp_path)
            problems = [found for _, path in stored if (found := supervisor.check(path).problem)]
            assert not [problem for problem in problems if "missing" not in problem], "torn under its final name"
            last = checkpoint.load_newest(tmp_path).step
        assert parent.wait(TIMEOUT_S) == 0
        assert last > kills
    finally:
        parent.kill()
        parent.stdout.close()
    loaded = checkpoint.load_newest(tmp_path)
    assert bool((loaded.tensors["model.weight"] == loaded.step).all())
