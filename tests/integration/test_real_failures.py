"""Runs that really fail, each in its own way, under supervision: what the journal says ended them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program import Gpusup, of_kind, read_until, wait_gone

TORCH = "import torch\n"
EVERY_OOM = "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1.54 GiB. GPU 1 has a total capacity')"
RANKS = f"""
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
def training_step():
    if os.environ["RANK"] == "1":
        raise {EVERY_OOM}
    dist.all_reduce(torch.ones(1))
training_step()
"""
SHARED = """
import numpy, torch
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.ones(1 << 20)
if __name__ == "__main__":
    for batch in torch.utils.data.DataLoader(Data(), num_workers=1, batch_size=2): pass
"""

FAILURES: dict[str, tuple[str, str, str]] = {
    "no memory": ("x = bytearray(1 << 60)", "host_oom", "refused"),
    "killed": ("import os\nos.kill(os.getpid(), 9)", "host_oom_suspected", ""),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "signal", "crash"),
    "disk full": ("open('/dev/full', 'w', buffering=1).write('weights\\n')", "disk_full", ""),
    "not a number": ("raise FloatingPointError('loss is nan at step 7')", "nan", ""),
    "missing module": ("import no_such_module", "error", "import"),
    "syntax": ("def train(:\n    pass", "error", "syntax"),
    "missing file": ("open('data/train.bin')", "error", "missing_file"),
    "shape": (TORCH + "torch.ones(2, 3) @ torch.ones(4, 5)", "error", "shape"),
    "no GPU": (TORCH + "torch.zeros(1, device='cuda')", "no_gpu", ""),
    "out of memory": (TORCH + f"raise {EVERY_OOM}", "device_oom", "own_growth"),
    "own exit status": ("import sys\nsys.exit(3)", "error", "program"),
}


def end_of(gpusup: Gpusup, script: str, *command: str) -> dict[str, Any]:
    (gpusup.folder / "fails.py").write_text(script)
    done = gpusup("run", "-q", "default", "--", *(command or (sys.executable, "fails.py")))
    assert done.returncode != 0
    return of_kind(gpusup.log(), "attempt_ended")[-1]


@pytest.mark.parametrize("name", list(FAILURES))
def test_cause_is_told(gpusup: Gpusup, name: str) -> None:
    script, kind, cause = FAILURES[name]
    if name == "no GPU" and Path("/dev/nvidiactl").exists():
        pytest.skip("there is one")
    end = end_of(gpusup, script)
    assert (end["diagnosis"], end["cause"]) == (kind, cause)


def test_exception_is_known_though_nothing_was_printed(gpusup: Gpusup) -> None:
    script = TORCH + f"import os\nos.close(1)\nos.close(2)\nraise {EVERY_OOM}"
    end = end_of(gpusup, script)
    assert end["diagnosis"] == "device_oom"
    assert "exception record" in end["sources"]


def test_rank_that_ran_out_of_memory_is_named_and_not_its_victim(gpusup: Gpusup) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "fails.py"]
    end_of(gpusup, RANKS, *torchrun)
    (oom,) = of_kind(gpusup.log(), "oom")
    assert (oom["diagnosis"], oom["rank"]) == ("device_oom", 1)


def test_shared_memory_that_is_too_small_is_told(gpusup: Gpusup) -> None:
    private = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("no private /dev/shm can be made here")
    end = end_of(gpusup, SHARED, *private, sys.executable, os.fspath(gpusup.folder / "fails.py"))
    assert end["diagnosis"] == "shm_oom"


def test_machine_that_died_is_told_with_what_was_last_seen(gpusup: Gpusup) -> None:
    (gpusup.folder / "trains.py").write_text(
        "import time\nfor step in range(10**6):\n    print('step', step, flush=True)\n    time.sleep(0.05)\n"
    )
    process = gpusup.start("run", "default", "--", sys.executable, "trains.py")
    read_until(process, b"step 40")  # two seconds: there are samples
    (attempt,) = gpusup.attempts()
    start = json.loads((attempt / "start.json").read_text())
    process.kill()
    for pid in (start["shim_pid"], start["pid"]):
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
    (attempt / "start.json").write_text(json.dumps({**start, "boot_id": "the boot before"}))
    again = gpusup.start("resume", "-1")
    read_until(again, b"attempt 2")
    end = of_kind(gpusup.log(), "attempt_ended")[0]
    assert end["diagnosis"] == "machine_died"
    assert "last seen: 20" in end["message"]
    assert "trainer" in end["message"]
