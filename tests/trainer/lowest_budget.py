"""Training's smallest memory budget, and whether evaluation passes in it: `python lowest_budget.py CHECKPOINTING`.

Prints JSON: the budget in KiB over what the process has when it begins, and what it takes for evaluation. The kernel
refuses memory beyond the budget (RLIMIT_DATA), PyTorch's own allocator raises, and the budget is raised until it fits.
"""

import gc
import json
import resource
import sys
from collections.abc import Callable

import torch
from gpusup.trainer.model import GPT, Shape
from limited import allocated_kb

SHAPE = Shape(n_layer=3, n_head=2, n_embd=64, block_size=64, vocab_size=16384, bias=False)
ROWS = 12
RESOLUTION_KB = 256


def fits(budget_kb: int, work: Callable[[], object]) -> bool:
    """Whether `work` succeeds with no more than `budget_kb` beyond what is allocated now."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, ((allocated_kb() + budget_kb) * 1024, hard))
    try:
        work()
    except RuntimeError as error:
        assert "can't allocate memory" in str(error)  # noqa: PT017  (a script, run by a test)
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        gc.collect()
    return True


def lowest_kb(work: Callable[[], object]) -> int:
    """The smallest budget in which `work` fits, to RESOLUTION_KB, found by bisection."""
    work()  # whatever is allocated once and kept
    low_kb, high_kb = 0, 1024 * 1024
    while high_kb - low_kb > RESOLUTION_KB:
        middle_kb = (low_kb + high_kb) // 2
        low_kb, high_kb = (low_kb, middle_kb) if fits(middle_kb, work) else (middle_kb, high_kb)
    return high_kb


def main() -> None:
    model = GPT.new(SHAPE, 0.0, torch.device("cpu"), 1, activation_checkpointing=json.loads(sys.argv[1]))
    tokens = torch.randint(SHAPE.vocab_size, (ROWS, SHAPE.block_size + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def train() -> None:
        model.train()
        try:
            model(inputs, targets).backward()
        finally:
            model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        model(inputs, targets)

    print(json.dumps({"train_kb": lowest_kb(train), "evaluate_kb": lowest_kb(evaluate)}))


if __name__ == "__main__":
    main()
