"""Pretraining: a base model from text.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --source=notes.txt  # a small model of your own text
    python -m scripts.base_train --depth=20                          # one GPU; a batch that does not fit is accumulated
    torchrun --nproc-per-node=8 -m scripts.base_train -- --depth=20  # the same run on eight GPUs, or on any number of ranks
    python -m scripts.base_train --depth=20 --resume-from-step=latest

`--depth` determines everything else: width, heads, horizon, batch size and rates follow from it.
"""

from __future__ import annotations

import argparse

from nanochat import flags
from nanochat.common import UserError, check_wandb, compute_init, print0, run_script


def main(argv=None):
    parser = flags.make_parser(__doc__)
    flags.add_run_flags(parser)
    group = parser.add_argument_group("model, data and hardware")
    group.add_argument("--depth", type=flags.DEPTH, default=20, help="number of layers; the one dial")
    group.add_argument("--model-tag", type=flags.tag, help="name of the checkpoint folder (default d{depth})")
    group.add_argument("--source", default="climbmix", help=flags.SOURCES)
    group.add_argument("--device-batch-size", type=flags.COUNT_OR_AUTO, default=-1, help="rows per micro-batch (-1: what fits)")
    group.add_argument("--fp8", action="store_true", help="train in float8, with compute capability 8.9 or more")
    flags.add_size_flags(parser)
    schedule = {"weight_decay": 0.28, "warmup_steps": 40, "warmdown_ratio": 0.65, "final_lr_frac": 0.05}
    flags.add_rate_flags(parser, inherited=False, **schedule)  # the warmup takes at most 5% of the steps
    flags.add_saving_flags(parser, eval_every=250)
    group = parser.add_argument_group("other evaluations")
    group.add_argument("--core-metric-every", type=flags.COUNT_OR_AUTO, default=2000, help="steps between CORE scores (-1: never)")
    group.add_argument("--core-metric-max-per-task", type=flags.COUNT_OR_AUTO, default=500, help="questions per task (-1: all)")
    group.add_argument("--sample-every", type=flags.INTERVAL, default=2000, help="steps between samples (-1: last, 0: never)")
    args = parser.parse_args(argv)

    import torch

    from nanochat import fp8
    from nanochat.core_eval import evaluate_core, fetch_bundle
    from nanochat.cross_entropy import SAMPLE
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as data_loader
    from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader_with_state
    from nanochat.dataset import resolve
    from nanochat.device import compile_model, fit_device_batch
    from nanochat.gpt import GPT, config_of_depth
    from nanochat.loss_eval import eval_batches, evaluate_bpb, sample_texts
    from nanochat.schedule import FULL_SOFTMAX, check_batch, plan
    from nanochat.tokenizer import get_tokenizer
    from nanochat.training import Run, due, make_optimizer, sampled_softmax, set_rates, train_step

    check_wandb(args.run)
    compute = compute_init(args.device_type, training=True)
    tokenizer = get_tokenizer()
    source = compute.on_main(lambda: resolve(args.source))  # once, since files may change during the run

    # The model
    shape = args.max_seq_len, args.aspect_ratio, args.head_dim, args.n_kv_head, args.window_pattern, args.plain
    config = config_of_depth(args.depth, tokenizer.get_vocab_size(), *shape)
    config.document_start = tokenizer.get_bos_token_id()
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
    goal = plan(
        flops_per_token, counts["scaling"], args.max_seq_len, num_iterations=args.num_iterations,
        target_flops=args.target_flops, target_param_data_ratio=args.target_param_data_ratio,
        total_batch_size=args.total_batch_size, warmup_steps=args.warmup_steps, weight_decay=args.weight_decay,
    )
    num_iterations, B, T = goal.num_iterations, args.device_batch_size, args.max_seq_len
    if B == -1:
        B = fit_device_batch(model, compute, goal.total_batch_size)
    micro_batches = check_batch(goal.total_batch_size, B, T, compute.world_size)
    print0(f"{num_iterations} steps of {goal.total_batch_size} tokens, "
           f"{micro_batches} micro-batch(es) of {B} rows on {compute.world_size} rank(s): "
           f"{goal.tokens / 1e6:.1f}M tokens, {goal.tokens / counts['scaling']:.1f} per scaling parameter; "
           f"learning rates x {goal.lr_scale * goal.short_run:.3f}, of scalars x {goal.lr_scale:.3f}")
    exact_from = (1 - FULL_SOFTMAX) * num_iterations
    sampled = compute.device.type == "cpu" and config.vocab_size >= 2 * SAMPLE
    if sampled:
        print0(f"until step {exact_from:.0f} the training loss is of a part of the vocabulary, and lower than the real one")
    optimizer = make_optimizer(model, args, goal.lr_scale, goal.short_run, goal.weight_decay)

    # The flags with what was derived from them: saved with the model, inherited by later stages
    derived = {"total_batch_size": goal.total_batch_size, "device_batch_size": B, "short_run": goal.short_run}
    settings = argparse.Namespace(**{**vars(args), **derived})
    run = Run("base", args.model_tag or f"d{args.depth}", model, optimizer, tokenizer, settings, compute)

    # The data
    batches = data_loader_with_state(
        tokenizer, B, T, "train", device=compute.device, source=source,
        rows_per_step=goal.total_batch_size // T, resume_state_dict=run.loader_state,
    )
    token_bytes = tokenizer.token_bytes(compute.device)
    eval_rows, eval_steps = eval_batches(args.eval_tokens, B, T, compute)
    core_bundle = None
    if args.core_metric_every > 0:
        try:
            core_bundle = fetch_bundle(compute)
        except UserError as error:
            print0(f"CORE will be skipped: {error}")

    def measure_bpb():
        val_batches = data_loader(
            tokenizer, B, T, "val", device=compute.device, source=source,
            rows_per_step=eval_rows, buffer_size=100, tokenizer_batch_size=16,
        )
        measured = compiled if compute.device.type == "cuda" else model  # a CPU compiles for longer than it gains
        return {"val_bpb": evaluate_bpb(measured, val_batches, eval_steps, token_bytes, compute, run.stop.requested)}

    def measure_core():
        limit = args.core_metric_max_per_task
        core = evaluate_core(model, tokenizer, compute, core_bundle, limit, stop=run.stop.requested)
        return core and {"core": core["core"], "core_stderr": core["stderr"]}

    def sample():
        if compute.is_main:
            print0("\n".join(sample_texts(model, tokenizer)))

    # The loop: save, evaluate, train
    compiled = compile_model(model, compute)
    run.start()
    while not run.save_if_due(last := run.step >= num_iterations):
        if due(run.step, args.eval_every, last):
            run.measure("val bpb", measure_bpb)
        if core_bundle and due(run.step, args.core_metric_every, last) and not run.stop.requested():
            run.measure("CORE", measure_core)
        if due(run.step, args.sample_every, last):
            run.measure("sampling", sample)
        if last:
            break
        if run.stop.requested():
            continue  # an evaluation was interrupted: save and leave

        run.meter.start()
        progress = run.step / num_iterations
        lrm = set_rates(optimizer, run.step, progress, goal.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        micro = [next(batches) for _ in compute.shard(micro_batches)]  # without padding, so the count is known
        importance = sampled_softmax(micro, config.vocab_size, compute, run.step, run.step >= exact_from) if sampled else None
        loss = train_step(compiled, optimizer, micro, compute, run.loss_scale, goal.total_batch_size, importance)
        run.step, run.loader_state = run.step + 1, micro[-1][2]
        run.meter.stop(run.step, run.step / num_iterations, loss, lrm, run.loader_state["epoch"])

    batches.close()
    run.finish(last, "Base model training", {
        "scores": {"val bpb of text": run.val_bpb}, "depth": args.depth,
        "parameters": counts["total"], "scaling parameters": counts["scaling"],
        "training tokens": goal.tokens, "training FLOPs": goal.tokens * flops_per_token,
        "flags": flags.for_report(parser, args, settings),
    })  # fmt: skip


if __name__ == "__main__":
    run_script(main)
