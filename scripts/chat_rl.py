"""Reinforcement learning: the model tries, a checker judges, and what went better than its average is made likelier.

    python -m scripts.chat_rl                                    # GSM8K, with the calculator
    python -m scripts.chat_rl --task=SampleArithmetic            # no connection needed, minutes on a CPU
    torchrun --nproc_per_node=8 -m scripts.chat_rl -- --task=SpellingBee

It goes on from the newest fine-tuned model with that model's rates. Each step takes some questions, samples a group of
answers to each, all of them together, and makes one update from them (nanochat/reinforce.py has the mathematics).
"""

from __future__ import annotations

import argparse
import random

from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_script, wandb_run


def main(argv=None):
    parser = argparse.ArgumentParser(description="Improve a chat model on a task whose answers can be checked.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="dummy", help="name of the wandb run (dummy: none)")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (empty: the best there is)")
    parser.add_argument("--source", default="sft", choices=["mid", "sft", "rl"], help="stage of the model to go on from")
    parser.add_argument("--model-tag", default=None, help="which model; also names the new one (newest if not given)")
    parser.add_argument("--model-step", type=int, default=None, help="which step of it (last if not given)")
    parser.add_argument("--task", default="GSM8K",
                        help="what to get better at: GSM8K, SpellingBee, ARC-Easy, ARC-Challenge, SampleWorld or SampleArithmetic")
    # the horizon
    parser.add_argument("--num-epochs", type=float, default=1.0, help="passes over the task's questions")
    parser.add_argument("--num-iterations", type=int, default=-1, help="steps instead (-1: as many as the epochs take)")
    # sampling
    parser.add_argument("--examples-per-step", type=int, default=16, help="questions per step, over all ranks")
    parser.add_argument("--num-samples", type=int, default=16, help="answers to each question")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="an answer that is longer is cut off, and worth 0")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling, and of the distribution that is improved")
    parser.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest tokens (0: all)")
    # inherited from the model that this goes on from, where not given
    parser.add_argument("--device-batch-size", type=int, default=None, help="rows of full length per forward pass; short answers go by their tokens")
    parser.add_argument("--embedding-lr", type=float, default=None, help="AdamW rate of the embeddings")
    parser.add_argument("--unembedding-lr", type=float, default=None, help="AdamW rate of the head")
    parser.add_argument("--matrix-lr", type=float, default=None, help="Muon rate of the matrices")
    parser.add_argument("--scalar-lr", type=float, default=None, help="AdamW rate of the per-layer scalars")
    # how the rates move
    parser.add_argument("--init-lr-frac", type=float, default=0.05, help="all rates begin at this part of themselves, and fall to 0")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of the matrices, falling to 0")
    # along the way
    parser.add_argument("--resume-from-step", default="-1", help="go on from a saved step, or from 'latest'")
    parser.add_argument("--eval-every", type=int, default=60, help="steps between measurements on held-out questions (-1: at the end)")
    parser.add_argument("--eval-examples", type=int, default=400, help="held-out questions per measurement")
    parser.add_argument("--eval-samples", type=int, default=8, help="sampled answers to each of them, for pass@k (0: greedy answers only)")
    parser.add_argument("--save-every", type=int, default=60, help="steps between checkpoints (-1: at the end)")
    parser.add_argument("--keep-last", type=int, default=-1, help="checkpoints to keep, the newest (-1: all)")
    args = parser.parse_args(argv)
    for flag, value, least in (("examples-per-step", args.examples_per_step, 1), ("num-samples", args.num_samples, 2),
                               ("max-new-tokens", args.max_new_tokens, 1), ("top-k", args.top_k, 0), ("eval-examples", args.eval_examples, 1),
                               ("eval-samples", args.eval_samples, 0)):  # fmt: skip
        if value < least:
            raise UserError(f"--{flag} is {value}; it must be {least} or more")
    if args.temperature <= 0:
        raise UserError(f"--temperature is {args.temperature}; it must be above 0, or all answers to a question would be equal")

    import copy

    import torch

    from nanochat import report
    from nanochat.checkpoint_manager import checkpoint_dir, load_model
    from nanochat.engine import Engine
    from nanochat.optim import MuonAdamW
    from nanochat.reinforce import policy_step, sample_groups, sync_weights
    from nanochat.saver import Saver
    from nanochat.schedule import batch_lr_scale
    from nanochat.task_eval import answer_text, count_right, pass_at_k
    from nanochat.training import (
        LossScale,
        Meter,
        StopSignal,
        choose_attention,
        due,
        inherit,
        resume_training,
        save_training,
        set_rates,
        freeze_garbage,
        warm_start,
    )
    from tasks.arc import ARC
    from tasks.gsm8k import GSM8K
    from tasks.sample_world import ARITHMETIC, SampleWorld
    from tasks.spellingbee import SpellingBee

    compute = compute_init(args.device_type)

    # The model, and what it brings along
    model, tokenizer, origin = load_model(args.source, compute, args.model_tag, args.model_step)
    tag = args.model_tag or origin["model_tag"]
    saver = Saver(checkpoint_dir("rl", tag), compute, args.keep_last)
    args.total_batch_size = args.max_seq_len = None  # those of the model, to which its rates belong
    inherit(args, origin)
    args.short_run = origin.get("user_config", {}).get("short_run", 1.0)
    lr_scale = batch_lr_scale(args.total_batch_size) * args.short_run * args.init_lr_frac
    optimizer = MuonAdamW(
        model.param_groups(
            embedding_lr=args.embedding_lr * lr_scale,
            unembedding_lr=args.unembedding_lr * lr_scale,
            matrix_lr=args.matrix_lr * lr_scale,
            scalar_lr=args.scalar_lr * lr_scale,
            weight_decay=args.weight_decay,
        )
    )
    meta = resume_training(saver.directory, args, model, optimizer, compute)
    if meta is None:
        warm_start(optimizer, args.source, origin, compute)
    loop = meta["loop_state"] if meta else {}
    step = meta["step"] if meta else 0

    # The questions, to learn from and held out
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
    num_steps = args.num_iterations if args.num_iterations > 0 else max(1, int(args.num_epochs * len(task) / args.examples_per_step))

    def questions_of(step):
        """(index, seed) of this rank's questions of a step. Each epoch has an order of its own; the seed numbers all that was asked."""
        for asked in range(step * args.examples_per_step, (step + 1) * args.examples_per_step)[compute.rank :: compute.world_size]:
            epoch, place = divmod(asked, len(task))
            yield random.Random(f"chat_rl {epoch}").sample(range(len(task)), len(task))[place], asked

    # On a CPU the model itself writes the answers, on a GPU a copy in the compute dtype, whose weights follow. Its cache
    # takes up to half of the memory, so the model learns from half as many tokens at a time as before, and keeps less of them.
    choose_attention(model, compute)
    max_tokens = args.device_batch_size * args.max_seq_len
    if compute.device.type == "cuda":
        model.recompute, max_tokens = True, max_tokens // 2
    sampler = copy.deepcopy(model).pack() if compute.device.type == "cuda" else model
    engine = Engine(sampler, tokenizer, max_sequences=-(-args.examples_per_step // compute.world_size) * args.num_samples)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k or None}

    def measure():
        """Accuracy of the likeliest answers and pass@k of sampled ones on held-out questions, each with half its 95% interval."""
        asked = (held_out, sampler, tokenizer, engine, compute, args.eval_examples)
        right = count_right(*asked, max_new_tokens=args.max_new_tokens, temperature=0.0, name=args.task)
        values = {"accuracy": pass_at_k(right, 1, 1)}
        if args.eval_samples and held_out.eval_type == "generative":
            right = count_right(*asked, num_samples=args.eval_samples, **sampling, name=f"{args.task} pass@{args.eval_samples}")
            powers = [2**i for i in range(args.eval_samples.bit_length()) if 2**i < args.eval_samples]
            values |= {f"pass@{k}": pass_at_k(right, args.eval_samples, k) for k in (*powers, args.eval_samples)}
        return values

    # The loop
    loss_scale = LossScale(**loop.get("loss_scale", {})) if compute.dtype == torch.float16 else None
    wandb = wandb_run("nanochat-rl", args.run, vars(args))
    meter = Meter(compute, saver.directory, 0, None, wandb, loop.get("meter"))
    stop = StopSignal(compute)
    freeze_garbage()
    groups, measured = [], {}
    while True:
        last = step >= num_steps
        stopping = stop.asked()
        fresh = meta is None or step > meta["step"]  # what was done when this step was saved is not done again
        measuring = not stopping and (fresh or last or not loop["measured"])  # whoever asks to stop may not wait long
        meter.flush()  # what is sampled next waits for the weights anyway

        sync_weights(engine, model)
        if (due(step, args.eval_every, last) or (step == 0 and args.eval_every != 0)) and measuring:
            measured = measure()
            meter.log(step, **{name: value for name, (value, _) in measured.items()}, **{f"{name}_ci": ci for name, (_, ci) in measured.items()})
            scores = " | ".join(f"{name} {100 * value:.1f}% +- {100 * ci:.1f}" for name, (value, ci) in measured.items())
            print0(f"step {step:05d} | {args.task}: {scores}")
            engine.reset()
        if (due(step, args.save_every, last) or stopping) and fresh and step > 0:
            save_training(saver, step, model, optimizer, tokenizer, args, meter, None, None, loss_scale, measuring)
        if last or stopping:
            break

        meter.start()
        lrm = set_rates(optimizer, step, step / num_steps, 0, 1.0, 0.0)
        groups = sample_groups(engine, tokenizer, task, questions_of(step), compute, args.num_samples, **sampling)
        loss, tokens, values = policy_step(
            model, optimizer, groups, compute, max_tokens, args.temperature, args.top_k or None, engine.python_start, loss_scale
        )
        step += 1
        meter.stop(step, step / num_steps, loss, lrm, 1 + (step * args.examples_per_step - 1) // len(task), tokens, **values)

    saver.close()
    if stopping and not last:
        print0(f"stopped after step {step}; go on with the same flags and --resume-from-step=latest")
    elif compute.is_main:
        said = [(group.conversation["messages"][0], answer_text(tokenizer, engine, group.seqs[0])) for group in groups[:4]]
        report.log("Reinforcement learning", {
            **vars(args), "stage": "rl", "scores": {f"{args.task} {name}": value for name, (value, _) in measured.items()},
            "model tag": tag, "steps": step, "questions": len(task),
            "95% intervals": {name: f"+- {ci:.4f}" for name, (_, ci) in measured.items()},
            "training minutes": meter.total_time / 60, "metrics": str(meter.path),
            "samples": [[question, {"role": "assistant", "content": answer}] for question, answer in said],
        })  # fmt: skip
    meter.finish()
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
