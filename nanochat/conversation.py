"""A conversation as token ids, and which of them the assistant learns to say.

The one idea to know: every id has a mask, 1 where the assistant itself must produce the token (its
text, its python calls with their delimiters, its end token) and 0 where it only reads (bos, the
user, the answers of tools). Training multiplies the loss by it. One exchange looks like this:

    <|bos|><|user_start|>2+2?<|user_end|><|assistant_start|>4<|assistant_end|>
       0          0       0         0             0         1         1

This file works on plain lists; it neither packs rows (dataloader.py does) nor runs tools (engine.py does).

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: optionally a system message,
then user and assistant in turns. The assistant's content is a string, or a list of parts
{"type": "text" | "python" | "python_output", "text": ...}.
"""

from __future__ import annotations

from nanochat.common import UserError

# part type -> (token before it, token after it, is it learnt?)
PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(tokenizer, conversation: dict, max_tokens: int | None = 2048) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation, both cut to `max_tokens` (None: never cut).

    Raises UserError (a ValueError) that names the message where the conversation is not of the form above.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1, or None for no limit")
    special = tokenizer.encode_special
    ids, mask = [tokenizer.get_bos_token_id()], [0]

    def add(tokens: list[int], learnt: int) -> None:
        ids.extend(tokens)
        mask.extend([learnt] * len(tokens))

    for role, parts in checked_turns(conversation):
        learnt_role = int(role == "assistant")
        add([special(f"<|{role}_start|>")], 0)
        for kind, text in parts:
            start, end, learnt = PARTS[kind]
            tokens = tokenizer.encode(text)
            add([special(start), *tokens, special(end)] if start else tokens, learnt * learnt_role)
        add([special(f"<|{role}_end|>")], learnt_role)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer, conversation: dict) -> list[int]:
    """Ids of a prompt that the assistant answers next.

    A last assistant message, the answer a data set comes with, is left out. Never cut: what to do
    with a prompt that does not fit depends on the model, which this file does not know.
    """
    messages = checked_messages(conversation)
    if len(messages) > 1 and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens=None)
    if ids[-1] != tokenizer.encode_special("<|user_end|>"):
        raise UserError(f"messages[{len(messages) - 1}] is not of the user, so there is nothing to answer")
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


# -----------------------------------------------------------------------------
# What a conversation must be


def checked_messages(conversation: dict) -> list:
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message in it')
    return list(messages)


def checked_turns(conversation: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """The conversation as (role, [(part type, text), ...]) with roles in turns, user first.

    A leading system message goes in front of the first user message, a blank line between them:
    the model has no role of that name.
    """
    turns = []
    system = None
    for i, message in enumerate(checked_messages(conversation)):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f'{where} must be {{"role": ..., "content": ...}}, not {brief(message)}')
        role, content = message["role"], message["content"]
        if i == 0 and role == "system":
            system = checked_text(where, content)
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise UserError(
                f"{where} has role {brief(role)} where {expected!r} must follow; after a system message, "
                "which may only come first, user and assistant take turns"
            )
        if role == "assistant" and isinstance(content, (list, tuple)):
            parts = [checked_part(f"{where}, part {j}", part) for j, part in enumerate(content)]
        else:
            text = checked_text(where, content)
            parts = [("text", text if turns or system is None else f"{system}\n\n{text}")]
        turns.append((role, parts))
    if not turns:
        raise UserError("messages[0] is a system message and nothing follows it; a user message must")
    return turns


def checked_text(where: str, content) -> str:
    if not isinstance(content, str):
        raise UserError(f"{where} has content {brief(content)}, which must be a string")
    return content


def checked_part(where: str, part) -> tuple[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
        raise UserError(f"{where} is {brief(part)}; its type must be one of {', '.join(PARTS)}")
    return kind, checked_text(where, part.get("text"))


def brief(value) -> str:
    """How a value looks, in a length fit for an error message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
