"""Amounts as people write them: memory (`1.2GiB`), time (`10m`), counts; and back."""

import re
from decimal import ROUND_HALF_EVEN, Decimal

BYTE_UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
"""GiB and GB differ by 7 %, which decides whether a run fits: each means what it says, and a bare `G` is refused."""

SECONDS = {"d": Decimal(86400), "h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}

_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{0,18})?"
_BYTES = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")
_PART = re.compile(rf"\s*({_NUMBER})\s*(ms|[dhms])(?![A-Za-z])")
_UNITS_BY_LOWER = {unit.lower(): size for unit, size in BYTE_UNITS.items()}


def parse_bytes(text: str) -> int:
    """`1.2GiB`, `500 MB`, `4096` (bytes) as a number of bytes, rounded to the nearest.

    Raises:
        ValueError: with a message that says what to write instead.
    """
    found = _BYTES.fullmatch(text.strip()) if text.isascii() else None
    if found is None:
        raise ValueError("not an amount of memory; write a number and a unit, such as 1.2GiB")
    number, unit = Decimal(found[1]), found[2]
    if not unit:
        if "." in found[1]:
            raise ValueError("a part of a byte; write a unit, such as 1.2GiB")
        return int(number)
    size = _UNITS_BY_LOWER.get(unit.lower())
    if size is None:
        wanted = f"{unit.upper()}iB or {unit.upper()}B" if unit.upper() in ("K", "M", "G", "T") else "KiB, MiB or GiB"
        raise ValueError(f"unknown unit of memory '{unit[:12]}'; write {wanted}")
    return int((number * size).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def format_bytes(count: int) -> str:
    """`1.20 GiB`: binary units, two decimals from KiB on; for people, so not exact."""
    if abs(count) < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        # Compared as printed: 1023.999 KiB would read "1024.00 KiB".
        if abs(round(value, 2)) < 1024:
            return f"{value:.2f} {unit}"
    return f"{value / 1024:.2f} TiB"


def parse_duration(text: str) -> float:
    """`10m`, `1h30m`, `1.5h`, `250ms` in seconds; units d, h, m, s, ms, each at most once and in this order.

    Raises:
        ValueError: with a message that says what to write instead.
    """
    text = text.strip()
    if not text.isascii():
        raise ValueError("not a duration; write a number and a unit, such as 90s or 10m")
    if re.fullmatch(_NUMBER, text):
        if Decimal(text) == 0:
            return 0.0
        raise ValueError(f"a duration without a unit; write {text}s or {text}m")
    total, at, order, last = Decimal(0), 0, list(SECONDS), -1
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            raise ValueError("not a duration; write a number and a unit, such as 90s, 10m or 1h30m")
        number, unit = part[1], part[2]
        if order.index(unit) <= last:
            raise ValueError(f"'{unit}' stands after a unit that is as small or smaller; write it like 1h30m")
        total, at, last = total + Decimal(number) * SECONDS[unit], part.end(), order.index(unit)
    if last < 0:
        raise ValueError("empty; write a number and a unit, such as 90s or 10m")
    return float(total)


def format_duration(seconds: float) -> str:
    """`8m12s`, `7h50m`, `1.5s`, `250ms`: for people, to the second from ten seconds on."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if round(seconds * 1000) < 1000:
        return f"{round(seconds * 1000)}ms" if round(seconds * 1000) else "0s"
    if round(seconds, 1) < 10:
        return f"{round(seconds, 1):g}s"
    rest, parts = round(seconds), ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        parts += f"{count}{unit}" if count else ""
    return parts


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
