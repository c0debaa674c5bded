"""`gpusup policy check` and `show`, as a person and as a script sees them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gpusup.supervisor.commands.policy import command
from gpusup.supervisor.errors import PolicyError
from gpusup.supervisor.policy_file import find_policy, load_policy, load_policy_text

BAD = "version: 1\nlimts: {}\nremediations:\n  - set: {dtype: fp16}\n"


def policy(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    return str(path)


def test_check_ok() -> None:
    result = policy("check", "rtx4070", "default")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "rtx4070: ok (3 remediations)\ndefault: ok (2 remediations)\n"


def test_check_counts_one_remediation_as_one(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("{version: 1, remediations: [{step: micro_batch}]}")
    assert policy("check", str(path)).stdout == f"{path}: ok (1 remediation)\n"


def test_check_prints_every_problem_to_stderr_and_goes_on(bad: str) -> None:
    result = policy("check", bad, "demo")
    assert result.exit_code == 1
    assert result.stdout == "demo: ok (3 remediations)\n"
    assert result.stderr == (
        f"{bad}:2:1: error: unknown key 'limts' in the policy; did you mean 'limits'?\n"
        f"{bad}:4:18: error: unknown dtype 'fp16'; did you mean 'float16'?\n"
    )


def test_check_of_no_such_file_is_usage(bad: str, tmp_path: Path) -> None:
    result = policy("check", bad, "rtx4071")
    assert result.exit_code == 2
    assert "did you mean 'rtx4070'?" in result.stderr
    assert policy("check").exit_code == 2
    assert policy("check", str(tmp_path)).exit_code == 2


def test_check_json(bad: str) -> None:
    result = policy("check", "--json", bad, "demo", "rtx4071")
    assert result.exit_code == 2
    shown = json.loads(result.stdout)
    assert shown["schema_version"] == 1
    assert shown["files"][0] == {
        "file": bad,
        "ok": False,
        "errors": [
            {"line": 2, "column": 1, "message": "unknown key 'limts' in the policy; did you mean 'limits'?"},
            {"line": 4, "column": 18, "message": "unknown dtype 'fp16'; did you mean 'float16'?"},
        ],
    }
    assert shown["files"][1] == {"file": "demo", "ok": True, "errors": []}
    assert shown["files"][2]["errors"][0]["line"] is None


def test_check_json_has_problems_beyond_the_twenty_shown(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text("version: 1\n" + "".join(f"key{n}: 1\n" for n in range(25)))
    assert len(json.loads(policy("check", "--json", str(path)).stdout)["files"][0]["errors"]) == 25


@pytest.mark.parametrize("name", ["rtx4070", "default", "demo"])
def test_show_gives_a_policy_that_means_the_same(name: str) -> None:
    result = policy("show", name)
    assert result.exit_code == 0
    assert load_policy_text(result.stdout.encode(), name) == load_policy(find_policy(name))


def test_show_writes_defaults_out() -> None:
    shown = policy("show", "default").stdout
    assert "  - compile\n" not in shown
    assert "order: [micro_batch]" in shown
    assert "limits: {max_attempts: 24, grace: 1m, hang_after: 30m}" in shown


def test_show_json_has_every_field_with_its_unit() -> None:
    shown = json.loads(policy("show", "--json", "demo").stdout)
    assert (shown["schema_version"], shown["file"]) == (1, "demo")
    assert shown["policy"]["limits"] == {"max_attempts": 24, "grace_s": 60.0, "hang_after_s": 1800.0}
    assert shown["policy"]["checkpoint_every"] is None
    assert isinstance(shown["policy"]["memory_budget_bytes"], int)
    assert shown["policy"]["remediations"][0]["set"] == {"compile": False}


def test_show_of_a_bad_policy_is_a_policy_error(bad: str) -> None:
    """`main` prints it and exits with its code."""
    error = policy("show", bad).exception
    assert isinstance(error, PolicyError)
    assert error.exit_code == 2


@pytest.mark.parametrize("arguments", [(), ("check",), ("show",)])
def test_help_ends_with_an_example(arguments: tuple[str, ...]) -> None:
    result = policy(*arguments, "--help")
    assert result.exit_code == 0
    assert result.stdout.strip().splitlines()[-1].startswith("  Example: gpusup policy ")
