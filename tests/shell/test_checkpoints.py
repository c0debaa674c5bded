"""Checkpoints are verified without torch, copied when they are rewritten in place, and never lost."""

import io
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import pytest
from gpusup.supervisor.checkpoints import COPIES_KEPT, Checked, Keeper, check, newest, place_for_resume

TIMEOUT_S = 30.0


def content_of(step: int, size: int = 100) -> bytes:
    """A file as `torch.save` lays it out, made without torch."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ckpt/data.pkl", pickle.dumps({"model": {}, "iter_num": step, "best": 2.5}, protocol=2))
        archive.writestr("ckpt/data/0", bytes(i * step % 251 for i in range(size)))
    return buffer.getvalue()


def save(path: Path, step: int, size: int = 100) -> Path:
    path.write_bytes(content_of(step, size))
    return path


# --- verifying --------------------------------------------------------------------------------------------------------


def test_whole_checkpoint_is_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", 250)
    assert check(path) == Checked(path=path, step=250, bytes=path.stat().st_size)


def test_step_in_the_name_goes_first(tmp_path: Path) -> None:
    assert check(save(tmp_path / "ckpt-00000300.pt", 250)).step == 300


def test_missing_checkpoint_is_a_problem(tmp_path: Path) -> None:
    assert check(tmp_path / "ckpt.pt").problem == "it does not exist"


def test_checkpoint_torn_at_any_byte_is_found(tmp_path: Path) -> None:
    whole = content_of(250)
    path = tmp_path / "ckpt.pt"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert check(path).problem, f"torn at byte {end}"


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_no_flipped_byte_passes_as_another_step_or_breaks_the_check(tmp_path: Path, flip: int) -> None:
    whole = content_of(250)
    path = tmp_path / "ckpt.pt"
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= flip
        path.write_bytes(damaged)
        checked = check(path)
        assert checked.problem or checked.step in (250, None), f"byte {at}"


def test_flipped_weights_are_named(tmp_path: Path) -> None:
    whole = bytearray(content_of(250, size=5000))
    whole[len(whole) // 2] ^= 0x10
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    assert check(path).problem == "ckpt/data/0 inside it is damaged"


def test_file_that_is_no_zip_at_all_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    for content in (b"", b"\0" * 4096, pickle.dumps({"iter_num": 5})):
        path.write_bytes(content)
        assert check(path).problem


def test_directory_in_place_of_a_checkpoint_is_a_problem(tmp_path: Path) -> None:
    assert check(tmp_path).problem


def test_whole_file_without_a_step_has_none(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", pickle.dumps({"epoch": 3}, protocol=2))
    assert (check(path).problem, check(path).step) == ("", None)


def test_checking_executes_nothing_of_the_pickle(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", pickle.dumps({"bomb": Bomb(), "iter_num": 7}, protocol=2))
    assert check(path).step == 7
    assert not (tmp_path / "executed").exists()


# --- verifying directories --------------------------------------------------------------------------------------------


def save_directory(path: Path, step: int, values: int = 50, header: dict[str, object] | None = None) -> Path:
    """A checkpoint as docs/checkpoint-format.md has it, made without torch."""
    path.mkdir()
    data = bytes(i * step % 251 for i in range(4 * values))
    entry = {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}
    text = json.dumps(header or {"__metadata__": {"made": "by hand"}, "model.weight": entry}).encode()
    state = len(text).to_bytes(8, "little") + text + data
    (path / "state.safetensors").write_bytes(state)
    files = {"state.safetensors": {"bytes": len(state), "crc32": f"{zlib.crc32(state):08x}"}}
    sign(path, {"format": "gpusup checkpoint", "version": 1, "step": step, "files": files, "meta": {"crc32": "x"}})
    return path


def sign(path: Path, manifest: dict[str, object]) -> None:
    signed = (json.dumps(manifest, indent=1)[:-2] + ",\n").encode()
    (path / "manifest.json").write_bytes(signed + f'"crc32": "{zlib.crc32(signed):08x}"}}\n'.encode())


def test_whole_directory_is_whole_and_its_step_is_the_manifests(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "any-name", 250)
    size = (path / "state.safetensors").stat().st_size
    assert check(path) == Checked(path=path, step=250, bytes=size)


def test_directory_without_its_manifest_or_its_state_is_a_problem(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "ckpt-00000010", 10)
    (path / "state.safetensors").rename(tmp_path / "state")
    assert check(path).problem == "its state.safetensors is missing"
    (tmp_path / "state").rename(path / "state.safetensors")
    assert check(path).problem == ""
    (path / "manifest.json").unlink()
    assert check(path).problem == "its manifest.json is missing"


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_directory_torn_or_flipped_at_any_byte_is_found(tmp_path: Path, name: str) -> None:
    path = save_directory(tmp_path / "ckpt-00000250", 250)
    file = path / name
    whole = file.read_bytes()
    for at in range(len(whole)):
        if (name, at) != ("manifest.json", len(whole) - 1):  # its last line break
            file.write_bytes(whole[:at])
            assert check(path).problem, f"torn at byte {at}"
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert check(path).problem or check(path).step == 250, f"byte {at}"
        if name == "state.safetensors":
            assert check(path).problem == "state.safetensors inside it is damaged"


def test_state_whose_tensors_are_not_what_follows_its_header_is_a_problem(tmp_path: Path) -> None:
    whole = {"dtype": "F32", "shape": [50], "data_offsets": [0, 200]}
    short, gap = {**whole, "data_offsets": [0, 196]}, {**whole, "data_offsets": [4, 200]}
    for number, (entry, told) in enumerate(((short, "do not fill it"), (gap, "leave gaps"), ({}, "data_offsets"))):
        path = save_directory(tmp_path / f"ckpt-{number:08d}", 5, header={"model.weight": entry})
        assert told in check(path).problem


def test_directory_of_another_format_is_named(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "ckpt-00000010", 10)
    sign(path, {"format": "gpusup checkpoint", "version": 9, "step": 10, "files": {}})
    assert check(path).problem == "it is of a format unknown here (gpusup checkpoint 9)"


def test_newest_whole_checkpoint_is_found_among_damaged_and_unfinished_ones(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") is None
    for step in (90, 100, 110):
        save_directory(tmp_path / f"ckpt-{step:08d}", step)
    (tmp_path / "ckpt-00000120.partial").mkdir()
    save_directory(tmp_path / "ckpt-00000130", 130)
    (tmp_path / "ckpt-00000130" / "manifest.json").unlink()
    assert newest(tmp_path) == tmp_path / "ckpt-00000110"
    (tmp_path / "ckpt-00000110" / "state.safetensors").write_bytes(b"torn")
    assert newest(tmp_path) == tmp_path / "ckpt-00000100"
    save(tmp_path / "ckpt-100000000.pt", 100000000)
    assert newest(tmp_path) == tmp_path / "ckpt-100000000.pt", "by number, whatever it is made of"


def test_newest_of_damaged_ones_is_the_last_so_that_it_can_be_told(tmp_path: Path) -> None:
    for step in (90, 100):
        (save_directory(tmp_path / f"ckpt-{step:08d}", step) / "state.safetensors").write_bytes(b"torn")
    assert newest(tmp_path) == tmp_path / "ckpt-00000100"


# --- the step of nanoGPT's files --------------------------------------------------------------------------------------


STEPS = (0, 1, 255, 256, 65535, 65536, 600000, 2**31)

NANOGPT = """
import sys, torch
folder, *steps = sys.argv[1:]
weight = torch.zeros(2, 2)
small = {"h.0.weight": weight}
large = {f"transformer.h.{i}.attn.c_attn.weight": torch.zeros(1) for i in range(340)}
for step in steps:
    for name, model in (("small", small), ("large", large)):
        if name == "large" and step != "600000":
            continue
        torch.save({
            "model": model,
            "optimizer": {"state": {i: {"step": torch.tensor(1.0)} for i in range(len(model))},
                          "param_groups": [{"lr": 6e-4, "params": list(range(len(model)))}]},
            "model_args": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=False, vocab_size=50304),
            "iter_num": int(step),
            "best_val_loss": torch.tensor(1e9),
            "config": {"out_dir": "out", "eval_interval": 2000, "iter_nums": 9, "batch_size": 12},
        }, f"{folder}/{name}-{step}.pt")
