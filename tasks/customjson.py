"""Your own conversations from a file of JSON lines, for example a persona.

Each line is a list of messages, or an object with them under "messages":

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Ada."}]
"""

from __future__ import annotations

import json
from pathlib import Path

from nanochat.common import Unreachable, UserError
from tasks.common import Task, check_conversation


class CustomJSON(Task):
    """All conversations of a file; blank lines are skipped. UserError names the first malformed line."""

    def __init__(self, filepath: str | Path, **view):
        super().__init__(**view)
        path = Path(filepath)
        if not path.is_file():
            raise Unreachable(f"there is no file of conversations at {path}; write one, or run `python -m dev.gen_identity`")
        self.rows = []
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self.rows.append(read_conversation(line, f"{path}, line {number}"))
        if not self.rows:
            raise UserError(f"{path} has no conversations; it needs one per line, as JSON")

    def get_example(self, index: int) -> dict:
        return self.rows[index]


def read_conversation(line: bytes, where: str) -> dict:
    """The conversation in one line of JSON; `where` names the line in an error."""
    try:
        record = json.loads(line.strip().decode("utf-8-sig"))
        conversation = record if isinstance(record, dict) else {"messages": record}
        return check_conversation({"messages": conversation.get("messages")})
    except (ValueError, RecursionError) as error:  # invalid JSON and UTF-8 raise them, too
        raise UserError(f"{where}: {error}") from error
