"""A conversation as token ids and a loss mask.

The mask is 1 where the assistant must produce the token (its text, its python calls with their delimiters, its end
token) and 0 elsewhere (bos, the user, the output of tools). An example:

    <|bos|><|user_start|>2+2?<|user_end|><|assistant_start|>4<|assistant_end|>
       0          0       0         0             0         1         1

This file works on plain lists; it neither packs rows (packing.py) nor runs tools (engine.py).

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: optionally a system message, then user and
assistant alternating. The assistant's content is a string, or a list of parts
{"type": "text" | "python" | "python_output", "text": ...}.
"""

from __future__ import annotations

from nanochat.common import UserError

# part type -> (token before it, token after it, supervised?)
PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(tokenizer, conversation: dict, max_tokens: int | None = 2048) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation, truncated to `max_tokens` (None: no limit). UserError names a malformed message."""
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    ids, mask = _render(tokenizer, checked_turns(conversation))
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer, conversation: dict) -> list[int]:
    """Ids of a prompt that ends where the assistant's reply starts.

    A last assistant message, the data set's own answer, is left out. The prompt is never truncated.
    """
    turns = checked_turns(conversation)
    if turns[-1][0] == "assistant":
        turns = turns[:-1]
    ids, _ = _render(tokenizer, turns)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def _render(tokenizer, turns: list[tuple]) -> tuple[list[int], list[int]]:
    special = tokenizer.encode_special
    ids, mask = [tokenizer.get_bos_token_id()], [0]

    def add(tokens: list[int], supervised: int) -> None:
        ids.extend(tokens)
        mask.extend([supervised] * len(tokens))

    for role, parts in turns:
        role_supervised = int(role == "assistant")
        add([special(f"<|{role}_start|>")], 0)
        for kind, text in parts:
            start, end, supervised = PARTS[kind]
            tokens = tokenizer.encode(text)
            add([special(start), *tokens, special(end)] if start else tokens, supervised * role_supervised)
        add([special(f"<|{role}_end|>")], role_supervised)
    return ids, mask


def checked_turns(conversation: dict) -> list[tuple]:
    """The conversation as (role, [(part type, text), ...]), roles alternating, user first.

    A leading system message is merged into the first user message with a blank line, since the model has no system role.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message')
    turns, system = [], ""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f'{where} must be {{"role": ..., "content": ...}}, not {message!r:.60}')
        role, content = message["role"], message["content"]
        if i == 0 and role == "system":
            system = checked_text(where, content) + "\n\n"
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise UserError(f"{where} has the role {role!r:.60}, but {expected!r} is expected: user and assistant must alternate")
        if role == "assistant" and isinstance(content, (list, tuple)):
            parts = [checked_part(f"{where}, part {j}", part) for j, part in enumerate(content)]
        else:
            parts = [("text", ("" if turns else system) + checked_text(where, content))]
        turns.append((role, parts))
    if not turns:
        raise UserError("messages[0] is a system message; a user message must follow")
    return turns


def checked_text(where: str, content) -> str:
    if not isinstance(content, str):
        raise UserError(f"{where} has the content {content!r:.60}; it must be a string")
    return content


def checked_part(where: str, part) -> tuple[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in list(PARTS):  # a list, since the type may be unhashable
        raise UserError(f"{where} is {part!r:.60}; its type must be one of {', '.join(PARTS)}")
    return kind, checked_text(where, part.get("text"))
