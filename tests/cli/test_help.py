"""The help of every subcommand ends with an example, and the example is understood."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from ds_pso.cli import main as cli


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize("name", subcommands())
def test_the_example_of_the_help_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    example = re.search(r"^example:\n  ds-pso (.+)$", out, flags=re.MULTILINE)
    assert example is not None
    words = shlex.split(example[1])
    assert words[0] == name
    assert callable(cli._parser().parse_args(words).run)
    assert max(map(len, out.split("example:")[0].splitlines())) <= 120


def test_the_command_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for name, parser in subcommands().items():
        assert re.search(rf"^    {name} +\S", out, flags=re.MULTILINE), parser.prog
