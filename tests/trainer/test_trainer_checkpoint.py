"""Checkpoints: whole or not at all, the two newest, and one before when the newest is damaged."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gpusup.trainer import checkpoint
from gpusup.trainer.errors import TrainerError

CPU = torch.device("cpu")


def write(folder: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(folder, step, {"weight": torch.full((1000,), float(step))})[0] for step in steps]


def flip_a_bit(path: Path) -> None:
    """Damage in the middle, where the tensor is: the file still opens."""
    content = bytearray(path.read_bytes())
    content[content.find(np.float32(2.0).tobytes() * 8) + 400] ^= 1
    path.write_bytes(content)


def test_save_keeps_the_two_newest(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 30, 100_000_000)
    assert [path.name for _, path in checkpoint.stored(tmp_path)] == ["ckpt-00000030.pt", "ckpt-100000000.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-00000030.pt", "ckpt-100000000.pt"]


def test_save_drops_later_ones_when_the_run_went_back(tmp_path: Path) -> None:
    """They belong to a course that was left; the next resume must not return to it."""
    write(tmp_path, 100, 120, 110)
    assert [step for step, _ in checkpoint.stored(tmp_path)] == [100, 110]


def test_save_leaves_the_ones_before_untouched_when_it_fails(tmp_path: Path) -> None:
    (before,) = write(tmp_path, 1)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path, 2, {"weight": lambda: None})
    assert list(tmp_path.iterdir()) == [before]
    assert checkpoint.load_newest(tmp_path)[0] == before


def test_half_written_file_is_ignored_and_removed_by_the_next_save(tmp_path: Path) -> None:
    """What a process leaves that is killed while it saves."""
    (before,) = write(tmp_path, 1)
    (tmp_path / "ckpt-00000002.pt.tmp").write_bytes(b"PK")
    assert checkpoint.load_newest(tmp_path)[0] == before
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-00000001.pt", "ckpt-00000003.pt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit flipped"])
def test_load_falls_back_one_generation_when_the_newest_is_damaged(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, newest = write(tmp_path, 1, 2)
    if damage == "bit flipped":
        flip_a_bit(newest)
    else:
        newest.write_bytes(newest.read_bytes()[: 3000 if damage == "truncated" else 0])

    path, content = checkpoint.load_newest(tmp_path)
    assert path == before
    assert content["step"] == 1
    assert f"{newest} is damaged" in (message := capsys.readouterr().err)
    assert "trying the one before" in message
    assert newest.with_name(f"{newest.name}.damaged").exists()
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(newest.with_name(f"{newest.name}.damaged"))


def test_load_is_refused_when_nothing_is_whole(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="no whole checkpoint to resume from; start with --init_from=scratch"):
        checkpoint.load_newest(tmp_path / "missing")
    (only,) = write(tmp_path, 1)
    only.write_bytes(b"")
    with pytest.raises(TrainerError, match="no whole checkpoint"):
        checkpoint.load_newest(tmp_path)
    with pytest.raises(TrainerError, match="no such checkpoint"):
        checkpoint.load(only)


class Attack:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit",))


def test_load_is_refused_when_a_file_carries_code_or_is_of_another_program(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "weight": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(TrainerError, match="more than plain data"):
        checkpoint.load(tmp_path / "attack.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(TrainerError, match="not a checkpoint of this trainer"):
        checkpoint.load(tmp_path / "other.pt")


def test_random_generators_continue_after_save_and_load(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))

    random.gauss(0.0, 1.0)
    np.random.normal()  # leaves a second value for the next call
    path, _ = checkpoint.save(tmp_path, 1, {"rng": checkpoint.rng_state(CPU)})
    drawn = draw()
    checkpoint.restore_rng(checkpoint.load(path)["rng"], CPU)
    assert draw() == drawn
