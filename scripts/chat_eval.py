"""Measure a chat model on tasks with answers that can be checked.

    python -m scripts.chat_eval -i sft                       # the six tasks of ChatCORE
    python -m scripts.chat_eval -i sft -a "ARC-Easy|GSM8K"   # some of them
    torchrun --nproc-per-node=8 -m scripts.chat_eval -- -i mid -x 500

ChatCORE is the mean over six tasks of (accuracy - baseline) / (1 - baseline), where the baseline is the accuracy of
guessing. It is printed only if all six tasks were run. Accuracies are shown with their standard error.
"""

from nanochat import flags
from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_script

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
TASK_NAMES = (*CHATCORE, "SampleWorld")
DEFAULT_QUESTIONS = ["Who are you?", "Why is the sky blue?"]  # for a model whose tasks name no examples


def make_task(name: str, allow_unsafe_code: bool = False):
    """The task with its test questions, of a file those held out. Data comes from the hub, so this may raise UserError."""
    from tasks.arc import ARC
    from tasks.customjson import CustomJSON
    from tasks.gsm8k import GSM8K
    from tasks.humaneval import HumanEval
    from tasks.mmlu import MMLU
    from tasks.sample_world import SampleWorld
    from tasks.spellingbee import SpellingBee

    return {
        "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
        "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
        "MMLU": lambda: MMLU("all", "test"),
        "GSM8K": lambda: GSM8K("main", "test"),
        "HumanEval": lambda: HumanEval(allow_unsafe=allow_unsafe_code),
        "SpellingBee": lambda: SpellingBee(256, "test"),
        "SampleWorld": lambda: SampleWorld("test"),
    }.get(name, lambda: CustomJSON(name, "val"))()


def converse(engine, tokenizer, questions: list[str], max_tokens: int = 128) -> list[dict]:
    """The messages of one conversation with these questions and greedy replies; it ends early where the context is full."""
    tokens, messages = [tokenizer.get_bos_token_id()], []
    for question in questions:
        message = {"role": "user", "content": question}
        tokens += tokenizer.render_for_completion({"messages": [message]})[1:]  # bos comes only before the first turn
        if len(tokens) >= engine.context:
            break
        [continued], _ = engine.generate_batch(tokens, max_tokens=max_tokens, temperature=0.0)
        messages += [message, {"role": "assistant", "content": tokenizer.decode(continued[len(tokens) :])}]
        tokens = [*continued, tokenizer.encode_special("<|assistant_end|>")]
    return messages


def main(argv=None):
    parser = flags.make_parser(__doc__)
    flags.add_model_flags(parser, ["base", "mid", "sft", "rl"])
    group = parser.add_argument_group("tasks")
    task_help = (f"a task, or several joined by |; may be repeated (default: the six of ChatCORE): {', '.join(TASK_NAMES)}, "
                 "or a file of conversations")
    group.add_argument("-a", "--task-name", action="append", metavar="NAME", help=task_help)
    group.add_argument("-x", "--max-problems", type=flags.COUNT, help="only the first problems of each task (default: all)")
    group.add_argument("-n", "--num-samples", type=flags.COUNT, default=1, help="replies per problem; one must be right")
    group.add_argument("-b", "--batch-size", type=flags.COUNT, default=8, help="multiple-choice problems per forward pass")
    group.add_argument("--allow-unsafe-code", action="store_true", help="run HumanEval even where its code cannot be isolated")
    flags.add_sampling_flags(parser, temperature=0.0, max_tokens="--max-new-tokens")
    args = parser.parse_args(argv)
    names = [name.strip() for name in "|".join(args.task_name or CHATCORE).split("|")]
    for name in names:
        if name not in TASK_NAMES and "." not in name:
            raise UserError(f"unknown task {name!r}; choose from {', '.join(TASK_NAMES)}, or name a file of conversations")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError(f"-n {args.num_samples}: samples at temperature 0 are all equal; add -t 1.0")

    from nanochat import report
    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine
    from nanochat.task_eval import count_right

    compute = compute_init(args.device_type)
    tasks = {}
    for name in dict.fromkeys(names):  # without duplicates
        try:
            tasks[name] = compute.main_first(lambda: make_task(name, args.allow_unsafe_code))
        except UserError as error:
            if args.task_name:  # requested by name: a result without it would be silently different
                raise
            print0(f"{name:14s} skipped: {error}")
    if not tasks:
        raise UserError("none of the tasks could be loaded (reasons above); -a SampleWorld needs no data hub")

    model, tokenizer, meta = load_model(args.stage, compute, model_tag=args.model_tag, step=args.step)
    engine = Engine(model.to(compute.dtype), tokenizer, compiled=True)
    results = {}
    for name, task in tasks.items():
        if name == "HumanEval":
            print0(f"HumanEval runs model-written code behind: {', '.join(task.layers) or 'nothing'}")
        right = count_right(
            task, model, tokenizer, engine, compute,
            max_problems=args.max_problems, batch_size=args.batch_size, num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k or None, name=name,
        )  # fmt: skip
        n, accuracy = len(right), (right > 0).double().mean().item()
        error = (accuracy * (1 - accuracy) / n) ** 0.5
        results[name] = {"accuracy": accuracy, "stderr": error, "n": n, "baseline": task.baseline}
        print0(f"{name:14s} {100 * accuracy:6.2f}% +- {100 * error:.2f}  "
               f"({n} problems, guessing scores {100 * task.baseline:.0f}%)")

    scores = {name: result["accuracy"] for name, result in results.items()}
    if set(CHATCORE) <= set(results):
        centered = [(scores[name] - tasks[name].baseline) / (1 - tasks[name].baseline) for name in CHATCORE]
        scores["ChatCORE"] = sum(centered) / len(centered)
        print0(f"ChatCORE {scores['ChatCORE']:.4f}")
    elif not args.task_name:
        print0(f"no ChatCORE, which needs all of {', '.join(CHATCORE)}")
    if compute.is_main:
        data = {
            "stage": args.stage, "step": meta["step"], "tasks": results, "scores": scores,
            "chat": converse(engine, tokenizer, meta.get("user_config", {}).get("examples") or DEFAULT_QUESTIONS),
            "flags": flags.for_report(parser, args),
        }
        report.log(f"Chat evaluation ({args.stage})", data)
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
