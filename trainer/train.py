"""Pretrain a GPT-2, on one device or, under torchrun, on several.

    python trainer/train.py [config/FILE.py] [--key=value ...]
    python -m gpusup.trainer.train [config/FILE.py] [--key=value ...]
    torchrun --nproc_per_node=2 trainer/train.py [config/FILE.py] [--key=value ...]

An interrupted run, resumed with --init_from=resume, continues bit for bit; resumed with another micro-batch, or on
another number of devices, it keeps the global batch, the order of the samples and the learning rate. SIGTERM saves and
stops. Exit status: 0 done, 1 an exception (with its traceback), 2 something in the settings or the data to put right,
75 out of memory, with everything up to the last completed step saved.
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

if not __package__:  # run by path: what must be importable is this package, not the modules inside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "trainer"

import torch
from torch import Tensor

from . import checkpoint, distributed, flops, options, rng, schedule, snapshot
from .allocator import keep_freed_memory, use_expandable_segments
from .clock import StepClock, duration
from .data import Tokens
from .errors import TrainerError
from .forward import DTYPES, Forward, loss_scaler, missing_for_compile, open_device, spare_dynamo
from .hook import EXIT_OOM_SAVED, StopRequest, is_out_of_memory
from .model import GPT, Shape
from .optimizer import AdamW
from .report import Reporter
from .rng import RngState
from .update import Update

# ---- settings: constants only, so that they can be read without running this file
# files
out_dir = "out"  # where checkpoints go
data_dir = "data/prose"  # holds the tokens made by prepare.py
init_from = "scratch"  # scratch, resume, or a checkpoint of nanoGPT (ckpt.pt) or Hugging Face's GPT-2 (its folder)
resume_from = ""  # with init_from=resume: the checkpoint to load; empty means the newest in out_dir
# how often, in optimizer steps
eval_interval = 250  # evaluate; 0 means never
eval_iters = 4  # size of the validation set, in global batches
log_interval = 1  # print the loss
checkpoint_interval = 0  # save; 0 means at every evaluation; the last step always saves
keep_latest_k = 2  # checkpoints kept, at least two
async_checkpoint = True  # write them while training goes on
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
# memory
loss_chunks = 0  # pieces a micro-batch's logits are computed in, never all at once; 1: whole; 0: as fits the device
activation_checkpointing = False  # compute a block's activations again in the backward pass instead of keeping them
activation_memory_budget = 1.0  # share of the activations compiled code may keep; below 1 it computes more again
expandable_segments = True  # CUDA: an allocator that fragments less, where the platform is known to bear it
# machine
seed = 1337  # of the initial weights, the order of the samples, and dropout
device = "cuda"  # cpu, cuda, cuda:1
dtype = "bfloat16"  # of matrix products: float32, bfloat16 or float16
compile = True  # torch.compile: faster, after a pause at the first step of each shape  # noqa: A001
threads = 0  # CPU threads; 0 means PyTorch's own choice
peak_tflops = 0.0  # the device's peak, for MFU; 0 means from the table of cards
# ---- end of settings

KNOBS = options.declared(Path(__file__).read_text(encoding="utf-8"))

AT_LEAST = {
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head", "n_embd"), 1),
    **dict.fromkeys(("max_iters", "log_interval", "eval_iters", "vocab_size"), 1),
    **dict.fromkeys(("eval_interval", "checkpoint_interval", "global_batch_size", "block_size_start"), 0),
    **dict.fromkeys(("block_size_warmup_iters", "warmup_iters", "lr_decay_iters", "threads", "seed"), 0),
    **dict.fromkeys(("dropout", "learning_rate", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip"), 0),
    **dict.fromkeys(("loss_chunks", "activation_memory_budget", "peak_tflops"), 0),
    "keep_latest_k": 2,  # the newest may be the damaged one
}
AT_MOST = {"activation_memory_budget": 1}
BELOW_ONE = ("dropout", "beta1", "beta2")
CHOICES = {"dtype": tuple(DTYPES)}
MAX_NOT_FINITE = 20  # updates skipped in a row; float16 may need a dozen until its scale fits


def configure(arguments: list[str]) -> None:
    """Set the module's settings from the command line. Raises TrainerError when they make no sense together."""
    values = options.parse(arguments, KNOBS)
    options.check_ranges(values, AT_LEAST, AT_MOST, BELOW_ONE, CHOICES)
    globals().update(values)
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
    best_val_loss: float | None = None


