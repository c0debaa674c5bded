"""From YAML nodes to a `Policy`: one method per part of the file.

A wrong part is noted and left out, and the reading goes on, so that everything wrong is found at once. What comes back
then is only good for being thrown away.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from .core.policy import KNOBS, LEVERS, SETTABLE, Limits, Policy, Remediation, Restore, Settings
from .policy_values import (
    Wrong,
    as_backoff,
    as_count,
    as_description,
    as_duration,
    as_list,
    as_map,
    as_memory,
    as_name,
    as_one_of,
    as_setting,
    as_switch,
    as_wait,
    listed,
    quote,
    unknown,
    wrong,
)
from .yaml_nodes import At, Entry, Node, Problem, Scalar

T = TypeVar("T")

VERSION = 1
POLICY_KEYS = ("version", "description", "remediations", "restore", "limits", "checkpoint_every", "memory_budget")
KINDS = ("set", "step", "wait_for_memory")
REMEDIATION_KEYS = ("name", *KINDS, "min", "when", "undo_if_useless")
RESTORE_KEYS = ("after_steps", "order", "backoff", "max_tries", "retry_failed")
LIMITS_KEYS = ("max_attempts", "grace", "hang_after")

BY_STEP = "use 'step: micro_batch', which holds the global batch"
NOT_SETTABLE = {
    "batch_size": BY_STEP,
    "micro_batch": BY_STEP,
    "gradient_accumulation_steps": BY_STEP,
    "block_size": f"that would be another experiment; set {listed(SETTABLE)}",
}


class PolicyReader:
    """Reads one policy; `problems` may hold some already and gets the others."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems

    def policy(self, root: Node) -> Policy | None:
        """The policy, None when nothing of it could be read."""
        entries = self._try(as_map, root, "a policy", "{version: 1}")
        if entries is None or not self._version(root.at, entries):
            return None
        self._known_keys(entries, POLICY_KEYS, "the policy")
        return Policy(
            description=self._get(entries, "description", as_description) or "",
            remediations=self._get(entries, "remediations", self._remediations) or (),
            restore=self._get(entries, "restore", self._restore),
            limits=self._get(entries, "limits", self._limits) or Limits(),
            checkpoint_every=self._get(entries, "checkpoint_every", as_count),
            memory_budget_bytes=self._get(entries, "memory_budget", as_memory),
        )

    def _version(self, at: At, entries: dict[str, Entry]) -> bool:
        """Whether the rest is worth reading: in a newer version it may mean anything."""
        if "version" not in entries:
            self._report(at, f"version is missing; write 'version: {VERSION}' first")
            return True
        node = entries["version"].node
        value = node.value if isinstance(node, Scalar) and not isinstance(node.value, bool) else None
        if isinstance(value, int) and value > VERSION:
            what = f"version {quote(value)} is written for a newer gpusup"
            self._report(node.at, f"{what}; update gpusup, or write a policy of version {VERSION}")
            return False
        if not isinstance(value, int) or value != VERSION:
            self._note(wrong(node, "version", str(VERSION), f"write 'version: {VERSION}'"))
        return True

    # --- the ladder

    def _remediations(self, node: Node, key: str) -> tuple[Remediation, ...]:
        names: dict[str, int] = {}
        rungs = [self._remediation(item, names) for item in as_list(node, key, "[{step: micro_batch}]")]
        return tuple(rung for rung in rungs if rung is not None)

    def _remediation(self, node: Node, names: dict[str, int]) -> Remediation | None:
        entries = self._try(as_map, node, "a remediation", "{step: micro_batch}")
        if entries is None:
            return None
        self._known_keys(entries, REMEDIATION_KEYS, "a remediation")
        kind = self._kind(node.at, entries)
        step = self._get(entries, "step", self._step)
        changes = self._get(entries, "set", self._changes)
        wait_s = self._get(entries, "wait_for_memory", as_wait)
        undo = self._get(entries, "undo_if_useless", as_switch)
        return Remediation(
            name=self._name(entries, names) or _default_name(kind, changes or {}),
            set=changes,
            step="micro_batch" if step else None,
            min=self._get(entries, "min", as_count) or 1,
            wait_for_memory_s=wait_s,
            when=self._get(entries, "when", self._condition) or {},
            undo_if_useless=undo is not False,
        )

    def _kind(self, at: At, entries: dict[str, Entry]) -> str:
        """Which of the kinds of remediation it is; noted when it is none or several."""
        kind, *more = [key for key in entries if key in KINDS] or [""]
        if not kind:
            self._report(at, f"the remediation does nothing; give it one of {listed(KINDS)}")
        for other in more:
            what = f"'{other}' stands beside '{kind}'"
            self._report(entries[other].key_at, f"{what}; a remediation has only one of them, so make two")
        for key, kinds in (("min", ("step",)), ("undo_if_useless", ("set",))):
            if key in entries and kind and kind not in kinds:
                self._report(entries[key].key_at, f"'{key}' means nothing beside '{kind}'; remove it")
        return kind

    def _name(self, entries: dict[str, Entry], names: dict[str, int]) -> str | None:
        name = self._get(entries, "name", as_name)
        if name is None:
            return None
        at = entries["name"].node.at
        if name in names:
            self._report(at, f"the name {quote(name)} is taken, on line {names[name]}; choose another")
        names.setdefault(name, at.line)
        return name

    def _step(self, node: Node, key: str) -> str:
        return as_one_of(node, key, ("micro_batch",))

    def _changes(self, node: Node, key: str) -> Settings:
        entries = as_map(node, key, "{compile: off}")
        for knob in [knob for knob in entries if knob in NOT_SETTABLE]:
            self._report(entries[knob].key_at, f"a policy may not set {knob}; {NOT_SETTABLE[knob]}")
        if not entries:
            self._report(node.at, "set changes nothing; name a setting, such as {compile: off}")
        return self._settings({k: entry for k, entry in entries.items() if k not in NOT_SETTABLE}, key, SETTABLE)

    def _condition(self, node: Node, key: str) -> Settings:
        entries = as_map(node, key, "{dtype: bfloat16}")
        if not entries:
            self._report(node.at, "when has no condition; name a setting, such as {dtype: bfloat16}, or leave it out")
        return self._settings(entries, key, KNOBS)

    def _settings(self, entries: dict[str, Entry], where: str, known: Iterable[str]) -> Settings:
        self._known_keys(entries, known, where, "setting")
        values = {knob: self._get(entries, knob, as_setting) for knob in entries if knob in known}
        return {knob: value for knob, value in values.items() if value is not None}

    # --- going back up, and the end

    def _restore(self, node: Node, key: str) -> Restore:
        entries = as_map(node, key, "{after_steps: 100}, or leave it out to give nothing back")
        self._known_keys(entries, RESTORE_KEYS, key)
        default = Restore()
        return Restore(
            after_steps=self._get(entries, "after_steps", as_count) or default.after_steps,
            order=self._get(entries, "order", self._order) or default.order,
            backoff=self._get(entries, "backoff", as_backoff) or default.backoff,
            max_tries=self._get(entries, "max_tries", as_count) or default.max_tries,
            retry_failed=self._get(entries, "retry_failed", as_switch) or default.retry_failed,
        )

    def _order(self, node: Node, key: str) -> tuple[str, ...]:
        items = as_list(node, key, "[compile, micro_batch]")
        if not items:
            self._report(node.at, "order names nothing; name what is given back first, or leave order out")
        levers: list[str] = []
        for item in items:
            lever = self._try(as_one_of, item, "lever", LEVERS)
            if lever in levers:
                self._report(item.at, f"order names {lever} twice; remove one")
            elif lever is not None:
                levers.append(lever)
        return tuple(levers)

    def _limits(self, node: Node, key: str) -> Limits:
        entries = as_map(node, key, "{max_attempts: 24, grace: 60s}")
        self._known_keys(entries, LIMITS_KEYS, key)
        grace_s, hang_after_s = self._get(entries, "grace", as_duration), self._get(entries, "hang_after", as_duration)
        return Limits(
            max_attempts=self._get(entries, "max_attempts", as_count) or Limits().max_attempts,
            grace_s=Limits().grace_s if grace_s is None else grace_s,
            hang_after_s=Limits().hang_after_s if hang_after_s is None else hang_after_s,
        )

    # --- noting what is wrong

    def _get(self, entries: dict[str, Entry], key: str, read: Callable[[Node, str], T]) -> T | None:
        """The value of a key, None when it is not given or wrong."""
        return self._try(read, entries[key].node, key) if key in entries else None

    def _try(self, read: Callable[..., T], node: Node, *rest: object) -> T | None:
        try:
            return read(node, *rest)
        except Wrong as error:
            self._note(error)
            return None

    def _note(self, error: Wrong) -> None:
        if error.problem is not None:
            self.problems.append(error.problem)

    def _report(self, at: At, message: str) -> None:
        self.problems.append(Problem(at, message))

    def _known_keys(self, entries: dict[str, Entry], known: Iterable[str], where: str, what: str = "key") -> None:
        for key, entry in entries.items():
            if key not in known:
                self.problems.append(unknown(entry.key_at, what, key, known, f" in {where}"))


def _default_name(kind: str, changes: Settings) -> str:
    if kind != "set":
        return "micro-batch down" if kind == "step" else "wait for memory"
    shown = {True: "on", False: "off"}
    return ", ".join(f"{knob} {shown[v] if isinstance(v, bool) else v}" for knob, v in changes.items())
