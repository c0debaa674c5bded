"""`gpusup policy`: check policy files, and show what one means with every default written out."""

import json
import sys
from typing import Any

import click
import msgspec

from ..errors import PolicyError
from ..policy_file import InvalidPolicy, dump_policy, find_policy, load_policy

SCHEMA_VERSION = 1

CHECK_EXIT_PROBLEMS = 1


@click.group(
    name="policy",
    epilog="Example: gpusup policy check my.yaml && gpusup policy show my.yaml",
    help="Check policy files and show what they mean. FILE is a path, or the name of a policy gpusup comes with.",
)
def command() -> None:
    pass


@command.command(epilog="Example: gpusup policy check policies/*.yaml")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def check(files: tuple[str, ...], as_json: bool) -> None:
    """Check policy files and report every problem with its line and column.

    Exits with 0 when all are valid, 1 when one has problems and 2 when one cannot be read.
    """
    results, worst = [], 0
    for file in files:
        result, exit_code, text = _check(file)
        results.append(result)
        worst = max(worst, exit_code)
        if not as_json:
            click.echo(text, err=not result["ok"])
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "files": results}, indent=2))
    sys.exit(worst)


def _check(file: str) -> tuple[dict[str, Any], int, str]:
    """The result of one file for machines, the exit code it asks for, and the result for people."""
    errors: list[dict[str, Any]] = []
    try:
        count = len(load_policy(find_policy(file)).remediations)
        exit_code, text = 0, f"{file}: ok ({count} remediation{'' if count == 1 else 's'})"
    except InvalidPolicy as error:
        errors = [{"line": p.at.line, "column": p.at.column, "message": p.message} for p in error.problems]
        exit_code, text = CHECK_EXIT_PROBLEMS, str(error)
    except PolicyError as error:  # no such file, or not readable
        errors = [{"line": None, "column": None, "message": str(error)}]
        exit_code, text = error.exit_code, str(error)
    return {"file": file, "ok": not errors, "errors": errors}, exit_code, text


@command.command(epilog="Example: gpusup policy show rtx4070 > my.yaml")
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with amounts in seconds and bytes.")
def show(file: str, as_json: bool) -> None:
    """Show a policy with every default written out, as YAML that can be used as a policy."""
    policy = load_policy(find_policy(file))
    if as_json:
        shown = {"schema_version": SCHEMA_VERSION, "file": file, "policy": _all_fields(policy)}
        click.echo(json.dumps(shown, indent=2))
    else:
        click.echo(dump_policy(policy), nl=False)


def _all_fields(value: Any) -> Any:
    """As msgspec would write it, but with the fields that have their default."""
    if isinstance(value, msgspec.Struct):
        return {name: _all_fields(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_all_fields(item) for item in value]
    return value
