"""Reinforcement learning: sample answers, grade them, make those better than their group's average more likely.

    python -m scripts.chat_rl                                    # GSM8K, with the calculator
    python -m scripts.chat_rl --task=SampleArithmetic            # no connection needed, minutes on a CPU
    torchrun --nproc-per-node=8 -m scripts.chat_rl -- --task=SpellingBee

It starts from the newest fine-tuned model with that model's rates. Each step samples a group of answers to each of some
questions, all in one batch, and makes one update from them (the mathematics is in nanochat/reinforce.py).
"""

from __future__ import annotations

import random

from nanochat import flags
from nanochat.common import UserError, check_wandb, compute_init, run_script


def main(argv=None):
    parser = flags.make_parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_origin_flags(parser, ["mid", "sft", "rl"], "sft")
    group = parser.add_argument_group("task")
    group.add_argument("--task", default="GSM8K", help="or SpellingBee, ARC-Easy, ARC-Challenge, SampleWorld, SampleArithmetic")
    group.add_argument("--num-epochs", type=flags.number(float, 0.001), default=1.0, help="passes over the task's questions")
    group.add_argument("--num-iterations", type=flags.COUNT_OR_AUTO, default=-1, help="steps (-1: as many as the epochs take)")
    group = parser.add_argument_group("sampling")
    group.add_argument("--examples-per-step", type=flags.COUNT, default=16, help="questions per step, over all ranks")
    group.add_argument("--num-samples", type=flags.number(int, 2), default=16, help="samples per question")
    group.add_argument("--max-new-tokens", type=flags.COUNT, default=256, help="longer samples are truncated, with reward 0")
    group.add_argument("--temperature", type=flags.number(float, 1e-3), default=1.0, help="of the sampled distribution")
    group.add_argument("--top-k", type=flags.number(int, 0), default=50, help="sample among the k most likely tokens (0: all)")
    group = parser.add_argument_group("batch")
    group.add_argument("--device-batch-size", type=flags.COUNT_OR_AUTO, help="full rows per micro-batch (default: inherited)")
    flags.add_rate_flags(parser, inherited=True, init_lr_frac=0.05, weight_decay=0.0)
    flags.add_saving_flags(parser, eval_every=60, save_every=60, eval_tokens=False)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-examples", type=flags.COUNT, default=400, help="held-out questions per evaluation")
    group.add_argument("--eval-samples", type=flags.number(int, 0), default=8, help="samples per held-out question (0: greedy)")
    parser.set_defaults(total_batch_size=None, max_seq_len=None)  # always inherited: the rates belong to this batch size
    args = parser.parse_args(argv)

    from functools import partial

    from nanochat.device import choose_attention
    from nanochat.engine import Engine
    from nanochat.reinforce import policy_step, sample_groups
    from nanochat.task_eval import completion_text, count_right, pass_at_k
    from nanochat.training import Run, due, load_origin, set_rates
    from tasks.arc import ARC
    from tasks.gsm8k import GSM8K
    from tasks.sample_world import ARITHMETIC, SampleWorld
    from tasks.spellingbee import SpellingBee

    check_wandb(args.run)
    compute = compute_init(args.device_type)

    model, optimizer, tokenizer, settings, origin = load_origin(args, compute)
    run = Run("rl", args.model_tag or origin["model_tag"], model, optimizer, tokenizer, settings, compute, origin)

    # The questions, for training and held out
    makers = {
        "GSM8K": lambda: (GSM8K("main", "train"), GSM8K("main", "test")),
        "SpellingBee": lambda: (SpellingBee(4096, "train"), SpellingBee(1024, "test")),
        "ARC-Easy": lambda: (ARC("ARC-Easy", "train"), ARC("ARC-Easy", "validation")),
        "ARC-Challenge": lambda: (ARC("ARC-Challenge", "train"), ARC("ARC-Challenge", "validation")),
        "SampleWorld": lambda: (SampleWorld("questions"), SampleWorld("test")),
        "SampleArithmetic": lambda: (SampleWorld("questions", kinds=ARITHMETIC), SampleWorld("test", kinds=ARITHMETIC)),
    }
    if args.task not in makers:
        raise UserError(f"--task {args.task} is not one of {', '.join(makers)}")
    task, held_out = compute.main_first(makers[args.task])
    num_steps = args.num_iterations
    if num_steps == -1:
        num_steps = max(1, int(args.num_epochs * len(task) / args.examples_per_step))

    def questions_of(step):
        """(index, seed) of this rank's questions of a step. Every epoch has its own order; the seed is the number in the run."""
        for position in compute.shard(args.examples_per_step):
            number = step * args.examples_per_step + position
            epoch, place = divmod(number, len(task))
            yield random.Random(f"chat_rl {epoch}").sample(range(len(task)), len(task))[place], number

    # On a GPU the engine's cache takes up to half of the memory, and an uncompiled pass saves 1.5 times as much
    choose_attention(model, compute)
    max_tokens = settings.device_batch_size * settings.max_seq_len
    if compute.device.type == "cuda":
        max_tokens //= 4
    num_sequences = -(-args.examples_per_step // compute.world_size) * args.num_samples
    engine = Engine(model, tokenizer, max_sequences=num_sequences, compiled=True)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k or None}

    def evaluate():
        """Accuracy of greedy answers and pass@k of samples on held-out questions, each with half its 95% interval (_ci)."""
        grade = partial(
            count_right, held_out, model, tokenizer, engine, compute, args.eval_examples, stop=lambda: run.stop.received
        )
        right = grade(name=args.task, **{**sampling, "temperature": 0.0})
        if right is None:
            return None  # a stop was requested
        estimates = {"accuracy": pass_at_k(right, 1, 1)}
        n = args.eval_samples
        if n and held_out.eval_type == "generative":
            right = grade(name=f"{args.task} pass@{n}", num_samples=n, **sampling)
            if right is None:
                return None
            powers = {2**i for i in range(n.bit_length())}  # 1, 2, 4, ... up to n
            estimates |= {f"pass@{k}": pass_at_k(right, n, k) for k in sorted(powers | {n})}
        values = {}
        for name, (value, ci) in estimates.items():
            values |= {name: value, f"{name}_ci": ci}
        return values

    # The loop: save, evaluate, train
    run.start()
    groups, scores = [], {}
    while not run.save_if_due(last := run.step >= num_steps):
        run.meter.flush()  # sampling needs the new weights anyway
        engine.reset()
        if due(run.step, args.eval_every, last) or (run.step == 0 and args.eval_every != 0):
            scores = run.measure(args.task, evaluate) or scores
            engine.reset()
        if last:
            break
        if run.stop.requested():
            continue  # the evaluation was interrupted: save and leave

        run.meter.start()
        lrm = set_rates(optimizer, run.step, run.step / num_steps, 0, 1.0, 0.0)
        groups = sample_groups(engine, tokenizer, task, questions_of(run.step), compute, args.num_samples, **sampling)
        loss, tokens, values = policy_step(
            model, optimizer, groups, compute, max_tokens, args.temperature, args.top_k or None,
            engine.python_start, run.loss_scale,
        )  # fmt: skip
        run.step += 1
        epoch = 1 + (run.step * args.examples_per_step - 1) // len(task)
        run.meter.stop(run.step, run.step / num_steps, loss, lrm, epoch, tokens, **values)

    samples = []
    for group in groups[:4]:
        reply = completion_text(tokenizer, engine, group.seqs[0])
        samples.append([group.conversation["messages"][0], {"role": "assistant", "content": reply}])
    run.finish(last, "Reinforcement learning", {
        "scores": {f"{args.task} {name}": value for name, value in scores.items() if not name.endswith("_ci")},
        "95% intervals": {name: f"+- {scores[f'{name}_ci']:.4f}" for name in scores if not name.endswith("_ci")},
        "questions": len(task), "samples": samples, "flags": flags.for_report(parser, args, settings),
    })  # fmt: skip


if __name__ == "__main__":
    run_script(main)
