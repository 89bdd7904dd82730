"""Generate conversations in which the assistant knows that it is nanochat.

    python -m dev.gen_identity      # writes identity_conversations.jsonl, which mid_train and chat_sft read, if it is missing

Each topic of dev/identity.json has several questions and answers, which hold for every model that this repository trains.
To give a model another persona, change that file or write the conversations yourself (see tasks/customjson.py).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from nanochat import flags
from nanochat.common import atomic, get_base_dir, run_script
from tasks.common import single_turn


def main(argv=None):
    parser = flags.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--count", type=flags.number(int, 1, 100_000), default=500, help="number of conversations")
    parser.add_argument("--seed", type=flags.SEED, default=42, help="seed of the generator")
    args = parser.parse_args(argv)
    path = get_base_dir() / "identity_conversations.jsonl"
    if path.exists():  # perhaps written by hand
        print(f"{path} is kept; delete it to have other conversations generated")
        return
    lines = [json.dumps(messages, ensure_ascii=False) for messages in conversations(args.count, args.seed)]
    with atomic(path) as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {len(lines)} conversations to {path}")


def conversations(count: int, seed: int) -> list[list[dict]]:
    """`count` different conversations, the same for the same seed."""
    phrasings = json.loads(Path(__file__).with_name("identity.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    unique = {}  # in order
    while len(unique) < count:
        messages = conversation(rng, **phrasings)
        unique[json.dumps(messages)] = messages
    return list(unique.values())


def conversation(rng: random.Random, greetings: list[str], topics: dict[str, dict[str, list[str]]]) -> list[dict]:
    """One to three exchanges on different topics, sometimes after a greeting; thanks come last."""
    names = rng.sample([name for name in topics if name != "thanks"], rng.choice((1, 1, 2, 3)))
    if rng.random() < 0.15:
        names.append("thanks")
    messages = []
    for name in names:
        messages += single_turn(rng.choice(topics[name]["questions"]), rng.choice(topics[name]["answers"]))["messages"]
    if rng.random() < 0.25:
        messages[0]["content"] = f"{rng.choice(greetings)} {messages[0]['content']}"
    return messages


if __name__ == "__main__":
    run_script(main)
