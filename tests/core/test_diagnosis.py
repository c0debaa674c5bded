"""Messages built from the wordings libraries print, and the situations in which a wording proves nothing."""

import time

import msgspec
import pytest
from gpusup.supervisor.core.diagnosis import (
    Diagnosis,
    DiagnosisKind,
    Evidence,
    ExitStatus,
    OomNumbers,
    TrainerFailure,
    clean_lines,
    diagnose,
    is_fragmentation,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

MIB, GIB = 1024**2, 1024**3
FAILED, SUCCEEDED, UNSEEN, KILLED = ExitStatus(code=1), ExitStatus(code=0), ExitStatus(), ExitStatus(signal=9)
D, H, S, K = (
    DiagnosisKind.DEVICE_OOM,
    DiagnosisKind.HOST_OOM,
    DiagnosisKind.SHM_OOM,
    DiagnosisKind.HOST_OOM_SUSPECTED,
)
LIBS = "/opt/env/lib/python3.11/site-packages"


# --- builders ---------------------------------------------------------------------------------------------------------


def gib(number: float) -> int:
    return round(number * GIB)


def mib(number: float) -> int:
    return round(number * MIB)


def torch_message(
    *,
    device: str = "0",
    backend: str = "CUDA",
    capacity: str = "capacity",
    own: str = "Including non-PyTorch memory, this process has 11.10 GiB memory in use. ",
    allowed: str = "",
    pools: str = "",
    hint: str = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.",
) -> str:
    """The wording since torch 2.1."""
    return (
        f"{backend} out of memory. Tried to allocate 1.54 GiB. GPU {device} has a total {capacity} of 11.60 GiB of "
        f"which 512.50 MiB is free. {own}{allowed}Of the allocated memory 10.25 GiB is allocated by PyTorch, {pools}"
        f"and 96.25 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try "
        f"setting {hint}"
    )


def old_message(*, last: str = "11.25 GiB reserved in total by PyTorch", allowed: str = "") -> str:
    """The wording before torch 2.1."""
    return (
        "CUDA out of memory. Tried to allocate 1.54 GiB (GPU 0; 11.60 GiB total capacity; 10.25 GiB already allocated; "
        f"512.50 MiB free; {allowed}{last})"
    )


FULL = OomNumbers(
    tried_to_allocate_bytes=gib(1.54),
    total_bytes=gib(11.6),
    free_bytes=mib(512.5),
    allocated_bytes=gib(10.25),
    reserved_unallocated_bytes=mib(96.25),
    process_in_use_bytes=gib(11.1),
)
OOM = f"torch.OutOfMemoryError: {torch_message()}"
BAD_VALUE = "ValueError: Expected batch of 64 sequences, got 63"
CPU_OOM = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 3296722944 bytes. Error code 12 (Cannot allocate memory)"
)


def trace(message: str, *frames: tuple[str, str, str], prefix: str = "") -> list[str]:
    lines = ["Traceback (most recent call last):"]
    for file, function, source in frames or (("train.py", "<module>", "main()"), ("train.py", "main", "step(batch)")):
        lines += [f'  File "{file}", line 12, in {function}', f"    {source}", f"    {'^' * len(source)}"]
    return [prefix + line for line in [*lines, *message.split("\n")]]


ROOT = ("train.py", "<module>", "main()")
FORWARD = (f"{LIBS}/torch/nn/modules/linear.py", "forward", "return F.linear(input, self.weight, self.bias)")
CALL = (f"{LIBS}/torch/nn/modules/module.py", "_call_impl", "return forward_call(*args, **kwargs)")


def said(*lines: str, exit: ExitStatus = FAILED, stdout: tuple[str, ...] = (), **more: object) -> Diagnosis:  # noqa: A002
    evidence = {"exit": exit, "stderr": tuple(lines), "stdout": stdout, **more}
    return diagnose(Evidence(**evidence))  # type: ignore[arg-type]


def numbers_of(message: str) -> OomNumbers:
    return said(*trace(message)).numbers


