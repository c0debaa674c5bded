"""Single values of a policy: each function turns one YAML node into a value, or raises `Wrong` with the problem.

`key` is what the value belongs to, for the message. Bool is an int to Python but never here.
"""

import unicodedata
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeVar

from .core.policy import DTYPES, KNOBS
from .core.policy import Scalar as SettingValue
from .units import parse_bytes, parse_duration
from .yaml_nodes import At, Entry, Items, Map, Node, Problem, Refused, Scalar

Number = TypeVar("Number", int, float)

LONGEST_NAME = 80
LONGEST_DESCRIPTION = 400
LARGEST = 2**53 - 1  # what every reader of the journal's JSON holds exactly
LARGEST_BACKOFF = 1000
LONGEST_WAIT_S = 7 * 86400.0
SMALLEST_BUDGET = 2**20

# What a thing is called elsewhere, where no likeness of letters leads to our word.
ALSO_CALLED = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "remedies": "remediations",
    "rules": "remediations",
    "batch_size": "micro_batch",
    "micro_batch_size": "batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "amp": "dtype",
    "precision": "dtype",
}


class Wrong(Exception):
    """A value cannot be used. Without a problem where that has been reported before."""

    def __init__(self, problem: Problem | None) -> None:
        super().__init__(problem)
        self.problem = problem


def listed(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} or {last}" if rest else last


def quote(value: object) -> str:
    """A value as it may stand in a message: on one line, and not all of a long one."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` when `word` looks like, or elsewhere means, one of the known words; else nothing."""
    known = tuple(known)
    if len(word) > 40:  # likeness is slow to compute for long texts, and nobody meant one
        return ""
    also = ALSO_CALLED.get(word.lower())
    close = [also] if also in known else get_close_matches(word.lower(), known, 1)
    return f"did you mean '{close[0]}'?" if close else ""


def unknown(at: At, what: str, word: str, known: Iterable[str], where: str = "") -> Problem:
    known = tuple(known)
    if ":" in word.rstrip(":"):  # in braces, `grace:1s` is one word
        advice = "write a space after the ':'"
    else:
        advice = suggestion(word, known) or f"use one of {listed(known)}"
    return Problem(at, f"unknown {what} {quote(word)}{where}; {advice}")


def wrong(node: Node, key: str, wanted: str, advice: str) -> Wrong:
    """`key` is not as `wanted`; `advice` says what to do."""
    if isinstance(node, Refused):
        return Wrong(None)
    if isinstance(node, Scalar):
        got = quote(node.text) if node.quoted or node.value is not None else "nothing"
    else:
        got = "a map" if isinstance(node, Map) else "a list"
    return Wrong(Problem(node.at, f"{key} must be {wanted}, got {got}; {advice}"))


def as_map(node: Node, key: str, example: str) -> dict[str, Entry]:
    if isinstance(node, Map):
        return node.entries
    raise wrong(node, key, "a map", f"write keys and values, such as {example}")


def as_list(node: Node, key: str, example: str) -> tuple[Node, ...]:
    if isinstance(node, Items):
        return node.items
    raise wrong(node, key, "a list", f"write one, such as {example}")


def as_name(node: Node, key: str) -> str:
    return _text(node, key, LONGEST_NAME)


def as_description(node: Node, key: str) -> str:
    return _text(node, key, LONGEST_DESCRIPTION)


def _text(node: Node, key: str, longest: int) -> str:
    if not isinstance(node, Scalar) or node.value is None:
        raise wrong(node, key, "text", f"write a few words, or leave {key} out")
    if not isinstance(node.value, str):
        raise wrong(node, key, "text", "put it in quotes")
    text = node.value.strip()
    # Text goes to terminals and into tables: no line breaks, no escape sequences, no half characters.
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise wrong(node, key, "one line of text", "remove line breaks and control characters")
    if not text:
        raise wrong(node, key, "text", f"write a few words, or leave {key} out")
    if len(text) > longest:
        raise Wrong(Problem(node.at, f"{key} has {len(text)} characters; write at most {longest}"))
    return text


def as_switch(node: Node, key: str) -> bool:
    if isinstance(node, Scalar) and isinstance(node.value, bool):
        return node.value
    in_quotes = isinstance(node, Scalar) and node.quoted
    raise wrong(node, key, "on or off", "remove the quotes" if in_quotes else f"write '{key}: on' or '{key}: off'")


def as_count(node: Node, key: str) -> int:
    """A whole number from 1."""
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(node, key, "a whole number", f"write one, such as '{key}: 8'")
    if value < 1:
        raise wrong(node, key, "at least 1", "write a number from 1 on")
    if value > LARGEST:
        raise wrong(node, key, f"at most {LARGEST}", "write a smaller number")
    return value


def as_backoff(node: Node, key: str) -> float:
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(node, key, "a number", "write how many times longer each wait is, such as 2")
    if not 1 <= value <= LARGEST_BACKOFF:  # refuses nan, too
        raise wrong(node, key, f"from 1 to {LARGEST_BACKOFF}", "2 doubles the wait after a try that failed")
    return float(value)


def as_duration(node: Node, key: str) -> float:
    return _amount(node, key, "a duration", "10m", parse_duration, LONGEST_WAIT_S, "7d")


def as_wait(node: Node, key: str) -> float:
    seconds = as_duration(node, key)
    if not seconds:
        raise wrong(node, key, "longer than nothing", "write how long to wait at most, such as 10m")
    return seconds


def as_memory(node: Node, key: str) -> int:
    count = _amount(node, key, "an amount of memory", "1.2GiB", parse_bytes, LARGEST, "8191 TiB")
    if count < SMALLEST_BUDGET:
        raise wrong(node, key, "at least 1 MiB", "write a unit, such as 12GiB")
    return count


def _amount(
    node: Node, key: str, what: str, example: str, parse: Callable[[str], Number], most: Number, limit: str
) -> Number:
    """A number with a unit, from its text: to YAML `10` is a number and `10m` a text."""
    if not isinstance(node, Scalar) or node.value is None or isinstance(node.value, bool):
        raise wrong(node, key, what, f"write one, such as {example}")
    if node.text.startswith("-"):
        raise wrong(node, key, f"{what}, which is not negative", "remove the minus sign")
    try:
        amount = parse(node.text)
    except ValueError as error:
        raise Wrong(Problem(node.at, f"{key} {quote(node.text)}: {error}")) from None
    if amount > most:
        raise wrong(node, key, f"at most {limit}", "write less")
    return amount


def as_one_of(node: Node, key: str, known: tuple[str, ...]) -> str:
    if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
        raise wrong(node, key, listed(known), "write it out" if len(known) == 1 else "write one of them")
    if node.value not in known:
        raise Wrong(unknown(node.at, key, node.value, known))
    return node.value


def as_setting(node: Node, knob: str) -> SettingValue:
    """A value of one of the knobs."""
    if bool in KNOBS[knob]:
        return as_switch(node, knob)
    if int in KNOBS[knob]:
        return as_count(node, knob)
    return as_one_of(node, knob, DTYPES)
