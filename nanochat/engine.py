"""Inference: tokens in, tokens out, as fast as a cache of keys and values allows.

The one idea: a model is called once on the whole prompt, then once per new token, because the
keys and values of earlier positions are kept. A `Row` is one sequence being written. It owns
everything that is particular to it (its dice, the tool call it is in the middle of, the tokens a
tool forces upon it, why it ended), so what a row says does not depend on its neighbours.

The engine knows a model only by calling it: `model(ids, kv_cache=cache)` gives logits and moves
the cache forward. It does not know about conversations, files or text beyond tool calls.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Iterator

import torch
import torch.nn.functional as F

from nanochat.calculator import use_calculator
from nanochat.common import UserError


class KVCache:
    """Keys and values of every layer for a batch of rows, each row with a length of its own.

    k_cache, v_cache: (layers, batch, seq, heads, dim). cache_seqlens: int32 (batch,), how many
    positions of each row are filled. prev_embedding: (batch, 1, d) or None, the embedding of
    each row's newest token, which the model leaves here for itself.
    """

    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers, device, dtype):
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        # Zeros and not whatever lies in memory: a masked NaN still poisons a sum.
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.prev_embedding: torch.Tensor | None = None

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.cache_seqlens.zero_()
        self.prev_embedding = None

    def get_pos(self) -> int:
        """How many positions the first row holds."""
        return int(self.cache_seqlens[0])

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (k, v) of one layer, each (batch, seq, heads, dim)."""
        return self.k_cache[layer], self.v_cache[layer]

    def advance(self, num_tokens: int) -> None:
        """The model calls this once per forward pass, after the last layer has written."""
        self.cache_seqlens += num_tokens

    def prefill(self, other: KVCache) -> None:
        """Copy `other` into this empty cache; a cache of one row is copied into every row."""
        length = int(other.cache_seqlens.max())
        assert self.get_pos() == 0, "only an empty cache can be prefilled"
        assert length <= self.k_cache.size(2), f"{length} positions do not fit {self.k_cache.size(2)}"
        self.k_cache[:, :, :length] = other.k_cache[:, :, :length]
        self.v_cache[:, :, :length] = other.v_cache[:, :, :length]
        self.cache_seqlens.copy_(other.cache_seqlens)
        if other.prev_embedding is not None:
            self.prev_embedding = other.prev_embedding.expand(self.k_cache.size(1), -1, -1).clone()


def cache_dtype(model) -> torch.dtype:
    """What the model's keys and values come in: the dtype of its embeddings, the narrowest of its weights."""
    weights = model.parameters() if isinstance(model, torch.nn.Module) else ()  # a stand-in may have none
    return min((weight.dtype for weight in weights), key=lambda dtype: dtype.itemsize, default=torch.float32)