# --- torch's allocator, wording by wording ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        pytest.param(torch_message(), FULL, id="2.3"),
        pytest.param(torch_message(capacity="capacty"), FULL, id="2.1 capacty"),
        pytest.param(torch_message(device="\x01"), FULL, id="index as a byte"),
        pytest.param(torch_message(device=""), FULL, id="index lost"),
        pytest.param(torch_message(hint="PYTORCH_ALLOC_CONF=expandable_segments:True."), FULL, id="renamed hint"),
        pytest.param(
            torch_message(pools="with 2.31 GiB allocated in private pools (e.g., CUDA Graphs), "),
            FULL,
            id="private pools",
        ),
        pytest.param(
            torch_message(allowed="10.90 GiB allowed; "),
            msgspec.structs.replace(FULL, allowed_bytes=gib(10.9)),
            id="cap",
        ),
        pytest.param(torch_message(backend="HIP"), FULL, id="HIP"),
        pytest.param(torch_message(backend="XPU"), FULL, id="XPU"),
        pytest.param(
            torch_message(own="Process 7 has 11.10 GiB memory in use. "), FULL, id="own process under a foreign pid"
        ),
        pytest.param(
            torch_message(own="Process 7 has 3.00 GiB memory in use. "),
            msgspec.structs.replace(FULL, process_in_use_bytes=None),
            id="somebody else's process",
        ),
        pytest.param(
            torch_message(own="Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use. "),
            msgspec.structs.replace(FULL, process_in_use_bytes=None),
            id="WSL2",
        ),
        pytest.param(
            torch_message().partition(" has a total")[0], OomNumbers(tried_to_allocate_bytes=gib(1.54)), id="cut by NUL"
        ),
        pytest.param(
            old_message(),
            OomNumbers(
                tried_to_allocate_bytes=gib(1.54),
                total_bytes=gib(11.6),
                free_bytes=mib(512.5),
                allocated_bytes=gib(10.25),
                reserved_unallocated_bytes=gib(1),
            ),
            id="1.4",
        ),
        pytest.param(
            old_message(last="96.25 MiB cached", allowed="11.00 GiB allowed; "),
            OomNumbers(
                tried_to_allocate_bytes=gib(1.54),
                total_bytes=gib(11.6),
                free_bytes=mib(512.5),
                allowed_bytes=gib(11),
                allocated_bytes=gib(10.25),
                reserved_unallocated_bytes=mib(96.25),
            ),
            id="1.1",
        ),
        pytest.param("CUDA out of memory. Tried to allocate more than 1EB memory.", OomNumbers(), id="1EB"),
        pytest.param(
            "CUDA out of memory. Allocation was preemptively rejected because it would exceed "
            "per_process_memory_fraction limit. Requested size: 1.54 GiB",
            OomNumbers(tried_to_allocate_bytes=gib(1.54)),
            id="preemptive",
        ),
        pytest.param(
            "Allocation on device 0 would exceed allowed memory. (out of memory)\n"
            "Currently allocated     : 10.25 GiB\n"
            "Requested               : 1.54 GiB\n"
            "Device limit            : 11.60 GiB\n"
            "Free (according to CUDA): 512.50 MiB\n"
            "PyTorch limit (set by user-supplied memory fraction)\n"
            "                        : 17179869184.00 GiB",
            OomNumbers(
                tried_to_allocate_bytes=gib(1.54),
                total_bytes=gib(11.6),
                free_bytes=mib(512.5),
                allocated_bytes=gib(10.25),
            ),
            id="cudaMallocAsync",
        ),
    ],
)
@pytest.mark.parametrize("name", ["RuntimeError", "torch.cuda.OutOfMemoryError", "torch.OutOfMemoryError"])
def test_torch_wordings(name: str, message: str, numbers: OomNumbers) -> None:
    found = said("step 1 loss 10.9", *trace(f"{name}: {message}"))
    assert (found.kind, found.is_oom) == (D, "yes")
    assert found.numbers == numbers
    assert found.message.startswith(name)
    assert len(found.message) <= 500


