"""Amounts of memory and time, read and written."""

import contextlib

import pytest
from gpusup.supervisor.units import format_bytes, format_duration, parse_bytes, parse_duration
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.2GiB", 1288490189),
        ("1.20 GiB", 1288490189),
        ("12gib", 12 * 2**30),
        ("412 MiB", 412 * 2**20),
        ("500MB", 500_000_000),
        ("1 TiB", 2**40),
        ("4096", 4096),
        (" 7 B ", 7),
        ("0", 0),
    ],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "such as 1.2GiB"),
        ("GiB", "such as 1.2GiB"),
        ("-1GiB", "such as 1.2GiB"),
        ("1e9", "such as 1.2GiB"),
        ("\uff11GiB", "such as 1.2GiB"),
        ("1.5", "a part of a byte"),
        ("1.2G", "write GiB or GB"),
        ("3 parsecs", "unknown unit of memory 'parsecs'"),
        ("9" * 5000, "such as 1.2GiB"),
    ],
)
def test_parse_bytes_refuses_with_advice(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1288490189, "1.20 GiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**50, "1024.00 TiB"),
        (-1717986918, "-1.60 GiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**50))
def test_formatted_bytes_parse_to_nearly_the_same(count: int) -> None:
    """Two decimals are at most half a percent of the unit away."""
    text = format_bytes(count)
    unit = parse_bytes("1" + text.split()[1])
    assert abs(parse_bytes(text) - count) <= max(unit * 0.00501, 0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600.0),
        ("60s", 60.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("5m250ms", 300.25),
        ("2d", 172800.0),
        ("8m12s", 492.0),
        ("0", 0.0),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "write a number and a unit"),
        ("10", "write 10s or 10m"),
        ("m", "write a number and a unit"),
        ("-10m", "write a number and a unit"),
        ("10 minutes", "such as 90s, 10m"),
        ("10m1h", "'h' stands after"),
        ("10m10m", "'m' stands after"),
        ("10m x", "such as 90s, 10m"),
        ("inf", "such as 90s, 10m"),
        ("\u0661m", "write a number and a unit"),
    ],
)
def test_parse_duration_refuses_with_advice(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "0s"),
        (0.25, "250ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (9.97, "10s"),
        (59.6, "1m"),
        (492.0, "8m12s"),
        (600, "10m"),
        (28200, "7h50m"),
        (90061, "1d1h1m1s"),
        (-5, "-5s"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 10**8))
def test_whole_seconds_survive_a_round_trip(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.floats(0, 1e8))
def test_any_duration_survives_to_the_precision_shown(seconds: float) -> None:
    shown = parse_duration(format_duration(seconds))
    assert abs(shown - seconds) <= (0.00051 if seconds < 0.9995 else 0.051 if seconds < 9.95 else 0.51)


@given(st.text(max_size=30))
def test_parsers_return_a_number_or_say_why_not(text: str) -> None:
    for parse in (parse_bytes, parse_duration):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