def sample(logits: torch.Tensor, temperature: float, top_k: int | None, draws: torch.Tensor) -> torch.Tensor:
    """One token per row, (B,) int64, from logits (B, V) and one uniform draw in [0, 1) per row.

    A draw picks the token whose slice of the cumulative distribution it falls into, so a row
    needs a single random number and the rows are still sampled together. Temperature 0 takes
    the most likely token. `top_k` keeps only the k most likely.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    candidates = None
    if top_k is not None and top_k < logits.size(-1):
        logits, candidates = logits.topk(top_k, dim=-1)  # both (B, k)
    logits = logits.float()
    # The maximum goes first: a tiny temperature must not overflow to infinity minus infinity.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    cumulative = F.softmax(scaled, dim=-1).cumsum(dim=-1)
    choice = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)  # (B, 1)
    return (choice if candidates is None else candidates.gather(1, choice)).squeeze(1)


@dataclass
class Row:
    """One sequence being written."""

    dice: torch.Generator
    forced: deque = field(default_factory=deque)  # tokens a tool has put in line
    call: list | None = None  # tokens since python_start; None outside of a call
    finish_reason: str | None = None  # "stop", "length" or "context" once the row has ended
    last_token: int = -1

    def draw(self) -> float:
        """Uniform in [0, 1). 23 bits and no more, so that draw * total rounds to less than total in float32."""
        return int(torch.randint(1 << 23, (), generator=self.dice)) / (1 << 23)


def make_row(seed: int, index: int) -> Row:
    """Row `index` of a request; neighbouring seeds and rows get unrelated dice."""
    mixed = random.Random(f"{seed}/{index}").getrandbits(63)
    return Row(dice=torch.Generator().manual_seed(mixed))


class Engine:
    """Writes on from a prompt with `model`; `tokenizer` is needed for tool calls and to know when to stop."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.python_start, self.python_end, self.output_start, self.output_end, assistant_end = (
            tokenizer.encode_special(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end")
        )
        # assistant_end closes a reply; bos opens the next document, which is where a base model stops.
        self.terminal_tokens = frozenset((assistant_end, tokenizer.get_bos_token_id()))

    def generate(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue one prompt `num_samples` times, yielding a token for every row at each step.

        Yields (token_column, token_masks), one entry per row: the mask is 1 where the token was
        sampled and 0 where a tool forced it. A row ends with a terminal token (assistant_end or
        bos), which is yielded; while other rows go on it repeats that token with mask 0. Without
        `max_tokens` rows go on until the context is full. The generator's return value (what
        `yield from` gives) lists why each row ended: "stop", "length" or "context".

        Raises UserError, at once and not at the first step, for arguments that cannot work.
        """
        context = self.model.config.sequence_len
        if not tokens:
            raise UserError("The prompt is empty; begin it with bos at least")
        if len(tokens) >= context:
            raise UserError(
                f"The prompt has {len(tokens)} tokens and the model's context holds {context}, "
                "which leaves no room for an answer; shorten the prompt"
            )
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}; it must be 1 or more")
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; it must be 1 or more, or None for as many as fit")
        if not 0 <= temperature < float("inf"):
            raise UserError(f"temperature is {temperature}; it must be 0 (always the likeliest token) or more")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}; it must be 1 or more, or None for all tokens")
        room = context - len(tokens)
        budget = room if max_tokens is None else min(max_tokens, room)
        # A row that has used up both at once has written all that was asked for.
        exhausted = "length" if budget == max_tokens else "context"
        rows = [make_row(seed, index) for index in range(num_samples)]
        return self._write(list(tokens), rows, budget, exhausted, temperature, top_k)

    def generate_batch(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Like `generate`, all at once: (sequences, masks), prompt included (mask 0), terminal token left out."""
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        for column, column_masks in self.generate(tokens, num_samples, max_tokens, temperature, top_k, seed):
            for row, (token, mask) in enumerate(zip(column, column_masks)):
                if token not in self.terminal_tokens:
                    sequences[row].append(token)
                    masks[row].append(mask)
        return sequences, masks

    def _write(self, tokens, rows, budget, exhausted, temperature, top_k):
        """The loop behind `generate`: sample a column, hand it out, feed it back."""
        prompt_cache = self._make_cache(1, len(tokens))
        logits = self._next_logits([tokens], prompt_cache)  # (1, V)
        logits = logits.expand(len(rows), -1)
        # The prompt is read once, however many rows continue it.
        cache = self._make_cache(len(rows), len(tokens) + budget)
        cache.prefill(prompt_cache)
        del prompt_cache
        for step in range(budget):
            if step > 0:
                logits = self._next_logits([[row.last_token] for row in rows], cache)  # (B, V)
            draws = torch.tensor([row.draw() for row in rows], device=logits.device)
            sampled = sample(logits, temperature, top_k, draws).tolist()
            masks = [self._accept(row, token) for row, token in zip(rows, sampled)]
            yield [row.last_token for row in rows], masks
            if all(row.finish_reason for row in rows):
                break
        return [row.finish_reason or exhausted for row in rows]

    def _accept(self, row: Row, token: int) -> int:
        """Give `row` its next token, the sampled one unless a tool has put others in line. Returns its mask."""
        if row.finish_reason:
            return 0
        if row.forced:
            row.last_token = row.forced.popleft()
            return 0
        row.last_token = token
        if token in self.terminal_tokens:
            row.finish_reason = "stop"
        elif token == self.python_start:
            row.call = []
        elif token == self.python_end and row.call is not None:
            result = use_calculator(self.tokenizer.decode(row.call))
            row.call = None
            if result is not None:
                row.forced.extend([self.output_start, *self.tokenizer.encode(str(result)), self.output_end])
        elif row.call is not None:
            row.call.append(token)
        return 1

    def _make_cache(self, batch_size: int, seq_len: int) -> KVCache:
        config = self.model.config
        return KVCache(
            batch_size=batch_size,
            num_heads=config.n_kv_head,
            seq_len=seq_len,
            head_dim=config.n_embd // config.n_head,
            num_layers=config.n_layer,
            device=self.model.get_device(),
            dtype=cache_dtype(self.model),
        )

    # Around each call and not around the generator: a mode set there would leak to whoever reads from it.
    @torch.no_grad()
    def _next_logits(self, ids: list[list[int]], cache: KVCache) -> torch.Tensor:
        """Feed ids (B, T) to the model and return what it expects next, (B, V)."""
        ids = torch.tensor(ids, dtype=torch.long, device=self.model.get_device())
        return self.model(ids, kv_cache=cache)[:, -1]
