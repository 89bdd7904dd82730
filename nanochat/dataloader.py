"""Batches of token ids from documents and conversations: packed, prefetched, resumable on any number of ranks.

The data is one global stream of rows, and a step consumes `rows_per_step` of them. Every rank walks the whole stream
and keeps its own rows: a step is cut into micro-batches of B rows, and micro-batch m belongs to rank m % world_size.
So neither the number of ranks nor B changes the data of a step. Every batch comes with a small JSON state: the next
position of the walk, and the positions of the documents that wait in the packing buffer. On resume those are read
again, and the following batches are bit for bit those of an uninterrupted run.

Rows are made in a background thread while the device computes. How they are filled is decided in packing.py.
"""

from __future__ import annotations

import atexit
import threading
from queue import SimpleQueue
from typing import Callable, Iterator

import numpy as np
import torch

from nanochat.common import UserError, ranks
from nanochat.dataset import DEFAULT_SOURCE, count_rows, split_paths
from nanochat.packing import ConversationPacker, DocumentPacker, Documents, Position, StreamPacker, split_conversation

AHEAD = 4  # batches made before they are needed

Batches = Iterator[tuple[torch.Tensor, torch.Tensor, dict]]


# -----------------------------------------------------------------------------
# Pretraining: documents


def tokenizing_distributed_data_loader_with_state_bos_bestfit(
    tokenizer, B: int, T: int, split: str, tokenizer_threads: int = 4, tokenizer_batch_size: int = 128,
    device: str | torch.device = "cuda", resume_state_dict: dict | None = None, *, source: str = DEFAULT_SOURCE,
    rank: int | None = None, world_size: int | None = None, rows_per_step: int | None = None, buffer_size: int = 1000,
) -> Batches:
    """Pretraining batches in which every row starts with bos and is packed by best fit, without padding or loss.

    Args:
        B, T: rows of a micro-batch and tokens of a row.
        split: "train" or "val".
        rank, world_size: torchrun's by default.
        rows_per_step: rows of one optimizer step over all ranks, by default B * world_size. If B does not divide it,
            the last micro-batch of a step is smaller.
        buffer_size: number of documents to choose from.

    Yields (inputs int32 (B, T), targets int64 (B, T), state) endlessly, epoch after epoch, in new tensors on the device.
    The state of a rank's last micro-batch of a step is the same on all ranks, and resumes at the next step on any number
    of ranks and with any B. The state of an earlier one resumes just after it on one rank. "epoch" counts from 1.

    Raises:
        UserError: no shards, only one shard for "train", no document in the split, or a state of other data.
    """

    def pack(documents: Documents, bos: int, waiting: list) -> DocumentPacker:
        return DocumentPacker(documents, T, bos, buffer_size, waiting)

    return _document_loader(pack, tokenizer, B, split, tokenizer_threads, tokenizer_batch_size, device, resume_state_dict,
                            source, rank, world_size, rows_per_step)  # fmt: skip


def tokenizing_distributed_data_loader_with_state(
    tokenizer, B: int, T: int, split: str, tokenizer_threads: int = 4, tokenizer_batch_size: int = 128,
    device: str | torch.device = "cuda", resume_state_dict: dict | None = None, *, source: str = DEFAULT_SOURCE,
    rank: int | None = None, world_size: int | None = None, rows_per_step: int | None = None,
) -> Batches:
    """Pretraining batches from one plain stream of tokens that is cut wherever a row ends. All else as above."""

    def pack(documents: Documents, bos: int, waiting: list) -> StreamPacker:
        return StreamPacker(documents, T, bos, waiting)

    return _document_loader(pack, tokenizer, B, split, tokenizer_threads, tokenizer_batch_size, device, resume_state_dict,
                            source, rank, world_size, rows_per_step)  # fmt: skip


