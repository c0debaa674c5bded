"""The hook: what it writes, what it notices, and that it costs nothing when nobody supervises."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpusup.trainer import hook as hook_module
from gpusup.trainer.hook import EXIT_OOM_SAVED, PROTOCOL, Hook, is_out_of_memory
from gpusup.trainer.report import Reporter
from protocol_doc import DOCUMENT, FIELD_TYPES, KINDS

HOOK = Path(hook_module.__file__)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is written is what the document says ------------------------------------------------------------------------


def everything(hook: Hook) -> None:
    """Every event, with everything that can be told."""
    hook.start(step=0, target_steps=9, can_save=False, settings={"dtype": "bfloat16"}, global_batch_size=8)
    hook.phase("train", block_size=64)
    hook.step(1, loss=2.5, dt_s=0.5, tokens=512, block_size=64, peak_bytes=7, grad_norm=1.5, alloc_retries=0)
    hook.peak("train", 1000, block_size=64, where="host")
    hook.eval(val_loss=2.25)
    hook.checkpoint_begun(1)
    hook.checkpoint(1, Path("out/ckpt"), count_bytes=10)
    hook.checkpoint_failed(1, "No space left on device")
    hook.skipped("overflow", 1)
    hook.unavailable("compile", "no compiler")
    hook.failed(MemoryError("no room"), peak_bytes=1000, block_size=64)
    hook.leave()
    hook.emit("stopped", step=1)  # `leave` would end this process


def test_kinds_and_fields_the_hook_writes_are_exactly_the_documents(tmp_path: Path) -> None:
    path = tmp_path / "events"
    everything(Hook(path))
    told = {event["kind"]: set(event) - {"kind", "step"} for event in written(path)}
    assert told == {kind: needed | optional for kind, (needed, optional) in KINDS.items()}


def test_values_the_hook_writes_have_the_documents_types(tmp_path: Path) -> None:
    path = tmp_path / "events"
    everything(Hook(path))
    for event in written(path):
        for name, value in event.items():
            assert isinstance(value, FIELD_TYPES[name]), (event, name)
    assert written(path)[0]["protocol"] == PROTOCOL


def test_least_that_can_be_told_has_every_needed_field(tmp_path: Path) -> None:
    path = tmp_path / "events"
    hook = Hook(path)
    hook.start()
    hook.phase("train")
    hook.step(1)
    hook.checkpoint(1, "ckpt")
    hook.skipped("overflow", 1)
    hook.failed(ValueError())
    hook.leave()
    for event in written(path):
        needed, optional = KINDS[event["kind"]]
        assert needed <= set(event) - {"kind", "step"} <= needed | optional


def test_reporter_adds_to_a_step_what_the_document_says(tmp_path: Path) -> None:
    """On the host: the peak of the phase."""
    path = tmp_path / "events"
    report = Reporter(Hook(path))
    report.enter("train", 64)
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    fields = report.step_fields()
    assert set(fields) == {"peak_bytes"}
    assert fields["peak_bytes"] > 64 << 20
    assert set(fields) <= KINDS["step"][1]
    assert Reporter(None).step_fields() == {}


def test_reporter_tells_phase_part_and_whether_memory_was_refused(tmp_path: Path) -> None:
    path = tmp_path / "events"
    report = Reporter(Hook(path))
    report.step = 7
    report.start(target_steps=10, settings={"dtype": "float32"}, global_batch_size=4)
    report.enter("train", 64)
    report.part = "backward"
    report.failed(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    report.failed(RuntimeError("something of its own"), oom=True)
    [start, _, refused, claimed] = written(path)
    assert set(start) - {"kind", "step"} == KINDS["start"][0] | KINDS["start"][1]
    assert (refused["phase"], refused["step"], refused["block_size"]) == ("backward", 7, 64)
    assert (refused["oom"], refused["rank"], claimed["oom"]) == (True, 0, True)


# --- out of memory ----------------------------------------------------------------------------------------------------


class OutOfMemoryError(Exception):
    """As libraries that are not PyTorch call theirs."""


def refused_by_the_host() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def refused_by_python() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize("allocate", [refused_by_the_host, refused_by_python])
def test_allocation_that_was_really_refused_is_out_of_memory(allocate: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.54 GiB."),
        OutOfMemoryError("anything"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 11.60 GiB total capacity)"),
        RuntimeError("HIP out of memory. Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 11.60 GiB"),
        RuntimeError("XPU out of memory. Tried to allocate 1.54 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 10 GB)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_spelling_of_out_of_memory_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA out of memory was in the text of a sample"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 114688"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
        AssertionError("size mismatch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_only_sounds_like_it_is_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


# --- it never harms training ------------------------------------------------------------------------------------------


def test_hook_of_nobody_writes_nothing_and_leaves_signals_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GPUSUP_EVENTS", raising=False)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    hook = Hook.from_environment()
    hook.start(can_save=True)
    everything(hook)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not hook.save_requested
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/nonexistent/events", "/dev/full", "/proc/version"])
def test_events_that_cannot_be_written_cost_only_the_events(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUSUP_EVENTS", path)
    everything(Hook.from_environment())
    assert capsys.readouterr().err.count("events will be written") == 1


def test_value_of_any_type_makes_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events"
    hook = Hook(path)
    hook.step(1, loss=torch.tensor(2.5), dt_s=float("inf"), tokens=torch.tensor([1, 2]), block_size=Path("x"))
    hook.start(settings={"a": float("nan"), "b": [torch.tensor(1), {"c": None}], "d": True})
    [step, start] = written(path)
    assert (step["loss"], step["dt_s"], step["tokens"], step["block_size"]) == (2.5, None, "tensor([1, 2])", "x")
    assert start["settings"] == {"a": None, "b": [1, {"c": None}], "d": True}


def test_start_outside_the_main_thread_cannot_save_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "events"
    hook = Hook(path)
    thread = threading.Thread(target=lambda: hook.start(can_save=True))
    thread.start()
    thread.join()
    assert written(path)[0]["can_save"] is False
    assert not hook.save_requested


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events"
    hook = Hook(path)
    threads = [
        threading.Thread(target=lambda n=n: [hook.step(n, text="x" * 5000) for _ in range(50)])  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(event["step"] for event in written(path)) == [n for n in range(4) for _ in range(50)]


def test_only_the_first_rank_tells_its_story_and_every_rank_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        everything(Hook(tmp_path / rank))
    assert {event["kind"] for event in written(tmp_path / "0")} == set(KINDS)
    [failed] = written(tmp_path / "1")
    assert (failed["kind"], failed["rank"], failed["oom"]) == ("failed", 1, True)


def end(hook: Hook, error: BaseException, told: bool) -> None:
    with hook:
        hook.step(3)
        if told:
            hook.failed(error)
        raise error


@pytest.mark.parametrize(
    ("error", "told", "reports"), [(ValueError(), False, 1), (MemoryError(), True, 1), (SystemExit(75), False, 0)]
)
def test_exception_that_ends_the_process_is_reported_once_and_a_deliberate_exit_is_not(
    tmp_path: Path, error: BaseException, told: bool, reports: int
) -> None:
    hook = Hook(tmp_path / "events")
    with pytest.raises(type(error)):
        end(hook, error, told)
    assert [event["kind"] for event in written(tmp_path / "events")] == ["step"] + ["failed"] * reports


# --- alone ------------------------------------------------------------------------------------------------------------

EXAMPLE = """
import sys, time
step, batch_size = 0, 8

