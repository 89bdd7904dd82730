"""Generate conversations in which the assistant knows that it is nanochat, or somebody else.

    python -m dev.gen_identity      # writes identity_conversations.jsonl, which mid_train and chat_sft read, if it is missing
    python -m dev.gen_identity --persona ada.txt

Each topic of dev/identity.json has several questions and answers, which hold for every model that this repository trains.
A persona is described by lines of `key: value`. The keys are name, maker, traits and facts, of which only the name is
needed; each may be repeated. A fact may begin with its question: `facts: Where do you live? I live in London.`
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Iterable

from nanochat import flags
from nanochat.common import UserError, atomic, get_base_dir, run_script
from tasks.common import single_turn


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--count", type=flags.number(int, 1, 100_000), default=500, help="number of conversations")
    as_text = argparse.FileType(encoding="utf-8-sig", errors="replace")
    parser.add_argument("--persona", type=as_text, metavar="FILE", help="description of another persona")
    parser.add_argument("--seed", type=flags.SEED, default=42, help="seed of the generator")
    args = parser.parse_args(argv)
    path = get_base_dir() / "identity_conversations.jsonl"
    if path.exists():  # perhaps written by hand
        print(f"{path} is kept; delete it to have other conversations generated")
        return
    phrasings = persona(args.persona) if args.persona else None
    lines = [json.dumps(messages, ensure_ascii=False) for messages in conversations(args.count, args.seed, phrasings)]
    with atomic(path) as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {len(lines)} conversations to {path}")


def load(name: str) -> dict:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def persona(description: Iterable[str]) -> dict:
    """The phrasings of the persona that these lines describe; topics of which they say nothing are left out."""
    described = {"name": [], "maker": [], "traits": [], "facts": []}
    for line in filter(str.strip, description):
        key, _, value = line.partition(":")
        if key.strip() not in described or not value.strip():
            raise UserError(f"{line!r:.60} is not `KEY: value` with one of the keys {', '.join(described)}")
        described[key.strip()].append(value.strip())
    if not described["name"]:
        raise UserError("the description has no line `name: ...`")
    words = {key: ", ".join(values) for key, values in described.items() if values}
    phrasings = load("persona.json")
    topics = {
        name: {kind: [text.format(**words) for text in texts] for kind, texts in topic.items()}
        for name, topic in phrasings["topics"].items() if topic.pop("about") in words
    }  # fmt: skip
    for number, fact in enumerate(described["facts"]):
        question, _, answer = fact.partition("?")
        own = {"questions": [f"{question}?"], "answers": [answer.strip()]}
        topics[f"fact {number}"] = own if answer else {"questions": phrasings["asking"], "answers": [fact]}
    return {"greetings": phrasings["greetings"], "topics": topics}


def conversations(count: int, seed: int, phrasings: dict | None = None) -> list[list[dict]]:
    """Up to `count` different conversations, the same for the same seed; fewer where the phrasings allow no more."""
    phrasings = phrasings or load("identity.json")
    rng = random.Random(seed)
    unique = {}  # in order
    for _ in range(100 * count):
        if len(unique) == count:
            break
        messages = conversation(rng, **phrasings)
        unique[json.dumps(messages)] = messages
    return list(unique.values())


def conversation(rng: random.Random, greetings: list[str], topics: dict[str, dict[str, list[str]]]) -> list[dict]:
    """One to three exchanges on different topics, sometimes after a greeting; thanks come last."""
    others = [name for name in topics if name != "thanks"]
    names = rng.sample(others, min(rng.choice((1, 1, 2, 3)), len(others)))
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
