"""Command-line flags that several scripts share, each declared once, in groups.

A flag means the same in every script. Numbers are checked where they are parsed. This file imports
nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from typing import Callable


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and adds the default to each help text that does not explain it itself."""

    def _get_help_string(self, action):
        explained = action.default in (None, False, "", []) or "(default" in action.help
        return action.help if explained else super()._get_help_string(action)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults and refuses abbreviated flags."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def number(kind: type, least: float, most: float = 2**31 - 1, or_: float | None = None) -> Callable[[str], float]:
    """A type for argparse: a number from `least` to `most`, or the special value `or_`.

    >>> number(int, 1, or_=-1)("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: 0 is not allowed: must be at least 1, or -1
    """

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if value != or_ and not least <= value <= most:  # also of NaN
            expected = f"at most {most}" if value > most else f"at least {least}"
            also = "" if or_ is None else f", or {or_}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: must be {expected}{also}")
        return value

    return parse


def tag(text: str) -> str:
    """A type for argparse: the name of a run and of its folder."""
    if not text.isprintable() or "/" in text or text[:1] in ("", ".", "-") or len(text.encode()) > 100:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a valid folder name: no slash, no dot or dash in front")
    return text


def step_or_latest(text: str) -> str:
    """A type for argparse: a step, -1 or "latest"."""
    try:
        return text if text == "latest" else str(number(int, 0, or_=-1)(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor 'latest'") from None


SOURCES = "climbmix, fineweb-edu, sample, a file or folder of .txt, .md, .jsonl or .parquet, or hf:DATASET[:CONFIG]"
COUNT = number(int, 1)  # 1, 2, ...
COUNT_OR_AUTO = number(int, 1, or_=-1)  # -1: chosen by the program
DEPTH = number(int, 1, 1000)  # each layer takes milliseconds to build
INTERVAL = number(int, 0, or_=-1)  # steps; -1: at the end only, 0: never
SEED = number(int, 0)
FRACTION = number(float, 0)
SHARE = number(float, 0, 1)
TEMPERATURE = number(float, 0, 2)
TOP_K = number(int, 0, 200)  # 0: all tokens


def for_report(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: argparse.Namespace | None = None) -> dict:
    """{"given": the flags that differ from their defaults, "all": every flag}; `settings` are the flags with derived values."""
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    return {"given": given, "all": vars(settings or args)}


def add_device_flag(group) -> None:
    group.add_argument("--device-type", default="", help="cuda, mps or cpu (default: the first that is available)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--run", default="dummy", help="name of the wandb run (dummy: no wandb)")
    add_device_flag(group)


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """The size of a base model and of its training, besides its depth."""
    group = parser.add_argument_group("shape of the model")
    group.add_argument("--plain", action="store_true", help="the architecture of transformers' NanoChatForCausalLM")
    group.add_argument("--aspect-ratio", type=COUNT, default=64, help="width per layer of depth")
    group.add_argument("--head-dim", type=COUNT, default=128, help="width of an attention head")
    group.add_argument("--n-kv-head", type=COUNT_OR_AUTO, default=-1, help="key and value heads (-1: as many as query heads)")
    group.add_argument("--max-seq-len", type=COUNT, default=2048, help="context in tokens")
    group.add_argument("--window-pattern", default="QQQL", help="attention window per layer, tiled: L full, S half, Q quarter")
    group = parser.add_argument_group("horizon: the first of these that is set")
    group.add_argument("--num-iterations", type=COUNT_OR_AUTO, default=-1, help="steps (-1: not set)")
    group.add_argument("--target-flops", type=number(float, 1, 1e30, or_=-1), default=-1.0, help="training FLOPs (-1: not set)")
    ratio = ("--target-param-data-ratio", "--ratio")
    group.add_argument(*ratio, type=number(float, 0, or_=-1), default=12.0, help="tokens per scaling parameter")
    group.add_argument("--total-batch-size", type=COUNT_OR_AUTO, default=-1, help="tokens per step (-1: from the horizon)")


def add_model_flags(parser: argparse.ArgumentParser, stages: list[str] | None = None, default: str = "sft") -> None:
    """The model that a script evaluates or serves."""
    group = parser.add_argument_group("model")
    if stages:
        group.add_argument("-i", "--stage", default=default, choices=stages, help="the model's stage")
    group.add_argument("-g", "--model-tag", type=tag, help="the model's tag (default: the newest model of the stage)")
    group.add_argument("-s", "--step", "--model-step", type=number(int, 0), help="the checkpoint's step (default: the last)")
    add_device_flag(group)


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float, max_tokens: str = "--max-tokens"):
    group = parser.add_argument_group("sampling")
    group.add_argument("-t", "--temperature", type=TEMPERATURE, default=temperature, help="0 is greedy")
    group.add_argument("-k", "--top-k", type=TOP_K, default=50, help="sample from the k most likely tokens; 0 for all")
    group.add_argument("-m", max_tokens, type=COUNT, default=512, help="maximum length of a reply in tokens")
    return group


def add_origin_flags(parser: argparse.ArgumentParser, stages: list[str], default: str) -> None:
    """The model that a stage starts from."""
    group = parser.add_argument_group("initial model")
    group.add_argument("-i", "--stage", default=default, choices=stages, help="stage of the model to start from")
    group.add_argument("--model-tag", type=tag, help="its tag, also used for the new model (default: the newest model's)")
    group.add_argument("--model-step", type=number(int, 0), default=None, help="its step (default: the last)")


def add_rate_flags(parser: argparse.ArgumentParser, inherited: bool, **schedule: float) -> None:
    """Learning rates before scaling, inherited by the later stages, and those flags of the schedule that have a default here."""
    group = parser.add_argument_group("learning rates" + ", inherited from the initial model where not given" * inherited)
    for name, default, text in (
        ("embedding", 0.3, "AdamW rate of the embeddings"),
        ("unembedding", 0.008, "AdamW rate of the output head"),
        ("matrix", 0.02, "Muon rate of the matrices"),
        ("scalar", 0.5, "AdamW rate of the per-layer scalars"),
    ):
        group.add_argument(f"--{name}-lr", type=FRACTION, default=None if inherited else default, help=text)
    group = parser.add_argument_group("schedule")
    for name, kind, text in (
        ("init_lr_frac", FRACTION, "factor of all learning rates"),
        ("weight_decay", FRACTION, "of the matrices, decaying to 0"),
        ("warmup_steps", number(int, 0), "steps of rising rates"),
        ("warmdown_ratio", SHARE, "share of the run in which rates fall"),
        ("final_lr_frac", FRACTION, "final fraction of the rates"),
    ):
        if name in schedule:
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=schedule[name], help=text)


def add_saving_flags(
    parser: argparse.ArgumentParser, eval_every: int, save_every: int = -1, eval_tokens: bool = True
) -> None:
    group = parser.add_argument_group("evaluation and checkpoints")
    group.add_argument("--resume-from-step", type=step_or_latest, default="-1", help="step to resume from, or 'latest' (-1: start a new run)")
    group.add_argument("--eval-every", type=INTERVAL, default=eval_every, help="steps between evaluations (-1: last, 0: never)")
    group.add_argument("--save-every", type=COUNT_OR_AUTO, default=save_every, help="steps between checkpoints (-1: at the end)")
    group.add_argument("--keep-last", type=COUNT_OR_AUTO, default=-1, help="number of newest checkpoints to keep (-1: all)")
    if eval_tokens:
        text = "tokens per evaluation (-1: 20 * 2^20, on a CPU 2^16)"
        group.add_argument("--eval-tokens", type=COUNT_OR_AUTO, default=-1, help=text)
