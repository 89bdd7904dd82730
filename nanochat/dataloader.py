"""Documents and conversations in, batches of token ids out: packed, prefetched, resumable.

The one idea to know: every batch comes with the state that resumes just after it, small and plain
(JSON): where reading stands in each lane (see lanes.py), and which documents wait in its packing
buffer, by their places in the data. On resume those are read again, and the batches that follow are
bit for bit those of an uninterrupted run.

No token is lost. Pretraining rows have no padding: a document too long for what is left of its row
is cut, and goes on in a later row. Conversation rows keep pieces whole: what does not fit waits, and
the rest of a row is padding. Both are made in a background thread while the device computes. This
file fetches no data, and does not know what a conversation looks like.
"""

from __future__ import annotations

import atexit
import random
import threading
from collections import deque
from functools import lru_cache
from queue import SimpleQueue
from typing import Iterable, Iterator

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.dataset import DEFAULT_SOURCE, split_paths
from nanochat.lanes import Documents, Lanes, Place, RowGroups
from nanochat.packing import BestFitBuffer, Conversations, split_conversation

AHEAD = 4  # batches made before they are asked for
LONG = 8192  # tokens; where documents are longer on average, fewer of them wait ...
FEW = 32  # ... but never fewer than these, so that one enormous document does not fill whole batches


# -----------------------------------------------------------------------------
# Pretraining: documents


def _bestfit_batches(documents: Documents, B: int, T: int, bos: int, buffer_size: int, waiting: Iterable) -> Iterator[tuple]:
    """Rows of T + 1 tokens, packed so that no token is lost and few documents are cut.

    A row opens with the document that has waited longest, and goes on with those that fill it exactly, or else
    with the largest that fits, again and again (`BestFitBuffer.pop_best`). When none fits, the shortest is cut.
    What is left of a document that was cut, or is longer than a row, goes to the end of the queue; it begins with
    bos when its turn comes. `python -m dev.bench.loader --policies` compares other rules.

    A document waits as ([*place, how many of its ids have been used], ids); they are without bos.
    """
    buffer = BestFitBuffer(T + 1)

    def add(place: Iterable[int], ids: np.ndarray, start: int = 0) -> None:
        buffer.add(1 + len(ids) - start, ([*place, start], ids))

    def refill() -> None:
        """Read once if there is room; so a buffer grows over its first rows, and many lanes start without delay.

        Of a corpus smaller than the buffer, hold no more than this epoch and the next.
        """
        if len(buffer) < (buffer_size if buffer.total < buffer_size * LONG else min(FEW, buffer_size)):
            if not buffer or documents.next_place[0] <= 1 + min(entry[0] for entry, _ in buffer):
                for document in documents.read():
                    add(*document)

    for (*place, start), ids in waiting:
        if start > 0 and start >= len(ids):
            raise UserError(f"the data has changed: document {place[3]} in row group {place[2]} of shard {place[1]} "
                            "is shorter than when this run read it. Put the shards back as they were.")
        add(place, ids, start)
    while True:
        rows = np.full((B, T + 1), bos, np.int32)  # so the bos of each document stands there already
        for row in rows:
            at = 0
            while at < T:  # one place that is left keeps its bos
                refill()
                room = T + 1 - at
                (*place, start), ids = (buffer.pop_best(room) or buffer.pop_shortest()) if at else buffer.pop_oldest()
                end = min(len(ids), start + room - 1)
                row[at + 1 : at + 1 + end - start] = ids[start:end]
                at += 1 + end - start
                if end < len(ids):
                    add(place, ids, end)
        tokens = torch.from_numpy(rows)
        state = {"next": list(documents.next_place), "buffer": [entry for entry, _ in buffer]}
        yield tokens[:, :-1].clone(), tokens[:, 1:].long(), state


