"""The trainer's parent: starts it, outlives the supervisor, records how it ended, sweeps what it left behind.

Run as a script by any Python, with nothing imported from gpusup: `shim.py ATTEMPT_DIRECTORY CWD COMMAND...`. It holds
no policy. The attempt directory is single use: the shim takes its lock, refuses if `start.json` exists, and the trainer
is not executed before `start.json` is durable, so starting an attempt twice starts it once.

Exit status of the first process (the caller waits for it; the shim proper is its orphan): 0 the trainer is under way,
1 it is not (`exit.json` says why if it could not be executed), 75 another shim has the directory, 76 it is used up.
`exit.json` is written as soon as the trainer is gone; when the shim itself is gone, the sweep is over.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Mapping

PR_SET_CHILD_SUBREAPER = 36
SWEEP_GRACE_S = 5.0
BUSY, USED = 75, 76
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE)


def main() -> None:
    directory, cwd, argv = sys.argv[1], sys.argv[2], sys.argv[3:]
    lock = os.open(f"{directory}/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os._exit(BUSY)
    if os.path.exists(f"{directory}/start.json") or os.path.exists(f"{directory}/exit.json"):
        os._exit(USED)
    ready_r, ready_w = os.pipe()
    if os.fork():  # the caller's child: leave as soon as the trainer is under way
        os.close(ready_w)
        os._exit(0 if os.read(ready_r, 1) else 1)
    os.close(ready_r)
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    pid = start(directory, cwd, argv)
    os.write(ready_w, b"x")
    os.close(ready_w)
    wait_and_sweep(directory, pid)


def start(directory: str, cwd: str, argv: list[str]) -> int:
    """Fork the trainer; it executes only once `start.json` is durable, and never if this process dies before."""
    go_r, go_w = os.pipe()
    failed_r, failed_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go_w)
        if os.read(go_r, 1):
            execute(directory, cwd, argv, failed_w)
        os._exit(127)
    os.close(go_r)
    os.close(failed_w)
    me = os.getpid()
    trainer = {"pid": pid, "start_ticks": start_ticks(pid), "boot_id": boot_id(), "at": time.time()}
    write_durably(directory, "start.json", {**trainer, "shim_pid": me, "shim_start_ticks": start_ticks(me)})
    os.write(go_w, b"x")
    os.close(go_w)
    error = os.read(failed_r, 4096)  # empty when exec succeeded: the descriptor closes on exec
    os.close(failed_r)
    if error:
        os.waitpid(pid, 0)
        write_durably(directory, "exit.json", {"exec_error": error.decode(), "at": time.time()})
        os._exit(0)
    return pid


def execute(directory: str, cwd: str, argv: list[str], failed_w: int) -> None:
    """Become the trainer: own session, output to its own append-only files, default signals."""
    try:
        os.setsid()
        for number in (*IGNORED, signal.SIGXFSZ):  # Python itself ignores SIGPIPE and SIGXFSZ
            signal.signal(number, signal.SIG_DFL)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(f"{directory}/stdout.log", flags, 0o600), 1)
        os.dup2(os.open(f"{directory}/stderr.log", flags, 0o600), 2)
        os.chdir(cwd)
        try:
            with open("/proc/self/oom_score_adj", "w") as f:
                f.write("200")  # short of memory, the kernel should take the trainer before its keepers
        except OSError:
            pass
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(failed_w, f"{error.errno} {error.strerror}".encode())
    os._exit(127)


def wait_and_sweep(directory: str, pid: int) -> None:
    """Reap until the trainer is gone, record its end, then end every descendant it left."""
    while True:
        reaped, status, usage = os.wait4(-1, 0)
        if reaped == pid:
            break
    end = {
        "status": status,
        "at": time.time(),
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "max_rss_bytes": usage.ru_maxrss * 1024,
    }
    write_durably(directory, "exit.json", end)
    if swept := sweep():
        write_durably(directory, "swept.json", {"processes": swept, "at": time.time()})


def sweep() -> int:
    """SIGTERM, then SIGKILL, every remaining descendant; orphans are ours because this process is a subreaper."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    found: set[int] = set()
    for number, grace_s in ((signal.SIGTERM, SWEEP_GRACE_S), (signal.SIGKILL, SWEEP_GRACE_S)):
        deadline = time.monotonic() + grace_s
        told: set[int] = set()
        while remaining := descendants():
            found |= remaining
            for pid in remaining - told:
                signal_quietly(pid, number)
            told |= remaining
            left = deadline - time.monotonic()
            if left <= 0:
                break
            signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.2))
            reap()
        else:
            return len(found)
    return len(found)


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def descendants() -> set[int]:
    """Live descendants of this process, zombies not counted."""
    reap()
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        parent = todo.pop()
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for task in tasks:
            try:
                with open(f"/proc/{parent}/task/{task}/children") as f:
                    children = {int(pid) for pid in f.read().split()}
            except OSError:
                continue
            todo += children - found
            found |= children
    return found


def signal_quietly(pid: int, number: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, number)
    except OSError:
        pass


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot: with the pid and the boot id, its identity."""
    with open(f"/proc/{pid}/stat", "rb") as f:  # a process may have any bytes for a name
        return int(f.read().rsplit(b")", 1)[1].split()[19])


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f.read().strip()


def write_durably(directory: str, name: str, content: Mapping[str, object]) -> None:
    temporary = f"{directory}/.{name}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, json.dumps(content).encode())
    os.fsync(fd)
    os.close(fd)
    os.rename(temporary, f"{directory}/{name}")
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


if __name__ == "__main__":
    main()
