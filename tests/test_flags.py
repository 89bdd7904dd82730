"""Flags: numbers are checked where they are parsed, abbreviations are refused, help texts show defaults once."""

import importlib
import re
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
def test_scripts_refuse_abbreviated_flags_and_show_each_default_once(name, capsys):
    main = importlib.import_module(f"scripts.{name}").main
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "default: None" not in shown and "(default: False)" not in shown
    flag = next(word for word in shown.replace(",", " ").split() if word.startswith("--") and word != "--help")
    with pytest.raises(SystemExit):
        main([flag[:-1], "1"])
    assert re.search(f"unrecognized arguments: {flag[:-1]}|required", capsys.readouterr().err)
