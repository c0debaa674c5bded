"""Several processes under torchrun train what one process trains: same batches, same order, same losses."""

import time
from pathlib import Path

import pytest
from gpusup.trainer.distributed import World
from hypothesis import given
from hypothesis import strategies as st
from trainer_runs import Launch, assert_continues, mutant

SUM_TOLERANCE = 1e-5  # float32 sums of the same numbers in another order
NO_ROOM = "torch.empty(1 << 44)"  # 64 TiB: a real refusal by PyTorch's own allocator


@given(rows=st.integers(0, 5000), size=st.integers(1, 64))
def test_shares_cover_the_batch_once_whatever_the_number_of_processes(rows: int, size: int) -> None:
    """Contiguous, in order, and as even as whole samples allow."""
    shares = [World(rank, size).share(rows) for rank in range(size)]
    assert [sample for first, count in shares for sample in range(first, first + count)] == list(range(rows))
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 1


def test_two_processes_continue_what_one_began_and_one_what_two_began(tmp_path: Path, tokens: Path) -> None:
    """A global batch of 7 in micro-batches of 2: 2+1 rows on the one, 2+2 on the other; one checkpoint for both."""
    settings = {"global_batch_size": 7, "batch_size": 2, "eval_interval": 6, "max_iters": 12}
    alone = Launch(tmp_path / "alone", tokens, **settings).run()
    launch = Launch(tmp_path / "mixed", tokens, **settings)
    first = launch.run(max_iters=4)
    second = launch.run(max_iters=8, init_from="resume", processes=2)
    third = launch.run(init_from="resume")
    for run in (alone, first, second, third):
        assert run.status == 0, run.stderr
    assert "of 2 processes" in second.stdout
    assert {run.of("start")[0]["global_batch_size"] for run in (first, second, third)} == {7}
    assert second.stdout.count("step 5/8: loss") == 1
    assert_continues(alone, [first, second, third], SUM_TOLERANCE)
    vals = {event["step"]: event["val_loss"] for run in (second, third) for event in run.of("eval")}
    for event in alone.of("eval"):
        assert vals[event["step"]] == pytest.approx(event["val_loss"], abs=SUM_TOLERANCE)


def test_process_without_a_sample_of_its_own_takes_part(tmp_path: Path, tokens: Path) -> None:
    """A global batch of one sample for two processes."""
    settings = {"global_batch_size": 1, "batch_size": 1, "max_iters": 4}
    alone = Launch(tmp_path / "alone", tokens, **settings).run()
    shared = Launch(tmp_path / "shared", tokens, **settings).run(processes=2)
    assert shared.status == 0, shared.stderr
    assert_continues(alone, [shared], SUM_TOLERANCE)


def test_failure_in_one_process_ends_all_at_once_when_memory_runs_out(tmp_path: Path, tokens: Path) -> None:
    """It is not caught: caught, the others would wait for this one until a timeout of ten minutes."""
    right = 'self.report.part = "backward"\n'
    wrong = right + f"                if self.world.rank == 1 and self.progress.step == 3: {NO_ROOM}\n"
    package = mutant(tmp_path, "train.py", right, wrong)
    begin_s = time.monotonic()
    run = Launch(tmp_path / "run", tokens, package, max_iters=1000, checkpoint_interval=2).run(processes=2)
    assert run.status not in (0, 75)
    assert time.monotonic() - begin_s < 60
    failed = [event for event in run.of("failed") if event["oom"]]
    assert [(event["rank"], event["step"], event["phase"]) for event in failed] == [(1, 3, "backward")]
    assert [path.name for path in Launch(tmp_path / "run", tokens).out.glob("ckpt-*")] == ["ckpt-00000002"]


def test_asked_to_stop_all_save_one_checkpoint_and_leave(tmp_path: Path, tokens: Path) -> None:
    """torchrun hands SIGTERM on to every process; each may see it in another step."""
    import signal

    launch = Launch(tmp_path, tokens, max_iters=5000)
    run = launch.signal_at(5, signal.SIGTERM, processes=2)
    assert run.status != 0
    assert run.events[-1]["kind"] == "stopped"
    assert [path.name for path in launch.out.glob("ckpt-*")] == [f"ckpt-{run.events[-1]['step']:08d}"]
