"""How often the diagnosis is right, beside other projects' matchers, and how fast it reads.

    python bench/diagnosis.py CORPUS

CORPUS is a folder of labelled logs: `index.jsonl` with, per file, `file`, `is_oom`, `kind`, `fatal` and the numbers in
bytes. What the labels mean in our words is KINDS below, which docs/diagnosis.md explains.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpusup.supervisor.commands.diagnose import Report, report
from gpusup.supervisor.core.diagnosis import clean_lines, diagnose
from gpusup.supervisor.core.verdict import Evidence, ExitStatus
from gpusup.supervisor.log_ending import read_ending

DEVICE, HOST, SHM, KILLED = ("device_oom", ""), ("host_oom", ""), ("shm_oom", ""), ("host_oom_suspected", "")
NONE = ("no_failure", "")
# label -> our (kind, cause); an empty cause is any.
KINDS = {
    **dict.fromkeys(("cuda_oom", "cuda_driver_oom", "cublas_cudnn_oom", "nccl_oom", "rocm_oom", "xpu_oom"), DEVICE),
    **dict.fromkeys(("xla_oom", "tf_oom", "mps_oom", "paddle_oom"), DEVICE),
    "host_oom": HOST, "shm": SHM, "killed": KILLED,
    **dict.fromkeys(("healthy", "handled_oom", "recompile", "overflow", "teardown_noise"), NONE),
    "nccl_timeout": ("distributed", ""), "nan": ("nan", ""), "disk_full": ("disk_full", ""), "sigterm": ("stopped", ""),
    "keyboard_interrupt": ("user_interrupt", ""), "cuda_env": ("no_gpu", ""), "cuda_hw": ("gpu_lost", ""),
    "cuda_illegal_access": ("cuda_context", ""), "cuda_launch_failure": ("cuda_context", ""),
    "segfault": ("signal", ""), "abort": ("signal", ""),
    "import_error": ("error", "import"), "syntax_error": ("error", "syntax"),
    "file_not_found": ("error", "missing_file"), "fd_limit": ("error", "file_limit"), "shape": ("error", "shape"),
    "state_dict": ("error", "checkpoint"), "inductor_error": ("error", "compiler"),
    "triton_resources": ("error", "compiler"), "data_error": ("error", "data"), "user_error": ("error", ""),
    "launch_error": ("error", ""),
}  # fmt: skip
# XLA and TensorFlow on a CPU run out of the host's memory; of a kill, a scheduler may say that it was for memory.
ALSO = {"xla_oom": ("host_oom",), "tf_oom": ("host_oom",), "killed": ("host_oom",)}
NUMBERS = (
    "tried_to_allocate_bytes", "total_bytes", "free_bytes", "allocated_bytes", "reserved_unallocated_bytes",
    "process_in_use_bytes",
)  # fmt: skip

CUDA_OOM = re.compile(r"CUDA out of memory")
CUDNN = "CUDNN_STATUS_NOT_SUPPORTED"
CPU = "DefaultCPUAllocator: can't allocate memory"
# What other projects look for, from their sources; here it is looked for in every line of the log.
PEERS: dict[str, Callable[[str], bool]] = {
    "Composer": lambda text: any(w in text for w in ("CUDA out of memory", "CUDA error: out of memory", CUDNN)),
    "Accelerate, HF Trainer": lambda text: any(w in text for w in ("CUDA out of memory.", CUDNN, CPU)),
    "PyTorch Lightning": lambda text: ("CUDA" in text and "out of memory" in text) or CUDNN in text or CPU in text,
    "toma": lambda text: any(w in text for w in ("CUDA out of memory.", CUDNN, CPU)),
    "detectron2": lambda text: "CUDA out of memory. " in text,
    "fairseq": lambda text: "out of memory" in text,
    "Ultralytics": lambda text: any(
        w in text for w in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR")
    ),
    "NVRx": lambda text: any(w in text for w in ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")),
    "Determined": lambda text: CUDA_OOM.search(text) is not None,
}


def ours(path: Path) -> Report:
    lines = clean_lines(read_ending(path))
    return report(diagnose(Evidence(exit=ExitStatus(), stderr=lines, text_only=True)))


def same_number(found: int | None, stated: int) -> bool:
    """Within what printing rounds away: 0.005 of the unit in which it was printed, which labels do not tell."""
    return found is not None and abs(found - stated) <= max(1, stated * 0.005)


def precision_recall(pairs: list[tuple[bool, bool]]) -> tuple[float, float]:
    """Of (said, true)."""
    right = sum(said and true for said, true in pairs)
    return right / max(1, sum(said for said, _ in pairs)), right / max(1, sum(true for _, true in pairs))


def score(corpus: Path, rows: list[dict[str, Any]]) -> None:
    """Print the table, and every file on which ours is wrong."""
    found = {row["file"]: ours(corpus / row["file"]) for row in rows}
    clear = [row for row in rows if row["kind"] != "killed"]
    print(f"{'matcher':<24} | precision | recall | over {len(clear)} logs, without the {len(rows) - len(clear)} killed")
    for name, peer in PEERS.items():
        texts = {row["file"]: (corpus / row["file"]).read_text("utf-8", "replace") for row in clear}
        pairs = [(any(map(peer, texts[row["file"]].splitlines())), row["is_oom"]) for row in clear]
        print("{:<24} | {:>9.2f} | {:>6.2f} |".format(name, *precision_recall(pairs)))
    pairs = [(found[row["file"]].is_oom is True, row["is_oom"]) for row in clear]
    print("{:<24} | {:>9.2f} | {:>6.2f} |".format("gpusup", *precision_recall(pairs)))
    wrong = 0
    for row in rows:
        said, (kind, cause) = found[row["file"]], KINDS.get(row["kind"], ("?", ""))
        kinds = {kind, *ALSO.get(row["kind"], ())}
        right = said.kind in kinds and (not cause or said.cause == cause)
        wrong += not right
        if not right:
            print(f"  kind: {row['file']} is {row['kind']}, said {said.kind} {said.cause}: {said.message[:90]}")
        if said.is_oom != row["is_oom"] and row["kind"] != "killed":
            print(f"  is_oom: {row['file']} is {row['is_oom']}, said {said.is_oom}")
        if said.fatal != row["fatal"]:
            print(f"  fatal: {row['file']} is {row['fatal']}, said {said.fatal}")
        for name in NUMBERS:
            if name in row and not same_number(getattr(said.numbers, name), row[name]):
                print(f"  number: {row['file']} {name} is {row[name]}, said {getattr(said.numbers, name)}")
    print(f"kinds right: {1 - wrong / len(rows):.3f} of {len(rows)}")


def speed(folder: Path) -> None:
    """Reading 1 GB: a healthy log with progress bars, and one whose failure stands far from its end."""
    bar = b"".join(
        b"\r%3d%%|####      | %d/99999 [12:00<3:00, 5.1it/s, loss=2.%03d]" % (i % 100, i, i % 999) for i in range(2000)
    )
    healthy = (
        bar + b"\n" + b"".join(b"iter %d: loss 2.%04d, time 20.00ms, mfu 31.0%%\n" % (i, i % 9999) for i in range(8000))
    )
    early = b"Traceback (most recent call last):\nRuntimeError: CUDA out of memory. Tried to allocate 1.54 GiB.\n"
    for name, head in (("healthy", b""), ("failure 1 GB before the end", early)):
        path = folder / "log"
        with path.open("wb") as file:
            file.write(head)
            while file.tell() < 1_000_000_000:
                file.write(healthy)
        times_s = []
        for _ in range(5):
            begin_s = time.process_time()
            ours(path)
            times_s.append(time.process_time() - begin_s)
        middle_s = statistics.median(times_s)
        spread = f"{min(times_s):.2f} to {max(times_s):.2f}"
        print(f"1 GB, {name}: {middle_s:.2f} s of one core ({spread}), {1000 / middle_s:,.0f} MB/s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in (options.corpus / "index.jsonl").read_text().splitlines()]
    score(options.corpus, rows)
    with tempfile.TemporaryDirectory() as folder:
        speed(Path(folder))


if __name__ == "__main__":
    main()
