"""A disturbed run is the undisturbed run: real interruptions, real recoveries, compared loss by loss."""

import signal
from pathlib import Path

import pytest
from trainer_runs import Launch, Run, assert_continues, mutant

SPLIT_TOLERANCE = 1e-5  # float32 sums of the same numbers in another order
# Of 12 x 32, 8 x 64 and 4 x 128 tokens the largest needs 128; of 12 x 64 and 8 x 128 the smallest needs 175.
BUDGET_MB = 150
LARGE = {
    "loss_chunks": 1,  # the plain loss: it is the logits that run out of memory
    "vocab_size": 16384,
    "block_size": 128,
    "block_size_start": 32,
    "block_size_warmup_iters": 60,
    "n_embd": 64,
    "global_batch_size": 12,
    "batch_size": 12,
    "max_iters": 100,
    "lr_decay_iters": 100,
    "checkpoint_interval": 10,
}


def test_recovered_equals_undisturbed_when_memory_runs_out_twice(tmp_path: Path, many_tokens: Path) -> None:
    """Two real allocation failures in mid-run, each resumed with a smaller micro-batch, the second one ragged."""
    undisturbed = Launch(tmp_path / "undisturbed", many_tokens, **LARGE).run()
    assert undisturbed.status == 0, undisturbed.stderr

    launch = Launch(tmp_path / "recovered", many_tokens, **LARGE)
    first = launch.run(BUDGET_MB)
    second = launch.run(BUDGET_MB, init_from="resume", batch_size=8)
    third = launch.run(BUDGET_MB, init_from="resume", batch_size=4)

    for attempt, step, block_size in ((first, 30, 64), (second, 60, 128)):
        (failed,) = attempt.of("failed")
        assert attempt.status == 1
        assert (failed["step"], failed["block_size"]) == (step, block_size)
        assert failed["phase"] in ("forward", "backward")
        assert failed["type"] == "RuntimeError"
        assert "DefaultCPUAllocator: can't allocate memory" in failed["message"]
        assert failed["message"].splitlines()[0] in attempt.stderr
    assert third.status == 0, third.stderr
    assert [event["global_batch_size"] for run in (first, second, third) for event in run.of("start")] == [12] * 3
    assert_continues(undisturbed, [first, second, third], SPLIT_TOLERANCE)


def test_restarted_is_bit_identical_when_killed(tmp_path: Path, tokens: Path) -> None:
    """With dropout, so that the random generator matters, and evaluations, so that they might disturb it."""
    settings = {"dropout": 0.1, "eval_interval": 7, "checkpoint_interval": 5, "max_iters": 30}
    undisturbed = Launch(tmp_path / "undisturbed", tokens, **settings).run()
    launch = Launch(tmp_path / "killed", tokens, **settings)
    first = launch.signal_at(8, signal.SIGKILL)
    second = launch.signal_at(17, signal.SIGKILL, init_from="resume")
    third = launch.run(init_from="resume")

    assert (first.status, second.status, third.status) == (-signal.SIGKILL, -signal.SIGKILL, 0)
    assert min(second.losses) > 1
    assert min(third.losses) > 6
    assert_continues(undisturbed, [first, second, third], 0.0)
    vals = {event["step"]: event["val_loss"] for run in (first, second, third) for event in run.of("eval")}
    assert vals == {event["step"]: event["val_loss"] for event in undisturbed.of("eval")}


def test_stopped_run_continues_bit_identically_when_asked_by_sigterm(tmp_path: Path, tokens: Path) -> None:
    """SIGTERM saves the step under way, says so, and ends by the signal."""
    settings = {"dropout": 0.1, "max_iters": 60}
    undisturbed = Launch(tmp_path / "undisturbed", tokens, **settings).run()
    launch = Launch(tmp_path / "stopped", tokens, **settings)
    first = launch.signal_at(6, signal.SIGTERM)
    second = launch.run(init_from="resume")

    assert first.status == -signal.SIGTERM
    assert [event["kind"] for event in first.events[-3:]] == ["checkpoint", "peak", "stopped"]
    stopped = first.events[-1]["step"]
    assert 6 <= stopped < 60
    assert min(second.losses) == stopped + 1
    assert_continues(undisturbed, [first, second], 0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Run:
    return Launch(tmp_path_factory.mktemp("undisturbed"), tokens, dropout=0.1).run()


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> tuple[Run, Path]:
    """The first ten steps in a process of their own, and their checkpoint."""
    launch = Launch(tmp_path_factory.mktemp("half"), tokens, dropout=0.1)
    return launch.run(max_iters=10), launch.out / "ckpt-00000010.pt"


def test_comparison_holds_when_nothing_is_wrong(
    tmp_path: Path, tokens: Path, undisturbed: Run, half_way: tuple[Run, Path]
) -> None:
    """The control of the next test."""
    first, path = half_way
    second = Launch(tmp_path, tokens, dropout=0.1).run(init_from="resume", resume_from=path)
    assert_continues(undisturbed, [first, second], 0.0)


@pytest.mark.parametrize(
    ("module", "right", "wrong"),
    [
        pytest.param("train.py", 'saved["sample"],', 'saved["sample"] + 1,', id="one sample skipped"),
        pytest.param(
            "train.py", "first = self.progress.sample", "first = self.progress.sample + 1", id="order shifted"
        ),
        pytest.param("train.py", 'checkpoint.restore_rng(saved["rng"], self.device)', "pass", id="rng not restored"),
        pytest.param("train.py", 'saved["optimizer"].items()', "{}.items()", id="optimizer state lost"),
    ],
)
def test_comparison_fails_when_resuming_is_wrong(
    tmp_path: Path, tokens: Path, undisturbed: Run, half_way: tuple[Run, Path], module: str, right: str, wrong: str
) -> None:
    """What the tests above promise, they notice: the same comparison on a trainer with one mistake."""
    first, path = half_way
    package = mutant(tmp_path, module, right, wrong)
    second = Launch(tmp_path / "run", tokens, package, dropout=0.1).run(init_from="resume", resume_from=path)
    assert second.of("start")[0]["step"] == 10
    with pytest.raises(AssertionError):
        assert_continues(undisturbed, [first, second], SPLIT_TOLERANCE)


def test_ragged_batches_equal_whole_ones_only_when_tokens_are_weighted(tmp_path: Path, tokens: Path) -> None:
    """12 samples as 12, as 5 + 5 + 2, and as 5 + 5 + 2 by a trainer that averages the means of micro-batches."""
    whole = Launch(tmp_path / "whole", tokens, global_batch_size=12, batch_size=12).run()
    ragged = Launch(tmp_path / "ragged", tokens, global_batch_size=12, batch_size=5).run()
    right, wrong = "loss_sum / tokens)", "loss_sum / (rows * context) / len(self.micro_rows))"
    by_means = mutant(tmp_path / "mutant", "train.py", right, wrong)
    averaged = Launch(tmp_path / "averaged", tokens, by_means, global_batch_size=12, batch_size=5).run()

    assert_continues(whole, [ragged], SPLIT_TOLERANCE)
    assert averaged.status == 0
    with pytest.raises(AssertionError):
        assert_continues(whole, [averaged], SPLIT_TOLERANCE)