@pytest.mark.parametrize(
    ("line", "kind", "verdict", "tried"),
    [
        ("RuntimeError: CUDA error: out of memory", D, "yes", None),
        ("torch.AcceleratorError: CUDA error: out of memory", D, "yes", None),
        ("RuntimeError: CUDA driver error: out of memory", D, "yes", None),
        ("RuntimeError: cuda runtime error (2) : out of memory at /a/THCStorage.cu:58", D, "yes", None),
        ("THCudaCheck FAIL file=/a/THCStorage.cu line=58 error=2 : out of memory", D, "yes", None),
        ("RuntimeError: Triton Error [CUDA]: out of memory", D, "yes", None),
        ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", D, "yes", None),
        ("RuntimeError: cuFFT error: CUFFT_ALLOC_FAILED", D, "yes", None),
        ("RuntimeError: cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `create`", D, "yes", None),
        (
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            D,
            "suspected",
            None,
        ),
        ("RuntimeError: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ...", D, "suspected", None),
        (
            'RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/a/CUDACachingAllocator.cpp":838',
            D,
            "suspected",
            None,
        ),
        ("include/alloc.h:99 NCCL WARN Cuda failure 2 'out of memory'", D, "yes", None),
        ("include/alloc.h:99 NCCL WARN Failed to CUDA calloc 6291456 bytes", D, "yes", 6291456),
        ("Error out of memory at line 380 in file /src/csrc/pythonInterface.c", D, "yes", None),
        (
            "RuntimeError: MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: "
            "9.07 GB). Tried to allocate 256.00 MB on private pool.",
            D,
            "yes",
            mib(256),
        ),
        ("RuntimeError: Invalid buffer size: 24.00 GB", D, "yes", gib(24)),
        ("ValueError: No available memory for the cache blocks. Try increasing ...", D, "yes", None),
        ("RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests.", D, "yes", None),
        (
            "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.",
            D,
            "yes",
            2 * GIB,
        ),
        (
            "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.00GiB.",
            D,
            "yes",
            2 * GIB,
        ),
        (
            "XlaRuntimeError: RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB (2147483648B) on device 0",
            D,
            "yes",
            2 * GIB,
        ),
        (
            "jax.errors.JaxRuntimeError: INTERNAL: Error dispatching computation: Out of memory allocating 8589934592 "
            "bytes.",
            H,
            "yes",
            8 * GIB,
        ),
        (
            "ResourceExhaustedError: OOM when allocating tensor with shape[8,9] and type float on "
            "/job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc",
            D,
            "yes",
            None,
        ),
        (
            "ResourceExhaustedError: OOM when allocating tensor with shape[8,9] and type float on "
            "/job:localhost/replica:0/task:0/device:CPU:0 by allocator cpu",
            H,
            "yes",
            None,
        ),
        (
            "ResourceExhaustedError: Out of memory error on GPU 0. Cannot allocate 1.500000GB memory on GPU 0, 9.0GB "
            "memory has been allocated and available memory is only 512.0MB.",
            D,
            "yes",
            gib(1.5),
        ),
        ("PxgCudaDeviceMemoryAllocator fail to allocate memory 67108864 bytes!! Result = 2", D, "yes", 67108864),
        ("RuntimeError: No executable batch size found, reached zero.", D, "yes", None),
        (CPU_OOM, H, "yes", 3296722944),
        (
            "RuntimeError: [enforce fail at CPUAllocator.cpp:64] . DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)",
            H,
            "yes",
            4096,
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried "
            "to allocate 4096 bytes.",
            H,
            "yes",
            4096,
        ),
        ("MemoryError", H, "yes", None),
        ("numba.cuda.cudadrv.driver.CudaAPIError: [2] cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY", D, "yes", None),
        (
            "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 4,096 bytes (allocated so far: 9 bytes).",
            D,
            "yes",
            4096,
        ),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", H, "yes", None),
        ("java.lang.OutOfMemoryError: Java heap space", H, "yes", None),
        (
            "numpy.core._exceptions.MemoryError: Unable to allocate 12. GiB for an array with shape (9,)",
            H,
            "yes",
            12 * GIB,
        ),
        (
            "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 EiB for an array with shape (9,)",
            H,
            "yes",
            None,
        ),
        ("pyarrow.lib.ArrowMemoryError: malloc of size 1073741824 failed", H, "yes", GIB),
        ("terminate called after throwing an instance of 'std::bad_alloc'", H, "yes", None),
        (
            "RuntimeError: unable to mmap 1048576 bytes from file </a/ckpt.pt>: Cannot allocate memory (12)",
            H,
            "yes",
            MIB,
        ),
        ("OSError: [WinError 1455] Die Auslagerungsdatei ist zu klein", H, "yes", None),
        ("OSError: [Errno 12] Cannot allocate memory", H, "yes", None),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks ...", H, "yes", None),
        ("slurmstepd-node3: error: Detected 2 oom-kill event(s) in StepId=7.batch.", H, "yes", None),
        ("srun: error: node3: task 5: Out Of Memory", H, "yes", None),
        ("slurmstepd: error: Step 7.0 exceeded memory limit (9000 > 8000), being killed", H, "yes", None),
        ("Memory cgroup out of memory: Killed process 77 (python) total-vm:9kB, anon-rss:8kB", H, "yes", None),
        (
            "RuntimeError: unable to allocate shared memory(shm) for file </torch_7_8>: No space left on device (28)",
            S,
            "yes",
            None,
        ),
        (
            "RuntimeError: unable to write to file </torch_7_8_0>: No space left on device (28)",
            S,
            "yes",
            None,
        ),
        (
            "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared "
            "memory (shm).",
            S,
            "suspected",
            None,
        ),
        ("RuntimeError: DataLoader worker (pid 77) is killed by signal: Bus error.", S, "suspected", None),
        ("RuntimeError: DataLoader worker (pid 77) is killed by signal: Killed.", K, "suspected", None),
        ("/var/job: line 4:    77 Killed                  python train.py", K, "suspected", None),
        ("Killed", K, "suspected", None),
        (
            "concurrent.futures.process.BrokenProcessPool: A process in the process pool was terminated abruptly while",
            K,
            "suspected",
            None,
        ),
        ("[launch.py:319:sigkill_handler] ['python', 'train.py'] exits with return code = -9", K, "suspected", None),
    ],
)
def test_other_wordings(line: str, kind: DiagnosisKind, verdict: str, tried: int | None) -> None:
    for lines in ([line], trace(line)):
        found = said("step 1 loss 10.9", *lines)
        assert (found.kind, found.is_oom) == (kind, verdict)
        assert found.numbers.tried_to_allocate_bytes == tried


def test_pinned_memory_is_host_memory() -> None:
    found = said(
        *trace("RuntimeError: Caught RuntimeError in pin memory thread for device 0."),
        "Original Traceback (most recent call last):",
        f'  File "{LIBS}/torch/utils/data/_utils/pin_memory.py", line 98, in pin_memory',
        "    return data.pin_memory(device)",
        "RuntimeError: CUDA error: out of memory",
    )
    assert (found.kind, found.is_oom) == (H, "yes")


# --- exit status ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [KILLED, ExitStatus(code=137), ExitStatus(code=-9)])
def test_sigkill_is_suspected_until_the_kernel_confirms(status: ExitStatus) -> None:
    found = said("step 7 loss 3.1", exit=status)
    assert (found.kind, found.is_oom) == (K, "suspected")
    assert said("step 7 loss 3.1", exit=status, host_oom_kills=1).kind is H
    assert said("step 7 loss 3.1", exit=status, host_oom_kills=1).is_oom == "yes"


def test_a_killed_worker_is_confirmed_by_the_kernel() -> None:
    lines = trace("RuntimeError: DataLoader worker (pid 77) is killed by signal: Killed.")
    assert said(*lines, host_oom_kills=1).is_oom == "yes"
    assert said(*trace("RuntimeError: DataLoader worker (pid(s) 77) exited unexpectedly"), host_oom_kills=2).kind is H


