"""Evaluate a base model, ours or one of Hugging Face, on CORE: 22 in-context tasks.

    python -m scripts.base_eval
    torchrun --nproc-per-node=8 -m scripts.base_eval -- --max-per-task=500
    python -m scripts.base_eval --hf-path openai-community/gpt2

Prints a table, writes it to base_eval/NAME.csv in the base folder and adds it to the report.
"""

from nanochat import flags
from nanochat.common import UserError, compute_cleanup, compute_init, get_base_dir, print0, run_script


def main(argv=None):
    parser = flags.make_parser(__doc__)
    flags.add_model_flags(parser)
    parser.add_argument("--hf-path", help="evaluate this Hugging Face model (folder or id) instead of ours")
    parser.add_argument("--max-per-task", type=flags.COUNT_OR_AUTO, default=-1, help="questions per task (-1: all)")
    args = parser.parse_args(argv)

    from nanochat import report
    from nanochat.checkpoint_manager import load_model
    from nanochat.core_eval import evaluate_core, fetch_bundle
    from nanochat.hf_model import load_hf_model

    compute = compute_init(args.device_type)
    if args.hf_path:
        model, tokenizer = compute.main_first(lambda: load_hf_model(args.hf_path, compute))
        name = args.hf_path.strip("/").replace("/", "-")
    else:
        model, tokenizer, meta = load_model("base", compute, args.model_tag, args.step)
        name = f"{meta['model_tag']}_{meta['step']:06d}"
    try:
        bundle = fetch_bundle(compute)
    except UserError as error:
        print0(f"CORE skipped: {error}")
        compute_cleanup(compute)
        return

    result = evaluate_core(model, tokenizer, compute, bundle, args.max_per_task, say=print0)
    if compute.is_main:
        rows = ["label,accuracy,centered,stderr,examples"]  # stderr is that of the centred value
        for label, task in result["tasks"].items():
            rows.append(f"{label},{task['accuracy']:.6f},{task['centered']:.6f},{task['stderr']:.6f},{task['examples']}")
        rows.append(f"CORE,,{result['core']:.6f},{result['stderr']:.6f},")
        path = get_base_dir() / "base_eval" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        print0("\n".join(rows))
        print(f"CORE {result['core']:.4f} +- {result['stderr']:.4f} (one standard error); written to {path}")
        centered = {label: round(task["centered"], 4) for label, task in result["tasks"].items()}
        data = {"model": name, "CORE": result["core"], "CORE standard error": result["stderr"], **centered}
        if not args.hf_path:  # only our own models have a column in the report's final table
            data |= {"stage": "base", "scores": {"CORE": result["core"]}}
        report.log("Base model evaluation", data)
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
