"""What is worth doing about each cause, in words, and the class of remedy that a policy has for it."""

from typing import Literal, NamedTuple

from .verdict import Cause, Diagnosis, DiagnosisKind

RemedyClass = Literal[
    "shrink", "defragment", "evaluate_less", "wait", "retry", "host", "shared_memory", "disk", "stop", "none"
]


class Remedy(NamedTuple):
    remedy: RemedyClass
    advice: tuple[str, ...]


_K, _C = DiagnosisKind, Cause

_SHRINK = (
    "a smaller micro-batch with more gradient accumulation: the same global batch",
    "the loss in chunks, or without returning logits; activation checkpointing",
)

_LEAK = (
    "what is in use grows step by step: a smaller batch only delays it; the same settings again, from a checkpoint",
    "often a loss or a metric that is kept with its graph: use .item() or .detach()",
)

_REMEDIES: dict[tuple[DiagnosisKind, Cause], Remedy] = {
    (_K.DEVICE_OOM, _C.OWN_GROWTH): Remedy("shrink", _SHRINK),
    (_K.DEVICE_OOM, _C.STARTUP): Remedy(
        "shrink",
        (
            "what is allocated once did not fit: optimizer state, compiled kernels, CUDA graphs or the weights",
            "a smaller micro-batch helps only with what activations take; an 8-bit or offloaded optimizer, or compile "
            "without CUDA graphs, with the rest",
        ),
    ),
    (_K.DEVICE_OOM, _C.FRAGMENTATION): Remedy(
        "defragment",
        (
            "the allocator held enough, in pieces too small: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "
            "(not on WSL2)",
            *_SHRINK,
        ),
    ),
    (_K.DEVICE_OOM, _C.EVALUATION): Remedy(
        "evaluate_less",
        ("training fitted, evaluation did not: a smaller evaluation batch, under torch.no_grad()",),
    ),
    (_K.DEVICE_OOM, _C.RESUME): Remedy(
        "retry",
        (
            "loading a checkpoint took more than training: torch.load(map_location='cpu', mmap=True), then the same "
            "settings again",
        ),
    ),
    (_K.DEVICE_OOM, _C.FOREIGN): Remedy(
        "wait",
        ("another process holds the memory (nvidia-smi names it): wait for it or end it; no setting needs to change",),
    ),
    (_K.DEVICE_OOM, _C.NOT_GIVEN_BACK): Remedy(
        "wait", ("the attempt before had not given its memory back: the same settings again, when it has",)
    ),
    (_K.DEVICE_OOM, _C.LEAK): Remedy("retry", _LEAK),
    (_K.HOST_OOM, _C.LEAK): Remedy("retry", _LEAK),
    (_K.DEVICE_OOM, _C.SPIKE): Remedy(
        "shrink",
        (
            "one batch needed much more than the others: a limit on the length of samples, or on tokens per batch",
            *_SHRINK,
        ),
    ),
    (_K.HOST_OOM, _C.SPIKE): Remedy("host", ("one batch needed much more than the others",)),
    (_K.HOST_OOM, _C.REFUSED): Remedy(
        "host", ("the host's memory ran out: fewer DataLoader workers, less prefetching, a smaller batch on the CPU",)
    ),
    (_K.HOST_OOM, _C.KERNEL): Remedy(
        "host",
        ("the kernel or the scheduler killed it for host memory: fewer workers, or a larger limit (Slurm: --mem)",),
    ),
    (_K.HOST_OOM, _C.PINNED): Remedy(
        "host", ("page-locked host memory could not be had, though the driver says CUDA: pin_memory=False",)
    ),
    (_K.SHM_OOM, _C.NONE): Remedy(
        "shared_memory", ("/dev/shm is full: fewer DataLoader workers, or a larger one (docker run --shm-size=8g)",)
    ),
    (_K.HOST_OOM_SUSPECTED, _C.NONE): Remedy(
        "retry",
        (
            "killed by SIGKILL: the kernel's OOM killer, a scheduler or a person; `dmesg | grep -i oom` or the job's "
            "accounting tells which",
        ),
    ),
    (_K.DISK_FULL, _C.NONE): Remedy("disk", ("free disk space, or keep fewer checkpoints; then the same settings",)),
    (_K.GPU_LOST, _C.ECC): Remedy("stop", ("the GPU reports memory errors: reset it (nvidia-smi -r) or reboot",)),
    (_K.GPU_LOST, _C.BUS): Remedy("stop", ("the GPU is gone from the bus: power, heat or the card; reboot",)),
    (_K.NO_GPU, _C.NONE): Remedy("stop", ("driver and PyTorch do not fit, or no GPU is visible: nvidia-smi",)),
    (_K.CUDA_CONTEXT, _C.ASSERT): Remedy(
        "stop", ("an index out of range on the device: run once with CUDA_LAUNCH_BLOCKING=1 to see where",)
    ),
    (_K.CUDA_CONTEXT, _C.NONE): Remedy("retry", ("once from the last checkpoint; again, and it is a bug or the card",)),
    (_K.NOT_A_NUMBER, _C.NONE): Remedy(
        "stop", ("resume from a checkpoint before it, with a lower learning rate, or bfloat16 instead of float16",)
    ),
    (_K.DISTRIBUTED, _C.TIMEOUT): Remedy(
        "retry", ("a rank waited in vain: look for the first failure in the other ranks' output",)
    ),
    (_K.DISTRIBUTED, _C.PEER): Remedy("retry", ("a victim of another rank: look for the first failure in its output",)),
    (_K.STOPPED, _C.NONE): Remedy("retry", ("it was told to leave; resume from the last checkpoint",)),
    (_K.HANG, _C.NONE): Remedy("retry", ("it made no step for very long: once more from the last checkpoint",)),
    (_K.MACHINE_DIED, _C.NONE): Remedy("retry", ("the machine stopped: power, heat or an update; see its own log",)),
    (_K.USER_INTERRUPT, _C.NONE): Remedy("none", ("interrupted by a person",)),
    (_K.SIGNAL, _C.NONE): Remedy("retry", ("native code crashed; once more from the last checkpoint, then report it",)),
    (_K.EXEC_FAILED, _C.NONE): Remedy("stop", ("the command could not be executed: check its path and permissions",)),
    (_K.ERROR, _C.NONE): Remedy("stop", ("an error of the program: it would happen again; see the traceback",)),
    (_K.ERROR, _C.FILE_LIMIT): Remedy("stop", ("raise the limit on open files (ulimit -n), or use fewer workers",)),
    (_K.ERROR, _C.MISSING_FILE): Remedy("stop", ("a file is missing: check the path, and the working directory",)),
    (_K.ERROR, _C.IMPORT): Remedy("stop", ("a module is missing: is it the right environment?",)),
    (_K.ERROR, _C.CHECKPOINT): Remedy("stop", ("the checkpoint is of another model, or damaged",)),
    (_K.ERROR, _C.COMPILER): Remedy("stop", ("compiling failed: without torch.compile it would run",)),
    (_K.SUCCESS, _C.NONE): Remedy("none", ()),
    (_K.NO_FAILURE, _C.NONE): Remedy("none", ("no failure is to be seen; with its --exit-code more could be said",)),
    (_K.UNKNOWN, _C.NONE): Remedy("stop", ("nothing tells why; give its --exit-code or --signal",)),
}


def remedy_of(found: Diagnosis) -> Remedy:
    """The remedy of its cause, or else of its kind."""
    return _REMEDIES.get((found.kind, found.cause)) or _REMEDIES[(found.kind, Cause.NONE)]
