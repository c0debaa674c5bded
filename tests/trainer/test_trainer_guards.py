"""A gradient that is not finite changes nothing, and a run that has only such gradients ends."""

from pathlib import Path

import pytest
import torch
from gpusup.trainer import checkpoint
from trainer_runs import Launch, mutant

BACKWARD = "                self.scaler.scale(loss_sum / tokens)"
NOT_A_NUMBER = "                loss_sum = loss_sum * (float('nan') if {when} else 1.0)\n"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_update_is_skipped_and_told_when_a_gradient_is_not_finite(tmp_path: Path, tokens: Path, dtype: str) -> None:
    """One step of ten: its weights and moments are those of the step before, and training goes on."""
    package = mutant(tmp_path, "train.py", BACKWARD, NOT_A_NUMBER.format(when="self.progress.step == 4") + BACKWARD)
    settings = {"checkpoint_interval": 1, "keep_latest_k": 10, "max_iters": 10, "dtype": dtype}
    launch = Launch(tmp_path / "run", tokens, package, **settings)
    run = launch.run()
    assert run.status == 0, run.stderr
    (skipped,) = run.of("skipped")
    assert (skipped["step"], skipped["count"]) == (5, 1)
    assert "step 5: the gradient is not finite; 1 updates skipped so far" in run.stdout
    states = {step: checkpoint.load(path).tensors for step, path in checkpoint.stored(launch.out)}
    assert all(torch.equal(tensor, states[5][name]) for name, tensor in states[4].items())
    assert not torch.equal(states[5]["model.tokens.weight"], states[6]["model.tokens.weight"])


def test_run_ends_when_nothing_is_finite_any_more(tmp_path: Path, tokens: Path) -> None:
    """With what to do about it; the weights in the last checkpoint are good ones."""
    package = mutant(tmp_path, "train.py", BACKWARD, NOT_A_NUMBER.format(when="self.progress.step >= 4") + BACKWARD)
    launch = Launch(tmp_path / "run", tokens, package, checkpoint_interval=2, max_iters=100)
    run = launch.run()
    assert run.status == 1
    assert max(run.losses) == 24
    assert "20 steps in a row were not finite" in run.stderr
    assert "resume from an earlier checkpoint with a lower learning_rate" in run.stderr
    weights = checkpoint.load_newest(launch.out).tensors
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_gradient_norm_is_limited_and_told_before_the_limit(tmp_path: Path, tokens: Path) -> None:
    """With a limit far below every norm the first update is as large as the limit lets it be, whatever the norm."""
    small = Launch(tmp_path / "small", tokens, grad_clip=1e-9, weight_decay=0.0, max_iters=3).run()
    free = Launch(tmp_path / "free", tokens, grad_clip=0.0, weight_decay=0.0, max_iters=3).run()
    norms = [[event["grad_norm"] for event in run.of("step")] for run in (small, free)]
    assert norms[0][0] == norms[1][0] > 0.1
    assert abs(small.losses[3] - small.losses[1]) < abs(free.losses[3] - free.losses[1])
