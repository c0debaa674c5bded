"""A trainer that uses the hook, with a copy of `hook.py` beside it: real memory, really refused, and no torch.

A step allocates `sample_mb` per sample of the micro-batch; from step `long_from` on the samples are twice as long. The
process limits itself to `memory_mb` beyond what it has at the start, so that the kernel refuses what does not fit.
"""

import resource
import sys
import time
import zipfile
from pathlib import Path

from hook import EXIT_OOM_SAVED, Hook, is_out_of_memory

# what gpusup reads, changes and passes on
out_dir = "out"
init_from = "scratch"
resume_from = ""
checkpoint_interval = 10
batch_size = 8
gradient_accumulation_steps = 2
block_size = 64
dtype = "float32"
compile = False  # noqa: A001
device = "cpu"
max_iters = 30
# its own
memory_mb = 64
sample_mb = 4
long_from = 1000
step_s = 0.01
for argument in sys.argv[1:]:
    name, _, text = argument[2:].partition("=")
    kind = type(globals()[name])
    globals()[name] = text == "True" if kind is bool else kind(text)


def limit_memory() -> None:
    with open("/proc/self/status") as f:
        in_use_kb = next(int(line.split()[1]) for line in f if line.startswith("VmData:"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (in_use_kb * 1024 + memory_mb * 2**20, hard))


def save(step: int) -> Path:
    path = Path(out_dir, f"ckpt-{step:08d}.pt")
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path.with_suffix(".part"), "w") as archive:  # what torch.save writes is a zip like this
        archive.writestr("archive/data.pkl", str(step))
    return path.with_suffix(".part").rename(path)


def load(path: str) -> int:
    with zipfile.ZipFile(path) as archive:
        return int(archive.read("archive/data.pkl"))


def optimizer_step(step: int) -> float:
    for _ in range(gradient_accumulation_steps):
        activations = bytearray(batch_size * sample_mb * 2**20 * (2 if step >= long_from else 1))
        activations[::4096] = b"x" * len(activations[::4096])
        del activations
    time.sleep(step_s)
    return 1.0 / step


def train(hook: Hook, step: int) -> int:
    """From `step` to the target, or until a save is requested; the number of steps completed."""
    hook.start(
        step=step,
        target_steps=max_iters,
        can_save=True,
        settings={"batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps},
        global_batch_size=batch_size * gradient_accumulation_steps,
    )
    refused = False
    while step < max_iters and not hook.save_requested:
        begin_s = time.perf_counter()
        try:
            loss = optimizer_step(step + 1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            hook.failed(error, phase="forward")
            refused = True
        if refused:  # outside the handler, where nothing of what failed is held any more
            hook.checkpoint(step, save(step))
            sys.exit(EXIT_OOM_SAVED)
        step += 1
        hook.step(step, loss=loss, dt_s=time.perf_counter() - begin_s, block_size=block_size)
        print(f"step {step}", flush=True)
        if step % checkpoint_interval == 0:
            hook.checkpoint_begun(step)
            hook.checkpoint(step, save(step))
    if hook.save_requested:
        hook.checkpoint(step, save(step))
    return step


with Hook.from_environment() as hook:
    limit_memory()
    train(hook, load(resume_from) if init_from == "resume" else 0)
    hook.leave()