"""


def test_step_of_real_nanogpt_checkpoints_is_read_whatever_their_size(tmp_path: Path) -> None:
    """More than 256 entries make the pickle use long memo opcodes, between the key and its value."""
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", NANOGPT, str(tmp_path), *map(str, STEPS)], check=True, timeout=120)
    assert {step: check(tmp_path / f"small-{step}.pt").step for step in STEPS} == {step: step for step in STEPS}
    large = tmp_path / "large-600000.pt"
    with zipfile.ZipFile(large) as archive:
        assert b"r\x00\x01\x00\x00" in archive.read("large-600000/data.pkl"), "no LONG_BINPUT: not the case meant"
    assert check(large) == Checked(path=large, step=600000, bytes=large.stat().st_size)


# --- keeping copies ---------------------------------------------------------------------------------------------------


def next_copy(keeper: Keeper) -> Checked:
    """Polls, as the loop does, until something was kept or refused."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := keeper.poll()):
        assert time.monotonic() < deadline, "nothing was kept"
        threading.Event().wait(0.02)
    assert len(found) == 1
    return found[0]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "ckpt.pt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def test_file_is_copied_once_for_each_time_it_was_saved(source: Path, folder: Path) -> None:
    keeper = Keeper(source, folder, not_before=0)
    assert keeper.poll() == []
    save(source, 10)
    first = next_copy(keeper)
    assert (first.step, first.path, first.problem) == (10, folder / "ckpt-00000010.pt", "")
    assert keeper.finish() == [], "the same version is not copied twice"
    save(source, 20)
    assert next_copy(keeper).step == 20


