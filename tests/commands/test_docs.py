"""The documents say what the program does."""

import re
from pathlib import Path

import pytest
from gpusup.supervisor import __version__
from gpusup.supervisor.cli import COMMANDS
from gpusup.supervisor.core import decide

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme_or_the_changelog(command: str) -> None:
    assert f"gpusup {command}" in (ROOT / "README.md").read_text() + (ROOT / "CHANGELOG.md").read_text()


def test_readme_names_the_two_commands_and_links_to_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_exit_codes_of_the_program_are_in_the_table() -> None:
    table = (ROOT / "docs" / "exit_codes.md").read_text()
    for code in (decide.EXIT_LADDER_EXHAUSTED, decide.EXIT_STOPPED, decide.EXIT_NO_PROGRESS, decide.EXIT_SELF):
        assert f"| {code} |" in table


def test_version_is_the_packages() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
