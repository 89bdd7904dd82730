"""Inference: many sequences generated in one batch, each as if it were alone.

Keys and values of earlier positions are cached, so a new token costs one pass through the model, and a pass costs
about the same for one sequence as for sixteen. So all running sequences share each pass; scheduler.py decides which.
What belongs to a sequence (its rng, its settings, its tool call) is kept with it, so its tokens do not depend on the
other sequences, up to the rounding of sums; an error in one ends that one alone ("failed").

The engine knows a model only by calling it: `model.hidden(ids, kv_cache=...)` advances a cache and `model.logits`
computes logits. It knows nothing about conversations. An engine must be used by one thread at a time.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Iterator
from itertools import count

import psutil
import torch

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from nanochat.device import compiler_fault, keep_freed_memory
from nanochat.inference import prepare
from nanochat.scheduler import Sequence, Scheduler

log = logging.getLogger(__name__)

SCORED_AT_ONCE = 128  # positions of a prompt whose logits are in memory at once


class KVCache:
    """Keys and values of every layer for a batch of sequences of different lengths.

    k_cache, v_cache: (layers, batch, seq, heads, dim). cache_seqlens: int32 (batch,), filled positions per
    sequence. last_tokens: int64 (batch,), the newest token of each sequence or -1, for the model's smear.
    slots: None, or int32 (batch,) in a view made by `select`: its rows of the tensors.
    """

    slots: torch.Tensor | None = None

    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers, device, dtype):
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        # Zeros, since uninitialised memory may hold NaN, and a masked NaN still makes a sum NaN
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.last_tokens = torch.full((batch_size,), -1, device=device)

    def reset(self) -> None:
        """Empty the cache; the memory is kept."""
        self.cache_seqlens.zero_()
        self.last_tokens.fill_(-1)

    def get_pos(self) -> int:
        """Filled positions of the first sequence."""
        return int(self.cache_seqlens[0])

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (k, v) of one layer, each (batch, seq, heads, dim)."""
        return self.k_cache[layer], self.v_cache[layer]

    def advance(self, num_tokens: int) -> None:
        """Called by the model once per forward pass, after the last layer."""
        self.cache_seqlens += num_tokens

    def prefill(self, other: KVCache) -> None:
        """Copy `other` into this empty cache; a cache of one sequence is copied into every place."""
        length = int(other.cache_seqlens.max())
        assert self.get_pos() == 0, "only an empty cache can be prefilled"
        self.k_cache[:, :, :length] = other.k_cache[:, :, :length]
        self.v_cache[:, :, :length] = other.v_cache[:, :, :length]
        self.cache_seqlens.copy_(other.cache_seqlens)
        self.last_tokens.copy_(other.last_tokens)

    def select(self, slots: torch.Tensor, seqlens: torch.Tensor, last_tokens: torch.Tensor) -> KVCache:
        """A view of the given slots as a batch, with the filled positions and last tokens given."""
        selection = KVCache.__new__(KVCache)  # `copy` cannot be compiled
        selection.k_cache, selection.v_cache = self.k_cache, self.v_cache  # the same tensors
        selection.slots, selection.cache_seqlens, selection.last_tokens = slots, seqlens, last_tokens
        return selection


# -----------------------------------------------------------------------------
# Sampling


