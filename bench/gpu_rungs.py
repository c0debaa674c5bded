"""What each lever does to memory and speed on this GPU, beside what the memory model predicts.

    python bench/gpu_rungs.py [--steps 12] [--repeat 2] [--budget-gib 7.5] [--device cuda]

The model is the one that ran out of memory on a 12 GB card: 12 layers, width 576, 1024 tokens, vocabulary 50304.
Every combination is a process of its own, in turn, `--repeat` times, so drift falls on all alike. The peak is what
PyTorch's allocator handed out while training (`max_memory_allocated`, and reserved); the time is the median step after
the third. `logits returned` is the model that also returns its logits, as nanoGPT's does. `--budget-gib` caps the
allocator, as a smaller card would; what does not fit says so.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HEADS, VOCABULARY = 12, 12, 50304


@dataclass(frozen=True)
class Case:
    """One combination of settings."""

    width: int
    context: int
    compiled: bool
    dtype: str
    micro_batch: int
    loss_chunks: int  # 1: whole, 0: chosen by the trainer
    returns_logits: bool

    def predicted_bytes(self) -> float:
        """Weights, gradients and moments in float32, 16-bit copies of the weights, activations, logits.

        36 bytes of activations a token, layer and unit of width: 34 as Korthikanti et al. (2022) count them without
        attention scores, less two dropout masks, plus float32 instead of 16-bit inputs to LayerNorm.
        """
        rows = self.micro_batch * self.context
        weights = VOCABULARY * self.width + self.context * self.width
        weights += LAYERS * (12 * self.width**2 + 2 * self.width) + self.width
        activations = rows * (LAYERS * (36 * self.width + 4 * HEADS) + 6 * self.width)
        per_logit = 0 if self.loss_chunks != 1 else 12 - 8 * self.compiled - 2 * (not self.returns_logits)
        return 18 * weights + activations + rows * VOCABULARY * per_logit


def cases(width: int) -> list[Case]:
    """compile x dtype x micro-batch x how the loss is computed; float16 only where it answers the question."""
    losses = [(1, True), (1, False), (0, False)]
    combinations = itertools.product((True, False), ("bfloat16", "float16"), (16, 12, 8), losses)
    return [
        Case(width, 1024, compiled, dtype, micro_batch, chunks, returned)
        for compiled, dtype, micro_batch, (chunks, returned) in combinations
        if dtype == "bfloat16" or micro_batch == 16
    ]


def run_case(case: Case, device_name: str, steps: int, budget_gib: float) -> dict[str, float]:
    """In a process of its own: train a few steps on random tokens; peaks in bytes, times in seconds."""
    sys.path.insert(0, str(ROOT))
    import torch
    from torch.nn import functional as F  # noqa: N812

    from trainer.distributed import World
    from trainer.forward import Forward, loss_scaler, open_device
    from trainer.model import GPT, Shape
    from trainer.optimizer import AdamW
    from trainer.report import Reporter
    from trainer.update import Update

    device = open_device(device_name)
    on_gpu = device.type == "cuda"
    if on_gpu and budget_gib:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gib * 2**30 / total_bytes), device)
    shape = Shape(
        n_layer=LAYERS, n_head=HEADS, n_embd=case.width, block_size=case.context, vocab_size=VOCABULARY, bias=False
    )
    model = GPT.new(shape, 0.0, device, seed=1, loss_chunks=case.loss_chunks)
    optimizer = AdamW(model.decay_groups(0.1), 6e-4, (0.9, 0.95))
    scaler = loss_scaler(device, case.dtype)
    update = Update(optimizer, scaler, 1.0, World(device=device))
    forward = Forward(model, device, case.dtype, case.compiled, Reporter(None))

    def logits_and_loss(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.logits(inputs)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    both = torch.compile(logits_and_loss, dynamic=False) if case.compiled else logits_and_loss
    tokens = torch.randint(VOCABULARY, (case.micro_batch, case.context + 1), device=device)
    times = []
    for _ in range(steps):
        begin_s = time.perf_counter()
        if case.returns_logits:
            with torch.autocast(device.type, dtype=getattr(torch, case.dtype)):
                kept, loss = both(tokens[:, :-1], tokens[:, 1:])  # noqa: RUF059  (until the next ones replace them)
        else:
            loss = forward((tokens[:, :-1], tokens[:, 1:]))
        scaler.scale(loss / tokens.numel()).backward()
        update.prepare()
        update.apply()
        loss.item()  # waits for the GPU
        times.append(time.perf_counter() - begin_s)
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "step_s": median(times[3:]),
        "first_s": times[0],
    }


def measure(case: Case, arguments: argparse.Namespace) -> str:
    """The right-hand columns of a row: figures, or that it did not fit."""
    request = json.dumps([asdict(case), arguments.device, arguments.steps, arguments.budget_gib])
    done = subprocess.run([sys.executable, __file__, "--child", request], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return "does not fit" if "out of memory" in done.stderr else f"failed: {reason[:90]}"
    told = json.loads(done.stdout.splitlines()[-1])
    allocated, reserved = told["allocated_bytes"] / 2**30, told["reserved_bytes"] / 2**30
    return f"{allocated:>9.2f} {reserved:>8.2f} {told['step_s'] * 1000:>8.1f} {told['first_s']:>8.1f}"


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--width", type=int, default=576, help="576 at 7.5 GiB and 768 at 10.5 GiB are the edges")
    parser.add_argument("--budget-gib", type=float, default=0.0, help="cap the allocator; 0 means the whole card")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, device, steps, budget_gib = json.loads(arguments.child)
        print(json.dumps(run_case(Case(**case), device, steps, budget_gib)))
        return
    print(
        f"{'compile':<8} {'dtype':<9} {'micro':>5} {'loss':<16} {'predicted':>9} {'allocated':>9} {'reserved':>8} "
        f"{'ms/step':>8} {'first s':>8}   (GiB)",
        flush=True,
    )
    for _ in range(arguments.repeat):
        for case in cases(arguments.width):
            loss = "logits returned" if case.returns_logits else ("whole" if case.loss_chunks == 1 else "chunked")
            print(
                f"{'on' if case.compiled else 'off':<8} {case.dtype:<9} {case.micro_batch:>5} {loss:<16} "
                f"{case.predicted_bytes() / 2**30:>9.2f} {measure(case, arguments)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
