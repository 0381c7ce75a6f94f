"""What `rococap --help` and the help of each command look like in a terminal of 80 columns."""

import pytest
from click.testing import CliRunner

from rococap.cli.options import SECTIONS, cli

COMMANDS = sorted(cli.commands)
SUMMARY_AT = 12
"""The column where the summaries begin: an indent of 2, the longest name and 2 spaces."""


def help_of(*command: str) -> list[str]:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli, [*command, "--help"], prog_name="rococap")
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def listed() -> dict[str, list[str]]:
    """The lines below each heading that follows the options."""
    lines = help_of()
    sections: dict[str, list[str]] = {}
    for line in lines[lines.index("Options:") + 1 :]:
        if line.endswith(":") and not line.startswith(" "):
            sections[line.removesuffix(":")] = []
        elif line and sections:
            list(sections.values())[-1].append(line)
    return sections


def test_every_command_is_in_one_section():
    assert sorted(name for names in SECTIONS.values() for name in names) == COMMANDS


def test_the_commands_are_listed_by_section_in_the_order_in_which_they_are_needed():
    sections = listed()
    assert list(sections) == ["Main job", "Inspect", "Operate", "Results", "Set-up"]
    assert {name: tuple(line.split()[0] for line in lines) for name, lines in sections.items()} == SECTIONS


def test_each_command_has_one_line_with_its_whole_summary():
    for line in [line for lines in listed().values() for line in lines]:
        name, summary = line[:SUMMARY_AT].strip(), line[SUMMARY_AT:]
        assert summary.endswith("."), line
        assert not summary.endswith(".."), line
        assert " ".join((cli.commands[name].help or "").split()).startswith(summary), line


SUBCOMMANDS = [[name, sub] for name in COMMANDS for sub in getattr(cli.commands[name], "commands", ())]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_no_line_of_a_help_is_longer_than_80_columns(command):
    assert [line for line in help_of(*command) if len(line) > 80] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_that_ends_as_a_sentence_or_with_its_default(name):
    group = cli.commands[name]
    for option in [one for each in (group, *getattr(group, "commands", {}).values()) for one in each.params]:
        if option.param_type_name == "option" and not option.hidden:
            assert option.help, option.name
            assert option.help.endswith((".", "]")), option.help