def sample(
    logits: torch.Tensor, settings: list[tuple[float, int | None, float]], uniform_samples: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per sequence from logits (B, V), with (temperature, top_k, top_p) and a uniform sample in [0, 1) for each.

    Returns (tokens (B,) int64, log-probabilities (B,) float32 under the settings). The uniform sample selects the token
    by inverting the cumulative distribution. Temperature 0 is greedy. `top_k` keeps the k most likely tokens; `top_p`
    keeps the fewest of these that have that share of the probability (nucleus sampling, arXiv:1904.09751). Where
    logits are NaN, so is the log-probability.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    log_probs = torch.zeros(len(logits), device=logits.device)
    u = uniform_samples[:, None]  # (B, 1)

    rows_of: dict[tuple, list[int]] = {}  # settings -> the rows that share them, which are sampled together
    for row, key in enumerate(settings):
        rows_of.setdefault(key, []).append(row)

    for (temperature, top_k, top_p), rows in rows_of.items():
        rows = slice(None) if len(rows) == len(logits) else rows  # a slice copies nothing
        scores = logits[rows]  # (R, V)
        if temperature == 0:
            tokens[rows] = scores.argmax(dim=-1)
            continue
        k = min(top_k or scores.size(-1), scores.size(-1))
        ordered = k < scores.size(-1) or top_p < 1
        if ordered:
            scores, candidates = largest(scores, k)  # (R, k), most likely first
        scores = scores.float()
        # Subtract the maximum first, so that a tiny temperature cannot give infinity minus infinity
        divisor = min(max(temperature, 1e-30), 1e30)  # float32 would make 0 or infinity of others
        weights = (scores - scores.amax(dim=-1, keepdim=True)).div_(divisor).exp_()
        cumulative = weights.cumsum(dim=-1)
        total = cumulative[:, -1:]
        if top_p < 1:
            kept = (cumulative - weights < top_p * total).sum(dim=-1, keepdim=True)
            total = cumulative.gather(1, kept.clamp(min=1) - 1)
        choice = torch.searchsorted(cumulative, u[rows] * total, right=True).clamp_(max=k - 1)  # (R, 1); NaN would find k
        tokens[rows] = (candidates.gather(1, choice) if ordered else choice)[:, 0]
        log_probs[rows] = (weights.gather(1, choice) / total).log()[:, 0]
    return tokens, log_probs


def largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores.topk(k)` of (R, V). All are in the k chunks of 64 that have the largest maxima, so the rest is read only once."""
    if scores.size(1) % 64 or scores.size(1) < 128 * k:
        return scores.topk(k)
    chunks = scores.unflatten(1, (-1, 64))
    best = chunks.amax(dim=-1).topk(k).indices[:, :, None]  # (R, k, 1)
    values, places = chunks.gather(1, best.expand(-1, -1, 64)).flatten(1).topk(k)
    return values, (best * 64 + torch.arange(64, device=scores.device)).flatten(1).gather(1, places)


def token_scores(logits: torch.Tensor, tokens: list[int], tops: list[int]) -> list[tuple[float, dict[int, float]]]:
    """For each token, after logits (N, V): its log-probability, and {token: log-probability} of the `top` most likely.

    They are those of the model itself: a log-softmax of the logits, before temperature, top_k and top_p.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    scores = log_probs.gather(1, chosen)[:, 0].tolist()
    best = log_probs.topk(max(tops), dim=-1)
    likely = zip(best.indices.tolist(), best.values.tolist(), tops)
    return list(zip(scores, [dict(zip(ids[:top], values)) for ids, values, top in likely]))


def uniform_sample(rng: random.Random) -> float:
    """Uniform in [0, 1), with 23 bits, so that its product with a total stays below the total in float32."""
    return rng.getrandbits(23) / (1 << 23)


# -----------------------------------------------------------------------------
# The engine

class Engine:
    """Continues prompts with `model`; `tokenizer` is used for tool calls and terminal tokens.

    At most `max_sequences` run at once, if half of the free memory suffices; others wait. Memory is allocated as
    needed. `context` limits the tokens of a sequence, prompt included (None: the model's context). `compiled`: on a GPU
    the decoding step is compiled, which takes a minute or so at the first token and halves its kernels.
    """

    def __init__(
        self, model, tokenizer, max_sequences: int = 64, context: int | None = None, compiled: bool = False
    ):  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.python_start, self.python_end, self.output_start, self.output_end, self.assistant_end = (
            tokenizer.encode_special(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end")
        )
        # assistant_end ends a reply; a base model ends a document with the next one's bos.
        self.terminal_tokens = frozenset((self.assistant_end, tokenizer.get_bos_token_id()))
        config = model.config
        self.context = min(context or config.sequence_len, config.sequence_len)
        # Of the cache of one sequence, as KVCache expects it: heads, positions, dimensions, layers
        self.cache_shape = config.n_kv_head, self.context, config.n_embd // config.n_head, config.n_layer
        self.device = model.get_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        # Keys and values have the dtype of the embeddings, the narrowest of the weights
        self.dtype = min((weight.dtype for weight in model.parameters()), key=lambda dtype: dtype.itemsize)
        self.max_sequences = min(max_sequences, self._sequences_that_fit())
        # Prompt tokens that are prefilled between two steps, so that running sequences wait for a step or two at most
        prefill_budget = 2048 if self.device.type == "cuda" else 128
        self.scheduler = Scheduler(self.max_sequences, prefill_budget)
        self.cache: KVCache | None = None
        self.graphs: dict[int, DecodingGraph] = {}
        self.decode = decode
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)  # of all its graphs
            if compiled and (fault := compiler_fault(self.device)):
                log.warning("decoding uncompiled and more slowly, since the compiler does not work: %s", fault)
            elif compiled:
                torch._dynamo.config.recompile_limit = 64  # each GPU of a server has its own, for one sequence and for several
                self.decode = torch.compile(decode, dynamic=True, fullgraph=True)
        self.prefill_tokens = self.cached_tokens = self.generated_tokens = 0  # totals, shown by the server's /stats

    def submit(
        self, tokens: list[int], max_tokens: int | None = None, temperature: float = 1.0, top_k: int | None = None,
        top_p: float = 1.0, seed: int = 42, sample_index: int = 0, top_logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> Sequence:  # fmt: skip
        """Add a prompt, which `step` continues. The tokens depend on these arguments only.

        The sequence ends with a terminal token (assistant_end or bos), after `max_tokens`, or when the context is
        full. Samples with the same seed differ by `sample_index`. Raises UserError for invalid arguments.
        With `top_logprobs`, which may be 0, its `scores` have an item for each generated token (see `token_scores`), and
        with `prompt_logprobs` for each token of the prompt before those; the first, which nothing precedes, has (None, {}).
        """
        if not 0 < len(tokens) < self.context:
            raise UserError(f"the prompt has {len(tokens)} tokens; in this context it must have 1 to {self.context - 1}")
        lengths_valid = all(value is None or value > 0 for value in (max_tokens, top_k))
        if not (lengths_valid and 0 <= temperature < math.inf and 0 < top_p <= 1):
            raise UserError(
                f"max_tokens ({max_tokens}) and top_k ({top_k}) must be 1 or more, or None for no limit, "
                f"temperature ({temperature}) 0 or more, and top_p ({top_p}) above 0 and at most 1"
            )
        # Unrelated random streams for neighbouring seeds and samples
        rng = random.Random(f"{seed}/{sample_index}")
        seq = Sequence(list(tokens), len(tokens) + (max_tokens or math.inf), temperature, top_k, top_p, rng)
        seq.top_logprobs, seq.prompt_logprobs = top_logprobs, prompt_logprobs
        seq.scores = [(None, {})] if prompt_logprobs else []
        self.scheduler.waiting.append(seq)
        return seq

    def cancel(self, seq: Sequence) -> None:
        """End `seq` and free its slot at once; no effect if it has finished."""
        if seq.finish_reason is None:
            self.scheduler.end(seq, "cancelled")

    @property
    def num_running(self) -> int:
        return len(self.scheduler.slots) - len(self.scheduler.free)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""
        return self.num_running + self.num_waiting > 0

    def reset(self) -> None:
        """Cancel all sequences and empty the prefix cache, as after a change of the weights. Memory is kept."""
        for seq in [*self.scheduler.waiting, *self.scheduler.slots]:
            self.cancel(seq)
        self.scheduler.slots.clear()
        self.scheduler.free.clear()

    def finish(self) -> Iterator[Sequence]:
        """Step until all sequences have finished, yielding each as it finishes."""
        while self.busy:
            yield from [seq for seq, _, _ in self.step() if seq.finish_reason]

    def generate(
        self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
        top_k: int | None = None, seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:  # fmt: skip
        """Continue one prompt `num_samples` times: yields (token_column, token_masks) with one entry per sample.

        A mask is 1 if the token was sampled, 0 if a tool forced it. A sample ends with a terminal token, which is
        yielded, then repeated with mask 0 while others continue. Raises UserError for invalid arguments.
        """
        settings = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
        seqs = [self.submit(tokens, **settings, sample_index=i) for i in range(num_samples)]
        try:
            for column in count():
                # The samples may get their tokens of this column in different steps
                while any(seq.finish_reason is None and column == len(seq.masks) for seq in seqs):
                    self.step()
                ended = [column >= len(seq.masks) for seq in seqs]
                if all(ended):
                    return
                tokens = [seq.tokens[-1 if end else seq.prompt_length + column] for seq, end in zip(seqs, ended)]
                masks = [0 if end else seq.masks[column] for seq, end in zip(seqs, ended)]
                yield tokens, masks
        finally:
            for seq in seqs:
                self.cancel(seq)

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **settings) -> tuple[list[list[int]], list[list[int]]]:
        """As `generate`: whole (sequences, masks), with the prompt (mask 0) and without the terminal token."""
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        for column, column_masks in self.generate(tokens, num_samples, **settings):
            for i, token in enumerate(column):
                if token not in self.terminal_tokens:
                    sequences[i].append(token)
                    masks[i].append(column_masks[i])
        return sequences, masks

    def step(self) -> list[tuple[Sequence, int, int]]:
        """Prefill some of the waiting prompts, then generate one token for each running sequence.

        Returns (sequence, token, mask) for each of these: mask 1 if the token was sampled, 0 if a tool forced it.
        A sequence that this token finishes has its `finish_reason` set; of one that failed the token is assistant_end.
        If a step fails or is interrupted, all sequences end as "cancelled" and the engine can be used again.
        """
        try:
            return self._step()
        except BaseException:  # the content of the cache is no longer known
            self.reset()
            self.cache, self.graphs = None, {}
            raise

    @torch.inference_mode()
    def _step(self) -> list[tuple[Sequence, int, int]]:
        work = self.scheduler.plan()
        if work:
            prepare(self.model)
        self._make_room(len(self.scheduler.slots))
        for item in work:
            self._prefill(*item)
        seqs = self.scheduler.running
        if not seqs:
            return []
        settings = [(seq.temperature, seq.top_k, seq.top_p) for seq in seqs]
        # Copied to a GPU while it is idle, so that nothing waits for it before the tokens are read
        uniform_samples = torch.tensor([uniform_sample(seq.rng) for seq in seqs], device=self.device)
        logits = self._logits(seqs)
        tokens, log_probs = sample(logits, settings, uniform_samples)
        self.generated_tokens += len(seqs)
        sampled = torch.stack([tokens.float(), log_probs], dim=1).tolist()  # one transfer; ids below 2^24 are exact in float32
        events = [(seq, *self._accept_or_fail(seq, int(token), log_prob)) for seq, (token, log_prob) in zip(seqs, sampled)]
        scored = [row for row, seq in enumerate(seqs) if seq.top_logprobs is not None]
        if scored:
            tokens = [events[row][1] for row in scored]
            scores = token_scores(logits[scored], tokens, [seqs[row].top_logprobs for row in scored])
            for row, score in zip(scored, scores):
                seqs[row].scores.append(score)
        return events

    def _accept_or_fail(self, seq: Sequence, token: int, log_prob: float) -> tuple[int, int]:
        try:
            if math.isnan(log_prob):
                raise FloatingPointError("the model's logits are NaN")
            return self._accept(seq, token, log_prob)
        except Exception:
            log.exception("a sequence failed")
            seq.computed = 0  # nothing of it may be reused, and NaN would remain NaN for the next sequence of the slot
            for memory in (self.cache.k_cache, self.cache.v_cache):
                memory[:, seq.slot] = 0
            self.scheduler.end(seq, "failed")
            return self.assistant_end, 0

    def _prefill(self, seq: Sequence, start: int, end: int, source: int | None) -> None:
        """Fill the cache with tokens start .. end of a prompt, after those that are copied from the slot `source`."""
        if source is not None:
            for memory in (self.cache.k_cache, self.cache.v_cache):
                memory[:, seq.slot, :start] = memory[:, source, :start]
            self.cached_tokens += start
        if start < end:
            ids = torch.tensor([seq.tokens[start:end]], device=self.device)
            before = seq.tokens[start - 1] if start else -1
            place = torch.tensor([[seq.slot], [start], [before]], dtype=torch.int32, device=self.device)
            hidden = self.model.hidden(ids, kv_cache=self.cache.select(*place), last_only=not seq.prompt_logprobs)
            if seq.prompt_logprobs:
                following = torch.tensor(seq.tokens[start + 1 : end + 1])
                for part, tokens in zip(hidden[0].split(SCORED_AT_ONCE), following.split(SCORED_AT_ONCE)):
                    logits = self.model.logits(part)
                    seq.scores += token_scores(logits, tokens.tolist(), [seq.top_logprobs] * len(tokens))
            self.prefill_tokens += end - start

    def _logits(self, seqs: list[Sequence]) -> torch.Tensor:
        """Logits (B, V) after the last token of each sequence."""
        slots = [seq.slot for seq in seqs]
        lengths = [len(seq.tokens) - 1 for seq in seqs]
        newest = [seq.tokens[-1] for seq in seqs]
        before = [seq.tokens[-2] if len(seq.tokens) > 1 else -1 for seq in seqs]
        batch = torch.tensor([slots, lengths, before, newest], dtype=torch.int32)  # (4, B)
        if self.device.type == "cuda":
            size = 1 << (len(seqs) - 1).bit_length()  # one graph for each power of two
            if size not in self.graphs:
                self.graphs[size] = DecodingGraph(self, size)
            return self.graphs[size].run(batch)
        return self.decode(self.model, self.cache, batch.to(self.device))

    def _accept(self, seq: Sequence, token: int, log_prob: float) -> tuple[int, int]:
        """Append the sampled token, or the next one of a tool's output: (token, mask)."""
        mask = 0 if seq.forced else 1
        if seq.forced:
            token = seq.forced.popleft()
        seq.computed = len(seq.tokens)
        seq.tokens.append(token)
        seq.masks.append(mask)
        seq.log_probs.append(log_prob * mask)
        if mask:
            self._track_call(seq, token)
        if mask and token in self.terminal_tokens:
            self.scheduler.end(seq, "stop")
        elif len(seq.tokens) >= seq.limit:
            self.scheduler.end(seq, "length")
        elif len(seq.tokens) >= self.context:
            self.scheduler.end(seq, "context")
        return token, mask

    def _track_call(self, seq: Sequence, token: int) -> None:
        """Collect the tokens of a tool call; at its end, queue the result."""
        if token == self.python_start:
            seq.call = []
        elif token == self.python_end and seq.call is not None:
            result = use_calculator(self.tokenizer.decode(seq.call))
            seq.call = None
            if result is not None:
                seq.forced.extend([self.output_start, *self.tokenizer.encode(str(result)), self.output_end])
        elif seq.call is not None:
            seq.call.append(token)

    def _sequences_that_fit(self) -> int:
        """The number of sequences that fit into half of the free memory, at least one."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + unused  # cached by PyTorch's allocator
        else:
            free = psutil.virtual_memory().available
        return max(1, free // 2 // (2 * math.prod(self.cache_shape) * self.dtype.itemsize))

    def _make_room(self, num_sequences: int) -> None:
        """Grow the cache to at least `num_sequences` slots, with its content."""
        spare = 1 if self.device.type == "cuda" else 0  # for the unused places of a graph's batch
        before = 0 if self.cache is None else self.cache.k_cache.size(1) - spare
        if num_sequences <= before:
            return
        size = min(max(num_sequences, 2 * before), self.max_sequences) + spare
        cache = KVCache(size, *self.cache_shape, self.device, self.dtype)
        if self.cache is not None:
            cache.k_cache[:, :before] = self.cache.k_cache[:, :before]
            cache.v_cache[:, :before] = self.cache.v_cache[:, :before]
        self.cache = cache
        self.graphs.clear()  # they hold the old cache's addresses


def decode(model, cache: KVCache, batch: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) after one token for each of B sequences; batch int32 (4, B): slots, lengths, previous tokens, tokens."""
    slots, lengths, before, newest = (row.clone() for row in batch)  # aligned, which the compiler would do for each layer
    return model.logits(model.hidden(newest[:, None], kv_cache=cache.select(slots, lengths, before))[:, -1])


class DecodingGraph:
    """The engine's `decode` for batches of up to `size` sequences as one CUDA graph, which launches all kernels at once.

    A graph always uses the same memory, so a batch is copied to its input and the logits are read from its output.
    Unused places of the batch write to the cache's last slot, which belongs to no sequence.
    """

    capturing = threading.Lock()  # a process may capture one graph at a time

    def __init__(self, engine: Engine, size: int):
        self.empty = torch.tensor([[engine.cache.k_cache.size(1) - 1], [0], [-1], [0]], dtype=torch.int32)
        self.pinned = self.empty.repeat(1, size).pin_memory()
        self.batch = self.pinned.to(engine.device)
        self.graph, stream, current = torch.cuda.CUDAGraph(), engine.stream, torch.cuda.current_stream(engine.device)
        pool = next((other.graph.pool() for other in engine.graphs.values()), None)  # graphs share their memory
        with self.capturing:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # libraries initialise themselves in their first calls, which must not be captured
                for _ in range(2):
                    engine.decode(engine.model, engine.cache, self.batch)
            current.wait_stream(stream)
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                self.logits = engine.decode(engine.model, engine.cache, self.batch)

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        n = batch.size(1)
        self.pinned[:, :n], self.pinned[:, n:] = batch, self.empty
        self.batch.copy_(self.pinned, non_blocking=True)
        self.graph.replay()
        return self.logits[:n]
