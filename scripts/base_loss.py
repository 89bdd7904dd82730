"""Bits per byte of a base model, ours or one of Hugging Face, on train and val text, and samples of its text.

    python -m scripts.base_loss
    torchrun --nproc_per_node=8 -m scripts.base_loss -- --split-tokens=20971520
    python -m scripts.base_loss --hf-path openai-community/gpt2 --source climbmix

Bits per byte do not depend on the vocabulary, so models with different tokenizers can be compared.
"""

from __future__ import annotations

from nanochat import flags
from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_script


def main(argv=None):
    parser = flags.make_parser("Loss of a base model.")
    flags.add_model_flags(parser)
    parser.add_argument("--hf-path", default="", help="evaluate this Hugging Face model (folder or id) instead of ours")
    parser.add_argument("--source", default="", help="the text (default: as in training; with --hf-path: climbmix)")
    parser.add_argument("--split-tokens", type=flags.COUNT_OR_AUTO, default=-1, help="tokens per split (-1: 20971520, on a CPU 262144)")
    parser.add_argument("--device-batch-size", type=flags.COUNT, default=32, help="rows per forward pass and rank")
    args = parser.parse_args(argv)

    from nanochat import report
    from nanochat.checkpoint_manager import load_model, resolve_checkpoint
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
    from nanochat.hf_model import load_hf_model
    from nanochat.loss_eval import SAMPLE_PROMPTS, eval_batches, evaluate_bpb, sample_texts

    compute = compute_init(args.device_type)
    if args.hf_path:
        model, tokenizer = compute.main_first(lambda: load_hf_model(args.hf_path, compute))
        token_bytes, source, name = tokenizer.token_bytes(), args.source or "climbmix", args.hf_path
    else:
        directory, step = compute.on_main(lambda: resolve_checkpoint("base", args.model_tag, args.step))
        model, tokenizer, meta = load_model("base", compute, directory.name, step)
        token_bytes, source = tokenizer.token_bytes(), args.source or meta.get("user_config", {}).get("source", "climbmix")
        name = f"{directory.name} step {step}"

    T = min(model.config.sequence_len, 2048)
    batch_tokens = args.device_batch_size * T
    split_tokens = args.split_tokens if args.split_tokens > 0 else 2**18 if compute.device.type == "cpu" else 20 * 2**20
    if split_tokens < batch_tokens:
        raise UserError(
            f"--split-tokens {split_tokens} is less than one batch of {batch_tokens} (--device-batch-size "
            f"{args.device_batch_size} x {T} tokens); increase it or use a smaller batch"
        )
    results = {"model": name, "source": source}
    for split in ("train", "val"):
        rows, steps = eval_batches(split_tokens, args.device_batch_size, T, compute)
        measured = results[f"{split} tokens"] = rows * T
        batches = tokenizing_distributed_data_loader_bos_bestfit(
            tokenizer, args.device_batch_size, T, split, device=compute.device, source=source,
            rows_per_step=rows, buffer_size=100, tokenizer_batch_size=16,
        )
        results[f"{split} bpb"] = evaluate_bpb(model, batches, steps, token_bytes, compute)
        batches.close()
        print0(f"{split} bpb {results[f'{split} bpb']:.4f} over {measured} tokens of {source}")

    if compute.is_main:
        if args.hf_path:
            samples = [model.complete(tokenizer, prompt) for prompt in SAMPLE_PROMPTS]
        else:
            samples = sample_texts(model, tokenizer)
        print("\n".join(samples))
        data = {**results, "samples": samples}
        if not args.hf_path:  # only our own models have a column in the report's final table
            data |= {"stage": "base", "scores": {f"{split} bpb of text": results[f"{split} bpb"] for split in ("train", "val")}}
        report.log("Base model loss", data)
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
