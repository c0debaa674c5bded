"""Saving and evaluating beside training: neither ends a run that training alone would finish."""

import resource
from pathlib import Path

from trainer_runs import Launch

TOO_SMALL_BYTES = 64 << 10  # for a checkpoint; events and output are smaller
SHAPE = {"n_layer": 2, "n_embd": 64, "block_size": 64, "vocab_size": 8192, "batch_size": 12}
RESOLUTION_MB = 1  # where training just fits, it does so in some runs and not in others


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path: Path, tokens: Path) -> None:
    """The disk refuses it (the kernel's limit on a file's size), and has room again later."""
    undisturbed = Launch(tmp_path / "undisturbed", tokens).run()
    launch = Launch(tmp_path / "disturbed", tokens, checkpoint_interval=5)
    child = launch.start()
    _, hard = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (TOO_SMALL_BYTES, hard))
    assert child.stdout is not None
    read = ""
    for line in child.stdout:
        read += line
        if line.startswith("not saved"):
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (hard, hard))
            break
    run = launch.finish(child, read)
    assert run.status == 0, run.stderr
    assert run.losses == undisturbed.losses
    assert "not saved: [Errno 27] File too large" in run.stdout
    assert [event["step"] for event in run.of("checkpoint_failed")] == [5]
    assert run.of("checkpoint")[-1]["step"] == 20
    assert not list(launch.out.glob("*.partial"))


def test_evaluation_passes_in_the_smallest_memory_in_which_training_does(tmp_path: Path, tokens: Path) -> None:
    launch = Launch(tmp_path, tokens, **SHAPE, max_iters=3, checkpoint_interval=100)

    def fits(budget_mb: int) -> bool:
        run = launch.run(budget_mb, out_dir=tmp_path / f"{budget_mb}")
        assert run.status == 0 or "memory" in run.stdout + run.stderr
        return run.status == 0

    low_mb, high_mb = 0, 128
    assert fits(high_mb)
    while high_mb - low_mb > RESOLUTION_MB:
        middle_mb = (low_mb + high_mb) // 2
        low_mb, high_mb = (low_mb, middle_mb) if fits(middle_mb) else (middle_mb, high_mb)
    run = launch.run(high_mb + RESOLUTION_MB, out_dir=tmp_path / "evaluated", eval_interval=1, eval_iters=3)
    assert run.status == 0, run.stderr
    assert len(run.of("eval")) == 3
    assert low_mb > 0
