"""Bits per byte of a base model, ours or one of Hugging Face, on train and val text, and samples of its text.

    python -m scripts.base_loss
    torchrun --nproc-per-node=8 -m scripts.base_loss -- --split-tokens=20971520
    python -m scripts.base_loss --hf-path openai-community/gpt2 --source climbmix

Bits per byte do not depend on the vocabulary, so models with different tokenizers can be compared.
"""

from nanochat import flags
from nanochat.common import compute_cleanup, compute_init, print0, run_script


def main(argv=None):
    parser = flags.make_parser(__doc__)
    flags.add_model_flags(parser)
    parser.add_argument("--hf-path", help="evaluate this Hugging Face model (folder or id) instead of ours")
    parser.add_argument("--source", default="", help="the text (default: as in training; with --hf-path: climbmix)")
    parser.add_argument("--split-tokens", type=flags.COUNT_OR_AUTO, default=-1, help="tokens per split (-1: 20 Mi, on a CPU 2^18)")
    parser.add_argument("--device-batch-size", type=flags.COUNT, default=32, help="rows per forward pass and rank")
    args = parser.parse_args(argv)

    from nanochat import report
    from nanochat.checkpoint_manager import load_model
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
    from nanochat.hf_model import load_hf_model
    from nanochat.loss_eval import SAMPLE_PROMPTS, eval_batches, evaluate_bpb, sample_texts

    compute = compute_init(args.device_type)
    if args.hf_path:
        model, tokenizer = compute.main_first(lambda: load_hf_model(args.hf_path, compute))
        name, source = args.hf_path, args.source or "climbmix"
    else:
        model, tokenizer, meta = load_model("base", compute, args.model_tag, args.step)
        name = f"{meta['model_tag']} step {meta['step']}"
        source = args.source or meta.get("user_config", {}).get("source", "climbmix")

    T = min(model.config.sequence_len, 2048)
    split_tokens = args.split_tokens
    if split_tokens == -1:
        split_tokens = 2**18 if compute.device.type == "cpu" else 20 * 2**20
    results = {"model": name, "source": source}
    for split in ("train", "val"):
        rows, steps = eval_batches(split_tokens, args.device_batch_size, T, compute)
        batches = tokenizing_distributed_data_loader_bos_bestfit(
            tokenizer, args.device_batch_size, T, split, device=compute.device, source=source,
            rows_per_step=rows, buffer_size=100, tokenizer_batch_size=16,
        )
        bpb = evaluate_bpb(model, batches, steps, tokenizer.token_bytes(), compute)
        batches.close()
        results |= {f"{split} tokens": rows * T, f"{split} bpb": bpb}
        print0(f"{split} bpb {bpb:.4f} over {rows * T} tokens of {source}")

    if compute.is_main:
        if args.hf_path:
            results["samples"] = [model.complete(tokenizer, prompt) for prompt in SAMPLE_PROMPTS]
        else:  # only our own models have a column in the report's final table
            results["samples"] = sample_texts(model, tokenizer)
            results |= {"stage": "base", "scores": {f"{split} bpb of text": results[f"{split} bpb"] for split in ("train", "val")}}
        print0("\n".join(results["samples"]))
        report.log("Base model loss", results)
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
