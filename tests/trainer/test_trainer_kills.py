"""Killed at any moment, a run resumes and is the undisturbed run, bit for bit."""

import random
from pathlib import Path

import pytest
from trainer_runs import Launch, assert_continues, kill_until_done

# A save after every step, so that most kills come near one; dropout, so that the random state matters.
SETTINGS = {"dropout": 0.1, "checkpoint_interval": 1, "vocab_size": 4096, "n_embd": 64, "threads": 1}


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(6, 60, id="six"), pytest.param(100, 1500, id="hundred", marks=pytest.mark.soak)]
)
def test_killed_at_random_moments_it_always_resumes_bit_identically(
    tmp_path: Path, tokens: Path, kills: int, steps: int
) -> None:
    """Also while a checkpoint is being written, which is when most of these kills come."""
    settings = {**SETTINGS, "max_iters": steps, "lr_decay_iters": steps}
    undisturbed = Launch(tmp_path / "undisturbed", tokens, **settings).run()
    launch = Launch(tmp_path / "killed", tokens, **settings)
    attempts, while_saving = kill_until_done(launch, random.Random(11), kills, longest_s=0.5)
    assert attempts[-1].status == 0, attempts[-1].stderr
    assert_continues(undisturbed, attempts, 0.0)
    assert while_saving or kills < 100
