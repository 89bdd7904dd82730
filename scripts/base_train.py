"""Pretraining: a base model from text.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=8 --num-iterations=200
    python -m scripts.base_train --depth=20                          # one GPU; a batch that does not fit is accumulated
    torchrun --nproc_per_node=8 -m scripts.base_train -- --depth=20  # the same run on eight, or on any number of ranks
    python -m scripts.base_train --depth=20 --resume-from-step=latest

`--depth` sizes everything else: width, heads, horizon, batch and rates follow from it.
"""

from __future__ import annotations

import argparse

from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_script, wandb_run


def main(argv=None):
    parser = argparse.ArgumentParser(description="Pretrain a base model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="dummy", help="name of the wandb run (dummy: none)")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (empty: the best there is)")
    # the model
    parser.add_argument("--depth", type=int, default=20, help="layers; the one dial")
    parser.add_argument("--aspect-ratio", type=int, default=64, help="width per layer of depth")
    parser.add_argument("--head-dim", type=int, default=128, help="width of an attention head")
    parser.add_argument("--n-kv-head", type=int, default=-1, help="key and value heads (-1: as many as query heads)")
    parser.add_argument("--max-seq-len", type=int, default=2048, help="context in tokens")
    parser.add_argument("--window-pattern", default="QQQL", help="attention span per layer, tiled: L full, S half, Q quarter")
    # the horizon: the first of these that is set
    parser.add_argument("--num-iterations", type=int, default=-1, help="steps (-1: not set)")
    parser.add_argument("--target-flops", type=float, default=-1.0, help="training FLOPs (-1: not set)")
    parser.add_argument("--target-param-data-ratio", type=float, default=12.0, help="tokens per scaling parameter")
    # the batch and the rates
    parser.add_argument("--device-batch-size", type=int, default=32, help="rows per forward pass (-1: as many as fit the GPU; 8 on a CPU)")
    parser.add_argument("--total-batch-size", type=int, default=-1, help="tokens per step (-1: what suits the horizon)")
    parser.add_argument("--embedding-lr", type=float, default=0.3, help="AdamW rate of the embeddings")
    parser.add_argument("--unembedding-lr", type=float, default=0.008, help="AdamW rate of the head")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="Muon rate of the matrices")
    parser.add_argument("--scalar-lr", type=float, default=0.5, help="AdamW rate of the per-layer scalars")
    parser.add_argument("--weight-decay", type=float, default=0.28, help="of the matrices, falling to 0")
    parser.add_argument("--warmup-steps", type=int, default=40, help="learning rates rise (at most a twentieth of the run)")
    parser.add_argument("--warmdown-ratio", type=float, default=0.65, help="share of the run in which they fall")
    parser.add_argument("--final-lr-frac", type=float, default=0.05, help="to this part of themselves")
    parser.add_argument("--fp8", action="store_true", help="train in float8 where the GPU can (compute capability 8.9 or more)")
    # along the way
    parser.add_argument("--resume-from-step", default="-1", help="go on from a saved step, or from 'latest'")
    parser.add_argument("--eval-every", type=int, default=250, help="steps between measurements of val bpb (-1: at the end)")
    parser.add_argument("--eval-tokens", type=int, default=-1, help="tokens per measurement (-1: 20971520, on a CPU 65536)")
    parser.add_argument("--core-metric-every", type=int, default=2000, help="steps between CORE evaluations (-1: none)")
    parser.add_argument("--core-metric-max-per-task", type=int, default=500, help="questions per CORE task")
    parser.add_argument("--sample-every", type=int, default=2000, help="steps between samples (-1: at the end)")
    parser.add_argument("--save-every", type=int, default=-1, help="steps between checkpoints (-1: at the end)")
    parser.add_argument("--keep-last", type=int, default=-1, help="checkpoints to keep, the newest (-1: all)")
    parser.add_argument("--model-tag", default=None, help="name of the checkpoint folder (default d{depth})")
    parser.add_argument("--source", default="climbmix", help="climbmix, fineweb-edu, sample, or a folder of parquet files")
    args = parser.parse_args(argv)

    import torch

    from nanochat import fp8, report
    from nanochat.checkpoint_manager import checkpoint_dir
    from nanochat.core_eval import evaluate_core, fetch_bundle
    from nanochat.dataloader import (
        tokenizing_distributed_data_loader_bos_bestfit,
        tokenizing_distributed_data_loader_with_state_bos_bestfit,
    )
    from nanochat.dataset import count_documents
    from nanochat.gpt import GPT, config_of_depth
    from nanochat.loss_eval import evaluate_bpb, sample_texts, share_of
    from nanochat.optim import MuonAdamW
    from nanochat.saver import Saver
    from nanochat.schedule import (
        batch_lr_scale,
        best_batch_size,
        horizon_tokens,
        micro_batches,
        short_run_lr_scale,
        weight_decay_scale,
    )
    from nanochat.tokenizer import get_token_bytes, get_tokenizer
    from nanochat.training import (
        LossScale,
        Meter,
        StopSignal,
        compile_model,
        due,
        resume_training,
        rows_that_fit,
        save_training,
        saved_flag,
        set_rates,
        freeze_garbage,
        train_step,
    )

    compute = compute_init(args.device_type)
    tokenizer = get_tokenizer()
    tag = args.model_tag or f"d{args.depth}"
    saver = Saver(checkpoint_dir("base", tag), compute, args.keep_last)

    # The model
    config = config_of_depth(
        args.depth, tokenizer.get_vocab_size(), args.max_seq_len, args.aspect_ratio, args.head_dim, args.n_kv_head, args.window_pattern
    )
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=compute.device)
    model.init_weights(compute.dtype)
    counts, flops_per_token = model.num_scaling_params(), model.estimate_flops()
    print0(f"model d{args.depth}: width {config.n_embd}, {config.n_head} heads, {counts['total'] / 1e6:.1f}M parameters "
           f"({counts['scaling'] / 1e6:.1f}M scaling), {flops_per_token / 1e6:.0f} MFLOPs per token, "
           f"{compute.dtype} on {compute.device.type}")
    if args.fp8:
        if obstacle := fp8.unsupported_reason(compute.device, compute.dtype):
            print0(f"--fp8 is skipped, training goes on in {compute.dtype}: {obstacle}")
        else:
            print0(f"{fp8.convert(model)} matrix products per pass in float8; evaluation stays in {compute.dtype}")

    # Horizon, batch and rates
    if args.num_iterations > 0:
        tokens = args.num_iterations * args.total_batch_size if args.total_batch_size > 0 else None
    else:
        tokens = horizon_tokens(args.target_flops, args.target_param_data_ratio, flops_per_token, counts["scaling"])
    batch = args.total_batch_size
    if batch <= 0:
        batch = best_batch_size(tokens or horizon_tokens(-1, args.target_param_data_ratio, flops_per_token, counts["scaling"]))
    if args.device_batch_size <= 0:
        most = batch // args.max_seq_len // compute.world_size
        args.device_batch_size = saved_flag(saver.directory, args, "device_batch_size", compute) or rows_that_fit(model, compute, most)
        print0(f"--device-batch-size {args.device_batch_size}")
    if args.total_batch_size <= 0:
        unit = args.device_batch_size * args.max_seq_len
        args.total_batch_size = max(round(batch / unit), compute.world_size) * unit
    lanes = micro_batches(args.total_batch_size, args.device_batch_size, args.max_seq_len, compute.world_size)
    passes = len(compute.shard(lanes))  # of this rank in each step
    num_iterations = args.num_iterations if args.num_iterations > 0 else max(1, round(tokens / args.total_batch_size))
    tokens = num_iterations * args.total_batch_size
    warmup_steps = min(args.warmup_steps, num_iterations // 20)
    args.short_run = short_run_lr_scale(tokens, counts["scaling"])  # saved with the flags: later stages go on with it
    lr_scale = batch_lr_scale(args.total_batch_size) * args.short_run
    weight_decay = args.weight_decay * weight_decay_scale(args.total_batch_size, tokens) / args.short_run
    print0(f"{num_iterations} steps of {args.total_batch_size} tokens, {lanes} pass(es) on {compute.world_size} rank(s): "
           f"{tokens / 1e6:.1f}M tokens, {tokens / counts['scaling']:.1f} per scaling parameter; learning rates x {lr_scale:.3f}")

    optimizer = MuonAdamW(
        model.param_groups(
            embedding_lr=args.embedding_lr * lr_scale,
            unembedding_lr=args.unembedding_lr * lr_scale,
            matrix_lr=args.matrix_lr * lr_scale,
            scalar_lr=args.scalar_lr * lr_scale,
            weight_decay=weight_decay,
        )
    )
    meta = resume_training(saver.directory, args, model, optimizer, compute)
    loop = meta["loop_state"] if meta else {}
    step, val_bpb = (meta["step"], meta["val_bpb"]) if meta else (0, None)

    # The data. Each pass of a step has a lane of its own, so a step sees the same text on any number of ranks.
    def val_batches():
        return tokenizing_distributed_data_loader_bos_bestfit(
            tokenizer, args.device_batch_size, args.max_seq_len, "val", device=compute.device, source=args.source,
            lanes=eval_lanes, buffer_size=100, tokenizer_batch_size=16,
        )

    batches = tokenizing_distributed_data_loader_with_state_bos_bestfit(
        tokenizer, args.device_batch_size, args.max_seq_len, "train", device=compute.device, source=args.source,
        lanes=lanes, resume_state_dict=meta["loader_state"] if meta else None,
    )
    loader_state = meta["loader_state"] if meta else None
    token_bytes = get_token_bytes(compute.device)
    eval_tokens = args.eval_tokens if args.eval_tokens > 0 else 2**16 if compute.device.type == "cpu" else 20 * 2**20
    documents = count_documents(args.source, "val")
    eval_lanes, eval_steps = share_of(eval_tokens, documents, args.device_batch_size, args.max_seq_len, compute)
    core_bundle = None
    if args.core_metric_every > 0:
        try:
            core_bundle = fetch_bundle(compute)
        except UserError as error:
            print0(f"CORE will be skipped: {error}")

    # The loop
    compiled = compile_model(model, compute, args.device_batch_size)
    loss_scale = LossScale(**loop.get("loss_scale", {})) if compute.dtype == torch.float16 else None
    wandb = wandb_run("nanochat", args.run, vars(args))
    meter = Meter(compute, saver.directory, args.total_batch_size, flops_per_token, wandb, loop.get("meter"))
    stop = StopSignal(compute)
    freeze_garbage()
    while True:
        last = step >= num_iterations
        stopping = stop.asked()
        fresh = meta is None or step > meta["step"]  # what was done when this step was saved is not done again
        measuring = not stopping and (fresh or not loop["measured"])  # whoever asks to stop may not wait long
        if last or stopping or any(due(step, every) for every in (args.eval_every, args.core_metric_every, args.sample_every, args.save_every)):
            meter.flush()

        if due(step, args.eval_every, last) and measuring:
            val_bpb = evaluate_bpb(model, val_batches(), eval_steps, token_bytes, compute)
            meter.log(step, val_bpb=val_bpb)
            print0(f"step {step:05d} | val bpb {val_bpb:.4f}")
        if core_bundle and due(step, args.core_metric_every, last) and measuring:
            core = evaluate_core(model, tokenizer, compute, core_bundle, args.core_metric_max_per_task)
            meter.log(step, core=core["core"])
            print0(f"step {step:05d} | CORE {core['core']:.4f} +- {core['stderr']:.4f}")
        if due(step, args.sample_every, last) and measuring and compute.is_main:
            print("\n".join(sample_texts(model, tokenizer)), flush=True)
        if (due(step, args.save_every, last) or stopping) and fresh and step > 0:
            save_training(saver, step, model, optimizer, tokenizer, args, meter, val_bpb, loader_state, loss_scale, measuring)
        if last or stopping:
            break

        meter.start()
        lrm = set_rates(optimizer, step, step / num_iterations, warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        micro = [next(batches) for _ in range(passes)]
        loader_state = micro[-1][2]
        pairs = [(inputs, targets) for inputs, targets, _ in micro]
        loss = train_step(compiled, optimizer, pairs, compute, loss_scale, count=args.total_batch_size)  # no padding: all count
        step += 1
        meter.stop(step, step / num_iterations, loss, lrm, loader_state["epoch"])

    batches.close()
    saver.close()
    if stopping and not last:
        print0(f"stopped after step {step} of {num_iterations}; go on with the same flags and --resume-from-step=latest")
    elif compute.is_main:
        report.log("Base model training", {
            **vars(args), "stage": "base", "scores": {"val bpb": val_bpb}, "model tag": tag,
            "parameters": counts["total"], "scaling parameters": counts["scaling"], "steps": num_iterations,
            "training tokens": tokens, "training FLOPs": tokens * flops_per_token,
            "training minutes": meter.total_time / 60, "metrics": str(meter.path),
        })
    meter.finish()
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
