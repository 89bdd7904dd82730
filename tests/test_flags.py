"""Flags: numbers are checked where they are parsed, abbreviations are refused, help texts show defaults once."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import flags

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("type, text, expected", [
    (flags.COUNT, "0", "0 is not allowed: must be at least 1"),
    (flags.COUNT, "1.5", "'1.5' is not an integer"),
    (flags.COUNT_OR_AUTO, "-2", "-2 is not allowed: must be at least 1, or -1"),
    (flags.TEMPERATURE, "nan", "nan is not allowed: must be from 0 to 2"),
    (flags.TEMPERATURE, "2.5", "2.5 is not allowed: must be from 0 to 2"),
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
def test_scripts_refuse_abbreviated_flags_and_show_each_default_once(name):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", f"scripts.{name}", *arguments], cwd=ROOT, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0 and "default: None" not in shown.stdout and "(default: False)" not in shown.stdout
    flag = next(word for word in shown.stdout.replace(",", " ").split() if word.startswith("--") and word != "--help")
    refused = run(flag[:-1], "1")
    assert refused.returncode == 2 and f"unrecognized arguments: {flag[:-1]}" in refused.stderr or "required" in refused.stderr
