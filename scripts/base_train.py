"""Pretraining: a base model from text.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=8 --num-iterations=200
    python -m scripts.base_train --depth=20                          # one GPU; a batch that does not fit is accumulated
    torchrun --nproc-per-node=8 -m scripts.base_train -- --depth=20  # the same run on eight GPUs, or on any number of ranks
    python -m scripts.base_train --depth=20 --resume-from-step=latest

`--depth` determines everything else: width, heads, horizon, batch size and rates follow from it.
"""

from __future__ import annotations

import argparse

from nanochat import flags
from nanochat.common import UserError, check_wandb, compute_cleanup, compute_init, print0, run_script, wandb_run


def main(argv=None):
    parser = flags.make_parser("Pretrain a base model.")
    flags.add_run_flags(parser)
    group = parser.add_argument_group("model and data")
    group.add_argument("--depth", type=flags.COUNT, default=20, help="number of layers; the one dial")
    group.add_argument("--model-tag", default=None, help="name of the checkpoint folder (default d{depth})")
    group.add_argument("--source", default="climbmix", help="climbmix, fineweb-edu, sample, or a folder of parquet files")
    flags.add_size_flags(parser)
    group = parser.add_argument_group("batch and schedule")
    group.add_argument("--device-batch-size", type=flags.COUNT_OR_AUTO, default=-1, help="rows per micro-batch (-1: what fits)")
    group.add_argument("--weight-decay", type=flags.FRACTION, default=0.28, help="of the matrices, decaying to 0")
    group.add_argument("--warmup-steps", type=flags.number(int, 0), default=40, help="steps of rising rates (5%% at most)")
    group.add_argument("--warmdown-ratio", type=flags.FRACTION, default=0.65, help="share of the run in which rates fall")
    group.add_argument("--final-lr-frac", type=flags.FRACTION, default=0.05, help="final fraction of the rates")
    group.add_argument("--fp8", action="store_true", help="train in float8, with compute capability 8.9 or more")
    flags.add_rate_flags(parser)
    flags.add_saving_flags(parser, eval_every=250)
    group = parser.add_argument_group("evaluation")
    eval_help = "tokens per evaluation (-1: 20 * 2^20, on a CPU 2^16)"
    group.add_argument("--eval-tokens", type=flags.COUNT_OR_AUTO, default=-1, help=eval_help)
    group.add_argument("--core-metric-every", type=flags.COUNT_OR_AUTO, default=2000, help="steps between CORE scores (-1: never)")
    group.add_argument("--core-metric-max-per-task", type=flags.COUNT_OR_AUTO, default=500, help="questions per task (-1: all)")
    group.add_argument("--sample-every", type=flags.INTERVAL, default=2000, help="steps between samples (-1: last, 0: never)")
    args = parser.parse_args(argv)

    import torch

    from nanochat import fp8, report
    from nanochat.checkpoint_manager import checkpoint_dir, update_meta
    from nanochat.core_eval import evaluate_core, fetch_bundle
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as data_loader
    from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader_with_state
    from nanochat.device import compile_model, fit_device_batch
    from nanochat.gpt import GPT, config_of_depth
    from nanochat.loss_eval import eval_batches, evaluate_bpb, sample_texts
    from nanochat.saver import Saver
    from nanochat.schedule import check_batch, plan
    from nanochat.tokenizer import get_tokenizer
    from nanochat.training import Meter, StopSignal, due, freeze_garbage, guarded, make_loss_scale, make_optimizer
    from nanochat.training import resume_training, save_training, set_rates, train_step

    check_wandb(args.run)
    compute = compute_init(args.device_type)
    tokenizer = get_tokenizer()
    tag = args.model_tag or f"d{args.depth}"

    # The model
    shape = args.max_seq_len, args.aspect_ratio, args.head_dim, args.n_kv_head, args.window_pattern
    config = config_of_depth(args.depth, tokenizer.get_vocab_size(), *shape)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=compute.device)
    model.init_weights(compute.dtype)
    counts, flops_per_token = model.num_scaling_params(), model.estimate_flops()
    print0(f"model d{args.depth}: width {config.n_embd}, {config.n_head} heads, {counts['total'] / 1e6:.1f}M parameters "
           f"({counts['scaling'] / 1e6:.1f}M scaling), {flops_per_token / 1e6:.0f} MFLOPs per token, "
           f"{compute.dtype} on {compute.device.type}")
    if args.fp8:
        if reason := fp8.unsupported_reason(compute.device, compute.dtype):
            print0(f"--fp8 is ignored, training continues in {compute.dtype}: {reason}")
        else:
            print0(f"{fp8.convert(model)} matrix products per pass in float8; evaluation stays in {compute.dtype}")

    # Horizon, batch size and rates
    run = plan(
        flops_per_token, counts["scaling"], args.max_seq_len, num_iterations=args.num_iterations,
        target_flops=args.target_flops, target_param_data_ratio=args.target_param_data_ratio,
        total_batch_size=args.total_batch_size, warmup_steps=args.warmup_steps, weight_decay=args.weight_decay,
    )
    device_batch_size = args.device_batch_size
    if device_batch_size == -1:
        device_batch_size = fit_device_batch(model, compute, run.total_batch_size)
    micro_batches = check_batch(run.total_batch_size, device_batch_size, args.max_seq_len, compute.world_size)
    print0(f"{run.num_iterations} steps of {run.total_batch_size} tokens, "
           f"{micro_batches} micro-batch(es) of {device_batch_size} rows on {compute.world_size} rank(s): "
           f"{run.tokens / 1e6:.1f}M tokens, {run.tokens / counts['scaling']:.1f} per scaling parameter; "
           f"learning rates x {run.lr_scale:.3f}")
    optimizer = make_optimizer(model, args, run.lr_scale, run.weight_decay)

    # The flags with what was derived from them: saved with the model, inherited by later stages
    derived = {"total_batch_size": run.total_batch_size, "device_batch_size": device_batch_size, "short_run": run.short_run}
    settings = argparse.Namespace(**{**vars(args), **derived})
    saver = Saver(checkpoint_dir("base", tag), compute, args.keep_last)
    meta = resume_training(saver, settings, model, optimizer, tokenizer, compute)
    loop = meta["loop_state"] if meta else {}
    wandb = wandb_run("nanochat", args.run, vars(settings), loop.get("wandb_id"))

    # The data
    loader_state = meta["loader_state"] if meta else None
    batches = data_loader_with_state(
        tokenizer, device_batch_size, args.max_seq_len, "train", device=compute.device, source=args.source,
        rows_per_step=run.total_batch_size // args.max_seq_len, resume_state_dict=loader_state,
    )
    token_bytes = tokenizer.token_bytes(compute.device)
    eval_rows, eval_steps = eval_batches(args.eval_tokens, device_batch_size, args.max_seq_len, compute)

    def measure_bpb():
        val_batches = data_loader(
            tokenizer, device_batch_size, args.max_seq_len, "val", device=compute.device, source=args.source,
            rows_per_step=eval_rows, buffer_size=100, tokenizer_batch_size=16,
        )
        return evaluate_bpb(model, val_batches, eval_steps, token_bytes, compute, stop.requested)

    core_bundle = None
    if args.core_metric_every > 0:
        try:
            core_bundle = fetch_bundle(compute)
        except UserError as error:
            print0(f"CORE will be skipped: {error}")

    # The loop: save, evaluate, train
    compiled = compile_model(model, compute, device_batch_size)
    loss_scale = make_loss_scale(compute, loop.get("loss_scale"))
    meter = Meter(compute, saver.directory, run.total_batch_size, flops_per_token, wandb, loop.get("meter"))
    stop = StopSignal(compute)
    freeze_garbage()
    step, val_bpb = (meta["step"], meta["val_bpb"]) if meta else (0, None)
    saved_step, failures = step, []
    while True:
        last = step >= run.num_iterations
        stopping = stop.requested()
        pauses = (args.eval_every, args.core_metric_every, args.sample_every, args.save_every)
        if last or stopping or any(due(step, every) for every in pauses):
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
        if core_bundle and due(step, args.core_metric_every, last) and not stop.requested():
            core = guarded("evaluating CORE", lambda: evaluate_core(
                model, tokenizer, compute, core_bundle, args.core_metric_max_per_task, stop=stop.requested), failures)
            if core is not None:
                meter.log(step, core=core["core"])
                print0(f"step {step:05d} | CORE {core['core']:.4f} +- {core['stderr']:.4f}")
        if due(step, args.sample_every, last) and compute.is_main:
            guarded("sampling", lambda: print("\n".join(sample_texts(model, tokenizer)), flush=True), failures)
        if last:
            break
        if stop.requested():
            continue  # an evaluation was interrupted: save and leave

        meter.start()
        lrm = set_rates(optimizer, step, step / run.num_iterations, run.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        micro = [next(batches) for _ in compute.shard(micro_batches)]
        loader_state = micro[-1][2]
        pairs = [(inputs, targets) for inputs, targets, _ in micro]  # without padding
        loss = train_step(compiled, optimizer, pairs, compute, loss_scale, count=run.total_batch_size)
        step += 1
        meter.stop(step, step / run.num_iterations, loss, lrm, loader_state["epoch"])

    # The end
    batches.close()
    saver.wait()
    if last:
        compute.on_main(lambda: update_meta(saver.directory, step, val_bpb=val_bpb))
    saver.close()
    if not last:
        print0(f"stopped after step {step} of {run.num_iterations}; continue with the same flags and --resume-from-step=latest")
    elif compute.is_main:
        report.log("Base model training", {
            "stage": "base", "scores": {"val bpb of text": val_bpb}, "model tag": tag, "depth": args.depth,
            "parameters": counts["total"], "scaling parameters": counts["scaling"], "steps": run.num_iterations,
            "training tokens": run.tokens, "training FLOPs": run.tokens * flops_per_token,
            "training minutes": meter.total_time / 60, "metrics": str(meter.path),
            "flags": flags.for_report(parser, args, settings),
        })
    meter.finish()
    compute_cleanup(compute)
    if failures:
        raise UserError(f"the model is saved in {saver.directory}, but these failed: {', '.join(failures)}")


if __name__ == "__main__":
    run_script(main)