def test_an_exception_explains_more_than_the_kill_that_followed() -> None:
    assert said(*trace(BAD_VALUE), exit=KILLED).kind is DiagnosisKind.ERROR
    assert said(*trace(OOM), exit=KILLED).kind is D
    assert said(*trace(OOM), exit=ExitStatus(signal=15)).kind is D


def test_success_is_never_an_incident() -> None:
    found = said(*trace(OOM), exit=SUCCEEDED, host_oom_kills=3)
    assert (found.kind, found.is_oom) == (DiagnosisKind.SUCCESS, "no")


def test_an_unseen_end_is_judged_by_its_text() -> None:
    assert said(*trace(OOM), exit=UNSEEN).is_oom == "yes"
    assert said("step 7 loss 3.1", exit=UNSEEN).kind is DiagnosisKind.UNKNOWN


@pytest.mark.parametrize(
    ("status", "lines", "kind"),
    [
        (ExitStatus(signal=15), [], DiagnosisKind.STOPPED),
        (ExitStatus(signal=11), ["step 3 loss 4.0"], DiagnosisKind.SIGNAL),
        (ExitStatus(code=139), [], DiagnosisKind.SIGNAL),
        (ExitStatus(signal=2), [], DiagnosisKind.USER_INTERRUPT),
        (ExitStatus(code=1), trace("KeyboardInterrupt"), DiagnosisKind.USER_INTERRUPT),
        (ExitStatus(code=127), ["sh: 1: trian.py: not found"], DiagnosisKind.EXEC_FAILED),
        (ExitStatus(code=1), [], DiagnosisKind.ERROR),
        (FAILED, trace("OSError: [Errno 28] No space left on device: 'ckpt.pt'"), DiagnosisKind.DISK_FULL),
        (FAILED, trace("RuntimeError: CUDA error: device-side assert triggered"), DiagnosisKind.CUDA_CONTEXT),
        (
            FAILED,
            trace("RuntimeError: CUDA error: an illegal memory access was encountered"),
            DiagnosisKind.CUDA_CONTEXT,
        ),
        (FAILED, trace("RuntimeError: CUDA error: uncorrectable ECC error encountered"), DiagnosisKind.GPU_LOST),
        (FAILED, trace("torch.distributed.DistBackendError: NCCL error in: a.cpp:9"), DiagnosisKind.DISTRIBUTED),
        (ExitStatus(signal=6), ["[Rank 1] Watchdog caught collective operation timeout: X"], DiagnosisKind.DISTRIBUTED),
        (
            FAILED,
            trace(
                "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in "
                "torch._inductor.config.cpp.cxx: (None, 'g++')"
            ),
            DiagnosisKind.ERROR,
        ),
    ],
)
def test_other_ends(status: ExitStatus, lines: list[str], kind: DiagnosisKind) -> None:
    found = said(*lines, exit=status)
    assert (found.kind, found.is_oom) == (kind, "no")


# --- wordings that prove nothing --------------------------------------------------------------------------------------

