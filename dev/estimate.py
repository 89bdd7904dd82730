"""What a run will take, estimated beforehand: tokens, steps, hours, dollars, shards of text and disk.

    python -m dev.estimate --depth 22 --vocab-size 49152 --ratio 9.4 --gpus 8 --mfu 0.5 --dollars-per-gpu-hour 3
    python -m dev.estimate --depth 10 12 14 16      # several models, and what they take together

Parameters and FLOPs are those of the model itself, built on the meta device; horizon and batch size come from
`schedule.plan`, as in scripts/base_train.py, whose other flags are ignored, so that one list of flags serves both.
"""

import math
import shutil

from nanochat import flags
from nanochat.common import UserError, get_base_dir, run_script

# ClimbMix has 400 billion tokens of GPT-2's (https://huggingface.co/datasets/nvidia/ClimbMix) in 6543 shards: 61 million
# each. A vocabulary of 32 to 64 thousand needs about as many; a tenth is kept in reserve.
TOKENS_PER_SHARD = 55e6
SHARD_BYTES = 100e6  # 61 million tokens are some 280 million characters; such text takes 0.31 bytes a character in parquet
CHAT_TOKENS = 350e6  # of mid_train and chat_sft: 870 thousand conversations of some 400 tokens (assumed)
OTHER_HOURS = 0.5  # set-up, tokenizer, CORE and the chat tasks (assumed)
CHECKPOINTS, CHAT_CHECKPOINTS = 3, 3  # of pretraining two are kept while a third is written; one each of mid, sft and rl
OTHER_BYTES = 5e9  # data sets of the tasks, CORE, logs


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--depth", type=flags.DEPTH, nargs="+", default=[20], help="layers; several numbers for several runs")
    flags.add_size_flags(parser)
    group = parser.add_argument_group("vocabulary, hardware, output")
    group.add_argument("--vocab-size", type=flags.COUNT, default=32768, help="tokens of the vocabulary")
    group.add_argument("--gpus", type=flags.COUNT, default=8, help="number of GPUs")
    group.add_argument("--gpu", default="H100", help="type of GPU, one listed in nanochat/device.py")
    group.add_argument("--mfu", type=flags.number(float, 0.001, 1), default=0.5, help="share of the bf16 peak that training reaches")
    group.add_argument("--dollars-per-gpu-hour", type=flags.FRACTION, default=3.0, help="price")
    group.add_argument("--chat", action="store_true", help="with midtraining and fine-tuning")
    group.add_argument("--check", action="store_true", help="fail if the base folder lacks space or has another tokenizer")
    group.add_argument("--shards", action="store_true", help="print only the number of shards")
    args, _ = parser.parse_known_args(argv)

    runs = [estimate(depth, args) for depth in args.depth]
    shards = min(6542, max(math.ceil(run["tokens"] / TOKENS_PER_SHARD) for run in runs))
    if args.shards:
        print(shards)
        return
    hours = sum(run["hours"] for run in runs)
    if args.chat:  # of several runs, for the last
        hours += runs[-1]["chat hours"] + OTHER_HOURS
    checkpoints = sum(run["checkpoint"] for run in runs) * (CHECKPOINTS + CHAT_CHECKPOINTS * args.chat)
    needed = (shards + 1) * SHARD_BYTES + checkpoints + OTHER_BYTES
    price = args.gpus * args.dollars_per_gpu_hour
    print(f"{'':24}{'parameters':>11}{'scaling':>9}{'tokens':>9}{'steps of':>9}{'tokens':>10}{'FLOPs':>10}"
          f"{'hours':>8}{'dollars':>9}")
    for depth, run in zip(args.depth, runs):
        print(f"{f'pretraining d{depth}':24}{amount(run['parameters']):>11}{amount(run['scaling']):>9}{amount(run['tokens']):>9}"
              f"{run['steps']:>9,}{run['batch']:>10,}{run['flops']:>10.2e}{run['hours']:>8.2f}{run['hours'] * price:>9,.0f}")
    if args.chat:
        chat_hours = runs[-1]["chat hours"]
        print(f"{'midtraining, fine-tuning':24}{amount(CHAT_TOKENS):>29}{chat_hours:>37.2f}{chat_hours * price:>9,.0f}")
        print(f"{'everything else':24}{OTHER_HOURS:>66.2f}{OTHER_HOURS * price:>9,.0f}")
    print(f"in all {hours:.2f} hours and {hours * price:,.0f} dollars on {args.gpus} x {args.gpu} "
          f"at {100 * args.mfu:.0f}% of the bf16 peak; {shards} shard(s) of text; {math.ceil(needed / 1e9)} GB of disk")
    if args.check:
        check(needed, args.vocab_size)


def estimate(depth: int, args) -> dict:
    """One pretraining run: its size and horizon, "hours", "chat hours" of later stages, "checkpoint" in bytes."""
    import torch

    from nanochat.device import PEAK_FLOPS, peak_flops_of
    from nanochat.gpt import GPT, config_of_depth
    from nanochat.schedule import plan

    peak = peak_flops_of(args.gpu)
    if peak is None:
        raise UserError(f"the bf16 peak of --gpu {args.gpu!r} is not known; known are {', '.join(PEAK_FLOPS)}")
    shape = args.max_seq_len, args.aspect_ratio, args.head_dim, args.n_kv_head, args.window_pattern, args.plain
    with torch.device("meta"):
        model = GPT(config_of_depth(depth, args.vocab_size, *shape))
    counts, flops_per_token = model.num_scaling_params(), model.estimate_flops()
    run = plan(
        flops_per_token, counts["scaling"], args.max_seq_len, num_iterations=args.num_iterations, target_flops=args.target_flops,
        target_param_data_ratio=args.target_param_data_ratio, total_batch_size=args.total_batch_size,
    )
    # Embeddings are stored in bfloat16, the rest in float32. Muon keeps one number a weight, AdamW two.
    embeddings = counts["wte"] + counts["value_embeds"]
    checkpoint = 2 * 3 * embeddings + 4 * (3 * counts["lm_head"] + 2 * counts["transformer_matrices"])
    per_hour = 3600 * args.gpus * peak * args.mfu
    return {
        "parameters": counts["total"], "scaling": counts["scaling"], "tokens": run.tokens, "steps": run.num_iterations,
        "batch": run.total_batch_size, "flops": run.tokens * flops_per_token, "checkpoint": checkpoint,
        "hours": run.tokens * flops_per_token / per_hour, "chat hours": CHAT_TOKENS * flops_per_token / per_hour,
    }


def amount(number: float) -> str:
    """1234567890 -> 1.23B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def check(needed: float, vocab_size: int) -> None:
    """Raises UserError where the base folder has no room for `needed` bytes, or holds a tokenizer of another size."""
    base = get_base_dir()
    used = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())  # by an earlier start of the same run
    space = used + shutil.disk_usage(base).free
    if space < needed:
        raise UserError(
            f"this run takes about {needed / 1e9:.0f} GB and {base} has space for {space / 1e9:.0f} GB. "
            "Point NANOCHAT_BASE_DIR at a larger disk"
        )
    if (base / "tokenizer" / "vocabulary.json").exists():
        from nanochat.tokenizer import get_tokenizer

        size = get_tokenizer().get_vocab_size()
        if size != vocab_size:
            raise UserError(f"the tokenizer in {base} has {size} tokens, not {vocab_size}. Use it with VOCAB_SIZE={size}, "
                            "or set NANOCHAT_BASE_DIR to another folder")


if __name__ == "__main__":
    run_script(main)
