"""The table that the benches of the trainer print into, a row as soon as it is measured."""

from collections.abc import Sequence
from statistics import median


def header() -> None:
    """The names of the columns."""
    print(f"{'what':<50} | {'ours':>12} | {'theirs':>12} | {'ratio (min-max)':>20} | {'wanted':>9} | met", flush=True)


def row(what: str, ours: str, theirs: str, ratios: Sequence[float], wanted: str) -> None:
    """One row: the median of `ratios`, one for each pair of runs, and whether it is `wanted`, such as `>= 1.25`."""
    relation, _, limit = wanted.partition(" ")
    value = median(ratios)
    met = value >= float(limit) if relation == ">=" else value <= float(limit)
    spread = f"{value:.3g} ({min(ratios):.3g}-{max(ratios):.3g})"
    print(f"{what:<50} | {ours:>12} | {theirs:>12} | {spread:>20} | {wanted:>9} | {'yes' if met else 'NO'}", flush=True)