STEPS = [f"step {n} loss 3.{n}" for n in range(100, 110)]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([*trace(OOM), *STEPS, *trace(BAD_VALUE)], id="printed, survived, another death"),
        pytest.param(
            [*trace(OOM, ("train.py", "step", "loss = model(x)")), *trace(BAD_VALUE)], id="caught in a function"
        ),
        pytest.param([f"WARNING: {OOM}", "skipping batch", *STEPS], id="logged and skipped"),
        pytest.param([f"sample: {OOM}", *STEPS], id="sampled"),
        pytest.param(["Once upon a time", OOM, *STEPS], id="sampled at the start of a line"),
        pytest.param([OOM, *trace(BAD_VALUE)], id="sampled, then an exception"),
        pytest.param(
            trace(BAD_VALUE, ROOT, ("train.py", "main", f"raise ValueError  # {OOM}")), id="comment in source"
        ),
        pytest.param(
            trace(BAD_VALUE, ROOT, ("train.py", "main", 'if "CUDA error: out of memory" in str(e):')),
            id="string in source",
        ),
        pytest.param(
            trace(BAD_VALUE, ("out_of_memory.py", "handle_cuda_out_of_memory", "run()")), id="names in frames"
        ),
        pytest.param(
            trace("ImportError: cannot import name 'OutOfMemoryError' from 'torch.cuda'"), id="import of the class"
        ),
        pytest.param(
            trace("AttributeError: module 'torch.cuda' has no attribute 'OutOfMemoryError'"),
            id="attribute of the class",
        ),
        pytest.param(["except torch.cuda.OutOfMemoryError:", "error"], id="source echoed"),
        pytest.param(["# RuntimeError: " + torch_message(), "error"], id="comment echoed"),
        pytest.param(['    raise RuntimeError("CUDA error: out of memory")', "error"], id="raise echoed"),
        pytest.param(['  when: "RuntimeError: CUDA error: out of memory"', "error"], id="policy echoed"),
        pytest.param(["  pattern: CUDA out of memory", "error"], id="policy echoed, plain"),
        pytest.param(["on: cuda_oom", "  match: [CUDA out of memory|CUDA error: out of memory]"], id="patterns echoed"),
        pytest.param(['{"patterns": ["RuntimeError: CUDA error: out of memory"], "retries": 3}'], id="config as JSON"),
        pytest.param(['{"step": 7, "sample": "RuntimeError: CUDA error: out of memory"}'], id="sample as JSON"),
        pytest.param(["Namespace(on='CUDA out of memory', lr=1)", "error"], id="arguments"),
        pytest.param(["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", "oom=0", "CUDA OOMs: 0"], id="counters"),
        pytest.param(["Lower the batch size to avoid CUDA out of memory errors", "error"], id="advice"),
        pytest.param(
            trace("triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 9"), id="on chip"
        ),
        pytest.param(trace("RuntimeError: Storage size calculation overflowed with sizes=[9, 9]"), id="overflow"),
        pytest.param(
            trace("RuntimeError: [enforce fail at inline_container.cc:671] . unexpected pos 9 vs 8"), id="enforce"
        ),
        pytest.param(trace("OSError: [Errno 28] No space left on device"), id="disk"),
        pytest.param(
            [
                *trace("RuntimeError: CUDA error: uncorrectable ECC error encountered"),
                "Exception raised from create_event at /a/c10/cuda/CUDACachingAllocator.cpp:733:",
                "frame #2: c10::cuda::CUDACachingAllocator::raw_delete(void*) + 0x8 (0x1 in libc10_cuda.so)",
            ],
            id="allocator in a backtrace",
        ),
        pytest.param(trace("FileNotFoundError: [Errno 2] No such file: '/data/out_of_memory/a.bin'"), id="path"),
        pytest.param(
            [
                "t.cu:9: block: [0,0,0] Assertion `t >= 0 && t < n_classes` failed.",
                *trace("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            ],
            id="a label out of range, reported late",
        ),
        pytest.param(["received SIGTERM", "Killing subprocess 77", *trace(BAD_VALUE)], id="teardown"),
        pytest.param(
            [
                "  exitcode  : -9 (pid: 7)",
                "  traceback : Signal 9 (SIGKILL) received by PID 7",
                "  exitcode  : -11 (pid: 8)",
                "  traceback : Signal 11 (SIGSEGV) received by PID 8",
            ],
            id="the launcher killed the survivors",
        ),
        pytest.param([*trace(BAD_VALUE), "Killed"], id="killed after an error"),
        pytest.param(
            ["policy:", "  - CUDA error: out of memory", "  - DefaultCPUAllocator: can't allocate memory"], id="list"
        ),
        pytest.param(
            [*trace(BAD_VALUE, prefix="[rank0]: "), "  exitcode  : -9 (pid: 7)"], id="killed after another rank's error"
        ),
    ],
)
def test_traps(lines: list[str]) -> None:
    assert said(*lines).is_oom == "no"
    assert said(*lines, exit=UNSEEN).is_oom == "no"


def test_sampled_text_on_stdout_does_not_explain_an_exception_or_a_signal() -> None:
    assert said(*trace(BAD_VALUE), stdout=("sample:", OOM)).kind is DiagnosisKind.ERROR
    assert said(exit=ExitStatus(signal=15), stdout=(OOM,)).kind is DiagnosisKind.STOPPED
    assert said(exit=KILLED, stdout=(OOM,)).kind is K


def test_a_caught_and_unexplained_oom_is_only_suspected() -> None:
    found = said(f"| WARNING: ran out of memory: {torch_message()}", "attempting to recover")
    assert found.is_oom == "suspected"


# --- wordings that are easily missed ----------------------------------------------------------------------------------

VICTIM = trace("RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer", prefix="[rank0]: ")
FOOTER = [
    *trace(
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        ("/opt/bin/torchrun", "<module>", "main()"),
    ),
    "=" * 60,
    *(f"note {n}" for n in range(30)),
    "Root Cause (first observed failure):",
    "  rank      : 0 (local_rank: 0)",
    "  exitcode  : 1 (pid: 7)",
]


def test_the_cause_is_ranked_over_all_ranks() -> None:
    cause = trace(OOM, prefix="[rank3]: ")
    for lines in (
        [*VICTIM, *cause, *FOOTER],
        [*cause, *VICTIM, *FOOTER],
        [x for p in zip(VICTIM, cause, strict=False) for x in p] + FOOTER,
    ):
        found = said(*lines)
        assert (found.kind, found.is_oom, found.rank) == (D, "yes", 3)
        assert found.numbers == FULL


