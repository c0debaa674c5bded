"""The tables of docs/trainer-protocol.md, for the tests that hold the program to them."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "trainer-protocol.md"
_TEXT = DOCUMENT.read_text()
_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str, type(None)),
    "integer": (int, type(None)),
    "number": (int, float, type(None)),
    "boolean": (bool,),
    "object": (dict,),
}


def _rows(header: str) -> list[list[str]]:
    """The cells of the table that begins with `header`."""
    lines = _TEXT[_TEXT.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _names(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


_EVENTS = _rows("| `kind` | Fields |")
KINDS = {name: (_names(row[1]), _names(row[2])) for row in _EVENTS for name in _names(row[0])}
"""Kind: its needed and its optional fields; `kind` and `step` are in every event."""
UNUSED = {name for row in _EVENTS for name in _names(row[0]) if row[4] == "nothing"}
"""Kinds that gpusup does nothing with."""
FIELD_TYPES = {name: _TYPES[row[1]] for row in _rows("| Field | Type |") for name in _names(row[0])}