def _stream_batches(documents: Documents, B: int, T: int, bos: int, offset: int) -> Iterator[tuple]:
    """Documents end to end, cut wherever a row ends; no token is lost and rows start anywhere.

    `offset` tokens of the first document have been used already.
    """
    flat, unfinished = np.empty(0, np.int32), deque()  # the documents in `flat`: (place, length) each
    skip = offset
    while True:
        parts, size = [flat], len(flat) - skip
        while size < B * T + 1:
            for place, ids in documents.read():
                unfinished.append((place, 1 + len(ids)))
                parts += [[bos], ids]
                size += 1 + len(ids)
        if len(parts) > 1:
            flat, skip = np.concatenate(parts, dtype=np.int32)[skip:], 0
        tokens = torch.from_numpy(flat[: B * T + 1])
        flat = flat[B * T :]  # the last target is the first input of the next batch
        offset += B * T
        while offset >= unfinished[0][1]:
            offset -= unfinished.popleft()[1]
        state = {"next": list(unfinished[0][0]), "offset": offset}
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
    lanes: int | None = None,
    buffer_size: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
    """What the four public loaders below share: their arguments, which are explained there."""
    paths = split_paths(source, split)
    bos = tokenizer.get_bos_token_id()
    fresh = {"next": [1, 0, 0, 0], **({"buffer": []} if packed else {"offset": 0})}
    dealt = Lanes(lanes, rank, world_size, resume_state_dict, fresh)
    # All lanes together hold about 8000 documents, up to 80 lanes, so that many lanes do not make the memory, the state and a resume large.
    buffer_size = buffer_size or max(100, min(1000, 8000 // dealt.lanes))

    def encode(documents: list[tuple[Place, str]]) -> list[tuple[Place, np.ndarray]]:
        ids, offsets = tokenizer.encode_to_numpy([text for _, text in documents], num_threads=tokenizer_threads)
        parts = np.split(ids, offsets[1:-1])
        return [(place, part.copy()) for (place, _), part in zip(documents, parts)]  # one that waits keeps no others

    def batches() -> Iterator[tuple]:
        groups = RowGroups(paths)
        # Documents that wait are noted as (*place, how many ids have been used), by older versions without the last.
        buffers = {lane: [(*entry, 0)[:5] for entry in stream.get("buffer", [])] for lane, stream in dealt.streams.items()}
        waiting = [entry for buffer in buffers.values() for entry in buffer]
        again = dict(pair for documents in groups.read_again(waiting) for pair in encode(documents))
        made = {}
        for lane, stream in dealt.streams.items():
            documents = Documents(groups, int(lane), dealt, encode, tokenizer_batch_size)
            if packed:
                unfinished = [(entry, again.pop(entry)) for entry in buffers[lane]]
                made[lane] = _bestfit_batches(documents, B, T, bos, buffer_size, unfinished)
            else:
                made[lane] = _stream_batches(documents, B, T, bos, stream["offset"])
        yield from dealt.batches(made)

    return _prefetch(batches(), torch.device(device))


def tokenizing_distributed_data_loader_with_state_bos_bestfit(*args, **kwargs):
    """Pretraining batches in which every row starts with bos and is packed by best fit, without padding or loss.

    Args: (tokenizer, B, T, split, tokenizer_threads=4, tokenizer_batch_size=128, device="cuda",
    resume_state_dict=None, *, source="climbmix", rank=None, world_size=None, lanes=None, buffer_size=None).
    B rows of T tokens; split "train" or "val"; rank and world size default to torchrun's, and
    lanes, the number of micro-batches per step over all ranks, to the world size.

    Yields (inputs int32 (B, T), targets int64 (B, T), state) for ever, epoch after epoch, in
    tensors of their own on the device; rank r of W gives a batch of lane r, one of lane r + W,
    ..., and begins again with lane r. A lane's buffer holds `buffer_size` documents to choose from, by default
    1000, or fewer where there are more than 8 lanes. `state` resumes just after the batch; its "epoch" counts passes
    over the data from 1. `merge_states` of all ranks' states resumes on any number of ranks, exactly
    where `lanes` is the same; where it is another, no document is lost and none is seen again.

    Raises:
        UserError: no shards, only one shard for "train", or no document in the split.
    """
    return _document_loader(True, *args, **kwargs)


def tokenizing_distributed_data_loader_with_state(*args, **kwargs):
    """Pretraining batches from one plain stream of tokens per lane, cut anywhere. All else as in the loader above.

    With another number of lanes, a document that was cut by the end of a batch is seen again from its beginning.
    """
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
    lanes: int | None = None,
    resume_state_dict: dict | None = None,
    seed: int = 42,
    buffer_size: int = 256,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
    """Batches of packed conversations in which every supervised token appears exactly once per epoch.

    Args:
        dataset: anything with `len` and `[i]` that gives conversations.
        supervise: "assistant" trains on what the assistant says (mask 1), "all" on every token.
        T: pairs of (input, target) per row. A longer conversation is split into pieces, never cropped.
        lanes: micro-batches per step over all ranks (None: the world size). A state resumes as it does above.
        seed: of the order of conversations, which is another one in each epoch.

    Yields (inputs int32 (B, T), targets int64 (B, T), state) for ever. Targets that are not
    trained on, and padding (inputs bos), are -1; each row has a target that is trained on. The
    batch in which a lane's epoch ends is filled with rows of the next. `state` resumes just after the
    batch; "epoch" counts from 1. In it are counted, over all epochs and the lanes of this rank (after
    `merge_states`: of all ranks), "finished": conversations used up, and "skipped": pieces left out
    because nothing in them is supervised. finished / "num_conversations" epochs are done.

    Raises:
        UserError: a whole epoch has no supervised token, or the data set's length has changed.
    """
    state, count = resume_state_dict, len(dataset)
    if state and state.get("num_conversations", count) != count:
        raise UserError(
            f"the data set has changed: {count} conversations now, {state['num_conversations']} when the "
            "checkpoint was saved. Bring the old data back, or start this stage again."
        )
    fresh = {"next": [1, 0], "buffer": [], "finished": 0, "skipped": 0}
    dealt = Lanes(lanes, rank, world_size, state, fresh)
    bos = tokenizer.get_bos_token_id()

    def render(conversation) -> list[tuple[list[int], list[int]]]:
        return split_conversation(*tokenizer.render_conversation(conversation, max_tokens=None), T, supervise)

    @lru_cache(maxsize=2)  # the lanes are in the same epoch or in neighbouring ones
    def order(epoch: int) -> list[int]:
        shuffled = list(range(count))
        random.Random(f"{seed}, epoch {epoch}").shuffle(shuffled)
        return shuffled

    def lane_batches(conversations: Conversations) -> Iterator[tuple]:
        while True:
            inputs = torch.full((B, T), bos, dtype=torch.int32)
            targets = torch.full((B, T), -1, dtype=torch.int64)
            for row in range(B):
                column = 0
                for piece_inputs, piece_targets in conversations.next_row():
                    end = column + len(piece_inputs)
                    inputs[row, column:end] = torch.tensor(piece_inputs, dtype=torch.int32)
                    targets[row, column:end] = torch.tensor(piece_targets)
                    column = end
            yield inputs, targets, conversations.state()

    def batches() -> Iterator[tuple]:
        made = {
            lane: lane_batches(
                Conversations(dataset, render, order, int(lane), dealt.lanes, dealt.was_read, buffer_size, T, stream)
            )
            for lane, stream in dealt.streams.items()
        }
        for inputs, targets, after in dealt.batches(made):
            yield inputs, targets, {**after, "num_conversations": count}

    return _prefetch(batches(), torch.device(device))


# -----------------------------------------------------------------------------
# The thread


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

    def stop() -> None:
        closed.set()
        free.release()
        thread.join()

    thread.start()
    atexit.register(stop)  # a thread that is in C++ or Rust when the interpreter ends takes the process down
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
        atexit.unregister(stop)
        stop()
