"""NVML in every state it can be in, through a real shared library: nothing raises, and nothing waits for ever."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from program import Gpusup, finish, of_kind, read_until

GIB = 1 << 30
ASK = """
import json, os, sys, time
from pathlib import Path
from gpusup.supervisor.gpu import Nvml
state = Path(sys.argv[1])
nvml = Nvml(patience_s=float(os.environ.get("PATIENCE_S", "1")))
uuid = "GPU-stub-0001"
nvml.gpus()
for word in sys.argv[2:]:
    state.write_text(word)
    begin_s = time.monotonic()
    gpus, memory, processes = nvml.gpus(), nvml.memory(uuid), nvml.process_bytes(uuid)
    print(json.dumps({
        "gpus": [(gpu.uuid, gpu.name, gpu.total_bytes) for gpu in gpus],
        "free": memory and memory.free_bytes, "processes": processes, "trouble": nvml.trouble,
        "problem": nvml.problem, "took_s": time.monotonic() - begin_s,
    }))
"""


def ask(library: Path, folder: Path, *states: str, first: str = "normal", **more: str) -> list[dict[str, Any]]:
    """What is said in each of the states, one after another in one process."""
    state = folder / "state"
    state.write_text(first)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "NVML_STUB": str(state), **more}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(state), *states], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_a_card_says(library: Path, tmp_path: Path) -> None:
    normal, small, full = ask(library, tmp_path, "normal", "small", "full")
    assert normal["gpus"] == [["GPU-stub-0001", "Stub RTX 4070", 12 * GIB]]
    assert normal["free"] == 11 * GIB
    assert list(normal["processes"].values()) == [GIB]
    assert (normal["trouble"], normal["problem"]) == (None, "")
    assert small["free"] == 3 * GIB
    assert full["free"] == 0


def test_figure_that_is_not_supported_costs_only_itself(library: Path, tmp_path: Path) -> None:
    (found,) = ask(library, tmp_path, "unsupported")
    assert (found["free"], found["processes"], found["trouble"]) == (11 * GIB, None, None)


@pytest.mark.parametrize(
    ("state", "trouble"),
    [("lost", "lost"), ("reset", "reset_required"), ("mismatch", "driver_replaced"), ("unknown", None)],
)
def test_trouble_is_told_apart_and_passes_when_the_card_is_back(
    library: Path, tmp_path: Path, state: str, trouble: str | None
) -> None:
    ill, well = ask(library, tmp_path, state, "normal")
    assert (ill["free"], ill["trouble"]) == (None, trouble)
    assert (well["free"], well["trouble"]) == (11 * GIB, None)


def test_driver_that_is_absent_is_said_to_be(library: Path, tmp_path: Path) -> None:
    (found,) = ask(library, tmp_path, "absent", first="absent")
    assert (found["gpus"], found["free"]) == ([], None)
    assert found["problem"].startswith("NVML does not answer: ")


def test_slow_driver_is_waited_for(library: Path, tmp_path: Path) -> None:
    (slow,) = ask(library, tmp_path, "slow", PATIENCE_S="30")
    assert (slow["free"], slow["problem"]) == (11 * GIB, "")
    assert slow["took_s"] > 0.3


def test_driver_that_blocks_is_not_waited_for(library: Path, tmp_path: Path) -> None:
    (blocking,) = ask(library, tmp_path, "blocking")
    assert (blocking["gpus"], blocking["free"]) == ([], None)
    assert blocking["problem"] == "NVML did not answer within 1 s"
    assert blocking["took_s"] < 5


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("0", 1), ("GPU-stub", 1), ("1", 0), ("", 0), ("GPU-other,0", 0), ("MIG-stub-1", 1), ("GPU-stub-0001", 1)],
)
def test_only_what_the_trainer_may_see_is_watched(library: Path, tmp_path: Path, visible: str, seen: int) -> None:
    (found,) = ask(library, tmp_path, "normal", CUDA_VISIBLE_DEVICES=visible)
    assert len(found["gpus"]) == seen


TRAINER = """
import sys, time
for step in range(10_000):
    print("step", step, flush=True)
    time.sleep(0.05)
"""


def supervised(gpusup: Gpusup, library: Path, script: str) -> Any:
    (gpusup.folder / "trains.py").write_text(script)
    (gpusup.folder / "state").write_text("normal")
    gpusup.environment |= {"LD_LIBRARY_PATH": str(library), "NVML_STUB": str(gpusup.folder / "state")}
    return gpusup.start("run", "default", "--", sys.executable, "trains.py")


def test_run_stops_and_is_not_started_again_when_the_gpu_is_lost(gpusup: Gpusup, library: Path) -> None:
    fails = (
        "import time\nwhile open('state').read() == 'normal': time.sleep(0.05)\n"
        "raise RuntimeError('CUDA error: unknown error')\n"
    )
    process = supervised(gpusup, library, fails)
    read_until(process, b"attempt 1")
    (gpusup.folder / "state").write_text("lost")
    code, output = finish(process)
    log = gpusup.log()
    assert code == 122
    assert of_kind(log, "attempt_ended")[-1]["diagnosis"] == "gpu_lost"
    assert of_kind(log, "finished")[-1]["result"] == "stopped"
    assert "the GPU is lost" in output


def test_supervision_goes_on_in_a_new_process_when_the_driver_was_replaced(gpusup: Gpusup, library: Path) -> None:
    process = supervised(gpusup, library, TRAINER)
    read_until(process, b"step 5")
    (gpusup.folder / "state").write_text("mismatch")
    read_until(process, b"took the run over")
    (gpusup.folder / "state").write_text("normal")
    log = gpusup.log()
    assert len(of_kind(log, "attempt_started")) == 1
    assert [event["trouble"] for event in of_kind(log, "gpu_trouble")][:1] == ["driver_replaced"]
    assert process.poll() is None


def test_supervisor_is_not_held_up_by_a_driver_that_blocks(gpusup: Gpusup, library: Path) -> None:
    process = supervised(
        gpusup, library, "import time\nfor i in range(60):\n    print('step', i, flush=True)\n    time.sleep(0.1)\n"
    )
    read_until(process, b"step 5")
    (gpusup.folder / "state").write_text("blocking")
    begin_s = time.monotonic()
    code, _ = finish(process)
    assert code == 0
    assert time.monotonic() - begin_s < 40


SLOWS = """
import json, os, time
events = os.open(os.environ["GPUSUP_EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def tell(kind, **fields): os.write(events, json.dumps({"kind": kind, **fields}).encode() + b"\\n")
tell("start", protocol=1, pid=os.getpid(), step=0)
for step in range(1, 101):
    dt_s = 0.05 if step < 60 else 0.25
    time.sleep(dt_s)
    tell("step", step=step, loss=1.0, dt_s=dt_s)
tell("done", step=100)
"""


@pytest.mark.parametrize(("state", "told"), [("full", 1), ("hot", 0), ("normal", 0)])
def test_collapse_of_speed_is_a_soft_oom_only_when_memory_is_full_and_heat_is_not_why(
    gpusup: Gpusup, library: Path, state: str, told: int
) -> None:
    process = supervised(gpusup, library, SLOWS)
    (gpusup.folder / "state").write_text(state)
    code, _ = finish(process)
    assert code == 0
    assert len(of_kind(gpusup.log(), "soft_oom")) == told
