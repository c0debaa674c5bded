"""A trainer that keeps to docs/trainer-protocol.md without torch: the reference trainer's knobs, steps of `step_s`.

`leave_orphan` starts a process of its own session that would outlive it; `ignore_term` never leaves when asked.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

out_dir = "out"
init_from = "scratch"
resume_from = ""
checkpoint_interval = 10
eval_interval = 0
batch_size = 8
gradient_accumulation_steps = 2
global_batch_size = 0
block_size = 64
dtype = "float32"
compile = False  # noqa: A001
device = "cpu"
max_iters = 100
step_s = 0.01
leave_orphan = False
ignore_term = False
for argument in sys.argv[1:]:
    name, _, text = argument[2:].partition("=")
    globals()[name] = type(globals()[name])(text if text not in ("True", "False") else text == "True")


def tell(kind: str, **fields: object) -> None:
    with open(os.environ["GPUSUP_EVENTS"], "a") as f:
        f.write(json.dumps({"kind": kind, **fields}) + "\n")


def save() -> None:
    import zipfile

    folder = Path(out_dir)
    folder.mkdir(exist_ok=True)
    path = folder / f"ckpt-{step:08d}.pt"
    with zipfile.ZipFile(path.with_suffix(".part"), "w") as archive:
        archive.writestr("archive/data.pkl", str(step))
    path.with_suffix(".part").rename(path)
    tell("checkpoint", step=step, path=str(path), bytes=path.stat().st_size)


asked = []
signal.signal(signal.SIGTERM, lambda *_: None if ignore_term else asked.append(True))
step = int(Path(resume_from).stem.split("-")[1]) if init_from == "resume" else 0
tell("start", step=step, target_steps=max_iters, pid=os.getpid(), can_save=True, global_batch_size=16, settings={})
if leave_orphan:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
while step < max_iters and not asked:
    time.sleep(step_s)
    step += 1
    tell("step", step=step, loss=1.0 / step, dt_s=step_s, tokens=1, block_size=block_size)
    print(f"step {step}", flush=True)
    if step % checkpoint_interval == 0:
        save()
if asked:
    save()
    tell("stopped", step=step)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
tell("done", step=step)
