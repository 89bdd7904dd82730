"""Flags: numbers are checked where they are parsed, help texts show defaults once, torchrun leaves them to the script."""

import argparse
import importlib
import re
import shlex

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

from nanochat import flags

PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("nanochat", "scripts", "dev") for path in (ROOT / folder).rglob("*.py") if "def main(argv" in path.read_text()
)  # fmt: skip


@pytest.mark.parametrize("type, text, expected", [
    (flags.COUNT, "0", "0 is not allowed: must be at least 1"),
    (flags.COUNT, "1.5", "'1.5' is not an integer"),
    (flags.COUNT_OR_AUTO, "-2", "-2 is not allowed: must be at least 1, or -1"),
    (flags.COUNT, "9999999999", "9999999999 is not allowed: must be at most 2147483647"),
    (flags.TEMPERATURE, "nan", "nan is not allowed: must be at least 0"),
    (flags.FRACTION, "inf", "inf is not allowed: must be at most 2147483647"),
    (flags.FRACTION, "x", "'x' is not a number"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(type, text, expected, capsys):
    parser = flags.make_parser("A test.")
    parser.add_argument("--value", type=type)
    with pytest.raises(SystemExit):
        parser.parse_args(["--value", text])
    assert capsys.readouterr().err.endswith(f"argument --value: {expected}\n")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_examples_and_each_default_once_and_cannot_be_abbreviated(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    shown = capsys.readouterr().out
    assert not re.search(r"default: (None|False|\[\])", shown)
    assert len(re.findall(rf"^    (python|torchrun .*) -m {re.escape(name)}\b", shown, re.MULTILINE)) >= 2
    if name != "dev.estimate":  # which ignores what it does not know
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(name).main(["--hel"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_number_of_every_program_has_a_range(name, monkeypatch):
    class Found(Exception):
        pass

    def stop(parser, *args):
        raise Found(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(Found) as found:
        importlib.import_module(name).main([])
    for action in found.value.args[0]._actions:
        is_number = isinstance(action.default, (int, float)) and not isinstance(action.default, bool)
        assert action.type not in (int, float) and not (is_number and action.type is None), action.option_strings
        if getattr(action.type, "__module__", "") != "nanochat.flags" or action.type is flags.tag:
            continue  # no number
        for text in ("-2", "nan", "inf", "-inf", "1e400", "1" + "0" * 31, "9" * 5000, "", "x"):
            with pytest.raises(argparse.ArgumentTypeError):
                action.type(text)


def test_torchrun_commands_leave_run_to_the_script():
    """Without -- before the flags, torchrun takes --run for an abbreviation of its own --run-path."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.sh"), *ROOT.glob("dev/*.*"), *ROOT.glob("scripts/*.py")]
    commands = "".join(path.read_text() for path in files if path.suffix in (".md", ".sh", ".py")).replace("\\\n", " ")
    found = [shlex.split(command, comments=True) for command in re.findall(r"torchrun +(--[^`\n]* -m [^`\n]*)", commands)]
    with_flags = [words for words in found if words[words.index("-m") + 2 :]]
    assert len(with_flags) >= 9
    for words in with_flags:
        args = get_args_parser().parse_args([*words, "--run=name"])
        assert args.training_script_args[-1] == "--run=name", words
