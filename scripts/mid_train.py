"""Midtraining: the base model learns the form of conversations, their special tokens and its tools.

    python -m scripts.mid_train
    python -m scripts.mid_train --tasks=SampleWorld --model-tag=d4      # no connection needed

It goes on from the newest base model with that model's batch, rates and optimizer state.
Conversations are packed whole, every token of them is learnt, and none is cropped.
"""

from __future__ import annotations

import argparse

from nanochat.common import compute_cleanup, compute_init, get_base_dir, print0, run_script, wandb_run


def main(argv=None):
    parser = argparse.ArgumentParser(description="Midtrain a base model on conversations.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="dummy", help="name of the wandb run (dummy: none)")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (empty: the best there is)")
    parser.add_argument("--source", default="base", choices=["base", "mid"], help="stage of the model to go on from")
    parser.add_argument("--model-tag", default=None, help="which model; also names the new one (newest if not given)")
    parser.add_argument("--model-step", type=int, default=None, help="which step of it (last if not given)")
    parser.add_argument("--tasks", default="SmolTalk,MMLU,GSM8K,Identity,SimpleSpelling,SpellingBee",
                        help="what to train on, of: SmolTalk,MMLU,GSM8K,Identity,SimpleSpelling,SpellingBee,SampleWorld")
    # the horizon
    parser.add_argument("--num-epochs", type=float, default=1.0, help="passes over the conversations")
    parser.add_argument("--num-iterations", type=int, default=-1, help="steps instead (-1: as many as the epochs take)")
    # inherited from the model that this goes on from, where not given
    parser.add_argument("--max-seq-len", type=int, default=None, help="tokens per row")
    parser.add_argument("--device-batch-size", type=int, default=None, help="rows per forward pass")
    parser.add_argument("--total-batch-size", type=int, default=None, help="tokens per step")
    parser.add_argument("--embedding-lr", type=float, default=None, help="AdamW rate of the embeddings")
    parser.add_argument("--unembedding-lr", type=float, default=None, help="AdamW rate of the head")
    parser.add_argument("--matrix-lr", type=float, default=None, help="Muon rate of the matrices")
    parser.add_argument("--scalar-lr", type=float, default=None, help="AdamW rate of the per-layer scalars")
    # how the rates move
    parser.add_argument("--init-lr-frac", type=float, default=1.0, help="all rates begin at this part of themselves")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of the matrices, falling to 0")
    parser.add_argument("--warmup-steps", type=int, default=0, help="rates rise; the optimizer is warm already")
    parser.add_argument("--warmdown-ratio", type=float, default=0.8, help="share of the run in which rates fall")
    parser.add_argument("--final-lr-frac", type=float, default=0.0, help="to this part of themselves")
    # along the way
    parser.add_argument("--resume-from-step", default="-1", help="go on from a saved step, or from 'latest'")
    parser.add_argument("--eval-every", type=int, default=150, help="steps between measurements of val bpb (-1: at the end)")
    parser.add_argument("--eval-tokens", type=int, default=-1, help="tokens per measurement (-1: 20971520, on a CPU 65536)")
    parser.add_argument("--save-every", type=int, default=-1, help="steps between checkpoints (-1: at the end)")
    parser.add_argument("--keep-last", type=int, default=-1, help="checkpoints to keep, the newest (-1: all)")
    args = parser.parse_args(argv)

    import torch

    from nanochat import report
    from nanochat.checkpoint_manager import checkpoint_dir, load_model
    from nanochat.dataloader import conversation_data_loader
    from nanochat.loss_eval import evaluate_bpb, share_of
    from nanochat.optim import MuonAdamW
    from nanochat.saver import Saver
    from nanochat.schedule import batch_lr_scale, micro_batches
    from nanochat.tokenizer import get_token_bytes
    from nanochat.training import (
        LossScale,
        Meter,
        StopSignal,
        compile_model,
        conversations_done,
        due,
        inherit,
        resume_training,
        save_training,
        set_rates,
        freeze_garbage,
        train_step,
        warm_start,
    )
    from tasks.common import TaskMixture, TaskSequence, available_tasks
    from tasks.customjson import CustomJSON
    from tasks.gsm8k import GSM8K
    from tasks.mmlu import MMLU
    from tasks.sample_world import SampleWorld
    from tasks.smoltalk import SmolTalk
    from tasks.spellingbee import SimpleSpelling, SpellingBee

    compute = compute_init(args.device_type)

    # The model, and what it brings along
    model, tokenizer, origin = load_model(args.source, compute, args.model_tag, args.model_step)
    model.train()
    tag = args.model_tag or origin["model_tag"]
    saver = Saver(checkpoint_dir("mid", tag), compute, args.keep_last)
    inherit(args, origin)
    lanes = micro_batches(args.total_batch_size, args.device_batch_size, args.max_seq_len, compute.world_size)
    passes = len(compute.shard(lanes))  # of this rank in each step
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
    step, val_bpb = (meta["step"], meta["val_bpb"]) if meta else (0, None)

    # The data
    identity = get_base_dir() / "identity_conversations.jsonl"  # python -m dev.gen_identity writes one to begin with
    makers = {
        "SmolTalk": lambda: SmolTalk("train"),
        "MMLU": lambda: MMLU("auxiliary_train", "train"),
        "GSM8K": lambda: GSM8K("main", "train"),
        "Identity": lambda: TaskSequence([CustomJSON(identity)] * 2),
        "SimpleSpelling": lambda: SimpleSpelling(200000, "train"),
        "SpellingBee": lambda: SpellingBee(80000, "train"),
        "SampleWorld": lambda: SampleWorld("train", size=12000),
    }
    val_makers = {
        "SmolTalk": lambda: SmolTalk("test"),
        "MMLU": lambda: MMLU("all", "test", stop=5200),
        "GSM8K": lambda: GSM8K("main", "test", stop=420),
        "SimpleSpelling": lambda: SimpleSpelling(1000, "test"),
        "SpellingBee": lambda: SpellingBee(1000, "test"),
        "SampleWorld": lambda: SampleWorld("train", size=12400, start=12000),
    }
    train_tasks = available_tasks(makers, args.tasks, compute)
    conversations = TaskMixture(list(train_tasks.values()))
    wanted = ",".join(name for name in train_tasks if name in val_makers) or "SampleWorld"  # for who has only a persona
    val_tasks = TaskMixture(list(available_tasks(val_makers, wanted, compute).values()))

    # Each pass of a step has a lane of its own, so a step sees the same conversations on any number of ranks.
    def loader(tasks, lanes, resume_state_dict=None, buffer_size=256):
        return conversation_data_loader(
            tasks, tokenizer, args.device_batch_size, args.max_seq_len, supervise="all",
            device=compute.device, lanes=lanes, resume_state_dict=resume_state_dict, buffer_size=buffer_size,
        )

    loader_state = meta["loader_state"] if meta else None
    batches = loader(conversations, lanes, loader_state)
    token_bytes = get_token_bytes(compute.device)
    eval_tokens = args.eval_tokens if args.eval_tokens > 0 else 2**16 if compute.device.type == "cpu" else 20 * 2**20
    eval_lanes, eval_steps = share_of(eval_tokens, len(val_tasks), args.device_batch_size, args.max_seq_len, compute)

    def progress_at(step, done):
        """The share of the run that is done: of its steps where they are given, else of its conversations, all of which are seen."""
        if args.num_iterations > 0:
            return step / args.num_iterations
        finished, behind = done.tolist()
        share = finished / len(conversations) / args.num_epochs
        return min(share, 1 - 1e-9) if behind else share

    # The loop
    compiled = compile_model(model, compute, args.device_batch_size)
    loss_scale = LossScale(**loop.get("loss_scale", {})) if compute.dtype == torch.float16 else None
    wandb = wandb_run("nanochat-mid", args.run, vars(args))
    meter = Meter(compute, saver.directory, args.total_batch_size, model.estimate_flops(), wandb, loop.get("meter"))
    stop = StopSignal(compute)
    freeze_garbage()
    progress = progress_at(step, conversations_done(loader_state, args.num_epochs)) if meta else 0.0
    while True:
        last = progress >= 1
        stopping = stop.asked()
        fresh = meta is None or step > meta["step"]  # what was done when this step was saved is not done again
        measuring = not stopping and (fresh or not loop["measured"])  # whoever asks to stop may not wait long
        if last or stopping or any(due(step, every) for every in (args.eval_every, args.save_every)):
            meter.flush()

        if due(step, args.eval_every, last) and measuring:
            val_batches = loader(val_tasks, eval_lanes, buffer_size=32)
            val_bpb = evaluate_bpb(model, val_batches, eval_steps, token_bytes, compute)
            val_batches.close()
            meter.log(step, val_bpb=val_bpb)
            print0(f"step {step:05d} | val bpb {val_bpb:.4f}")
        if (due(step, args.save_every, last) or stopping) and fresh and step > 0:
            save_training(saver, step, model, optimizer, tokenizer, args, meter, val_bpb, loader_state, loss_scale, measuring)
        if last or stopping:
            break

        meter.start()
        lrm = set_rates(optimizer, step, progress, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        micro = [next(batches) for _ in range(passes)]
        loader_state = micro[-1][2]
        loss = train_step(compiled, optimizer, [(inputs, targets) for inputs, targets, _ in micro], compute, loss_scale)
        step += 1
        progress = progress_at(step, compute.sum(conversations_done(loader_state, args.num_epochs)))
        meter.stop(step, min(progress, 1.0), loss, lrm, loader_state["epoch"])

    batches.close()
    saver.close()
    if stopping and not last:
        print0(f"stopped after step {step}; go on with the same flags and --resume-from-step=latest")
    elif compute.is_main:
        report.log("Midtraining", {
            **vars(args), "stage": "mid", "scores": {"val bpb": val_bpb}, "model tag": tag, "steps": step,
            "conversations": len(conversations),
            "training minutes": meter.total_time / 60, "metrics": str(meter.path),
        })
    meter.finish()
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
