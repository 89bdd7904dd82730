"""How much faster a task is answered when its problems are written together, and whether the answers stay.

    python -m dev.bench.chat_eval                         # GSM8K, 64 problems, the newest fine-tuned model
    python -m dev.bench.chat_eval --task SpellingBee -x 32

The same engine answers greedily twice: with as many rows as it likes, and with one row, a problem at a time.
"""

from __future__ import annotations

import argparse
import time


def main(argv=None):
    parser = argparse.ArgumentParser(description="Answering together.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("-i", "--source", default="sft", choices=["mid", "sft", "rl"], help="the model's stage")
    parser.add_argument("-a", "--task", default="GSM8K", help="a task answered in words")
    parser.add_argument("-x", "--problems", type=int, default=64, help="the first so many problems")
    parser.add_argument("-m", "--max-new-tokens", type=int, default=512, help="length of an answer")
    args = parser.parse_args(argv)

    from nanochat.checkpoint_manager import load_model
    from nanochat.common import compute_init
    from nanochat.engine import Engine
    from nanochat.task_eval import run_task
    from scripts.chat_eval import make_task

    compute = compute_init()
    model, tokenizer, _ = load_model(args.source, compute)
    model.pack()
    answers, seconds, task = {}, {}, make_task(args.task)
    evaluate = task.evaluate
    for max_sequences in (64, 1):
        said = answers[max_sequences] = {}
        # The answers themselves are compared, not only whether they are right.
        task.evaluate = lambda problem, answer, said=said: said.update({str(problem): answer}) or evaluate(problem, answer)
        engine = Engine(model, tokenizer, max_sequences=max_sequences)
        started = time.perf_counter()
        accuracy, n = run_task(task, model, tokenizer, engine, compute, args.problems, max_new_tokens=args.max_new_tokens, progress=False)
        seconds[max_sequences] = time.perf_counter() - started
        print(f"{max_sequences:2d} rows: {n} problems in {seconds[max_sequences]:.1f} s, {engine.generated_tokens} tokens, "
              f"{engine.generated_tokens / seconds[max_sequences]:,.0f} tok/s, accuracy {100 * accuracy:.1f}%", flush=True)
    same = sum(answers[64][problem] == answers[1][problem] for problem in answers[1])
    print(f"{seconds[1] / seconds[64]:.1f} times as fast, {same} of {len(answers[1])} answers the same")


if __name__ == "__main__":
    main()
