"""A trainer that stops making steps is ended and goes on from its checkpoint; one that hangs again ends the run."""

import sys
from pathlib import Path

from program import Gpusup, of_kind

HANGS = """
import json, os, time
events = os.open(os.environ["GPUSUP_EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def tell(kind, **fields): os.write(events, json.dumps({"kind": kind, **fields}).encode() + b"\\n")
tell("start", protocol=1, pid=os.getpid(), step=0, target_steps=8)
for step in range(1, 9):
    time.sleep(0.15)
    tell("step", step=step, loss=1.0)
    while step == 4 and WHEN:
        print("still here", flush=True)
        time.sleep(0.1)
tell("done", step=8)
"""


def run(gpusup: Gpusup, when: str) -> "tuple[int, dict[str, object]]":
    (gpusup.folder / "hangs.py").write_text(HANGS.replace("WHEN", when))
    policy = gpusup.policy("limits: {hang_after: 1s}\nremediations: [{step: micro_batch}]\n")
    done = gpusup("run", "-q", policy, "--", sys.executable, str(Path("hangs.py")))
    return done.returncode, gpusup.log()


def test_hang_is_ended_and_the_run_goes_on(gpusup: Gpusup) -> None:
    code, log = run(gpusup, 'os.environ["GPUSUP_ATTEMPT"] == "1"')
    assert code == 0
    (hang,) = of_kind(log, "hang")
    assert hang["step"] == 4
    assert [end["diagnosis"] for end in of_kind(log, "attempt_ended")] == ["hang", "success"]


def test_hang_that_comes_again_without_a_new_step_ends_the_run(gpusup: Gpusup) -> None:
    code, log = run(gpusup, "True")
    assert code == 123
    assert len(of_kind(log, "attempt_started")) == 2
    assert of_kind(log, "finished")[-1]["result"] == "stopped"
