"""Pretrain a GPT-2 on one device.

    python trainer/train.py [config/FILE.py] [--key=value ...]
    python -m gpusup.trainer.train [config/FILE.py] [--key=value ...]

An interrupted run, resumed with --init_from=resume, continues bit for bit; resumed with another micro-batch it keeps
the global batch, the order of the samples and the learning rate. SIGTERM saves and stops. Exit status: 0 done, 1 an
exception (with its traceback), 2 something in the settings or the data to put right.
"""

import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

if not __package__:  # run by path: what must be importable is this package, not the modules inside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "trainer"

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, options, schedule
from .allocator import use_expandable_segments
from .data import Tokens
from .errors import TrainerError
from .forward import DTYPES, Forward, loss_scaler, missing_for_compile, open_device, spare_dynamo
from .model import GPT, Shape
from .optimizer import AdamW
from .report import Reporter
from .stop import StopRequest

# ---- settings: constants only, so that they can be read without running this file
# files
out_dir = "out"  # where checkpoints go
data_dir = "data/prose"  # holds train.bin and val.bin, made by prepare.py
init_from = "scratch"  # scratch, or resume
resume_from = ""  # with init_from=resume: the checkpoint to load; empty means the newest in out_dir
# how often, in optimizer steps
eval_interval = 250  # evaluate; 0 means never
eval_iters = 4  # size of the validation set, in global batches
log_interval = 1  # print the loss
checkpoint_interval = 0  # save; 0 means at every evaluation; the last step always saves
# batch
batch_size = 12  # samples in a micro-batch: what memory depends on
gradient_accumulation_steps = 4  # micro-batches in an optimizer step, unless global_batch_size is given
global_batch_size = 0  # samples in an optimizer step, the last micro-batch may be ragged; 0: the product of the two
block_size = 256  # context, in tokens
block_size_start = 0  # context at the beginning, then doubled up to block_size; 0 means block_size throughout
block_size_warmup_iters = 0  # steps before block_size is reached, shared equally by the shorter contexts
# model
n_layer = 6  # blocks
n_head = 6  # attention heads; must divide n_embd
n_embd = 384  # width
vocab_size = 50304  # GPT-2's 50257 tokens, rounded up to a multiple of 64
dropout = 0.0  # probability
bias = False  # in Linear and LayerNorm
# optimizer
max_iters = 1000  # optimizer steps in all
learning_rate = 6e-4  # its peak
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9  # AdamW: decay of the first moment
beta2 = 0.95  # AdamW: decay of the second moment
grad_clip = 1.0  # largest norm of the gradient; 0 means no limit
decay_lr = True  # warm-up and cosine decay; otherwise learning_rate throughout
warmup_iters = 100  # steps of linear warm-up
lr_decay_iters = 0  # step at which min_lr is reached; 0 means max_iters
min_lr = 6e-5  # learning rate at the end
# machine
seed = 1337  # of the initial weights, the order of the samples, and dropout
device = "cuda"  # cpu, cuda, cuda:1
dtype = "bfloat16"  # of matrix products: float32, bfloat16 or float16
compile = True  # torch.compile: faster, after a pause at the first step of each shape  # noqa: A001
loss_chunks = 0  # parts in which a micro-batch's logits are made; 1: all at once, the plain loss; 0 means automatic
activation_checkpointing = False  # keep a block's input only, compute the rest again in backward: slower, leaner
activation_memory_budget = 1.0  # compiled: fraction of the activations kept for backward, the rest is computed again
expandable_segments = True  # CUDA: let the allocator's segments grow, on systems known to bear it
threads = 0  # CPU threads; 0 means PyTorch's own choice
# ---- end of settings

KNOBS = options.declared(Path(__file__).read_text(encoding="utf-8"))

