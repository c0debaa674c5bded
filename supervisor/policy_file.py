"""Reads a policy from YAML (docs/policy.md) and writes it back; the types are in `core.policy`.

A person fixes a policy once, not once per mistake: everything wrong with it is reported together, each problem with
the line and column of the key or value that is wrong.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from .core.policy import Policy, Remediation
from .errors import PolicyError
from .policy_reader import PolicyReader
from .policy_values import listed, suggestion
from .units import format_bytes, format_duration, parse_bytes, parse_duration
from .yaml_nodes import MAX_BYTES, At, Problem, Scalar, read_yaml, resolve

MOST_PROBLEMS = 20

SMALLEST = "{version: 1, remediations: [{step: micro_batch}]}"


class InvalidPolicy(PolicyError):
    """What is wrong with a policy, also as data."""

    def __init__(self, name: str, problems: list[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        shown = self.problems[:MOST_PROBLEMS]
        lines = [f"{name}:{p.at.line}:{p.at.column}: error: {p.message}" for p in shown]
        if len(self.problems) > MOST_PROBLEMS:
            lines.append(f"and {len(self.problems) - MOST_PROBLEMS} more")
        super().__init__("\n".join(lines))


def load_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        PolicyError: when it cannot be read or is not valid.
    """
    name = os.fsencode(path).decode(errors="replace")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # one more than is allowed is enough to know
    except OSError as error:
        raise PolicyError(f"{name}: cannot be read ({error.strerror}); name a policy file") from None
    return load_policy_text(data, name)


def load_policy_text(text: bytes, name: str) -> Policy:
    """The policy in `text`; `name` stands for it in messages.

    Raises:
        PolicyError: when it is not valid; the message has one line per problem.
    """
    root, problems = read_yaml(text)
    if root is None or (isinstance(root, Scalar) and root.value is None):
        empty = Problem(At(1, 1), f"the policy is empty; the smallest one is {SMALLEST}")
        raise InvalidPolicy(name, problems or [empty])
    reader = PolicyReader(problems)
    policy = reader.policy(root)
    if problems or policy is None:
        raise InvalidPolicy(name, problems)
    return policy


def shipped_policies() -> dict[str, Path]:
    """The policies that come with gpusup, by name."""
    from importlib.resources import files

    try:
        folder = Path(str(files("gpusup.policies")))
    except ModuleNotFoundError:  # run from a checkout that is not installed
        folder = Path(__file__).resolve().parent.parent / "policies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_policy(name_or_path: str) -> Path:
    """The file that is meant: a path that exists, or else a shipped policy by its name.

    Raises:
        PolicyError: when it is neither.
    """
    path = Path(name_or_path)
    try:
        exists, folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # too long for a path, or with a NUL in it
        exists = folder = False
    if exists and not folder:
        return path
    shipped = shipped_policies()
    found = shipped.get(name_or_path.removesuffix(".yaml"))
    if found is not None:
        return found
    if folder:
        raise PolicyError(f"{name_or_path!r} is a folder, not a policy; name a file in it")
    hint = suggestion(name_or_path.removesuffix(".yaml"), shipped) or f"give a path, or one of {listed(shipped)}"
    raise PolicyError(f"no policy file {name_or_path!r}, and gpusup comes with none of that name; {hint}")


def dump_policy(policy: Policy) -> str:
    """The policy as YAML with every default written out; loading it gives the same policy."""
    written = _as_written(policy)
    return str(
        yaml.dump(written, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    )


def _as_written(policy: Policy) -> dict[str, Any]:
    """A policy in the keys and units of the file."""
    written: dict[str, Any] = {"version": policy.version}
    if policy.description:
        written["description"] = policy.description
    written["remediations"] = [_rung_as_written(rung) for rung in policy.remediations]
    if (restore := policy.restore) is not None:
        written["restore"] = {
            "after_steps": restore.after_steps,
            "order": list(restore.order),
            "backoff": restore.backoff,
            "max_tries": restore.max_tries,
            "retry_failed": restore.retry_failed,
        }
    written["limits"] = {
        "max_attempts": policy.limits.max_attempts,
        "grace": _exact_duration(policy.limits.grace_s),
        "hang_after": _exact_duration(policy.limits.hang_after_s),
    }
    if policy.checkpoint_every is not None:
        written["checkpoint_every"] = policy.checkpoint_every
    if policy.memory_budget_bytes is not None:
        written["memory_budget"] = _exact_bytes(policy.memory_budget_bytes)
    return written


def _rung_as_written(rung: Remediation) -> dict[str, Any]:
    written: dict[str, Any] = {"name": rung.name}
    if rung.set is not None:
        written["set"] = dict(rung.set)
    elif rung.step is not None:
        written |= {"step": rung.step, "min": rung.min}
    elif rung.wait_for_memory_s is not None:
        written["wait_for_memory"] = _exact_duration(rung.wait_for_memory_s)
    if rung.when:
        written["when"] = dict(rung.when)
    if rung.set is not None:
        written["undo_if_useless"] = rung.undo_if_useless
    return written


def _exact_duration(seconds: float) -> str:
    shown = format_duration(seconds)
    return shown if parse_duration(shown) == seconds else f"{seconds:f}".rstrip("0").rstrip(".") + "s"


def _exact_bytes(count: int) -> str | int:
    shown = format_bytes(count)
    return shown if parse_bytes(shown) == count else count


class _Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` reads back: on/off, and quotes round text that YAML 1.2 takes for a number."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if resolve(text) == text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_switch(dumper: yaml.SafeDumper, switch: bool) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:bool", "on" if switch else "off")


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(bool, _represent_switch)
