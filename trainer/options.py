"""The knobs of a script: declared in it as constants, overridden by configuration files and the command line.

A knob is a module-level assignment of a constant to a lower-case name; the comment behind it is its help text. Both
the script and the configuration files are read as syntax and folded, never executed, so any program can know a
script's knobs without running it, and a configuration file cannot do anything but assign.
"""

import ast
import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import TrainerError

Value = bool | int | float | str

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Knob:
    """One setting: its default, which also fixes its type, and its help text."""

    default: Value
    help: str


def declared(source: str) -> dict[str, Knob]:
    """The knobs a script declares, in order."""
    knobs: dict[str, Knob] = {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if name.islower() and not name.startswith("_"):
            default = fold(node.value, {known: knob.default for known, knob in knobs.items()})
            comment = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :]
            knobs[name] = Knob(default, comment.split("# noqa")[0].strip(" #"))
    return knobs


def parse(arguments: Sequence[str], knobs: Mapping[str, Knob]) -> dict[str, Value]:
    """The value of every knob after `arguments`: configuration files and --key=value, left to right, the last wins.

    Raises TrainerError for anything that is neither, an unknown knob, or a value of the wrong type.
    """
    values = {name: knob.default for name, knob in knobs.items()}
    for argument in arguments:
        if not argument.startswith("-"):
            values.update(read_config(Path(argument), knobs, values))
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals or not argument.startswith("--"):
            raise TrainerError(f"{argument}: write settings as --key=value, for example --batch_size=8")
        _check_known(name, knobs, "command line")
        values[name] = _from_text(name, text, knobs[name].default)
    return values


def read_config(path: Path, knobs: Mapping[str, Knob], known: Mapping[str, Value]) -> dict[str, Value]:
    """The assignments of a configuration file; the values `known` so far may be used in them."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body
    except OSError as error:
        raise TrainerError(f"{path}: cannot read this configuration file: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise TrainerError(f"{path}: not a Python file: {error}") from None
    values: dict[str, Value] = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}:{node.lineno}"
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            raise TrainerError(f"{where}: only assignments such as `batch_size = 8` are allowed here")
        name = node.targets[0].id
        _check_known(name, knobs, where)
        try:
            value = fold(node.value, {**known, **values})
        except (ValueError, ArithmeticError) as error:
            raise TrainerError(f"{where}: {name}: {error}") from None
        values[name] = _of_type(name, value, knobs[name].default, where)
    return values


def fold(node: ast.expr, known: Mapping[str, Value]) -> Value:
    """The value of a constant expression. Raises ValueError for anything else, ArithmeticError for 1/0."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(fold(operand, known))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            result: Value = BINARY[type(op)](_number(fold(left, known)), _number(fold(right, known)))
            return result
    raise ValueError(f"`{ast.unparse(node)}` is not a constant: write a number, a string, True or False")


def describe(knobs: Mapping[str, Knob]) -> str:
    """The help text: one line for each knob."""
    width = max(len(f"{name}={knob.default}") for name, knob in knobs.items())
    return "\n".join(f"  --{f'{name}={knob.default}':<{width}}  {knob.help}" for name, knob in knobs.items())


def check_ranges(
    values: Mapping[str, Value],
    at_least: Mapping[str, float],
    at_most: Mapping[str, float],
    below_one: Sequence[str],
    choices: Mapping[str, Sequence[str]],
) -> None:
    """Raise TrainerError for a value out of its range, or not among its choices."""
    for name, minimum in at_least.items():
        if _number(values[name]) < minimum:
            raise TrainerError(f"{name}={values[name]} is too small: it must be at least {minimum:g}")
    for name, maximum in at_most.items():
        if _number(values[name]) > maximum:
            raise TrainerError(f"{name}={values[name]} is too large: it must be at most {maximum:g}")
    for name in below_one:
        if _number(values[name]) >= 1:
            raise TrainerError(f"{name}={values[name]} must be below 1")
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise TrainerError(f"{name}={values[name]} is not one of {', '.join(allowed)}")


def _number(value: Value) -> int | float:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is not a number")
    return value


def _check_known(name: str, knobs: Mapping[str, Knob], where: str) -> None:
    if name not in knobs:
        near = difflib.get_close_matches(name.replace("-", "_"), knobs, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise TrainerError(f"{where}: there is no setting {name!r}; {hint}")


def _from_text(name: str, text: str, default: Value) -> Value:
    """The value written as `text` on the command line, of the type of `default`."""
    try:
        if isinstance(default, bool):
            if text.lower() not in TRUE + FALSE:
                raise ValueError
            return text.lower() in TRUE
        if isinstance(default, str):
            return text
        return _of_type(name, int(text) if isinstance(default, int) else float(text), default, "command line")
    except ValueError:
        raise TrainerError(f"command line: {name}={text}: {_wanted(default)} is needed, such as {default}") from None


def _of_type(name: str, value: Value, default: Value, where: str) -> Value:
    """`value` as the type of `default`; a whole number will do for a float."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
        raise TrainerError(f"{where}: {name}={value!r}: {_wanted(default)} is needed, such as {default!r}")
    return value


def _wanted(default: Value) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}[type(default)]
