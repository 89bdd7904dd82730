"""Your own conversations from a file, for example a persona.

The file has one JSON value per line, or is one JSON array of them. Each is a conversation in one of these forms:

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Ada."}]
    {"messages": [...]}                                                       the same as an object
    {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am Ada."}]}      ShareGPT
    {"instruction": "Add.", "input": "2 and 3", "output": "5"}                Alpaca; "input" may be missing
    {"prompt": "Who are you?", "completion": "I am Ada."}                     both may also be lists of messages
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Iterator

from nanochat.common import Unreachable, UserError
from nanochat.conversation import checked_turns
from tasks.common import Task, check_conversation, single_turn

HELD_OUT = 0.1  # share of the different conversations that is for validation
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class CustomJSON(Task):
    """The conversations of a file: all, or those of split "train" or "val". UserError names the first malformed one.

    Equal conversations are in the same split. A reply is right if it equals the last message, apart from case.
    """

    eval_type = "generative"

    def __init__(self, filepath: str | Path, split: str | None = None, **view):
        super().__init__(**view)
        path = Path(filepath).expanduser()
        if not path.is_file():
            raise Unreachable(f"there is no file of conversations at {path}; write one, or run `python -m dev.gen_identity`")
        self.rows = [read_conversation(record, where) for record, where in read_records(path)]
        if not self.rows:
            raise UserError(f"{path} has no conversations; it needs one per line, as JSON")
        if split:
            hashes = [sha256(json.dumps(row).encode()).digest() for row in self.rows]
            unique = sorted(set(hashes))
            if len(unique) < 2:
                raise UserError(f"{path} has only one conversation; at least 2 are needed, one of them for validation")
            held_out = set(unique[: max(1, int(HELD_OUT * len(unique)))])
            self.rows = [row for row, key in zip(self.rows, hashes) if (key in held_out) == (split == "val")]
            asked = (turn["content"] for row in self.rows[:20] for turn in row["messages"] if turn["role"] == "user")
            self.examples = tuple(dict.fromkeys(question for question in asked if len(question) < 100))[:4]

    def evaluate(self, conversation: dict, completion: str) -> bool:
        role, parts = checked_turns(conversation)[-1]
        if role != "assistant":
            raise UserError(f"a conversation has no reference answer, since its last message is the {role}'s")
        answer = "".join(text for kind, text in parts if kind == "text")
        return completion.strip().lower() == answer.strip().lower()


def read_records(path: Path) -> Iterator[tuple[object, str]]:
    """(record, place) of each line of a file (bytes), or of each item of an array (parsed) if the file is one JSON value."""
    data = path.read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if path.suffix == ".json" and "Extra data" not in str(error):  # which is what follows a first line
            raise UserError(f"{path} is neither JSON nor JSON lines: {error}") from error
        yield from ((line, f"{path}, line {number}") for number, line in enumerate(data.split(b"\n"), 1) if line.strip())
        return
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, list) and not (isinstance(first, dict) and first.keys() & {"role", "from"}):
        yield from ((record, f"{path}, item {index} of the array") for index, record in enumerate(value))
    else:
        yield value, f"{path}, line 1"


def read_conversation(record: object, where: str) -> dict:
    """The conversation of a record in any of the forms; `where` names it in an error."""
    try:
        record = json.loads(record.strip().decode("utf-8-sig")) if isinstance(record, bytes) else record
        match record:
            case [*messages] | {"messages": [*messages]} | {"conversations": [*messages]}:
                pass
            case {"prompt": [*prompt], "completion": [*completion]}:
                messages = prompt + completion
            case {"instruction": question, "output": answer} | {"prompt": question, "completion": answer}:
                messages = single_turn("\n\n".join(filter(None, [question, record.get("input")])), answer)["messages"]
            case _:
                raise UserError(f"{json.dumps(record):.60} is not a conversation; it needs `messages` or `conversations` "
                                "(lists), `instruction` and `output`, or `prompt` and `completion`")
        return check_conversation({"messages": [
            {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message.get("value")}
            if isinstance(message, dict) and "from" in message else message for message in messages
        ]})  # fmt: skip
    except (ValueError, TypeError, RecursionError) as error:  # invalid JSON and UTF-8 raise ValueError, too
        raise UserError(f"{where}: {error}") from error
