"""Out of memory costs no step: the state as of the last completed one is saved, wherever memory ran out."""

from pathlib import Path

import pytest
import torch
from gpusup.trainer import checkpoint, update
from gpusup.trainer.distributed import World
from gpusup.trainer.hook import EXIT_OOM_SAVED
from gpusup.trainer.model import GPT, Shape
from gpusup.trainer.optimizer import AdamW
from trainer_runs import Launch, Run, assert_continues, mutant

FAILS_AT = 7  # the last completed step; checkpoints are due every 5
# Once, and 64 TiB, so that PyTorch's own allocator refuses it.
NO_ROOM = f"if self.progress.step == {FAILS_AT} and 'full' not in vars(self): self.full = 1; torch.empty(1 << 44)"
SETTINGS = {"dropout": 0.1, "checkpoint_interval": 5, "eval_interval": 7, "max_iters": 12}

PLACES = {  # where memory runs out: the line of train.py it is injected before, and the phase that is reported
    "forward": ("                loss_sum = self.forward(batch)\n", "forward"),
    "backward": ("            total += loss_sum.detach()\n", "backward"),
    "second micro-batch": ("            first += rows\n        self.report", "backward"),
    "clip": ("        self.update.prepare()\n", "clip"),
    "eval": ("                total += self.forward(self.val_tokens", "eval"),
    "optimizer, before anything is applied": ("        self.update.apply()\n", "optimizer"),
    "save": ("        self.checkpointer.save(self.progress.step", "checkpoint"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Run:
    return Launch(tmp_path_factory.mktemp("undisturbed"), tokens, **SETTINGS).run()


@pytest.mark.parametrize("place", PLACES)
def test_no_step_is_lost_when_memory_runs_out(tmp_path: Path, tokens: Path, undisturbed: Run, place: str) -> None:
    """Saved as the end of the last step, random state and data position included: resumed, it is bit for bit equal."""
    line, phase = PLACES[place]
    indent = line[: len(line) - len(line.lstrip())]
    package = mutant(tmp_path, "train.py", line, f"{indent}{NO_ROOM}\n{line}")
    settings = {**SETTINGS, "checkpoint_interval": 7} if place == "save" else SETTINGS
    launch = Launch(tmp_path / "run", tokens, package, **settings)
    first = launch.run()
    assert first.status == EXIT_OOM_SAVED, first.stderr
    (failed,) = first.of("failed")
    assert (failed["step"], failed["phase"], failed["oom"]) == (FAILS_AT, phase, True)
    assert "DefaultCPUAllocator: can't allocate memory" in first.stderr
    assert first.of("checkpoint")[-1]["step"] == FAILS_AT

    launch.package = Launch(tmp_path, tokens).package
    second = launch.run(init_from="resume")
    assert second.status == 0, second.stderr
    assert min(second.losses) == FAILS_AT + 1
    assert_continues(undisturbed, [first, second], 0.0)


def test_nothing_is_saved_when_the_update_was_half_applied(tmp_path: Path, tokens: Path) -> None:
    """Weights between two steps are no state of the run; the checkpoint before it is, and costs the steps since."""
    line = "        self.update.apply()\n"
    package = mutant(tmp_path, "train.py", line, f"{line}        {NO_ROOM}\n")
    launch = Launch(tmp_path / "run", tokens, package, **SETTINGS)
    run = launch.run()
    assert run.status == 1
    assert run.of("failed")[0]["phase"] == "optimizer"
    assert [step for step, _ in checkpoint.stored(launch.out)] == [5]


def test_nothing_is_saved_when_no_step_was_completed(tmp_path: Path, tokens: Path) -> None:
    line = "                loss_sum = self.forward(batch)\n"
    package = mutant(tmp_path, "train.py", line, f"                torch.empty(1 << 44)\n{line}")
    launch = Launch(tmp_path / "run", tokens, package)
    run = launch.run()
    assert run.status == 1
    assert checkpoint.stored(launch.out) == []


@pytest.mark.parametrize("applied", ["nothing", "a count", "one group", "everything"])
def test_update_is_called_untouched_only_when_it_is(applied: str) -> None:
    """Whatever part of an optimizer step was carried out before memory ran out."""
    shape = Shape(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=16, bias=True)
    model = GPT.new(shape, 0.0, torch.device("cpu"), seed=1)
    optimizer = AdamW(model.decay_groups(0.1), 1e-3, (0.9, 0.95))
    steps = update.Update(optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0, World())
    before = steps.applied()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    steps.prepare()
    if applied == "a count":
        optimizer.state[optimizer.param_groups[1]["params"][-1]]["step"] += 1
    if applied == "one group":
        second = optimizer.param_groups.pop()
        optimizer.step()
        optimizer.add_param_group(second)
    if applied == "everything":
        steps.apply()
    assert steps.untouched_since(before) is (applied == "nothing")
