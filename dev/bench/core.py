"""Time CORE on a randomly initialised model, and check that batching changes no answer.

    python -m dev.bench.core --depth 4 --sequence-len 2048 --max-per-task 16

Needs a tokenizer (`python -m scripts.tok_train` writes one) and the CORE bundle. The blocks'
output matrices, zero in a fresh model, get random values here: otherwise no prompt would matter.
"""

from __future__ import annotations

import argparse
import time

from dev.bench.model import build
from nanochat.common import compute_cleanup, compute_init, run_script


def main(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Time CORE.", formatter_class=formatter)
    parser.add_argument("--tokenizer", default="", help="folder of the tokenizer (empty: the trained one)")
    parser.add_argument("--bundle", default="", help="unpacked eval bundle (empty: fetch it)")
    parser.add_argument("--depth", type=int, default=4, help="layers; the width is 64 times that")
    parser.add_argument("--sequence-len", type=int, default=2048, help="the model's context in tokens")
    parser.add_argument("--max-per-task", type=int, default=16, help="questions per task")
    parser.add_argument("--batch-tokens", type=int, default=None, help="tokens per batch (none: as base_eval)")
    parser.add_argument("--skip-check", action="store_true", help="do not answer one at a time for comparison")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (empty: the best there is)")
    args = parser.parse_args(argv)

    from pathlib import Path

    import torch

    from nanochat.core_eval import BATCH_TOKENS, CHUNK, answer_rows, fetch_bundle, load_tasks, read_rows
    from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

    compute = compute_init(args.device_type)
    tokenizer = RustBPETokenizer.from_directory(args.tokenizer) if args.tokenizer else get_tokenizer()
    bundle = Path(args.bundle) if args.bundle else fetch_bundle(compute)
    model = build(args.depth, args.sequence_len, tokenizer.get_vocab_size(), compute.device)
    for parameter in [*model.transformer.h.parameters(), model.lm_head.weight]:
        torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)

    def answers(batch_tokens: int) -> tuple[list, float]:
        """The answer to every question of every task, and the seconds it took."""
        began, collected = time.perf_counter(), []
        for task in load_tasks(bundle):
            rows, task_began = read_rows(task, args.max_per_task), time.perf_counter()
            for first in range(0, len(rows), CHUNK):
                which = range(first, min(first + CHUNK, len(rows)))
                collected += answer_rows(model, tokenizer, task, rows, which, batch_tokens)
            print(f"  {task.label:32s} {len(rows):5d} questions {time.perf_counter() - task_began:6.1f} s", flush=True)
        return collected, time.perf_counter() - began

    batch_tokens = args.batch_tokens or BATCH_TOKENS[compute.device.type]
    batched, seconds = answers(batch_tokens)
    threads = torch.get_num_threads()
    print(f"batches of {batch_tokens} tokens: {len(batched)} questions in {seconds:.1f} s, {threads} threads")
    if not args.skip_check:
        single, seconds = answers(batch_tokens=1)
        changed = sum(a != b for a, b in zip(batched, single))
        print(f"one at a time: {seconds:.1f} s; answers that batching changed: {changed} of {len(single)}")
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
