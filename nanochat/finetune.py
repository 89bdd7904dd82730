"""Training on conversations: the loop that mid_train and chat_sft share.

Their scripts hold the data mixture, the defaults of the flags, and which tokens are supervised.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from nanochat import flags
from nanochat.common import Compute, UserError, check_wandb, compute_cleanup, compute_init, print0, wandb_run

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
    group.add_argument("--tasks", default=tasks, help=f"tasks to train on, separated by commas; also available: {others}")
    group.add_argument("--num-epochs", type=flags.number(float, 0.001), default=1.0, help="passes over the conversations")
    group.add_argument("--num-iterations", type=flags.COUNT_OR_AUTO, default=-1, help="steps (-1: as many as the epochs take)")
    flags.add_batch_flags(parser)
    flags.add_rate_flags(parser, inherited=True)
    group = parser.add_argument_group("schedule")
    group.add_argument("--init-lr-frac", type=flags.FRACTION, default=init_lr_frac, help="factor of all learning rates")
    group.add_argument("--weight-decay", type=flags.FRACTION, default=0.0, help="of the matrices, decaying to 0")
    group.add_argument("--warmup-steps", type=flags.number(int, 0), default=0, help="steps of rising rates; the optimizer state is inherited")
    group.add_argument("--warmdown-ratio", type=flags.FRACTION, default=warmdown, help="share of the run in which rates fall")
    group.add_argument("--final-lr-frac", type=flags.FRACTION, default=0.0, help="final fraction of the rates")
    flags.add_saving_flags(parser, eval_every=150)
    group.add_argument("--eval-tokens", type=flags.COUNT_OR_AUTO, default=-1, help="tokens per evaluation (-1: 20971520, on a CPU 65536)")


def finetune(
    stage: str, parser: argparse.ArgumentParser, args: argparse.Namespace, load_data: Callable[[Compute], tuple], supervise: str
) -> None:
    """Train stage "mid" or "sft" and save the model.

    `load_data(compute)` returns (training conversations, validation conversations), sequences of dicts.
    `supervise` is "all" (every token) or "assistant" (what the assistant says).
    """
    from nanochat import report
    from nanochat.checkpoint_manager import checkpoint_dir, load_model, update_meta
    from nanochat.dataloader import conversation_data_loader
    from nanochat.device import compile_model, fit_device_batch
    from nanochat.loss_eval import eval_batches, evaluate_bpb
    from nanochat.saver import Saver
    from nanochat.schedule import batch_lr_scale, check_batch
    from nanochat.training import (
        Meter,
        StopSignal,
        due,
        freeze_garbage,
        guarded,
        inherit,
        make_loss_scale,
        make_optimizer,
        resume_training,
        save_training,
        set_rates,
        train_step,
        warm_start,
    )

    check_wandb(args.run)
    compute = compute_init(args.device_type)

    # The initial model, and the settings inherited from its training
    model, tokenizer, origin = load_model(args.stage, compute, args.model_tag, args.model_step)
    model.train()
    tag = args.model_tag or origin["model_tag"]
    settings = inherit(args, origin)
    B, T = settings.device_batch_size, settings.max_seq_len
    if B == -1:
        B = settings.device_batch_size = fit_device_batch(model, compute, settings.total_batch_size)
    micro_batches = check_batch(settings.total_batch_size, B, T, compute.world_size)
    lr_scale = batch_lr_scale(settings.total_batch_size) * settings.short_run * args.init_lr_frac
    optimizer = make_optimizer(model, settings, lr_scale, args.weight_decay)
    saver = Saver(checkpoint_dir(stage, tag), compute, args.keep_last)
    meta = resume_training(saver, settings, model, optimizer, tokenizer, compute)
    loop = meta["loop_state"] if meta else {}
    if meta is None:
        warm_start(optimizer, args.stage, origin, compute)
    wandb = wandb_run(f"nanochat-{stage}", args.run, vars(settings), loop.get("wandb_id"))

    # The data
    train_data, val_data = load_data(compute)
    settings.examples = list(train_data.examples)
    loader = partial(conversation_data_loader, tokenizer=tokenizer, B=B, T=T, supervise=supervise, device=compute.device)
    loader_state = meta["loader_state"] if meta else None
    batches = loader(train_data, rows_per_step=settings.total_batch_size // T, resume_state_dict=loader_state)
    token_bytes = tokenizer.token_bytes(compute.device)
    eval_rows, eval_steps = eval_batches(args.eval_tokens, B, T, compute)

    def measure_bpb():
        val_batches = loader(val_data, rows_per_step=eval_rows, buffer_size=32)
        return evaluate_bpb(model, val_batches, eval_steps, token_bytes, compute, stop.requested)

    def progress_at(step, loader_state):
        """The share of the run that is done: of its steps where their number is given, else of its conversations."""
        if args.num_iterations > 0:
            return step / args.num_iterations
        return loader_state["finished"] / len(train_data) / args.num_epochs if loader_state else 0.0

    # The loop: save, evaluate, train
    compiled = compile_model(model, compute, B)
    loss_scale = make_loss_scale(compute, loop.get("loss_scale"))
    meter = Meter(compute, saver.directory, settings.total_batch_size, model.estimate_flops(), wandb, loop.get("meter"))
    stop = StopSignal(compute)
    freeze_garbage()
    step, val_bpb = (meta["step"], meta["val_bpb"]) if meta else (0, None)
    saved_step, failures = step, []
    progress = progress_at(step, loader_state)
    while True:
        last = progress >= 1
        stopping = stop.requested()
        if last or stopping or due(step, args.eval_every) or due(step, args.save_every):
            meter.flush()

        if step > saved_step and (due(step, args.save_every, last) or stopping):
            save_training(saver, step, model, optimizer, tokenizer, settings, meter, val_bpb, loader_state, loss_scale)
            saved_step = step
        if stopping:
            break

        if due(step, args.eval_every, last):
            bpb = guarded("evaluating val bpb", measure_bpb, failures)
            if bpb is not None:
                val_bpb = bpb
                meter.log(step, val_bpb=val_bpb)
                print0(f"step {step:05d} | val bpb {val_bpb:.4f}")
        if last:
            break
        if stop.requested():
            continue  # the evaluation was interrupted: save and leave

        meter.start()
        lrm = set_rates(optimizer, step, progress, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        micro = [next(batches) for _ in compute.shard(micro_batches)]
        loader_state = micro[-1][2]
        pairs = [(inputs, targets) for inputs, targets, _ in micro]
        loss = train_step(compiled, optimizer, pairs, compute, loss_scale)
        step += 1
        progress = progress_at(step, loader_state)
        meter.stop(step, min(progress, 1.0), loss, lrm, loader_state["epoch"])

    # The end
    batches.close()
    saver.wait()
    if last:
        compute.on_main(lambda: update_meta(saver.directory, step, val_bpb=val_bpb))
    saver.close()
    if not last:
        print0(f"stopped after step {step}; continue with the same flags and --resume-from-step=latest")
    elif compute.is_main:
        report.log(NAMES[stage], {
            "stage": stage, "scores": {f"val bpb of {MEASURED[stage]}": val_bpb}, "model tag": tag, "steps": step,
            "conversations": len(train_data), "training minutes": meter.total_time / 60, "metrics": str(meter.path),
            "flags": flags.for_report(parser, args, settings),
        })
    meter.finish()
    compute_cleanup(compute)
    if failures:
        raise UserError(f"the model is saved in {saver.directory}, but these failed: {', '.join(failures)}")
