"""Training on conversations: the loop that mid_train and chat_sft share.

Their scripts hold the data mixture, the defaults of the flags, and which tokens are supervised.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from nanochat import flags
from nanochat.common import Compute, check_wandb, compute_init

NAMES = {"mid": "Midtraining", "sft": "Supervised fine-tuning"}
MEASURED = {"mid": "conversations", "sft": "replies"}  # what the bits per byte are of


def add_flags(
    parser: argparse.ArgumentParser, stages: list[str], stage: str, tasks: str, others: str,
    init_lr_frac: float, warmdown: float,
) -> None:  # fmt: skip
    """The flags of both stages. `stages` and `stage`: where the initial model may come from; `tasks`: the default mixture."""
    flags.add_run_flags(parser)
    flags.add_origin_flags(parser, stages, stage)
    group = parser.add_argument_group("data")
    group.add_argument("--tasks", default=tasks,
                       help=f"tasks to train on, separated by commas; also available: {others}, and files of conversations")
    group.add_argument("--num-epochs", type=flags.number(float, 0.001), default=1.0, help="passes over the conversations")
    group.add_argument("--num-iterations", type=flags.COUNT_OR_AUTO, default=-1, help="steps (-1: as many as the epochs take)")
    group = parser.add_argument_group("batch, inherited from the initial model where not given")
    group.add_argument("--max-seq-len", type=flags.COUNT, help="tokens per row")
    group.add_argument("--device-batch-size", type=flags.COUNT_OR_AUTO, help="rows per micro-batch (-1: as many as fit)")
    group.add_argument("--total-batch-size", type=flags.COUNT, help="tokens per step")
    # No warmup, since the optimizer state is inherited, too
    schedule = {"weight_decay": 0.0, "warmup_steps": 0, "warmdown_ratio": warmdown, "final_lr_frac": 0.0}
    flags.add_rate_flags(parser, inherited=True, init_lr_frac=init_lr_frac, **schedule)
    flags.add_saving_flags(parser, eval_every=150)


def finetune(
    stage: str, parser: argparse.ArgumentParser, args: argparse.Namespace, load_data: Callable[[Compute], tuple], supervise: str
) -> None:
    """Train stage "mid" or "sft" and save the model.

    `load_data(compute)` returns (training conversations, validation conversations), sequences of dicts.
    `supervise` is "all" (every token) or "assistant" (what the assistant says).
    """
    from nanochat.dataloader import conversation_data_loader
    from nanochat.device import compile_model
    from nanochat.loss_eval import eval_batches, evaluate_bpb
    from nanochat.schedule import check_batch
    from nanochat.training import Run, due, load_origin, set_rates, train_step

    check_wandb(args.run)
    compute = compute_init(args.device_type, training=True)
    model, optimizer, tokenizer, settings, origin = load_origin(args, compute)
    model.train()
    B, T = settings.device_batch_size, settings.max_seq_len
    micro_batches = check_batch(settings.total_batch_size, B, T, compute.world_size)
    tag = args.model_tag or origin["model_tag"]
    run = Run(stage, tag, model, optimizer, tokenizer, settings, compute, origin)

    # The data
    train_data, val_data = load_data(compute)
    settings.examples = list(train_data.examples)
    loader = partial(conversation_data_loader, tokenizer=tokenizer, B=B, T=T, supervise=supervise, device=compute.device)
    batches = loader(train_data, rows_per_step=settings.total_batch_size // T, resume_state_dict=run.loader_state)
    token_bytes = tokenizer.token_bytes(compute.device)
    eval_rows, eval_steps = eval_batches(args.eval_tokens, B, T, compute)

    def measure_bpb():
        val_batches = loader(val_data, rows_per_step=eval_rows, buffer_size=32)
        measured = compiled if compute.device.type == "cuda" else model  # a CPU compiles for longer than it gains
        return {"val_bpb": evaluate_bpb(measured, val_batches, eval_steps, token_bytes, compute, run.stop.requested)}

    def progress():
        """The share of the run that is done: of its steps where their number is given, else of its conversations."""
        if args.num_iterations > 0:
            return run.step / args.num_iterations
        return run.loader_state["finished"] / len(train_data) / args.num_epochs if run.loader_state else 0.0

    # The loop: save, evaluate, train
    compiled = compile_model(model, compute)
    run.start()
    while not run.save_if_due(last := progress() >= 1):
        if due(run.step, args.eval_every, last):
            run.measure("val bpb", measure_bpb)
        if last:
            break
        if run.stop.requested():
            continue  # the evaluation was interrupted: save and leave

        run.meter.start()
        lrm = set_rates(optimizer, run.step, progress(), args.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        micro = [next(batches) for _ in compute.shard(micro_batches)]
        loss = train_step(compiled, optimizer, micro, compute, run.loss_scale)
        run.step, run.loader_state = run.step + 1, micro[-1][2]
        run.meter.stop(run.step, min(progress(), 1.0), loss, lrm, run.loader_state["epoch"])

    batches.close()
    run.finish(last, NAMES[stage], {
        "scores": {f"val bpb of {MEASURED[stage]}": run.val_bpb}, "conversations": len(train_data),
        "flags": flags.for_report(parser, args, settings),
    })  # fmt: skip