@pytest.mark.parametrize(
    "prefix",
    [
        "[rank1]: ",
        "[default1]:",
        "1: ",
        "[1,1]<stderr>:",
        "[1]<stderr>:",
        "41:[default1]:[rank1]: ",
        "(Worker rank=1 pid=77) ",
        "(Worker rank=1 pid=77) ERROR 04-02 11:20:31 [executor.py:375] ",
        "[default1]:2026-01-02 03:04:05,678 - trainer - ERROR - ",
        "2026-01-02T03:04:05.123456789Z stderr F [rank1]: ",
        "Jan  2 03:04:05 node7 python[77]: [rank1]: ",
        "[E 2026-01-02 03:04:05,678] [rank1]: ",
        "2026-01-02 03:04:05.123 | ERROR    | trainer:fit:12 - [rank1]: ",
    ],
)
def test_prefixes(prefix: str) -> None:
    lines = trace(OOM, ROOT, FORWARD, prefix=prefix)
    found = said(*lines)
    assert (found.is_oom, found.rank, found.phase, found.numbers) == ("yes", 1, "forward", FULL)
    quoted = said(*trace(BAD_VALUE, ROOT, ("t.py", "f", f"g()  # {OOM}"), prefix=prefix))
    assert quoted.is_oom == "no"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(
            [
                "torch.cudatorch.cuda.OutOfMemoryErrorOutOfMemoryError.: : CUDA out of memory. Tried to allocate "
                "2.00 MiB. GPU "
            ],
            id="two ranks in one line",
        ),
        pytest.param(["RuntimeError: CUDA out of memory. Tried to allocate", "2.00 MiB. GPU 0 has a"], id="wrapped"),
        pytest.param(
            [
                "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator:",
                "can't allocate memory: you tried to allocate 2097152 bytes. Error code 12",
            ],
            id="wrapped by rich",
        ),
        pytest.param(
            [
                "╭──────╮",
                "│ RuntimeError: CUDA out of memory. Tried to  │",
                "│ allocate 2.00 MiB. GPU 0 has a total      │",
            ],
            id="in a box",
        ),
        pytest.param(
            ["\x1b[31mRuntimeError\x1b[0m: CUDA out of memory. Tried to allocate \x1b[1m2.00 MiB\x1b[0m."], id="ANSI"
        ),
        pytest.param(
            [
                msgspec.json.encode(
                    {
                        "level": "error",
                        "message": "\n".join(trace("RuntimeError: CUDA out of memory. Tried to allocate 2.00 MiB.")),
                    }
                ).decode()
            ],
            id="JSON log",
        ),
        pytest.param(
            [
                msgspec.json.encode(
                    {
                        "message": {
                            "message": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB.",
                            "extraInfo": {},
                        }
                    }
                ).decode()
            ],
            id="torchelastic error file",
        ),
        pytest.param(["Training failed: RuntimeError('CUDA out of memory. Tried to allocate 2.00 MiB.')"], id="repr"),
        pytest.param(
            ["[trainer] Error: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB."], id="one-liner"
        ),
    ],
)
@pytest.mark.parametrize("tail", [0, 1, 2, 3])
def test_forms(lines: list[str], tail: int) -> None:
    after = [
        [],
        [
            "epoch 3:  41%|████      | 41/100 [00:09<00:12,  4.5it/s]",
            "wandb: train/loss 3.1",
            "wandb: train/global_step 41",
        ],
        [
            "",
            *trace(
                "subprocess.CalledProcessError: Command '['python', 'train.py']' returned non-zero exit status 1.",
                ("launch.py", "<module>", "run(cmd, check=True)"),
            ),
        ],
        [
            "Exception ignored in: <function Pool.__del__>",
            *trace("AttributeError: 'NoneType' object has no attribute 'x'"),
        ],
    ][tail]
    found = said(*lines, *after)
    assert found.is_oom == "yes"
    assert found.numbers.tried_to_allocate_bytes == 2 * MIB


def test_a_chained_exception_keeps_its_cause() -> None:
    for link in (
        "The above exception was the direct cause of the following exception:",
        "During handling of the above exception, another exception occurred:",
    ):
        assert said(*trace(OOM), "", link, "", *trace(BAD_VALUE)).kind is D


def test_a_launcher_script_that_raises_its_own_error_does_not_hide_the_childs() -> None:
    own = trace("LaunchFailed: training did not finish", ("sweep.py", "<module>", "launch()"))
    assert said(*trace(OOM), *own).kind is D


def test_another_process_has_its_own_say() -> None:
    worker = trace(OOM, ("worker.py", "train_loop", "loss = model(x)"), prefix="(TrainWorker pid=77) ")
    driver = trace("TrialFailed: see the logs", ("driver.py", "<module>", "tuner.fit()"))
    found = said(*worker, *driver)
    assert (found.kind, found.is_oom, found.rank) == (D, "yes", None)


def test_an_uncaught_oom_among_bars_that_look_like_steps_is_not_dismissed() -> None:
    bars = [f"tokenizing: {n}/900 [00:0{n}<00:09]" for n in range(1, 9)]
    assert said(*trace(OOM), *bars).is_oom == "suspected"
    assert said(*trace(OOM), *bars, exit=ExitStatus(signal=15)).is_oom == "no"


def test_a_real_shortage_that_surfaces_as_something_else() -> None:
    found = said(
        "PxgCudaDeviceMemoryAllocator fail to allocate memory 67108864 bytes!! Result = 2",
        *trace("RuntimeError: CUDA error: an illegal memory access was encountered"),
    )
    assert (found.kind, found.is_oom) == (D, "yes")
    nccl = said(
        "include/alloc.h:99 NCCL WARN Cuda failure 2 'out of memory'",
        *trace("torch.distributed.DistBackendError: NCCL error in: a.cpp:9, unhandled cuda error"),
    )
    assert (nccl.kind, nccl.is_oom) == (D, "yes")


def test_device_beats_host_and_the_last_complete_message_gives_the_numbers() -> None:
    later = torch_message().replace("1.54 GiB", "3.00 GiB")
    found = said(
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.",
        *trace(OOM, prefix="[rank0]: "),
        *trace(f"torch.OutOfMemoryError: {later}", prefix="[rank1]: "),
        *trace("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB. GPU ", prefix="[rank2]: "),
    )
    assert found.kind is D
    assert (found.numbers.tried_to_allocate_bytes, found.rank) == (3 * GIB, 1)


