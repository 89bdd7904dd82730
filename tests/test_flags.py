"""Flags: numbers are checked where they are parsed, help texts show defaults once."""

import importlib
from pathlib import Path

import pytest

from nanochat import flags

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "scripts").glob("[!_]*.py"))


@pytest.mark.parametrize("type, text, expected", [
    (flags.COUNT, "0", "0 is not allowed: must be at least 1"),
    (flags.COUNT, "1.5", "'1.5' is not an integer"),
    (flags.COUNT_OR_AUTO, "-2", "-2 is not allowed: must be at least 1, or -1"),
    (flags.TEMPERATURE, "nan", "nan is not allowed: must be from 0 to 2"),
    (flags.FRACTION, "inf", "inf is not allowed: must be at least 0"),
    (flags.FRACTION, "x", "'x' is not a number"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(type, text, expected, capsys):
    parser = flags.make_parser("A test.")
    parser.add_argument("--value", type=type)
    with pytest.raises(SystemExit):
        parser.parse_args(["--value", text])
    assert capsys.readouterr().err.endswith(f"argument --value: {expected}\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_each_default_once(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"scripts.{name}").main(["--help"])
    shown = capsys.readouterr().out
    assert "default: None" not in shown and "(default: False)" not in shown