def test_copy_is_no_link_so_that_rewriting_in_place_leaves_it_whole(source: Path, folder: Path) -> None:
    keeper = Keeper(source, folder, not_before=0)
    save(source, 10)
    copy = next_copy(keeper).path
    with source.open("r+b") as f:
        f.write(b"\0" * 64)
    assert check(source).problem
    assert check(copy).step == 10


def test_file_older_than_the_run_is_another_runs(source: Path, folder: Path) -> None:
    save(source, 10)
    keeper = Keeper(source, folder, not_before=source.stat().st_mtime + 5)
    assert keeper.finish() == []
    os.utime(source, (source.stat().st_mtime + 10,) * 2)
    assert [kept.step for kept in keeper.finish()] == [10]


def test_half_rewritten_file_is_refused_and_its_completion_is_kept(source: Path, folder: Path) -> None:
    keeper = Keeper(source, folder, not_before=0)
    save(source, 10, size=4000)
    assert next_copy(keeper).step == 10
    new = content_of(20, size=4000)
    with source.open("r+b") as f:
        f.write(new[:2000])
        f.flush()
        refused = next_copy(keeper)
        assert refused.problem
        assert refused.path == source
        f.write(new[2000:])
    assert next_copy(keeper).step == 20
    assert sorted(path.name for path in folder.glob("ckpt-*")) == ["ckpt-00000010.pt", "ckpt-00000020.pt"]


