"""Documents and conversations in, batches of token ids out: packed, prefetched, resumable.

The one idea to know: every batch comes with the state that resumes just after it. A state is
small and plain (JSON): where reading stands, and which documents wait in the packing buffer, by
their places in the data; on resume those are read again, so the batches that follow are bit for
bit those of an uninterrupted run with the same arguments and number of ranks.

Pretraining rows have no padding: a document too long for what is left of its row is cropped.
Conversation rows lose nothing: what does not fit waits, and the rest of a row is padding. Both are
made in a background thread while the device computes. This file fetches no data, and does not
know what a conversation looks like.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections import deque
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Callable, Iterator

import torch

from nanochat.common import UserError, ranks
from nanochat.dataset import DEFAULT_SOURCE, count_row_groups, read_row_group, split_paths
from nanochat.packing import BestFitBuffer, Conversations, split_conversation

AHEAD = 4  # batches made before they are asked for


# -----------------------------------------------------------------------------
# Pretraining: documents

Place = tuple[int, int, int, int]  # (epoch from 1, number of the shard, of the row group in it, of the row in that)


class Documents:
    """An endless walk over the documents of one rank, a few at a time, as token ids.

    The rows of each row group are dealt to the ranks in turn. `next_place` is where the next
    `read` begins, so a walk that starts there goes on exactly like this one.
    """

    def __init__(self, paths: list[Path], rank: int, world_size: int, encode: Callable, at_a_time: int, start: list):
        """`start` is a place; its row may be None for the first row of this rank."""
        self.paths, self.rank, self.world_size = paths, rank, world_size
        self.encode, self.at_a_time = encode, at_a_time
        self.walk = self._walk(*start)
        self.ahead = next(self.walk)

    @property
    def next_place(self) -> Place:
        return self.ahead[0][0]

    def read(self) -> list[tuple[Place, array]]:
        """The next documents, all of one row group: (place, ids) each."""
        documents, self.ahead = self.ahead, next(self.walk)
        return self._tokenize(documents)

    def read_again(self, places: list[list[int]]) -> list[tuple[Place, array]]:
        """The documents at these places, in the same order."""
        documents = []
        for (shard, group), there in groupby(places, key=lambda place: (place[1], place[2])):
            exists = shard < len(self.paths) and group < count_row_groups(self.paths[shard])
            texts = read_row_group(self.paths[shard], group) if exists else []
            for place in there:
                if place[3] >= len(texts):
                    raise UserError(
                        f"the data has changed: document {place[3]} in row group {group} of shard {shard}, which this "
                        f"run has to read again, is not in {self.paths[0].parent}. Put the shards back as they were."
                    )
                documents.append((tuple(place), texts[place[3]]))
        return self._tokenize(documents)

    def _tokenize(self, documents: list[tuple[Place, str]]) -> list[tuple[Place, array]]:
        ids = self.encode([text for _, text in documents])
        return [(place, array("i", tokens)) for (place, _), tokens in zip(documents, ids)]

    def _walk(self, epoch: int, shard: int, group: int, row: int | None) -> Iterator[list[tuple[Place, str]]]:
        found = (shard, group, row) != (0, 0, None)  # the rest of an epoch may be empty, a whole one must not
        while True:
            for shard in range(shard, len(self.paths)):
                for group in range(group, count_row_groups(self.paths[shard])):
                    texts = read_row_group(self.paths[shard], group)
                    # Shard and group shift the deal, so that groups of one row do not all go to rank 0.
                    first = (self.rank - shard - group) % self.world_size if row is None else row
                    rows = [row for row in range(first, len(texts), self.world_size) if texts[row]]
                    for i in range(0, len(rows), self.at_a_time):
                        found = True
                        yield [((epoch, shard, group, row), texts[row]) for row in rows[i : i + self.at_a_time]]
                    row = None
                group = 0
            if not found:
                raise UserError(
                    f"no document for rank {self.rank} of {self.world_size} in {len(self.paths)} shard(s) "
                    f"of {self.paths[0].parent}. Add data or use fewer ranks."
                )
            epoch, shard, found = epoch + 1, 0, False


def _bestfit_batches(documents: Documents, B: int, T: int, buffer_size: int, waiting: list) -> Iterator[tuple]:
    """Each row: the oldest document, then always the largest that fits; when none fits, the shortest is cropped.

    Cropping the shortest loses the fewest tokens: measured on 16,384 documents (mean 727 tokens)
    with a buffer of 1,000 and T = 2048, 7.4% of the tokens read are lost, of which 4.8% are
    the part of long documents beyond any row; cropping the oldest instead loses 15%.
    """
    buffer = BestFitBuffer()
    for place, tokens in documents.read_again(waiting):
        buffer.add(len(tokens), (place, tokens))

    def refill() -> None:
        """Of a corpus smaller than the buffer, hold no more than this epoch and the next."""
        while len(buffer) < buffer_size and (not buffer or documents.next_place[0] <= buffer.oldest()[0][0] + 1):
            for place, tokens in documents.read():
                buffer.add(len(tokens), (place, tokens))

    while True:
        flat = array("i")
        for end in range(T + 1, B * (T + 1) + 1, T + 1):
            refill()
            _, tokens = buffer.pop_oldest()
            flat.extend(tokens[: T + 1])
            while room := end - len(flat):
                refill()
                _, tokens = buffer.pop_largest(room) or buffer.pop_shortest()
                flat.extend(tokens[:room])
        rows = torch.frombuffer(flat, dtype=torch.int32).view(B, T + 1)
        next_place = documents.next_place
        state = {"epoch": next_place[0], "next": list(next_place), "buffer": [list(place) for place, _ in buffer]}
        yield rows[:, :-1].clone(), rows[:, 1:].long(), state


def _stream_batches(documents: Documents, B: int, T: int, offset: int) -> Iterator[tuple]:
    """Documents end to end, cut wherever a row ends; no token is lost and rows start anywhere.

    `offset` tokens of the first document have been used already.
    """
    flat, unfinished = array("i"), deque()  # the documents in `flat`: (place, length) each
    skip = offset
    while True:
        while len(flat) < B * T + 1:
            for place, tokens in documents.read():
                unfinished.append((place, len(tokens)))
                flat.extend(tokens[skip:])
                skip = 0
        tokens = torch.frombuffer(flat[: B * T + 1], dtype=torch.int32)
        flat = flat[B * T :]  # the last target is the first input of the next batch
        offset += B * T
        while offset >= unfinished[0][1]:
            offset -= unfinished.popleft()[1]
        place = unfinished[0][0]
        state = {"epoch": place[0], "next": list(place), "offset": offset}
        yield tokens[:-1].view(B, T).clone(), tokens[1:].view(B, T).long(), state


def _document_loader(
    packed: bool,
    tokenizer,
    B: int,
    T: int,
    split: str,
    tokenizer_threads: int = 4,
    tokenizer_batch_size: int = 128,
    device: str | torch.device = "cuda",
    resume_state_dict: dict | None = None,
    *,
    source: str = DEFAULT_SOURCE,
    rank: int | None = None,
    world_size: int | None = None,
    buffer_size: int = 1000,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
    """What the four public loaders below share: their arguments, which are explained there."""
    rank, world_size = _place_among_ranks(rank, world_size)
    paths = split_paths(source, split)
    bos = tokenizer.get_bos_token_id()
    state = resume_state_dict or {"next": [1, 0, 0, None], "buffer": [], "offset": 0}
    if resume_state_dict and (state["rank"], state["world_size"]) != (rank, world_size):
        # Another rank's documents: begin with the row group it was at, which is as near as one can get.
        state = {"next": [*state["next"][:3], None], "buffer": [], "offset": 0}

    def batches() -> Iterator[tuple]:
        def encode(texts: list[str]) -> list[list[int]]:
            return tokenizer.encode(texts, prepend=bos, num_threads=tokenizer_threads)

        documents = Documents(paths, rank, world_size, encode, tokenizer_batch_size, state["next"])
        if packed:
            made = _bestfit_batches(documents, B, T, buffer_size, state["buffer"])
        else:
            made = _stream_batches(documents, B, T, state["offset"])
        for inputs, targets, after in made:
            yield inputs, targets, {**after, "rank": rank, "world_size": world_size}

    return _prefetch(batches(), torch.device(device))


def tokenizing_distributed_data_loader_with_state_bos_bestfit(*args, **kwargs):
    """Pretraining batches in which every row starts with bos and is packed by best fit, without padding.

    Args: (tokenizer, B, T, split, tokenizer_threads=4, tokenizer_batch_size=128, device="cuda",
    resume_state_dict=None, *, source="climbmix", rank=None, world_size=None, buffer_size=1000).
    B rows of T tokens; split "train" or "val"; rank and world size default to torchrun's.

    Yields (inputs int32 (B, T), targets int64 (B, T), state) for ever, epoch after epoch, in
    tensors of their own on the device. `state` resumes just after the batch; its "epoch" counts
    passes over the data from 1. A state of another rank or number of ranks resumes at the same
    row group, without the documents that waited.

    Raises:
        UserError: no shards, only one shard for "train", or no document in the split.
    """
    return _document_loader(True, *args, **kwargs)


def tokenizing_distributed_data_loader_with_state(*args, **kwargs):
    """Pretraining batches from one plain stream of tokens, cut anywhere. All else as in the loader above."""
    return _document_loader(False, *args, **kwargs)


def tokenizing_distributed_data_loader_bos_bestfit(*args, **kwargs):
    """(inputs, targets) of `tokenizing_distributed_data_loader_with_state_bos_bestfit`."""
    return ((inputs, targets) for inputs, targets, _ in _document_loader(True, *args, **kwargs))


def tokenizing_distributed_data_loader(*args, **kwargs):
    """(inputs, targets) of `tokenizing_distributed_data_loader_with_state`."""
    return ((inputs, targets) for inputs, targets, _ in _document_loader(False, *args, **kwargs))


# -----------------------------------------------------------------------------
# Conversations


def conversation_data_loader(
    dataset,
    tokenizer,
    B: int,
    T: int,
    *,
    supervise: str,
    device: str | torch.device,
    rank: int | None = None,
    world_size: int | None = None,
    resume_state_dict: dict | None = None,
    seed: int = 42,
    buffer_size: int = 256,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
    """Batches of packed conversations in which every supervised token appears exactly once per epoch.

    Args:
        dataset: anything with `len` and `[i]` that gives conversations.
        supervise: "assistant" trains on what the assistant says (mask 1), "all" on every token.
        T: pairs of (input, target) per row. A longer conversation is split into pieces, never cropped.
        seed: of the order of conversations, which is another one in each epoch.

    Yields (inputs int32 (B, T), targets int64 (B, T), state) for ever. Targets that are not
    trained on, and padding (inputs bos), are -1; each row has a target that is trained on. The
    batch in which an epoch ends is filled with rows of the next. `state` resumes just after the
    batch; "epoch" counts from 1, "progress" is the number of epochs consumed (2.25: a quarter of the
    third), "skipped" counts pieces left out because nothing in them is supervised.

    Raises:
        UserError: a whole epoch has no supervised token, or the data set's length has changed.
    """
    rank, world_size = _place_among_ranks(rank, world_size)
    fresh = {"epoch": 1, "progress": 0.0, "read": 0, "buffer": [], "skipped": 0, "rank": rank, "world_size": world_size}
    state = resume_state_dict or fresh
    if state.get("num_conversations", len(dataset)) != len(dataset):
        raise UserError(
            f"the data set has changed: {len(dataset)} conversations now, {state['num_conversations']} when the "
            "checkpoint was saved. Bring the old data back, or start this stage again."
        )
    bos = tokenizer.get_bos_token_id()

    def render(conversation) -> list[tuple[list[int], list[int]]]:
        return split_conversation(*tokenizer.render_conversation(conversation, max_tokens=None), T, supervise)

    def batches() -> Iterator[tuple]:
        conversations = Conversations(dataset, render, rank, world_size, seed, buffer_size, state)
        while True:
            inputs = torch.full((B, T), bos, dtype=torch.int32)
            targets = torch.full((B, T), -1, dtype=torch.int64)
            for row in range(B):
                column = 0
                for piece_inputs, piece_targets in conversations.next_row(T):
                    end = column + len(piece_inputs)
                    inputs[row, column:end] = torch.tensor(piece_inputs, dtype=torch.int32)
                    targets[row, column:end] = torch.tensor(piece_targets)
                    column = end
            yield inputs, targets, conversations.state()

    return _prefetch(batches(), torch.device(device))


# -----------------------------------------------------------------------------
# What both share


def _place_among_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    launched_rank, _, launched_world_size = ranks()
    return launched_rank if rank is None else rank, launched_world_size if world_size is None else world_size


def _prefetch(batches: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """The same batches, made in a thread a few ahead of their use, and copied to the device there.

    On CUDA the copies run on a stream of their own, from pinned memory that PyTorch's allocator
    keeps until they are done. Closing the generator ends the thread; an exception in the thread is
    raised here.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    ready, free, closed = SimpleQueue(), threading.Semaphore(AHEAD), threading.Event()

    def work() -> None:
        try:
            for inputs, targets, state in batches:
                copied = None
                if side:
                    with torch.cuda.stream(side):
                        inputs = inputs.pin_memory().to(device, non_blocking=True)
                        targets = targets.pin_memory().to(device, non_blocking=True)
                        copied = side.record_event()
                ready.put((inputs, targets, state, copied))
                free.acquire()
                if closed.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), BaseException):
            free.release()
            inputs, targets, state, copied = item
            if copied:
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                inputs.record_stream(current)
                targets.record_stream(current)
            yield inputs.to(device), targets.to(device), state
        raise item
    finally:
        closed.set()
        free.release()
        if not sys.is_finalizing():  # at interpreter exit the thread no longer runs, and a join would never end
            thread.join()