# --- what a cooperating trainer said ----------------------------------------------------------------------------------


def failure(kind: str, message: str, phase: str = "backward") -> TrainerFailure:
    return TrainerFailure(phase=phase, step=41, type=kind, message=message, block_size=1024)


def test_the_trainers_own_word_comes_first() -> None:
    found = said(*trace(OOM, ROOT, FORWARD), failure=failure("OutOfMemoryError", torch_message(), "optimizer"))
    assert (found.kind, found.is_oom, found.phase, found.numbers) == (D, "yes", "optimizer", FULL)
    found = said(exit=KILLED, failure=failure("torch.OutOfMemoryError", torch_message()))
    assert (found.kind, found.numbers) == (D, FULL)
    assert said(failure=failure("MemoryError", "")).kind is H
    assert said(failure=failure("RuntimeError", CPU_OOM)).kind is H
    assert said(failure=failure("AcceleratorError", "CUDA error: out of memory\nmore")).kind is D


def test_a_reported_error_is_not_overruled_by_text() -> None:
    found = said(OOM, stdout=(OOM,), failure=failure("ValueError", "Expected batch of 64"))
    assert (found.kind, found.is_oom, found.phase) == (DiagnosisKind.ERROR, "no", "backward")
    victim = failure("DistBackendError", "NCCL error: remote process exited")
    assert said(*trace(OOM, prefix="[rank1]: "), failure=victim).kind is D


def test_the_numbers_are_taken_from_the_text_when_the_report_has_none() -> None:
    assert said(*trace(OOM), failure=failure("OutOfMemoryError", "")).numbers == FULL


def test_the_trainers_word_that_memory_was_refused_needs_no_known_wording() -> None:
    """Whose memory: as the wording says, else of where it trains."""
    own = TrainerFailure(type="AllocError", message="no room", oom=True, rank=3)
    found = said(failure=own)
    assert (found.kind, found.is_oom, found.rank, found.phase) == (D, "yes", 3, None)
    assert said(failure=own, trains_on="host").kind is H
    assert said(failure=replace(own, message="DefaultCPUAllocator: can't allocate memory")).kind is H
    vague = replace(own, message="CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert said(failure=vague, trains_on="host").is_oom == "yes"
    assert said(failure=replace(vague, oom=False)).is_oom == "suspected"
    assert said(failure=own, exit=SUCCEEDED).is_oom == "no"


def test_cublas_that_could_not_start_after_a_failed_assertion_is_no_oom_whatever_the_trainer_says() -> None:
    late = TrainerFailure(type="RuntimeError", message="CUDA error: CUBLAS_STATUS_ALLOC_FAILED", oom=True)
    asserted = "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1: block: [0,0,0] Assertion `index < size` failed."
    assert said(asserted, failure=late).is_oom == "no"


def test_phase_that_the_report_lacks_is_read_from_the_traceback() -> None:
    lines = trace(OOM, ("train.py", "<module>", "loss = model(x)"), CALL, FORWARD)
    assert said(*lines, failure=TrainerFailure(type="OutOfMemoryError", message="", oom=True)).phase == "forward"


# --- phases -----------------------------------------------------------------------------------------------------------

BACKWARD = (f"{LIBS}/torch/_tensor.py", "backward", "torch.autograd.backward(")
ENGINE = (f"{LIBS}/torch/autograd/graph.py", "_engine_run_backward", "return Variable._execution_engine.run_backward(")


@pytest.mark.parametrize(
    ("frames", "phase"),
    [
        ([("train.py", "<module>", "loss = model(x); loss.backward()"), CALL, FORWARD], "forward"),
        ([("train.py", "<module>", "loss = model(x); loss.backward()"), BACKWARD, ENGINE], "backward"),
        ([ROOT, ("train.py", "main", "scaler.scale(loss).backward()")], "backward"),
        (
            [ROOT, BACKWARD, ENGINE, (f"{LIBS}/torch/utils/checkpoint.py", "recompute_fn", "fn(*args)"), FORWARD],
            "backward",
        ),
        (
            [("train.py", "<module>", "optimizer.step()"), (f"{LIBS}/torch/optim/adamw.py", "step", "adamw(")],
            "optimizer",
        ),
        ([("train.py", "<module>", "scaler.step(optimizer)")], "optimizer"),
        (
            [ROOT, (f"{LIBS}/torch/optim/sgd.py", "step", "loss = closure()"), ("m.py", "training_step", "self(x)")],
            "forward",
        ),
        ([ROOT, ("train.py", "estimate_loss", "logits, loss = model(X, Y)"), CALL, FORWARD], "eval"),
        ([ROOT, ("trainer.py", "evaluation_loop", "outputs = model(x)"), FORWARD], "eval"),
        ([ROOT, ("train.py", "save_checkpoint", "torch.save(state, path)")], "checkpoint"),
        ([("train.py", "<module>", "checkpoint = torch.load(path)")], "resume"),
        ([("train.py", "<module>", "model.load_state_dict(state)"), CALL], "resume"),
        ([ROOT, (f"{LIBS}/transformers/modeling_utils.py", "from_pretrained", "load_state_dict(x)")], "load"),
        (
            [("train.py", "<module>", "model.to(device)"), (f"{LIBS}/torch/nn/modules/module.py", "_apply", "fn(p)")],
            "load",
        ),
        (
            [
                ROOT,
                CALL,
                (f"{LIBS}/torch/_dynamo/eval_frame.py", "compile_wrapper", "fn()"),
                (f"{LIBS}/torch/_inductor/compile_fx.py", "compile_fx_inner", "compile()"),
            ],
            "compile",
        ),
        (
            [
                ROOT,
                CALL,
                (f"{LIBS}/torch/_dynamo/eval_frame.py", "compile_wrapper", "fn()"),
                (f"{LIBS}/torch/_inductor/output_code.py", "__call__", "self.current_callable(inputs)"),
                (
                    "/tmp/torchinductor_me/ab/cab.py",
                    "call",
                    "buf3 = empty_strided_cuda((8, s87), (8, 1), torch.float32)",
                ),
            ],
            "forward",
        ),
        ([ROOT, ("data.py", "tokens", "np.zeros(n)")], None),
    ],
)
def test_phases(frames: list[tuple[str, str, str]], phase: str | None) -> None:
    found = said("step 3 loss 4.0", *trace(OOM, *frames))
    assert (found.is_oom, found.phase) == ("yes", phase)


# --- fragmentation, cleaning ------------------------------------------------------------------------------------------


def test_fragmentation() -> None:
    assert not is_fragmentation(FULL)
    assert not is_fragmentation(OomNumbers())
    assert is_fragmentation(OomNumbers(tried_to_allocate_bytes=mib(20), reserved_unallocated_bytes=gib(2)))


def test_cleaning() -> None:
    assert clean_lines(b"1%\r2%\r\n3%\rdone\nend\r\n") == ("2%", "done", "end")
    assert clean_lines(b"\x1b[1;31mred\x1b[0m\n") == ("red",)
    assert clean_lines(b"bad \xff byte\n") == ("bad � byte",)
    assert clean_lines(b"") == ()
    wide = f"RuntimeError: {torch_message()}\r\n"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        found = diagnose(Evidence(exit=FAILED, stderr=clean_lines(wide.encode(encoding))))
        assert (found.kind, found.numbers) == (D, FULL)


def test_evidence_is_short_and_readable() -> None:
    found = said(*["noise " * 5000] * 20, *trace(OOM, ROOT, FORWARD, prefix="[rank1]: "), *FOOTER)
    assert any("linear.py" in line for line in found.evidence)
    assert len(found.evidence) <= 10
    assert max(map(len, found.evidence)) <= 1000
    assert found.message.startswith("torch.OutOfMemoryError: CUDA out of memory.")


# --- any bytes --------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        OOM,
        CPU_OOM,
        old_message(),
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in <module>',
        "    x()",
        "[rank1]: ",
        "[default0]:",
        "(A rank=3 pid=7) ",
        "{",
        '{"message": "',
        '"}',
        "\n",
        "\r",
        "\x1b[1m",
        "\x00",
        "│ ",
        "   ",
        "Killed",
        "MemoryError",
        "step 7",
        "Error: ",
        "E0101 00:00:00.1 7 a.py:7] ",
        "0: ",
        "out of memory",
        "Tried to allocate ",
        "9" * 400 + " GiB",
        "1.2.3 MiB",
        "During handling of the above exception, another exception occurred:",
    ]
)
OUTPUT = st.one_of(
    st.binary(max_size=400),
    st.lists(st.one_of(PIECES, st.text(max_size=12)), max_size=40).map(
        lambda parts: "".join(parts).encode(errors="ignore")
    ),
)
STATUSES = st.builds(ExitStatus, code=st.none() | st.integers(-70, 300), signal=st.none() | st.integers(1, 64))


