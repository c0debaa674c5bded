"""What every folder of tests may use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from program import TIMEOUT_S, Gpusup, end_trainer


@pytest.fixture
def gpusup(tmp_path: Path) -> Iterator[Gpusup]:
    program = Gpusup(tmp_path)
    yield program
    for process in program.started:
        if process.poll() is None:
            process.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait(TIMEOUT_S)
    for attempt in program.attempts():
        end_trainer(attempt)
