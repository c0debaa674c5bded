"""Batch arithmetic: micro-batch x gradient accumulation steps = global batch, exactly or not at all."""


def divisors(n: int) -> list[int]:
    """The positive divisors of `n`, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def accumulation_for(global_batch_size: int, micro_batch_size: int) -> int:
    """Accumulation steps that hold the global batch.

    Raises:
        ValueError: when `micro_batch_size` does not divide `global_batch_size`.
    """
    steps, remainder = divmod(global_batch_size, micro_batch_size)
    if remainder:
        raise ValueError(f"micro-batch {micro_batch_size} does not divide the global batch {global_batch_size}")
    return steps


def exact_micro_batches(global_batch_size: int, accumulation_multiple: int = 1) -> list[int]:
    """Micro-batches that hold the global batch with an accumulation divisible by `accumulation_multiple`, ascending.

    nanoGPT divides its accumulation among its ranks and refuses one that does not divide.
    """
    return [
        m for m in divisors(global_batch_size) if accumulation_for(global_batch_size, m) % accumulation_multiple == 0
    ]
