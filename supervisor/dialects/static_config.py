"""Reading a script's settings without executing it: module-level assignments, with constant expressions folded.

What depends on the machine or on anything but constants is unknown, with the place and the reason; it is never guessed.
"""

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.events import Origin
from ..core.policy import Scalar

Origins = dict[str, Origin]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_MAX_DIGITS = 40


class NotConstant(Exception):
    """The expression depends on more than constants."""


def fold(node: ast.expr, names: Origins) -> Scalar:
    """The value of a constant expression; `names` are settings already known.

    Raises:
        NotConstant: anything that would have to be executed to be known.
    """
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in names and (known := names[name].value) is not None:
            return known
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = fold(operand, names)
            if isinstance(value, (int, float)):
                return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _binary(type(op), fold(left, names), fold(right, names))
    raise NotConstant


def _binary(op: type[ast.operator], left: Scalar, right: Scalar) -> Scalar:
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    texts = isinstance(left, str) and isinstance(right, str) and op is ast.Add
    if not (numbers or texts) or (op is ast.Pow and (abs(float(right)) > _MAX_DIGITS or abs(float(left)) > 1e6)):
        raise NotConstant
    try:
        value = _BINARY[op](left, right)
    except (ArithmeticError, ValueError) as error:
        raise NotConstant from error
    if isinstance(value, (bool, int, float, str)):
        return value
    raise NotConstant


def read_assignments(path: Path, shown: str, known: Origins, until: str | None = None) -> Origins:
    """Settings assigned at the top level of the Python file at `path`, on top of `known`.

    Args:
        shown: how to name the file to a person.
        until: stop at the first statement whose source contains this text (where the script reads its overrides).

    Raises:
        SyntaxError, OSError, UnicodeDecodeError: the file cannot be read as Python.
    """
    source = path.read_text(encoding="utf-8")
    found = dict(known)
    for statement in ast.parse(source, shown).body:
        if until is not None and until in (ast.get_source_segment(source, statement) or ""):
            break
        _assign(statement, shown, found)
    return found


def _assign(statement: ast.stmt, shown: str, found: Origins) -> None:
    where = f"{shown}:{statement.lineno}"
    match statement:
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.AnnAssign(target=ast.Name(id=name), value=value)
        ):
            if value is not None:
                found[name] = _origin(value, where, found)
        case ast.ImportFrom(names=[ast.alias(name="*")]) | ast.Expr(value=ast.Call(func=ast.Name(id="exec"))):
            why = f"`{ast.unparse(statement)[:80]}` may assign it"
            found.update(dict.fromkeys(found, Origin(where=where, why_unknown=why)))
        case ast.Expr() | ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
            return
        case _:  # a branch, a loop, a tuple: whatever it assigns cannot be known without executing it
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found[node.id] = Origin(
                        where=where, why_unknown="it is assigned in a statement that must be executed"
                    )


def _origin(value: ast.expr, where: str, names: Origins) -> Origin:
    try:
        return Origin(value=fold(value, names), where=where)
    except NotConstant:
        return Origin(where=where, why_unknown="it depends on the machine or on code: " + ast.unparse(value)[:80])