def tokenizing_distributed_data_loader_bos_bestfit(
    tokenizer, B: int, T: int, split: str, tokenizer_threads: int = 4, tokenizer_batch_size: int = 128,
    device: str | torch.device = "cuda", resume_state_dict: dict | None = None, *, source: str = DEFAULT_SOURCE,
    rank: int | None = None, world_size: int | None = None, rows_per_step: int | None = None, buffer_size: int = 1000,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of `tokenizing_distributed_data_loader_with_state_bos_bestfit`."""
    batches = tokenizing_distributed_data_loader_with_state_bos_bestfit(
        tokenizer, B, T, split, tokenizer_threads, tokenizer_batch_size, device, resume_state_dict, source=source,
        rank=rank, world_size=world_size, rows_per_step=rows_per_step, buffer_size=buffer_size,
    )  # fmt: skip
    return ((inputs, targets) for inputs, targets, _ in batches)


def tokenizing_distributed_data_loader(
    tokenizer, B: int, T: int, split: str, tokenizer_threads: int = 4, tokenizer_batch_size: int = 128,
    device: str | torch.device = "cuda", resume_state_dict: dict | None = None, *, source: str = DEFAULT_SOURCE,
    rank: int | None = None, world_size: int | None = None, rows_per_step: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of `tokenizing_distributed_data_loader_with_state`."""
    batches = tokenizing_distributed_data_loader_with_state(
        tokenizer, B, T, split, tokenizer_threads, tokenizer_batch_size, device, resume_state_dict, source=source,
        rank=rank, world_size=world_size, rows_per_step=rows_per_step,
    )  # fmt: skip
    return ((inputs, targets) for inputs, targets, _ in batches)


def _document_loader(
    pack, tokenizer, B, split, tokenizer_threads, tokenizer_batch_size, device, state, source, rank, world_size, rows_per_step
) -> Batches:
    """What the document loaders share; `pack(documents, bos, waiting)` makes the packer."""
    paths = split_paths(source, split)
    data = {"shards": count_rows(paths), "tokenizer": tokenizer.fingerprint()}
    if state:
        _check_data_unchanged(state, data)

    def encode(texts: list[str]) -> list[np.ndarray]:
        ids, offsets = tokenizer.encode_to_numpy(texts, num_threads=tokenizer_threads)
        return [part.copy() for part in np.split(ids, offsets[1:-1])]  # copies, so that one does not keep all in memory

    def make_packer():
        position = Position(*state["next"]) if state else Position(epoch=1, shard=0, group=0, row=0)
        documents = Documents(paths, encode, tokenizer_batch_size, position)
        return pack(documents, tokenizer.get_bos_token_id(), state["buffer"] if state else [])

    return _prefetch(_micro_batches(make_packer, data, B, rank, world_size, rows_per_step), torch.device(device))


def _check_data_unchanged(state: dict, data: dict) -> None:
    """Raise UserError if `state` was saved with another tokenizer or other data than the current ones, `data`."""
    if not data.keys() <= state.keys():
        raise UserError("this checkpoint is of an older version, and its position in the data cannot be read. "
                        "Start this stage again.")
    remedy = "Restore what was there when the checkpoint was saved, or start this stage again."
    if state["tokenizer"] != data["tokenizer"]:
        raise UserError(f"the tokenizer is not the one that the checkpoint was made with. {remedy}")
    if (count := data.get("num_conversations")) != (before := state.get("num_conversations")):
        raise UserError(f"the data set has changed: {count} conversations now, {before} when the checkpoint was saved. {remedy}")
    old, new = state.get("shards"), data.get("shards")
    if old != new:
        name = min(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        raise UserError(f"the data has changed: {name} has {new.get(name, 'no')} rows now, {old.get(name, 'none')} when the "
                        f"checkpoint was saved. {remedy}")


# -----------------------------------------------------------------------------
# Conversations


def conversation_data_loader(
    dataset, tokenizer, B: int, T: int, *, supervise: str, device: str | torch.device, rank: int | None = None,
    world_size: int | None = None, rows_per_step: int | None = None, resume_state_dict: dict | None = None,
    seed: int = 42, buffer_size: int = 256,
) -> Batches:
    """Batches of packed conversations in which every supervised token appears exactly once per epoch.

    Args:
        dataset: anything with `len` whose items are conversations.
        T: pairs of (input, target) per row. A longer conversation is split, never cropped.
        supervise: "assistant" trains on what the assistant says (mask 1), "all" on every token.
        rank, world_size, rows_per_step: as for documents.
        seed: determines the order of the conversations, which differs from epoch to epoch.

    Yields (inputs int32 (B, T), targets int64 (B, T), state) endlessly. Targets that are not trained on and padding
    (inputs bos) are -1; each row has a target that is trained on. The state resumes as for documents. It counts, over
    all epochs, "finished": conversations that are packed completely, and "skipped": chunks left out because they have
    no supervised token. finished / "num_conversations" is the number of completed epochs.

    Raises:
        UserError: no supervised token in a whole epoch, or a state of another data set or tokenizer.
    """
    data = {"num_conversations": len(dataset), "tokenizer": tokenizer.fingerprint()}
    if resume_state_dict:
        _check_data_unchanged(resume_state_dict, data)

    def render(conversation) -> list[tuple[list[int], list[int]]]:
        return split_conversation(*tokenizer.render_conversation(conversation, max_tokens=None), T, supervise)

    def make_packer() -> ConversationPacker:
        state = resume_state_dict or ConversationPacker.FRESH
        return ConversationPacker(dataset, render, T, tokenizer.get_bos_token_id(), buffer_size, seed, state)

    return _prefetch(_micro_batches(make_packer, data, B, rank, world_size, rows_per_step), torch.device(device))


# -----------------------------------------------------------------------------
# Rows -> micro-batches -> device


def _micro_batches(
    make_packer: Callable, data: dict, B: int, rank: int | None, world_size: int | None, rows_per_step: int | None
) -> Batches:
    """The micro-batches of this rank on the CPU; `data` is added to each state."""
    launched_rank, _, launched_world_size = ranks()
    rank = launched_rank if rank is None else rank
    world_size = launched_world_size if world_size is None else world_size
    rows_per_step = B * world_size if rows_per_step is None else rows_per_step
    starts = range(0, rows_per_step, B)  # the first row of each micro-batch
    mine = range(rank, len(starts), world_size)
    assert mine, f"rank {rank} of {world_size} has none of the {len(starts)} micro-batches of a step"

    packer = make_packer()
    while True:
        for number, start in enumerate(starts):
            rows = [packer.next_row() for _ in range(min(B, rows_per_step - start))]
            if number in mine:
                inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
                batch = inputs, targets.long()
                if number != mine[-1]:
                    yield *batch, {**packer.state(), **data}
        yield *batch, {**packer.state(), **data}  # at the end of the step, where the state is the same on all ranks


def _prefetch(batches: Batches, device: torch.device) -> Batches:
    """The same batches, made a few ahead of their use in a thread, and copied to the device there.

    On CUDA the copies run on a stream of their own, from pinned memory that PyTorch's allocator retains until they are
    done. Closing the generator ends the thread; an exception in the thread is raised here.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    ready, free, closed = SimpleQueue(), SimpleQueue(), threading.Event()  # `free` holds a token for each batch that may be made
    for _ in range(AHEAD):
        free.put(None)

    def work() -> None:
        try:
            if side:
                torch.cuda.set_device(side.device)  # else pinning memory would open a context on GPU 0, on every rank
            for inputs, targets, state in batches:
                copied = None
                if side:
                    with torch.cuda.stream(side):
                        inputs = inputs.pin_memory().to(device, non_blocking=True)
                        targets = targets.pin_memory().to(device, non_blocking=True)
                        copied = side.record_event()
                ready.put((inputs, targets, state, copied))
                free.get()
                if closed.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)

    def stop() -> None:
        closed.set()
        free.put(None)
        thread.join()

    thread.start()
    atexit.register(stop)  # a thread that runs C++ or Rust code while the interpreter ends would crash the process
    try:
        while not isinstance(item := ready.get(), BaseException):
            free.put(None)
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
