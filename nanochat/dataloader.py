"""Batches of token ids from documents and conversations: packed, prefetched, resumable on any number of ranks.

The data is one global stream of rows (packing.py), and a step consumes `rows_per_step` of them. Every rank walks the
whole stream and keeps its own rows: a step is cut into micro-batches of B rows, and micro-batch m belongs to rank
m % world_size. So neither the number of ranks nor B changes the data of a step. Every batch comes with a small JSON
state: the next position of the walk, and the positions of the documents that wait in the packing buffer. On resume
those are read again, and the following batches are bit for bit those of an uninterrupted run.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, wraps
from typing import Callable, Iterator

import numpy as np
import torch

from nanochat.common import UserError, ranks
from nanochat.dataset import DEFAULT_SOURCE, count_rows, split_paths
from nanochat.packing import ConversationPacker, DocumentPacker, Documents, StreamPacker, split_conversation

AHEAD = 4  # batches made before they are needed

Batches = Iterator[tuple[torch.Tensor, torch.Tensor, dict]]


def tokenizing_distributed_data_loader_with_state_bos_bestfit(
    tokenizer, B: int, T: int, split: str, tokenizer_threads: int = 4, tokenizer_batch_size: int = 128,
    device: str | torch.device = "cuda", resume_state_dict: dict | None = None, *, source: str = DEFAULT_SOURCE,
    rows_per_step: int | None = None, buffer_size: int = 1000,
) -> Batches:
    """Pretraining batches in which every row starts with bos and is packed by best fit, without padding or loss.

    `rows_per_step` are the rows of one optimizer step over all ranks, by default B for each; if B does not divide it, the
    last micro-batch of a step is smaller. `buffer_size` is the number of documents to choose from; 0 makes one plain
    stream that is cut wherever a row ends.

    Yields (inputs int32 (B, T), targets int64 (B, T), state) endlessly, epoch after epoch, in new tensors on the device.
    The state of a rank's last micro-batch of a step is the same on all ranks, and resumes at the next step on any number
    of ranks and with any B. The state of an earlier one resumes just after it on one rank. "epoch" counts from 1.
    Raises UserError if there is no such data, or if the state is of other data.
    """
    bos, state = tokenizer.get_bos_token_id(), resume_state_dict
    paths = split_paths(source, split)
    data = {"shards": count_rows(paths), "tokenizer": tokenizer.fingerprint()}

    def encode(texts):
        ids, offsets = tokenizer.encode_to_numpy(texts, num_threads=tokenizer_threads)
        return [part.copy() for part in np.split(ids, offsets[1:-1])]  # copies, so that one does not keep all in memory

    with _resuming(state, data):
        documents = Documents(paths, encode, tokenizer_batch_size, state)
        packer = DocumentPacker(documents, T, bos, buffer_size) if buffer_size else StreamPacker(documents, T, bos)
    return _batches(packer, data, B, rows_per_step, torch.device(device))


def _without_state(loader: Callable) -> Callable:
    """The same loader, but its batches are (inputs, targets)."""

    @wraps(loader)
    def batches(*args, **kwargs):
        return ((inputs, targets) for inputs, targets, _ in loader(*args, **kwargs))

    return batches


tokenizing_distributed_data_loader_with_state = partial(tokenizing_distributed_data_loader_with_state_bos_bestfit, buffer_size=0)
tokenizing_distributed_data_loader_bos_bestfit = _without_state(tokenizing_distributed_data_loader_with_state_bos_bestfit)
tokenizing_distributed_data_loader = _without_state(tokenizing_distributed_data_loader_with_state)


@contextmanager
def _resuming(state: dict | None, data: dict) -> Iterator[None]:
    """Raise UserError if `state`, of which the block makes a packer, is damaged or was saved with other data than `data`."""
    remedy = "since the checkpoint was saved. Restore what was there, or start this stage again"
    try:
        if state and state["tokenizer"] != data["tokenizer"]:
            raise UserError(f"the tokenizer has changed {remedy}")
        before, now = (x.get("shards") or {"the data set": x.get("num_conversations")} for x in (state or data, data))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(f"{name} has changed from {before.get(name, 'no')} to {now.get(name, 'no')} rows {remedy}")
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the checkpoint's loader state is damaged ({error!r}); start this stage again") from error


def conversation_data_loader(
    dataset, tokenizer, B: int, T: int, *, supervise: str, device: str | torch.device, rows_per_step: int | None = None,
    resume_state_dict: dict | None = None, seed: int = 42, buffer_size: int = 256,
) -> Batches:
    """Batches of packed conversations in which every supervised token appears exactly once per epoch.

    `dataset` has `len` and conversations as items; those of more than T + 1 tokens are split, not cropped. `supervise`
    "assistant" trains on what the assistant says (mask 1), "all" on every token. `seed` determines the order of the
    conversations, which differs from epoch to epoch.

    Yields and resumes as for documents. Targets that are not trained on and padding (inputs bos) are -1; each row has a
    target that is trained on. The state counts in "finished" the conversations that are packed completely, over all
    epochs. Raises UserError if no token is supervised, or if the state is of another data set or tokenizer.
    """
    data = {"num_conversations": len(dataset), "tokenizer": tokenizer.fingerprint()}

    def render(conversation):
        return split_conversation(*tokenizer.render_conversation(conversation, max_tokens=None), T, supervise)

    with _resuming(resume_state_dict, data):
        packer = ConversationPacker(dataset, render, T, tokenizer.get_bos_token_id(), buffer_size, seed, resume_state_dict)
    return _batches(packer, data, B, rows_per_step, torch.device(device))


def _batches(packer, data: dict, B: int, rows_per_step: int | None, device: torch.device) -> Batches:
    """This rank's micro-batches of the packer's rows, on the device; `data` is added to each state."""
    rank, _, world_size = ranks()
    rows_per_step = rows_per_step or B * world_size
    starts = range(0, rows_per_step, B)  # the first row of each micro-batch
    mine = range(rank, len(starts), world_size)
    assert mine, f"rank {rank} of {world_size} has none of the {len(starts)} micro-batches of a step"

    def micro_batches():
        while True:
            for number, start in enumerate(starts):
                rows = [packer.next_row() for _ in range(min(B, rows_per_step - start))]
                if number in mine:
                    inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
                    batch = inputs, targets.long()
                    if number != mine[-1]:
                        yield *batch, {**packer.state(), **data}
            yield *batch, {**packer.state(), **data}  # at the end of the step, where the state is the same on all ranks

    return _prefetch(micro_batches(), device)


def _prefetch(batches: Batches, device: torch.device) -> Batches:
    """The same batches, made a few ahead of their use in a thread, and copied to the device there.

    On CUDA the copies run on a stream of their own, from pinned memory that PyTorch's allocator retains until they are
    done. The thread is an executor's, which ends before the interpreter does: one that runs Rust code then would crash.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make():
        inputs, targets, state = next(batches)
        if not side:
            return inputs, targets, state, None
        torch.cuda.set_device(side.device)  # else pinning memory would open a context on GPU 0, on every rank
        with torch.cuda.stream(side):
            inputs = inputs.pin_memory().to(device, non_blocking=True)
            targets = targets.pin_memory().to(device, non_blocking=True)
            return inputs, targets, state, side.record_event()

    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(thread.submit(make) for _ in range(AHEAD))
        while True:
            inputs, targets, state, copied = ahead.popleft().result()
            ahead.append(thread.submit(make))
            if copied:
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                inputs.record_stream(current)
                targets.record_stream(current)
            yield inputs.to(device), targets.to(device), state
    finally:
        thread.shutdown(cancel_futures=True)