@settings(max_examples=300, deadline=None)
@given(OUTPUT, OUTPUT, STATUSES, st.integers(0, 2), st.none() | st.builds(failure, st.text(), st.text()))
@example(b"[" * 5000, b'{"' + b"[" * 5000 + b"}", FAILED, 0, None)
def test_never_raises(
    stderr: bytes, stdout: bytes, status: ExitStatus, kills: int, said_itself: TrainerFailure | None
) -> None:
    found = diagnose(
        Evidence(
            exit=status,
            stderr=clean_lines(stderr),
            stdout=clean_lines(stdout),
            failure=said_itself,
            host_oom_kills=kills,
        )
    )
    assert len(found.message) <= 500
    if status.code == 0 and status.signal is None:
        assert (found.kind, found.is_oom) == (DiagnosisKind.SUCCESS, "no")
    assert (found.is_oom == "no") == (found.kind not in (D, H, S, K))
    msgspec.json.encode(found)


@given(st.lists(st.text(), max_size=20))
def test_never_raises_on_lines_nobody_cleaned(lines: list[str]) -> None:
    said(*lines)


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        " ",
        "[",
        "a.",
        "a: ",
        "CUDA ",
        "Error: ",
        "OOM ",
        "out of memory",
        "│ ",
        "0: ",
        "-",
        "1/2 [1",
        "step 1 ",
        "memory ",
    ],
)
def test_time_is_linear_in_the_input(unit: str) -> None:
    began = time.process_time()
    lines = clean_lines((unit * (200_000 // len(unit))).encode()) + (unit * (2000 // len(unit)),) * 100
    said(*lines)
    assert time.process_time() - began < 6  # about one second on a slow machine