class Trainer:
    """One run, from its first or resumed step to the last."""

    def __init__(self, report: Reporter) -> None:
        """Open the device and the data, build the model: the phase `load`."""
        self.report = report
        self.sizes = schedule.stages(block_size_start, block_size)
        self.global_rows = global_batch_size or batch_size * gradient_accumulation_steps
        self.out = Path(out_dir)
        report.enter("load", self.sizes[0])

        # ---- device, processes
        if threads:
            torch.set_num_threads(threads)
        if expandable_segments:
            use_expandable_segments()
        self.device = open_device(distributed.own_device(device))
        self.world = distributed.join(self.device)
        self.first, rows = self.world.share(self.global_rows)
        self.micro_rows = schedule.micro_batches(rows, batch_size)
        self.peak: float | None = None  # FLOP/s
        if self.device.type == "cuda":
            report.measure_cuda()
            self.peak = flops.peak(torch.cuda.get_device_name(self.device), dtype)
        missing = missing_for_compile(self.device) if compile else None
        if missing:
            self.say(f"compile is not available: {missing}; training goes on without it")
            report.emit("unavailable", knob="compile", reason=missing)
        self.compiled = compile and not missing
        if self.device.type == "cpu":
            keep_freed_memory()
        if activation_memory_budget < 1 and not self.compiled:
            self.say("activation_memory_budget is the compiler's, and nothing is compiled: it has no effect")
        if self.compiled:  # what is compiled stays with the run, so that the same again is quick, after a reboot too
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((self.out / "compile_cache").absolute()))

        # ---- data
        self.train_tokens = Tokens.open(Path(data_dir), "train", block_size, vocab_size)
        self.val_tokens = Tokens.open(Path(data_dir), "val", block_size, vocab_size) if eval_interval else None

        # ---- model, optimizer
        rng.seed(seed)
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
        self.world.agree(parameter.detach() for parameter in self.model.parameters())
        self.optimizer = AdamW(self.model.decay_groups(weight_decay), learning_rate, (beta1, beta2))
        self.scaler = loss_scaler(self.device, dtype)
        self.update = Update(self.optimizer, self.scaler, grad_clip, self.world)
        self.forward = Forward(self.model, self.device, dtype, self.compiled, report, activation_memory_budget)
        self.checkpointer = checkpoint.Checkpointer(self.out, keep_latest_k, async_checkpoint)
        self.progress = Progress()
        self.rng = RngState(self.device)
        self.applied = self.update.applied()  # updates, before the step under way
        self.skipped = 0.0  # updates, as last told
        self.saved_step = -1  # of the newest checkpoint, perhaps still being written

    def begin(self) -> None:
        """Resume, if this run does, and announce it."""
        stored = checkpoint.stored(self.out)
        if init_from == "resume":
            self.report.enter("resume", self.sizes[0])
            self.resume()
        elif stored:
            raise TrainerError(
                f"{self.out} already holds {stored[-1][1].name}; go on with --init_from=resume, or use another out_dir"
            )
        elif init_from != "scratch":
            self.report.enter("resume", self.sizes[0])
            foreign = snapshot.start_from(Path(init_from), self.model, self.optimizer)
            self.progress = Progress(foreign.step, foreign.step * self.global_rows)
            for line in (*foreign.notes, f"started from {init_from} at step {foreign.step}"):
                self.say(line)
        if init_from != "resume" and self.world.size > 1:
            torch.manual_seed(seed + 1 + self.world.rank)  # dropout differs between processes, the weights do not
        self.rng = RngState(self.device)
        self.out.mkdir(parents=True, exist_ok=True)
        self.report.step = self.progress.step
        self.report.start(max_iters, self.settings(), self.global_rows)
        how = f"{dtype}, compiled" if self.compiled else dtype
        of = f", of {self.world.size} processes" if self.world.size > 1 else ""
        self.say(
            f"{self.model.parameter_count() / 1e6:.2f} M parameters on {self.device}, {how}; "
            f"global batch {self.global_rows} samples, micro-batch {max(self.micro_rows, default=0)}{of}"
        )

    def settings(self) -> dict[str, object]:
        """Every setting as it is really in effect."""
        return {
            **{name: globals()[name] for name in KNOBS},
            "batch_size": max(self.micro_rows, default=0),
            "gradient_accumulation_steps": len(self.micro_rows) * self.world.size,
            "global_batch_size": self.global_rows,
            "compile": self.compiled,
            "threads": torch.get_num_threads(),
        }

    def run(self, stop: StopRequest) -> None:
        """Take the optimizer steps that remain, or those until `stop` is asked for."""
        progress, report = self.progress, self.report
        context = 0  # block size of the step under way
        clock = StepClock()
        while progress.step < max_iters and not self.world.any(stop.asked):
            # ---- how long the samples are now
            previous, context = context, schedule.block_size_at(progress.step, self.sizes, block_size_warmup_iters)
            if context != previous:
                self.forward.begin_stage()
                clock = StepClock()

            # ---- one optimizer step
            compiling = any(self.forward.must_compile(rows, context) for rows in self.micro_rows)
            report.enter("compile" if compiling else "train", context)
            clock.start()
            loss_sum = self.optimizer_step(context)
            progress.step += 1
            progress.sample += self.global_rows
            self.rng = RngState(self.device)
            report.stepped()

            # ---- print
            if progress.step % log_interval == 0:
                self.log(loss_sum, context, clock.lap)
            else:
                clock.stop()
            self.collect_saved(self.checkpointer.poll)

            # ---- evaluate, save
            last = progress.step == max_iters
            evaluated = schedule.is_due(eval_interval, progress.step) or (last and eval_interval > 0)
            if evaluated:
                self.evaluate(context, stop)
            if last or (schedule.is_due(checkpoint_interval, progress.step) if checkpoint_interval else evaluated):
                self.save(context)

        # ---- how it ended
        if progress.step < max_iters and self.world.any(self.saved_step != progress.step):
            self.save(context or self.sizes[0])
        self.tell_saved(self.checkpointer.wait())
        report.leave()
        self.report.emit("done" if progress.step >= max_iters else "stopped")
        self.world.leave()
        if progress.step < max_iters:
            self.say(f"stopped at step {progress.step}: go on with --init_from=resume")
            stop.obey()

    def optimizer_step(self, context: int) -> Tensor:
        """One update of the weights from the next global batch; this process's sum of its token losses, float64."""
        self.applied = self.update.applied()
        lr = schedule.learning_rate_at(
            self.progress.step, learning_rate, min_lr, warmup_iters, lr_decay_iters or max_iters
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr if decay_lr else learning_rate
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens = self.global_rows * context  # of the whole global batch, so that every token weighs the same
        first = self.progress.sample + self.first
        for rows in self.micro_rows:
            batch = self.train_tokens.training(seed, first, rows, context)
            with self.forward.first_call(rows, context):
                self.report.part = "forward"
                loss_sum = self.forward(batch)
                self.report.part = "backward"
                self.scaler.scale(loss_sum / tokens).backward()  # type: ignore[no-untyped-call]
            total += loss_sum.detach()
            first += rows
        self.report.part = "clip"
        self.update.prepare()
        self.report.part = "optimizer"
        self.checkpointer.before_update()
        self.update.apply()
        self.report.part = ""
        return total

    def log(self, loss_sum: Tensor, context: int, lap: Callable[[], float]) -> None:
        """Print and report one line: the exact mean over the global batch, and the mean time of a step since the last.

        Raises FloatingPointError when no gradient has been finite for long.
        """
        self.world.sum([loss_sum])
        numbers = torch.stack([loss_sum, self.update.grad_norm, self.update.skipped, self.update.in_a_row])
        loss_total, grad_norm, skipped, in_a_row = numbers.tolist()  # waits for the GPU, so that the time is right
        dt_s = lap()
        tokens = self.global_rows * context
        loss = loss_total / tokens
        speed = f"{dt_s * 1000:.0f} ms, {tokens / dt_s:,.0f} tok/s"
        if (utilisation := self.utilisation(tokens / dt_s, context)) is not None:
            speed += f", MFU {utilisation:.1%}"
        eta = duration((max_iters - self.progress.step) * dt_s)
        self.say(
            f"step {self.progress.step}/{max_iters}: loss {loss:.4f}, {speed}, norm {grad_norm:.2f}, ETA {eta}, "
            f"block {context}"
        )
        memory = self.report.step_fields()
        self.report.emit("step", loss=loss, dt_s=dt_s, tokens=tokens, block_size=context, grad_norm=grad_norm, **memory)
        if skipped > self.skipped:
            self.say(f"step {self.progress.step}: the gradient is not finite; {skipped:.0f} updates skipped so far")
            self.report.emit("skipped", count=int(skipped), reason="the gradient is not finite")
            self.skipped = skipped
        if in_a_row >= MAX_NOT_FINITE:
            raise FloatingPointError(
                f"the gradients of {in_a_row:.0f} steps in a row were not finite, so nothing is learned any more; "
                f"resume from an earlier checkpoint with a lower learning_rate, or with dtype=float32 or bfloat16"
            )

    def utilisation(self, tokens_per_s: float, context: int) -> float | None:
        """Share of the device's peak that the model's own FLOPs take (MFU); None where the peak is not known."""
        peak = peak_tflops * 1e12 or self.peak
        if not peak:
            return None
        return (
            tokens_per_s * flops.per_token(self.model.parameter_count(), self.shape, context) / peak / self.world.size
        )

    @torch.no_grad()
    def evaluate(self, context: int, stop: StopRequest) -> None:
        """Print and report the mean loss over the fixed validation samples; given up when a stop is asked for."""
        assert self.val_tokens is not None
        self.report.enter("eval", context)
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        samples = eval_iters * self.global_rows  # not a multiple of the micro-batch: the same whatever that is
        first, mine = self.world.share(samples)
        for rows in schedule.micro_batches(mine, batch_size):
            with self.forward.first_call(rows, context):
                total += self.forward(self.val_tokens.validation(samples, first, rows, context))
            first += rows
            if stop.asked:
                break
        self.model.train()
        if self.world.any(stop.asked):
            return
        self.world.sum([total])
        val_loss = total.item() / (samples * context)
        self.progress.best_val_loss = min(self.progress.best_val_loss or val_loss, val_loss)
        self.say(f"step {self.progress.step}: val loss {val_loss:.4f}")
        self.report.emit("eval", val_loss=val_loss)

    def save(self, context: int) -> None:
        """Begin a checkpoint from which a run with the same settings continues bit for bit."""
        self.report.enter("checkpoint", context)
        generators = self.world.gather(self.rng.to_json())
        if not self.world.first:
            self.saved_step = self.progress.step
            return
        self.report.emit("checkpoint_begun")
        meta = {
            "sample": self.progress.sample,
            "best_val_loss": self.progress.best_val_loss,
            "shape": asdict(self.shape),
            "tokenizer": self.train_tokens.vocabulary,
            "data": self.train_tokens.fingerprint,
            "scaler": self.scaler.state_dict(),
            "rng": generators,
            "config": self.settings(),
            "versions": snapshot.versions(),
        }
        self.collect_saved(self.checkpointer.wait)
        self.checkpointer.save(self.progress.step, snapshot.tensors(self.model, self.optimizer), meta)
        self.saved_step = self.progress.step

    def tell_saved(self, saved: list[checkpoint.Saved]) -> None:
        """Print and report the checkpoints that have become durable."""
        for one in saved:
            self.say(f"saved {one.path} ({one.bytes / 1e6:.1f} MB)")
            self.report.emit("checkpoint", step=one.step, path=str(one.path), bytes=one.bytes)

    def collect_saved(self, collect: Callable[[], list[checkpoint.Saved]]) -> None:
        """As `tell_saved`; a checkpoint that could not be written costs only itself, and training goes on."""
        try:
            self.tell_saved(collect())
        except checkpoint.SaveFailed as error:
            self.say(f"not saved: {error}")
            self.report.emit("checkpoint_failed", step=self.saved_step, message=str(error))
            self.saved_step = -1

    def resume(self) -> None:
        """Take everything from the checkpoint; hyperparameters are this run's own."""
        path = Path(resume_from) if resume_from else None
        loaded = checkpoint.load(path) if path else checkpoint.load_newest(self.out)
        now = {"seed": seed, "global_batch_size": self.global_rows}
        notes = snapshot.check_resumable(loaded, self.shape, self.train_tokens, now)
        snapshot.restore(loaded, self.model, self.optimizer, self.scaler, self.device, self.world)
        self.progress = Progress(loaded.step, loaded.meta["sample"], loaded.meta["best_val_loss"])
        self.saved_step = loaded.step
        for line in (*notes, f"resumed {loaded.path} at step {loaded.step}"):
            self.say(line)

    def can_rescue(self) -> bool:
        """Whether a step was completed, and memory still holds the state as it was then."""
        whole = self.report.part != "optimizer" or self.update.untouched_since(self.applied)
        return whole and self.progress.step > 0

    def rescue(self) -> NoReturn:
        """After running out of memory: save the state as of the last completed step, and leave with status 75.

        To be called where nothing refers to the failed step any more, so that its memory is free.
        """
        self.forward.begin_stage()
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.saved_step != self.progress.step:
            self.save(block_size)
        self.tell_saved(self.checkpointer.wait())
        self.report.leave()
        self.say(
            f"out of memory in step {self.progress.step + 1}; step {self.progress.step} is saved: "
            f"go on with --init_from=resume and settings that need less, such as a smaller batch_size"
        )
        raise SystemExit(EXIT_OOM_SAVED)

    def say(self, line: str) -> None:
        """Print at once, whoever is reading, and once for all processes."""
        if self.world.first:
            print(line, flush=True)


def main(arguments: list[str]) -> None:
    """Configure, train, and report how it ended."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\nSettings and their defaults:\n\n{options.describe(KNOBS)}")
        return
    report = Reporter.from_environment()
    stop = StopRequest()
    trainer: Trainer | None = None
    try:
        configure(arguments)
        trainer = Trainer(report)
        trainer.begin()
        trainer.run(stop)
        return
    except TrainerError as error:
        report.failed(error)
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        report.failed(error)
        if trainer is None:
            raise
        alone = trainer.world.size == 1
        if not (alone and is_out_of_memory(error) and trainer.can_rescue()):
            trainer.collect_saved(trainer.checkpointer.wait)
            if alone:
                raise
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # at once: a process that said goodbye would wait for those that wait for it
        traceback.print_exc()
    trainer.rescue()  # out of the handler, for the exception holds the failed step and all its memory


if __name__ == "__main__":
    main(sys.argv[1:])