def test_every_copy_is_whole_though_the_file_is_rewritten_all_the_time(source: Path, folder: Path) -> None:
    keeper, enough = Keeper(source, folder, not_before=0), threading.Event()
    contents = [content_of(step, size=200_000) for step in (11, 22, 33)]

    def rewrite() -> None:
        while not enough.is_set():
            for content in contents:
                source.write_bytes(content)
        source.write_bytes(contents[-1])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            keeper.poll()
    finally:
        enough.set()
        writer.join()
    keeper.finish()
    assert check(folder / "ckpt-00000033.pt").step == 33, "the last version, at rest, is kept"
    assert all(not check(path).problem for path in folder.glob("ckpt-*.pt"))


def test_newest_two_copies_are_kept(source: Path, folder: Path) -> None:
    keeper = Keeper(source, folder, not_before=0)
    for number, step in enumerate((5, 10, 15, 20)):
        save(source, step)
        os.utime(source, (number + 1, number + 1))
        assert [kept.step for kept in keeper.finish()] == [step]
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt-00000015.pt", "ckpt-00000020.pt"]
    assert COPIES_KEPT == 2


def test_checkpoint_without_a_step_is_not_kept(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("ckpt/data.pkl", pickle.dumps({"epoch": 3}, protocol=2))
    [refused] = Keeper(source, folder, not_before=0).finish()
    assert refused.problem == "its step is not recorded in it"
    assert not list(folder.glob("ckpt-*"))


def test_copy_that_cannot_be_written_is_told_and_the_trainers_file_is_left(source: Path, folder: Path) -> None:
    save(source, 10)
    folder.mkdir()
    (folder / ".incoming.pt.part").mkdir()  # in the way
    refused, theirs = Keeper(source, folder, not_before=0).finish()
    assert "could not be copied" in refused.problem
    assert (theirs.path, theirs.step, theirs.problem) == (source, 10, ""), "better than to start from zero"
    assert check(source).step == 10


def test_neither_a_copy_nor_a_torn_original_is_a_checkpoint(source: Path, folder: Path) -> None:
    source.write_bytes(content_of(10)[:50])
    folder.touch()  # no folder can be made here
    [refused] = Keeper(source, folder, not_before=0).finish()
    assert "could not be copied" in refused.problem


# --- putting a copy back ----------------------------------------------------------------------------------------------


def test_whole_file_of_the_same_step_is_left_as_it_is(tmp_path: Path) -> None:
    copy, target = save(tmp_path / "ckpt-00000010.pt", 10), save(tmp_path / "ckpt.pt", 10, size=77)
    before = target.read_bytes()
    assert place_for_resume(copy, target, "aside") == ""
    assert target.read_bytes() == before


def test_missing_file_is_put_back(tmp_path: Path) -> None:
    copy, target = save(tmp_path / "ckpt-00000010.pt", 10), tmp_path / "ckpt.pt"
    assert place_for_resume(copy, target, "aside") == "ckpt.pt put back from gpusup's verified copy of step 10"
    assert target.read_bytes() == copy.read_bytes()


@pytest.mark.parametrize(("found", "told"), [(b"torn", "torn or damaged"), (content_of(20), "was of step 20")])
def test_users_file_is_renamed_never_deleted(tmp_path: Path, found: bytes, told: str) -> None:
    copy, target = save(tmp_path / "ckpt-00000010.pt", 10), tmp_path / "ckpt.pt"
    target.write_bytes(found)
    note = place_for_resume(copy, target, "before-attempt-2")
    assert told in note
    assert "kept as ckpt.pt.before-attempt-2" in note
    assert (tmp_path / "ckpt.pt.before-attempt-2").read_bytes() == found
    assert check(target).step == 10


def test_file_kept_aside_by_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    copy, target = save(tmp_path / "ckpt-00000010.pt", 10), tmp_path / "ckpt.pt"
    for content in (b"of the first night", b"of the second night"):
        target.write_bytes(content)
        place_for_resume(copy, target, "before-attempt-2")
    kept = {path.read_bytes() for path in tmp_path.iterdir() if "before-attempt-2" in path.name}
    assert kept == {b"of the first night", b"of the second night"}
