"""In every Python of a trainer, before its own code: a memory limit, and a record of the exception that ends it.

Found first on PYTHONPATH; Python imports it at start-up, then the trainer runs. `GPUSUP_EXCEPTIONS` is the file for the
record (`record_exception`), written just before Python prints the traceback as ever. `GPUSUP_MEMORY_BUDGET` is
`host:BYTES` or `device:BYTES`; the limit is set right after `import torch`, when the library and its threads have taken
what they need, so that it is training that runs into it:

* host: soft RLIMIT_DATA = what the process uses now + budget; PyTorch's CPU allocator then fails with its own message.
* device: the CUDA allocator's per-process fraction, applied when CUDA is initialised.

Each process has its own limit. What was done is appended to `GPUSUP_BUDGET_REPORT`, for the supervisor to check. An
existing `sitecustomize` is run after this one, as if this one did not exist.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any

WRITER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "record_exception.py")
HERE = os.path.dirname(os.path.abspath(__file__))


def vm_data_bytes() -> int:
    """Private writable memory of this process: what RLIMIT_DATA is compared with."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmData:"))


def report(where: str, baseline_bytes: int, limit_bytes: int) -> None:
    path = os.environ.get("GPUSUP_BUDGET_REPORT")
    if not path:
        return
    content = {"pid": os.getpid(), "where": where, "baseline_bytes": baseline_bytes, "limit_bytes": limit_bytes}
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, json.dumps(content).encode() + b"\n")
    os.close(fd)


def limit_host(torch: Any, budget_bytes: int) -> None:
    """Warm PyTorch's threads (OpenMP and autograd, each with its own arena), then set the soft limit."""
    import resource

    warm = torch.ones(256, 256, requires_grad=True)
    (warm @ warm).relu().sum().backward()
    del warm
    baseline_bytes = vm_data_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit_bytes = baseline_bytes + budget_bytes
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
    report("host", baseline_bytes, limit_bytes)


def limit_device(torch: Any, budget_bytes: int) -> None:
    """Cap the CUDA caching allocator on every visible device, once CUDA is initialised (never initialise it here)."""

    def apply() -> None:
        current = torch.cuda.current_device()
        for device in range(torch.cuda.device_count()):
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total_bytes), device)
        torch.cuda.set_device(current)  # setting a fraction makes its device the current one
        report("device", 0, budget_bytes)

    torch.cuda._lazy_call(apply)


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `action` with the module called `name` right after its import."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action
        self.looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self.looking:
            return None
        self.looking = True  # stays in place until the import: many libraries look for torch first
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        loader, action = spec.loader, self.action
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                action(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def record_exceptions(path: str) -> None:
    """Have the exception that ends this process written to `path`; whatever goes wrong with that is kept silent."""
    show = sys.excepthook

    def excepthook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if issubclass(
            kind, KeyboardInterrupt
        ):  # Python would no longer end by SIGINT: it forgets when it evaluates text
            show(kind, value, trace)
            return
        try:
            spec = importlib.util.spec_from_file_location("record_exception", WRITER)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.write(path, kind, value, trace)
        except BaseException:
            pass
        show(kind, value, trace)

    sys.excepthook = excepthook


def run_next_sitecustomize() -> None:
    """Run the `sitecustomize` this one hides, if there is one."""
    path = [entry for entry in sys.path if os.path.abspath(entry or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def install() -> None:
    where, _, budget = os.environ.get("GPUSUP_MEMORY_BUDGET", "").partition(":")
    limit = {"host": limit_host, "device": limit_device}.get(where)
    if limit is not None:
        sys.meta_path.insert(0, AfterImport("torch", lambda torch: limit(torch, int(budget))))


if __name__ == "sitecustomize":
    install()
    run_next_sitecustomize()
    if path := os.environ.get("GPUSUP_EXCEPTIONS"):
        record_exceptions(path)  # last: the system's own may set a hook, as Ubuntu's does
