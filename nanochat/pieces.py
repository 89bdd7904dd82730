"""The tokens of a reply as segments of text for display.

The one idea to know: a reply is a row of parts (conversation.py), and the special tokens say where each
begins. So a token is either text of the part that is being written, or it says which kind comes next.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.tokenizer import StreamDecoder


def kinds_after(tokenizer) -> dict[int, str]:
    """{special token: the kind of what follows it}; the tokens themselves are not shown."""
    kinds = dict.fromkeys(map(tokenizer.encode_special, tokenizer.get_special_tokens()), "text")
    kinds[tokenizer.encode_special("<|python_start|>")] = "python"
    kinds[tokenizer.encode_special("<|output_start|>")] = "python_output"
    return kinds


class Pieces:
    """The tokens of a sequence as segments (kind, text) of whole characters: ("text", "It is "), ("python", "6*7"), ...

    Where `stop` strings are given, the text ends before the first of them, and what may become one is held
    back until it is known not to.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.stop = stop
        self.stopped = False  # whether one of them has been said
        self._kinds, self._kind = kinds_after(tokenizer), "text"
        self._decoder = StreamDecoder(tokenizer)
        self._held = ""

    def push(self, token: int) -> list[tuple[str, str]]:
        follows = self._kinds.get(token)
        if follows is None:
            return self._shown(self._decoder.push(token))
        pieces = self._shown(self._decoder.finish())
        self._kind = follows
        return pieces

    def finish(self) -> list[tuple[str, str]]:
        """The held-back text at the end of the sequence."""
        pieces = self._shown(self._decoder.finish())
        held, self._held = self._held, ""
        return [*pieces, ("text", held)] if held else pieces

    def _shown(self, text: str) -> list[tuple[str, str]]:
        if self.stopped:
            return []
        if self.stop and self._kind == "text":
            text = self._before_stop(self._held + text)
        return [(self._kind, text)] if text else []

    def _before_stop(self, text: str) -> str:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
