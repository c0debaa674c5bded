"""Plans that depend on nothing but numbers: micro-batches, sequence-length stages, the learning rate."""

import math


def micro_batches(global_batch_size: int, batch_size: int) -> list[int]:
    """Rows of each micro-batch of one optimizer step; their sum is exactly the global batch, the last may be ragged."""
    full, rest = divmod(global_batch_size, batch_size)
    return [batch_size] * full + [rest] * (rest > 0)


def is_due(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps is done after `step`; 0 means never."""
    return interval > 0 and step % interval == 0


def stages(start: int, block_size: int) -> list[int]:
    """Block sizes of a warm-up by doublings; `start` 0 means none. ValueError when doublings miss `block_size`."""
    if start == 0:
        return [block_size]
    sizes = [start]
    while sizes[-1] < block_size:
        sizes.append(2 * sizes[-1])
    if sizes[-1] != block_size:
        raise ValueError(f"doubling block_size_start={start} never gives block_size={block_size}")
    return sizes


def block_size_at(step: int, sizes: list[int], warmup_iters: int) -> int:
    """Block size of the optimizer step after `step` others; stages before the last share the warm-up equally."""
    if step >= warmup_iters:
        return sizes[-1]
    return sizes[step * (len(sizes) - 1) // warmup_iters]


def learning_rate_at(step: int, peak: float, floor: float, warmup_iters: int, decay_iters: int) -> float:
    """Learning rate after `step` completed steps: a linear warm-up, then half a cosine from `peak` down to `floor`."""
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return floor
    done = (step - warmup_iters) / (decay_iters - warmup_iters)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
