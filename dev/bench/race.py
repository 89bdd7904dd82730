"""What a model learns in a given time: variants of base_train's recipe on the same text.

    python -m nanochat.dataset -n 7 --source climbmix
    python -m scripts.tok_train --source climbmix
    python -m dev.bench.race --arms now,full-softmax --minutes 8 --seeds 1,2,3
    python -m dev.bench.race --arms now,plain,no-smear+no-backout --steps 250 -- --depth=6

An arm is a small change of the recipe (`ARMS`); `a+b` is both. Every run is one of base_train, saved under the tag "race". At
first all arms take turns at 20 steps, and each gets as many steps as fit into the minutes at its median step time. So a busy
neighbour slows the benchmark, but changes no result. Seeds differ in the initial weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pkgutil import resolve_name
from statistics import mean, median, stdev
from unittest.mock import patch

from nanochat import flags
from nanochat.common import UserError, run_script
from nanochat.schedule import FULL_SOFTMAX


def zero(prefix: str) -> Callable:
    """Weights whose names start so are zero and not trained."""

    def patched(init_weights):
        def init_and_zero(self, dtype=None):
            init_weights(self, dtype)
            for name, parameter in self.named_parameters():
                if name.startswith(prefix):
                    parameter.requires_grad_(False).zero_()

        return init_and_zero

    return patched


BASE = ["--depth=4", "--max-seq-len=512", "--total-batch-size=4096", "--eval-tokens=131072"]
# Flags of base_train, or {what is patched: function from the original to its replacement}
ARMS: dict[str, list[str] | dict[str, Callable]] = {
    "now": [],
    "full-softmax": {"nanochat.schedule.FULL_SOFTMAX": lambda _: 1.0},
    "unbiased-sample": {"nanochat.cross_entropy.CORRECTION": lambda _: 1.0},
    "no-values": {"nanochat.gpt.has_value_embed": lambda _: lambda layer, config: False},
    "no-x0": {"nanochat.gpt.GPT.init_weights": zero("x0_lambdas")},
    "no-smear": {"nanochat.gpt.GPT.init_weights": zero("smear")},
    "no-backout": {"nanochat.gpt.GPT.init_weights": zero("backout")},
    "plain": ["--plain"],
    "unscaled": {"nanochat.gpt.GPTConfig.__post_init__": lambda _: lambda config: setattr(config, "qk_scale", 1.0)},
}


def run(name: str, argv: list[str], seed: int) -> tuple[float, float]:
    """(seconds per step, val bpb) of one run, from the medians of the steps with the sampled and with the full softmax."""
    import torch

    from nanochat.checkpoint_manager import checkpoint_dir
    from nanochat.report import read_jsonl
    from scripts import base_train

    torch._dynamo.reset()
    set_seed = torch.manual_seed
    with ExitStack() as stack:
        for arm in name.split("+"):
            if isinstance(ARMS[arm], list):
                argv = [*argv, *ARMS[arm]]
            else:
                for target, replace in ARMS[arm].items():
                    stack.enter_context(patch(target, replace(resolve_name(target))))
        stack.enter_context(patch("torch.manual_seed", lambda _: set_seed(seed)))
        stack.enter_context(redirect_stdout(StringIO()))
        base_train.main(argv)
    metrics = read_jsonl(checkpoint_dir("base", "race") / "metrics.jsonl")
    times = [line["dt"] for line in metrics if "dt" in line]
    full = math.ceil((1 - FULL_SOFTMAX) * len(times))  # the first step with the full softmax
    seconds = (1 - FULL_SOFTMAX) * median(times[1:full]) + FULL_SOFTMAX * median(times[full:])
    return seconds, metrics[-1]["val_bpb"]


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--arms", default="now", help=f"separated by commas; there are {', '.join(ARMS)}")
    parser.add_argument("--minutes", type=flags.number(float, 0.01), default=8.0, help="training time of each run")
    parser.add_argument("--steps", type=flags.number(int, 20), help="steps of each run, instead of --minutes")
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument("flags", nargs="*", help=f"flags of base_train, after {' '.join(BASE)}")
    args = parser.parse_args(argv)
    names = args.arms.split(",")
    if unknown := {arm for name in names for arm in name.split("+")} - ARMS.keys():
        raise UserError(f"there is no arm {min(unknown)!r}; there are {', '.join(ARMS)}")

    argv = [*BASE, *args.flags, "--model-tag=race", "--eval-every=-1", "--core-metric-every=-1", "--sample-every=0"]
    steps = dict.fromkeys(names, args.steps)
    if not args.steps:
        short = [*argv, "--num-iterations=20", "--eval-tokens=512"]
        times = {name: [] for name in names}
        for _ in range(3):
            for name in names:
                times[name].append(run(name, short, seed=0)[0])
        steps = {name: max(20, round(60 * args.minutes / median(times[name]))) for name in names}
    scores = {name: [] for name in names}
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            seconds, bpb = run(name, [*argv, f"--num-iterations={steps[name]}"], seed)
            scores[name].append(bpb)
            print(json.dumps({"arm": name, "seed": seed, "steps": steps[name], "ms per step": round(1000 * seconds),
                              "bpb": round(bpb, 4)}), flush=True)  # fmt: skip
    for name, values in scores.items():
        print(f"{name:20s} {mean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else ""))


if __name__ == "__main__":
    run_script(main)
