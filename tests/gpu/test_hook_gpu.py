"""What the hook reads of PyTorch's CUDA allocator."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from program import ROOT

pytestmark = pytest.mark.gpu

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from hook import Hook, cuda_memory
assert cuda_memory() == {}, "nothing is initialised by asking"
hook = Hook.from_environment()
block = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
del block
hook.step(1, loss=1.0)
torch.cuda.set_per_process_memory_fraction((96 << 20) / torch.cuda.get_device_properties(0).total_memory)
block = torch.empty(80 << 20, dtype=torch.uint8, device="cuda")  # fits once the cached 64 MiB are given back
hook.step(2, loss=1.0)
"""


def test_steps_tell_reserved_bytes_and_how_often_the_cache_was_freed_to_go_on(tmp_path: Path) -> None:
    events = tmp_path / "events"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "trainer")],
        env={"GPUSUP_EVENTS": str(events)},
        check=True,
        timeout=120,
    )
    first, second = (json.loads(line) for line in events.read_text().splitlines())
    assert first["peak_bytes"] >= 64 << 20
    assert first["alloc_retries"] == 0
    assert second["alloc_retries"] >= 1