def train_one_step():
    if step == 4:
        bytearray(1 << 60)
    return 1.5, 0.1

def save(step):
    return f"ckpt-{step}"

"""


def test_example_of_the_document_leaves_with_75_and_nothing_lost(tmp_path: Path) -> None:
    """The fifth step is refused its memory by Python itself."""
    [code] = re.findall(r"```python\n# with hook.py\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    shutil.copy(HOOK, tmp_path)
    (tmp_path / "train.py").write_text(EXAMPLE + code)
    environment = {**os.environ, "GPUSUP_EVENTS": str(tmp_path / "events")}
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == EXIT_OOM_SAVED == 75
    events = written(tmp_path / "events")
    assert [(event["kind"], event["step"]) for event in events] == [
        ("start", 0), *(("step", n) for n in range(1, 5)), ("failed", 4), ("checkpoint", 4),
    ]  # fmt: skip
    assert (events[-2]["oom"], events[-1]["path"]) == (True, "ckpt-4")


ALONE = """
import os, signal, sys, time
from hook import Hook
assert "torch" not in sys.modules and "gpusup" not in sys.modules
with Hook.from_environment() as hook:
    hook.start(target_steps=5, can_save=True)
    hook.step(1, loss=1.0)
    ready, up = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.write(up, b"x")
        while True:
            time.sleep(0.01)
    os.read(ready, 1)
    os.kill(helper, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(helper, 0)[1]) == signal.SIGTERM, "a helper is not asked to save"
    assert not hook.save_requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert hook.save_requested
    hook.step(2, loss=0.5)
    hook.leave()
"""


def test_copied_hook_needs_nothing_and_leaves_by_the_signal_when_asked(tmp_path: Path) -> None:
    """Isolated from every installed package."""
    shutil.copy(HOOK, tmp_path)
    (tmp_path / "train.py").write_text(ALONE)
    events = tmp_path / "events"
    done = subprocess.run(
        [sys.executable, "-S", "train.py"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "GPUSUP_EVENTS": str(events)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert [(event["kind"], event["step"]) for event in written(events)] == [
        ("start", 0), ("step", 1), ("step", 2), ("stopped", 2),
    ]  # fmt: skip
