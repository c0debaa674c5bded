"""What a supervisor sees of a run: docs/trainer-protocol.md, checked on real runs."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpusup.trainer import checkpoint
from gpusup.trainer.hook import Hook
from gpusup.trainer.report import Reporter
from protocol_doc import FIELD_TYPES, KINDS
from trainer_runs import PACKAGE, TINY, Launch, Run, mutant

SAVING = ("checkpoint_begun", "checkpoint", "checkpoint_failed")  # may be told when training is further already


def assert_keeps_contract(run: Run) -> None:
    """Known kinds, their fields in their types, and `step` never goes back."""
    for event in run.events:
        needed, optional = KINDS[event["kind"]]
        assert needed <= set(event) - {"kind", "step"} <= needed | optional, event
        assert all(isinstance(value, FIELD_TYPES[name]) for name, value in event.items()), event
    steps = [event["step"] for event in run.events if event["kind"] not in SAVING]
    assert steps == sorted(steps)


def test_whole_run_tells_its_story(tmp_path: Path, tokens: Path) -> None:
    """A warm-up, an evaluation and a checkpoint in the middle, and the end."""
    settings = {"block_size_start": 16, "block_size_warmup_iters": 4, "eval_interval": 5, "max_iters": 8}
    launch = Launch(tmp_path, tokens, **settings, global_batch_size=10)
    run = launch.run()
    assert run.status == 0, run.stderr
    assert_keeps_contract(run)

    (start,) = run.of("start")
    assert (start["step"], start["target_steps"], start["global_batch_size"], start["can_save"]) == (0, 8, 10, True)
    assert start["settings"]["gradient_accumulation_steps"] == 2
    assert start["settings"]["learning_rate"] == TINY["learning_rate"]
    assert [(event["step"], event["tokens"]) for event in run.of("step")] == [
        (step, 10 * (16 if step <= 4 else 32)) for step in range(1, 9)
    ]
    assert [(event["phase"], event["block_size"], event["step"]) for event in run.of("phase")] == [
        ("load", 16, 0), ("train", 16, 0), ("train", 32, 4), ("eval", 32, 5), ("checkpoint", 32, 5),
        ("train", 32, 5), ("eval", 32, 8), ("checkpoint", 32, 8),
    ]  # fmt: skip
    assert [event["step"] for event in run.of("eval")] == [5, 8]
    for event in run.of("checkpoint"):
        path = Path(event["path"])
        assert path.name == f"ckpt-{event['step']:08d}"
        assert (path / "state.safetensors").stat().st_size == event["bytes"]
    assert run.events[-1] == {"kind": "done", "step": 8}
    first_line = next(line for line in run.stdout.splitlines() if line.startswith("step 5/8: loss "))
    assert first_line.endswith(", block 32")


def test_peak_of_training_is_reported_only_after_two_steps_at_a_block_size(tmp_path: Path, tokens: Path) -> None:
    """One step at 16, then many at 32."""
    run = Launch(tmp_path, tokens, block_size_start=16, block_size_warmup_iters=1, max_iters=6).run()
    peaks = [event for event in run.of("peak") if event["phase"] == "train"]
    assert {event["block_size"] for event in peaks} == {32}
    assert [event["step"] for event in peaks] == [3, 6]
    assert all(event["where"] == "host" and event["bytes"] > 10_000_000 for event in peaks)


def test_peak_is_of_its_own_phase(tmp_path: Path, many_tokens: Path) -> None:
    """The large logits of training are not charged to what comes after."""
    run = Launch(tmp_path, many_tokens, vocab_size=16384, batch_size=24, max_iters=4, threads=1, loss_chunks=1).run()
    peaks = {event["phase"]: event["bytes"] for event in run.of("peak")}
    logits_bytes = 24 * 32 * 16384 * 4
    assert peaks["train"] > peaks["load"] + 2 * logits_bytes
    assert peaks["checkpoint"] < peaks["train"] - logits_bytes


def test_nothing_is_written_without_the_variable(tmp_path: Path, tokens: Path) -> None:
    """And SIGTERM still saves."""
    launch = Launch(tmp_path, tokens, max_iters=10_000)
    child = launch.start(env={"GPUSUP_EVENTS": ""})
    assert child.stdout is not None
    assert any(line.startswith("step 3/") for line in child.stdout)
    child.send_signal(signal.SIGTERM)
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGTERM
    assert "stopped at step" in rest
    assert not launch.events.exists()
    assert len(list(launch.out.glob("ckpt-*"))) == 1


def test_event_file_that_cannot_be_written_costs_only_the_events(tmp_path: Path, tokens: Path) -> None:
    launch = Launch(tmp_path, tokens, max_iters=2)
    child = launch.start(env={"GPUSUP_EVENTS": "/dev/full"})
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert "no more events will be written" in launch.errors.read_text()


def test_number_that_json_lacks_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "events"
    Reporter(Hook(path)).emit("step", loss=float("nan"), dt_s=1.0)
    assert json.loads(path.read_text()) == {"kind": "step", "step": 0, "loss": None, "dt_s": 1.0}


@pytest.mark.parametrize(
    ("phase", "step", "module", "line"),
    [
        ("forward", 0, "train.py", "                loss_sum = self.forward(batch)"),
        ("backward", 0, "train.py", "                self.scaler.scale("),
        ("clip", 0, "train.py", "        self.update.prepare()"),
        ("optimizer", 0, "train.py", "        self.update.apply()"),
        ("eval", 2, "train.py", "                total += self.forward(self.val_tokens"),
        ("checkpoint", 2, "train.py", "        self.checkpointer.save(self.progress.step"),
        ("load", 0, "train.py", "        self.optimizer = AdamW("),
    ],
)
def test_failure_names_its_phase(tmp_path: Path, tokens: Path, phase: str, step: int, module: str, line: str) -> None:
    """An exception in that place: an event, an ordinary traceback, status 1."""
    indent = line[: len(line) - len(line.lstrip())]
    package = mutant(tmp_path, module, line, f"{indent}raise RuntimeError('broken')\n{line}")
    run = Launch(tmp_path / "run", tokens, package, max_iters=2, eval_interval=2).run()
    assert_keeps_contract(run)
    failed = run.events[-1]
    assert run.status == 1
    assert (failed["phase"], failed["step"]) == (phase, step)
    assert (failed["type"], failed["message"], failed["oom"]) == ("RuntimeError", "broken", False)
    assert run.stderr.startswith("Traceback")
    assert run.stderr.endswith("RuntimeError: broken\n")


@pytest.mark.parametrize(
    ("settings", "phase", "message"),
    [
        ({"data_dir": "/nonexistent"}, "load", "/nonexistent/train.bin: no such token file"),
        ({"bacth_size": 3}, "load", "did you mean batch_size?"),
        ({"device": "cuda:99"}, "load", "device=cuda:99"),
        ({"device": "tpu"}, "load", "device=tpu is not a device"),
        ({"init_from": "resume"}, "resume", "start with --init_from=scratch"),
    ],
)
def test_mistake_of_the_user_ends_with_status_2_and_one_line(
    tmp_path: Path, tokens: Path, settings: dict[str, object], phase: str, message: str
) -> None:
    run = Launch(tmp_path, tokens, **settings).run()
    assert run.status == 2
    assert run.stderr.startswith("train.py: ")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.events[-1]["kind"] == "failed"
    assert run.events[-1]["phase"] == phase


def test_out_dir_is_refused_when_it_holds_checkpoints_or_another_model(tmp_path: Path, tokens: Path) -> None:
    launch = Launch(tmp_path, tokens, max_iters=1)
    assert launch.run().status == 0
    again = launch.run()
    assert again.status == 2
    assert "already holds ckpt-00000001; go on with --init_from=resume" in again.stderr
    other = launch.run(init_from="resume", n_layer=3)
    assert other.status == 2
    assert "has n_layer=2, this run n_layer=3" in other.stderr


def test_resume_says_so_when_it_cannot_be_exact(tmp_path: Path, tokens: Path) -> None:
    launch = Launch(tmp_path, tokens, max_iters=1)
    launch.run()
    run = launch.run(init_from="resume", seed=5, batch_size=5, max_iters=2)
    assert run.status == 0
    assert "note: seed was 1337 and is now 5" in run.stdout
    assert "note: global_batch_size was 12 and is now 10" in run.stdout


def test_resume_takes_the_exact_checkpoint_it_is_given(tmp_path: Path, tokens: Path) -> None:
    """And a run that has reached its target says it is done."""
    launch = Launch(tmp_path, tokens, max_iters=6, checkpoint_interval=3)
    launch.run()
    run = launch.run(init_from="resume", resume_from=launch.out / "ckpt-00000003")
    assert min(run.losses) == 4
    finished = launch.run(init_from="resume")
    assert (finished.status, finished.losses, finished.events[-1]["kind"]) == (0, {}, "done")


def test_precision_may_change_on_resume(tmp_path: Path, tokens: Path) -> None:
    """bfloat16 -> float16 -> bfloat16 -> float32; the loss scale of float16 is kept while it is used."""
    launch = Launch(tmp_path, tokens)
    scales: list[dict[str, Any]] = []
    for steps, dtype in ((3, "bfloat16"), (6, "float16"), (9, "float16"), (12, "bfloat16"), (15, "float32")):
        run = launch.run(max_iters=steps, dtype=dtype, init_from="resume" if steps > 3 else "scratch")
        assert run.status == 0, run.stderr
        assert sorted(run.losses) == [steps - 2, steps - 1, steps]
        scales.append(checkpoint.load(launch.out / f"ckpt-{steps:08d}").meta["scaler"])
    assert [scale.get("_growth_tracker") for scale in scales] == [None, 3, 6, None, None]


def test_training_goes_on_when_there_is_no_compiler(tmp_path: Path, tokens: Path) -> None:
    run = Launch(tmp_path, tokens, max_iters=2).run(env={"PATH": str(tmp_path), "CXX": ""}, compile="true")
    assert run.status == 0, run.stderr
    assert_keeps_contract(run)
    (event,) = run.of("unavailable")
    assert event["knob"] == "compile"
    assert "no C++ compiler" in event["reason"]
    assert run.stdout.count("compile is not available") == 1
    assert run.of("start")[0]["settings"]["compile"] is False


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_checkpoint_is_the_same_with_and_without_compile(tmp_path: Path, tokens: Path) -> None:
    """Saved compiled, resumed eager; the compiled first step is a phase of its own."""
    launch = Launch(tmp_path, tokens, n_layer=1, gradient_accumulation_steps=1)
    first = launch.run(max_iters=3, compile="true", env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert first.status == 0, first.stderr
    assert [event["phase"] for event in first.of("phase")] == ["load", "compile", "train", "checkpoint"]
    names = checkpoint.load(launch.out / "ckpt-00000003").tensors
    assert not any("_orig_mod" in name for name in names)
    second = launch.run(max_iters=5, init_from="resume")
    assert second.status == 0, second.stderr
    eager = Launch(tmp_path / "eager", tokens, n_layer=1, gradient_accumulation_steps=1, max_iters=5).run()
    for step, loss in {**first.losses, **second.losses}.items():
        assert loss == pytest.approx(eager.losses[step], abs=1e-4)


def test_trainer_imports_nothing_of_the_supervisor() -> None:
    run = "import sys, runpy; runpy.run_module('gpusup.trainer.train')"
    code = f"{run}; print([name for name in sys.modules if 'supervisor' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=PACKAGE)
    assert done.stdout == "[]\n", done.stderr