AT_LEAST = {
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head", "n_embd"), 1),
    **dict.fromkeys(("max_iters", "log_interval", "eval_iters", "vocab_size"), 1),
    **dict.fromkeys(("eval_interval", "checkpoint_interval", "global_batch_size", "block_size_start"), 0),
    **dict.fromkeys(("block_size_warmup_iters", "warmup_iters", "lr_decay_iters", "threads", "seed"), 0),
    **dict.fromkeys(("dropout", "learning_rate", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip"), 0),
    **dict.fromkeys(("loss_chunks", "activation_memory_budget"), 0),
}
BELOW_ONE = ("dropout", "beta1", "beta2")
CHOICES = {"init_from": ("scratch", "resume"), "dtype": tuple(DTYPES)}


def configure(arguments: list[str]) -> None:
    """Set the module's settings from the command line. Raises TrainerError when they make no sense together."""
    values = options.parse(arguments, KNOBS)
    options.check_ranges(values, AT_LEAST, CHOICES)
    globals().update(values)
    if activation_memory_budget > 1:
        raise TrainerError(f"activation_memory_budget={activation_memory_budget} is a fraction: at most 1")
    for name in BELOW_ONE:
        if cast(float, values[name]) >= 1:
            raise TrainerError(f"{name}={values[name]} must be below 1")
    if n_embd % n_head:
        raise TrainerError(f"n_embd={n_embd} cannot be split into n_head={n_head} equal heads; change one of them")
    if resume_from and init_from != "resume":
        raise TrainerError(f"resume_from={resume_from} needs --init_from=resume")
    try:
        sizes = schedule.stages(block_size_start, block_size)
    except ValueError as error:
        raise TrainerError(f"{error}; use block_size divided by 2, 4, 8, ...") from None
    if len(sizes) > 1 and block_size_warmup_iters < len(sizes) - 1:
        raise TrainerError(f"block_size_warmup_iters={block_size_warmup_iters} is too few for the stages {sizes[:-1]}")


@dataclass
class Progress:
    """How far the run has come."""

    step: int = 0  # optimizer steps completed
    sample: int = 0  # samples consumed: the number of the next one
    best_val_loss: float = float("inf")
    saved_step: int = -1  # of the newest checkpoint


class Trainer:
    """One run, from its first or resumed step to the last."""

    def __init__(self, report: Reporter) -> None:
        """Open the device and the data, build the model: the phase `load`."""
        self.report = report
        self.sizes = schedule.stages(block_size_start, block_size)
        self.global_rows = global_batch_size or batch_size * gradient_accumulation_steps
        self.micro_rows = schedule.micro_batches(self.global_rows, batch_size)
        report.enter("load", self.sizes[0])

        if threads:
            torch.set_num_threads(threads)
        if expandable_segments:
            use_expandable_segments()
        self.device = open_device(device)
        if self.device.type == "cuda":
            report.measure_cuda()
        missing = missing_for_compile(self.device) if compile else None
        if missing:
            say(f"compile is not available: {missing}; training goes on without it")
            report.emit("unavailable", knob="compile", reason=missing)
        self.compiled = compile and not missing
        if activation_memory_budget < 1 and not self.compiled:
            say("activation_memory_budget is the compiler's, and nothing is compiled: it has no effect")

        self.train_tokens = Tokens(Path(data_dir, "train.bin"), block_size, vocab_size)
        self.val_tokens = Tokens(Path(data_dir, "val.bin"), block_size, vocab_size) if eval_interval else None
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self.shape = Shape(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size, bias=bias
        )
        if not self.compiled:
            spare_dynamo()
        self.model = GPT.new(
            self.shape,
            dropout,
            self.device,
            seed,
            loss_chunks=loss_chunks,
            activation_checkpointing=activation_checkpointing,
        )
        self.optimizer = AdamW(self.model.decay_groups(weight_decay), learning_rate, (beta1, beta2))
        self.scaler = loss_scaler(self.device, dtype)
        self.forward = Forward(self.model, self.device, dtype, self.compiled, report, activation_memory_budget)
        self.progress = Progress()
        self.out = Path(out_dir)

    def begin(self) -> None:
        """Resume, if this run does, and announce it."""
        if init_from == "resume":
            self.report.enter("resume", self.sizes[0])
            self.resume()
        elif files := checkpoint.stored(self.out):
            raise TrainerError(
                f"{self.out} already holds {files[-1][1].name}; go on with --init_from=resume, or use another out_dir"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        self.report.step = self.progress.step
        self.report.emit(
            "start",
            target_steps=max_iters,
            pid=os.getpid(),
            can_save=True,
            settings=self.settings(),
            global_batch_size=self.global_rows,
        )
        how = f"{dtype}, compiled" if self.compiled else dtype
        say(
            f"{self.model.parameter_count() / 1e6:.1f} M parameters on {self.device}, {how}; "
            f"global batch {self.global_rows} samples, micro-batch {max(self.micro_rows)}"
        )

    def settings(self) -> dict[str, object]:
        """Every setting as it is really in effect."""
        return {
            **{name: globals()[name] for name in KNOBS},
            "batch_size": max(self.micro_rows),
            "gradient_accumulation_steps": len(self.micro_rows),
            "global_batch_size": self.global_rows,
            "compile": self.compiled,
            "threads": torch.get_num_threads(),
        }

    def run(self, stop: StopRequest) -> None:
        """Take the optimizer steps that remain, or those until `stop` is asked for."""
        progress, report = self.progress, self.report
        context = 0  # block size of the step under way
        unlogged, unlogged_s = 0, 0.0  # steps since the last printed line, and the time they took
        while progress.step < max_iters and not stop.asked:
            # ---- how long the samples are now
            previous, context = context, schedule.block_size_at(progress.step, self.sizes, block_size_warmup_iters)
            if context != previous:
                self.forward.begin_stage()
                unlogged, unlogged_s = 0, 0.0

            # ---- one optimizer step
            compiling = any(self.forward.must_compile(rows, context) for rows in self.micro_rows)
            report.enter("compile" if compiling else "train", context)
            begin_s = time.perf_counter()
            loss_sum = self.optimizer_step(context)
            progress.step += 1
            progress.sample += self.global_rows
            report.stepped()

            # ---- print
            tokens = self.global_rows * context
            printed = progress.step % log_interval == 0
            loss = loss_sum.item() / tokens if printed else 0.0  # .item() waits for the GPU, so the time is right
            unlogged, unlogged_s = unlogged + 1, unlogged_s + time.perf_counter() - begin_s
            if printed:
                self.log(loss, unlogged_s / unlogged, tokens, context)
                unlogged, unlogged_s = 0, 0.0

            # ---- evaluate, save
            last = progress.step == max_iters
            evaluated = is_due(eval_interval, progress.step) or (last and eval_interval > 0)
            if evaluated:
                self.evaluate(context, stop)
            if last or (is_due(checkpoint_interval, progress.step) if checkpoint_interval else evaluated):
                self.save(context)

        # ---- how it ended
        if progress.step < max_iters and progress.saved_step != progress.step:
            self.save(context or self.sizes[0])
        report.leave()
        report.emit("done" if progress.step >= max_iters else "stopped")
        if progress.step < max_iters:
            say(f"stopped at step {progress.step}: go on with --init_from=resume")
            stop.obey()

    def optimizer_step(self, context: int) -> Tensor:
        """One update of the weights from the next global batch; the sum of its token losses, float64."""
        lr = schedule.learning_rate_at(
            self.progress.step, learning_rate, min_lr, warmup_iters, lr_decay_iters or max_iters
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr if decay_lr else learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens = self.global_rows * context  # of the whole global batch, so that every token weighs the same
        first = self.progress.sample
        for rows in self.micro_rows:
            batch = self.train_tokens.training(seed, first, rows, context)
            with self.forward.first_call(rows, context):
                self.report.part = "forward"
                loss_sum = self.forward(batch)
                self.report.part = "backward"
                self.scaler.scale(loss_sum / tokens).backward()  # type: ignore[no-untyped-call]
            total += loss_sum.detach()
            first += rows
        self.report.part = "optimizer"
        self.update()
        self.report.part = ""
        return total

    def update(self) -> None:
        """Apply the gradients, or, where float16 overflowed, skip this update."""
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        if grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            say(f"step {self.progress.step + 1}: a gradient overflowed float16, this update is skipped")

    def log(self, loss: float, dt_s: float, tokens: int, context: int) -> None:
        """Print and report one line: the exact mean over the global batch, and the mean time of a step."""
        say(
            f"step {self.progress.step}/{max_iters}: loss {loss:.4f}, {dt_s * 1000:.0f} ms, "
            f"{tokens / dt_s:,.0f} tok/s, block {context}"
        )
        self.report.emit("step", loss=loss, dt_s=dt_s, tokens=tokens, block_size=context)

    @torch.no_grad()
    def evaluate(self, context: int, stop: StopRequest) -> None:
        """Print and report the mean loss over the fixed validation samples; given up when a stop is asked for."""
        assert self.val_tokens is not None
        self.report.enter("eval", context)
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        samples = eval_iters * self.global_rows  # not a multiple of the micro-batch: the same whatever that is
        for first in range(0, samples, batch_size):
            rows = min(batch_size, samples - first)
            with self.forward.first_call(rows, context):
                total += self.forward(self.val_tokens.validation(samples, first, rows, context))
            if stop.asked:
                break
        else:
            val_loss = total.item() / (samples * context)
            self.progress.best_val_loss = min(self.progress.best_val_loss, val_loss)
            say(f"step {self.progress.step}: val loss {val_loss:.4f}")
            self.report.emit("eval", val_loss=val_loss)
        self.model.train()

    def save(self, context: int) -> None:
        """Write a checkpoint from which a run with the same settings continues bit for bit."""
        self.report.enter("checkpoint", context)
        content = {
            "sample": self.progress.sample,
            "best_val_loss": self.progress.best_val_loss,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(self.device),
            "shape": asdict(self.shape),
            "train_tokens": len(self.train_tokens),
            "config": self.settings(),
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__, "python": sys.version.split()[0]},
        }
        path, size_bytes = checkpoint.save(self.out, self.progress.step, content)
        self.progress.saved_step = self.progress.step
        say(f"saved {path} ({size_bytes / 1e6:.1f} MB)")
        self.report.emit("checkpoint", path=str(path), bytes=size_bytes)

    def resume(self) -> None:
        """Take everything from the checkpoint; hyperparameters are this run's own."""
        path = Path(resume_from)
        if resume_from:
            saved = checkpoint.load(path)
        else:
            path, saved = checkpoint.load_newest(self.out)
        self.check_resumable(path, saved)
        self.model.load_state_dict(saved["model"])
        own = self.optimizer.state_dict()["state"]
        for index, values in saved["optimizer"].items():
            for name, value in values.items():
                own[index][name].copy_(value)  # in place: resuming needs no more memory than starting
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        checkpoint.restore_rng(saved["rng"], self.device)
        step = saved["step"]
        self.progress = Progress(step, saved["sample"], saved["best_val_loss"], saved_step=step)
        say(f"resumed {path} at step {step}")

    def check_resumable(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Raise TrainerError when the weights do not fit; say so when the run will not continue as it would have."""
        for name, value in asdict(self.shape).items():
            if saved["shape"][name] != value:
                raise TrainerError(
                    f"{path} has {name}={saved['shape'][name]}, this run {name}={value}; "
                    f"use the same, or start from scratch in another out_dir"
                )
        now = {"seed": seed, "global_batch_size": self.global_rows, "train_tokens": len(self.train_tokens)}
        for name, value in now.items():
            before = saved["train_tokens"] if name == "train_tokens" else saved["config"][name]
            if before != value:
                say(f"note: {name} was {before} and is now {value}: this run does not continue {path} exactly")


def is_due(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps is done after `step`; 0 means never."""
    return interval > 0 and step % interval == 0


def say(line: str) -> None:
    """Print at once, whoever is reading."""
    print(line, flush=True)


def main(arguments: list[str]) -> None:
    """Configure, train, and report how it ended."""
    if "--help" in arguments or "-h" in arguments:
        say(f"{__doc__}\nSettings and their defaults:\n\n{options.describe(KNOBS)}")
        return
    report = Reporter.from_environment()
    stop = StopRequest()
    try:
        configure(arguments)
        trainer = Trainer(report)
        trainer.begin()
        trainer.run(stop)
    except TrainerError as error:
        report.failed(error)
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        report.failed(error)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
