"""The loaders against brute force: packing, any number of ranks, exact resume, every token once per epoch."""

import json
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import best_length

from nanochat import dataloader, packing
from nanochat.common import UserError

BOS = 0
LENGTHS = [3, 14, 5, 2, 9, 9, 1, 6, 30, 4, 8, 2, 2, 11, 7, 3, 5, 13, 2, 6, 40, 3, 3, 10, 5]
SHAPES = [(30, 3), (5, 2), (1, 1), (8, 0), (17, 16), (4, 1), (25, 24), (9, 2), (6, 5), (3, 2), (12, 1)]


class WordTokenizer:
    """One token per word, and words are numbers. Conversations are (ids, mask) already."""

    def get_bos_token_id(self):
        return BOS

    def fingerprint(self):
        return "words"

    def encode_to_numpy(self, texts, num_threads=8):
        rows = [[int(word) for word in text.split()] for text in texts]
        return np.array([id for ids in rows for id in ids], np.uint16), np.cumsum([0, *map(len, rows)])

    def render_conversation(self, conversation, max_tokens=2048):
        assert max_tokens is None
        return conversation


def write_corpus(folder: Path, lengths: list[int], row_group_size: int = 4, shard_size: int = 10) -> list[list[int]]:
    """Documents of `lengths` tokens, bos included, that no other document has, and a val shard. Returns their ids."""
    documents, word = [], 1
    for length in lengths:
        documents.append(list(range(word, word + length - 1)))
        word += length - 1
    shards = [documents[i : i + shard_size] for i in range(0, len(documents), shard_size)] + [[[7, 7, 7]]]
    for number, shard in enumerate(shards):
        table = pa.table({"text": [" ".join(map(str, ids)) for ids in shard]})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=row_group_size)
    return [[BOS, *ids] for ids in documents]


def make_conversations(shapes: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """(tokens, period of the assistant's tokens; 0: none) -> ids that no other conversation has, and the mask."""
    made, first = [], 1
    for length, every in shapes:
        made.append((list(range(first, first + length)), [int(every > 0 and i % every == 0) for i in range(length)]))
        first += length
    return made


def packed(folder, B=2, T=8, split="train", device="cpu", **kwargs):
    loader = dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit
    return loader(WordTokenizer(), B, T, split, device=device, source=str(folder), **kwargs)


def stream(folder, B=2, T=8, **kwargs):
    loader = dataloader.tokenizing_distributed_data_loader_with_state
    return loader(WordTokenizer(), B, T, "train", device="cpu", source=str(folder), **kwargs)


def conversations(dataset, B=1, T=4, supervise="assistant", **kwargs):
    return dataloader.conversation_data_loader(dataset, WordTokenizer(), B, T, supervise=supervise, device="cpu", **kwargs)


def take(loader, n: int) -> list:
    taken = list(islice(loader, n))
    loader.close()
    return taken


def rows_of(taken) -> list[list[int]]:
    """The rows of T + 1 tokens behind (inputs, targets)."""
    rows = []
    for inputs, targets, _ in taken:
        assert inputs.dtype == torch.int32 and targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:].long(), targets[:, :-1])
        rows += [[first, *rest] for first, rest in zip(inputs[:, 0].tolist(), targets.tolist())]
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, LENGTHS)
    return folder


@pytest.fixture(params=["packed", "stream", "conversations"])
def open_loader(request, corpus):
    """One of the loaders with small sizes, on data of several epochs."""
    return {
        "packed": partial(packed, corpus, tokenizer_batch_size=3, buffer_size=6),
        "stream": partial(stream, corpus, tokenizer_batch_size=3),
        "conversations": partial(conversations, make_conversations(SHAPES), T=7, buffer_size=3),
    }[request.param]


# -----------------------------------------------------------------------------
# Ranks, batch sizes, resume


def take_steps(open_loader, n, rows_per_step, B, world_size, resume=None):
    """The rows of each of n steps over all ranks, in order, and the state after it."""
    count = -(-rows_per_step // B)
    loaders = []
    for rank in range(min(world_size, count)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataloader, "ranks", lambda: (rank, rank, world_size))
            loaders.append(open_loader(B=B, rows_per_step=rows_per_step, resume_state_dict=resume))
    steps = []
    for _ in range(n):
        micro = [next(loaders[number % world_size]) for number in range(count)]
        states = [json.dumps(state) for _, _, state in micro[-len(loaders) :]]  # of each rank's last micro-batch
        assert len(set(states)) == 1
        assert all(len(x) == B for x, _, _ in micro[:-1])
        steps.append(([row for x, y, _ in micro for row in zip(x.tolist(), y.tolist())], json.loads(states[0])))
    for loader in loaders:
        loader.close()
    return steps


SIZES = st.tuples(st.integers(1, 7), st.integers(1, 3))  # rows of a micro-batch, ranks


def test_resume_on_another_world_size_and_batch_size_is_exact(open_loader):
    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 12), SIZES, SIZES, st.integers(1, 9))
    def is_exact(rows_per_step, sizes, other_sizes, stop):
        steps = take_steps(open_loader, 12, rows_per_step, 1, 1)
        assert all(len(rows) == rows_per_step for rows, _ in steps)
        assert take_steps(open_loader, 12, rows_per_step, *sizes) == steps
        resumed = take_steps(open_loader, 3, rows_per_step, *other_sizes, steps[stop - 1][1])
        assert resumed == steps[stop : stop + 3]

    is_exact()


def test_resume_after_any_batch_of_one_rank_is_exact(open_loader):
    def rows_and_states(resume, n):
        loader = open_loader(B=2, rows_per_step=6, resume_state_dict=resume)
        return [(x.tolist(), y.tolist(), state) for x, y, state in take(loader, n)]

    uninterrupted = rows_and_states(None, 40)
    assert uninterrupted[-1][2]["epoch"] > 2
    for stop in range(1, 36):
        assert rows_and_states(uninterrupted[stop - 1][2], 4) == uninterrupted[stop : stop + 4]


def test_resume_on_other_data_is_refused(tmp_path):
    def refused(loader, data, state, message):
        with pytest.raises(UserError, match=message):
            loader(data, resume_state_dict=state)

    write_corpus(tmp_path, LENGTHS)
    state = take(packed(tmp_path), 3)[-1][2]
    assert state["shards"] == {"000.parquet": 10, "001.parquet": 10, "002.parquet": 5}
    refused(packed, tmp_path, state | {"tokenizer": "others"}, "the tokenizer has changed")
    write_corpus(tmp_path, [2] * len(LENGTHS))
    refused(packed, tmp_path, state, "has changed since this run read it")
    write_corpus(tmp_path, LENGTHS[:-1])
    refused(packed, tmp_path, state, "002.parquet has changed from 5 to 4 rows since the checkpoint")
    state = take(conversations(make_conversations(SHAPES)), 1)[0][2]
    shorter = make_conversations([(1, 1)] * len(SHAPES))
    refused(conversations, shorter[:3], state, "changed from 11 to 3 rows since the checkpoint was saved")
    refused(conversations, shorter, state, "is shorter than when this run read it")


# -----------------------------------------------------------------------------
# Documents


def brute_force_rows(documents, n, T, buffer_size, chunk_size):
    """Reference implementation of the packing rule, with lists that are searched from the front."""
    texts = [ids for ids in documents if len(ids) > 1]
    chunks = [texts[i : i + chunk_size] for i in range(0, len(texts), chunk_size)]
    buffer, read, rows = [], 0, []  # buffer: (epoch, ids), oldest first
    for _ in range(n):
        row = []
        while len(row) < T:
            oldest = min((epoch for epoch, _ in buffer), default=read)
            if len(buffer) < buffer_size and read // len(chunks) <= oldest + 1:
                buffer += [(read // len(chunks), ids) for ids in chunks[read % len(chunks)]]
                read += 1
            room, lengths = T + 1 - len(row), [len(ids) for _, ids in buffer]
            best = best_length(lengths, room) or min(min(lengths), T + 2)
            number = next(i for i, n in enumerate(lengths) if min(n, T + 2) == best) if row else 0
            epoch, ids = buffer.pop(number)
            row += ids[:room]
            if len(ids) > room:
                buffer.append((epoch, [BOS, *ids[room:]]))
        rows.append(row + [BOS] * (T + 1 - len(row)))
    return rows


corpora = st.lists(st.integers(1, 25), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 12), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_packed_rows_equal_brute_force_and_lose_no_token(lengths, T, B, buffer_size, chunk_size, row_group_size):
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), lengths, row_group_size)
        taken = take(packed(folder, B, T, tokenizer_batch_size=chunk_size, buffer_size=buffer_size), 12)
    rows, state = rows_of(taken), taken[-1][2]
    assert rows == brute_force_rows(documents, 12 * B, T, buffer_size, chunk_size)
    assert all(row[0] == BOS for row in rows)
    # What was packed and what waits is what was read: each document once per epoch.
    seen = Counter(token for row in rows for token in row if token != BOS)
    for _, shard, group, row, start in state["buffer"]:
        seen.update(documents[10 * shard + row_group_size * group + row][1 + start :])
    epoch, shard, group, row = state["next"]
    reached = 10 * shard + row_group_size * group + row
    assert seen == +Counter({token: epoch - (d >= reached) for d, ids in enumerate(documents) for token in ids[1:]})


@settings(max_examples=25, deadline=None)
@given(corpora, st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
def test_plain_stream_loses_no_token(lengths, T, B, chunk_size):
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), lengths)
        taken = take(stream(folder, B, T, tokenizer_batch_size=chunk_size), 12)
    once = [token for ids in documents if len(ids) > 1 for token in ids]
    endless = once * (12 * B * T // len(once) + 2)
    for name, shift in (("inputs", 0), ("targets", 1)):
        tokens = [token for batch in taken for token in batch[shift].flatten().tolist()]
        assert tokens == endless[shift : shift + 12 * B * T], name


def test_long_document_neither_blocks_the_others_nor_grows_the_state(tmp_path, monkeypatch):
    documents = write_corpus(tmp_path, [5, 4000, *[5 + i % 9 for i in range(300)]], shard_size=400)
    for long in (packing.LONG, 20):  # 20: the document alone is more than may wait
        monkeypatch.setattr(packing, "LONG", long)
        taken = take(packed(tmp_path, B=4, buffer_size=10, tokenizer_batch_size=5), 60)
        of_the_long = [[row[1] in documents[1] for row in inputs.tolist()] for inputs, _, _ in taken[1:]]
        assert all(sum(rows) < 4 for rows in of_the_long) and sum(map(sum, of_the_long)) > 5
        assert max(len(state["buffer"]) for _, _, state in taken) < (15 if long > 20 else packing.FEW + 5)


def test_validation_reads_the_last_shard_and_repeats_it(corpus):
    taken = take(packed(corpus, T=7, split="val"), 3)
    assert rows_of(taken) == [[BOS, 7, 7, 7, BOS, 7, 7, 7]] * 6
    assert taken[-1][2]["epoch"] > 1


@pytest.mark.parametrize("loader", [packed, stream])
def test_data_without_text_is_refused(tmp_path, loader):
    write_corpus(tmp_path, [1, 1, 1])
    with pytest.raises(UserError, match="no document with text in 1 shard"):
        loader(tmp_path)


# -----------------------------------------------------------------------------
# Conversations


def supervised(dataset, supervise) -> Counter:
    """(input, target) of everything that must be trained on, once each."""
    return Counter(
        (ids[i], ids[i + 1])
        for ids, mask in dataset
        for i in range(len(ids) - 1)
        if supervise == "all" or mask[i + 1]
    )


chats = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(chats, st.integers(1, 9), st.integers(1, 20), st.sampled_from(["assistant", "all"]))
def test_every_supervised_token_is_trained_on_once_per_epoch(shapes, T, buffer_size, supervise):
    dataset = make_conversations(shapes)
    expected = supervised(dataset, supervise)
    loader = conversations(dataset, 1, T, supervise, buffer_size=buffer_size)
    if not expected:
        with pytest.raises(UserError, match="none of the .* has a supervised token"):
            next(loader)
        return
    trained_on = {1: Counter(), 2: Counter()}
    for inputs, targets, state in loader:  # rows one by one; none holds chunks of two epochs
        padding = (inputs == BOS).squeeze(0)
        assert (targets != -1).any() and (targets.squeeze(0)[padding] == -1).all()
        assert padding.tolist() == sorted(padding.tolist())
        for _, index, chunk in state["buffer"]:  # nothing that waits would have fitted
            assert min(T, shapes[index][0] - 1 - chunk * T) > padding.sum()
        epoch = state["epoch"]
        assert (epoch - 1) * len(shapes) <= state["finished"] <= epoch * len(shapes)
        if epoch > 2:
            break
        pairs = zip(inputs.flatten().tolist(), targets.flatten().tolist())
        trained_on[epoch].update((x, y) for x, y in pairs if y != -1)
    loader.close()
    assert trained_on == {1: expected, 2: expected}


def test_epochs_differ_in_order_and_a_seed_repeats_it():
    def order(seed):
        return [x.item() for x, _, _ in take(conversations(make_conversations([(2, 1)] * 9), T=1, seed=seed), 18)]

    assert order(1) == order(1) != order(2)
    assert order(1)[:9] != order(1)[9:]
    assert sorted(order(1)[:9]) == sorted(order(1)[9:]) == list(range(1, 18, 2))


def test_chunks_without_a_supervised_token_are_counted_not_trained_on():
    dataset = make_conversations([(9, 8), (8, 0)])  # the only supervised target is the ninth token of the first
    [(inputs, targets, state)] = take(conversations(dataset), 1)
    assert (inputs.tolist(), targets.tolist()) == ([[5, 6, 7, 8]], [[-1, -1, -1, 9]])
    assert state["skipped"] == 1 + 2
    assert (state["epoch"], state["finished"], state["num_conversations"]) == (1, 2, 2)


# -----------------------------------------------------------------------------
# The thread


class Failing(list):
    """Conversations that can be read 19 times."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 20:
            raise KeyError("the disk is gone")
        return super().__getitem__(index)


def prefetch_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_thread_runs_a_little_ahead_and_ends_with_the_loader_or_its_exception():
    loader = conversations(Failing(make_conversations([(5, 1)] * 30)), buffer_size=1)
    assert not prefetch_threads()  # nothing runs before the first batch is requested
    with pytest.raises(KeyError, match="the disk is gone"):
        for number, _ in enumerate(loader, 1):
            assert prefetch_threads() == 1
    assert 15 < number < 20 and not prefetch_threads()
    loader = conversations(make_conversations([(5, 1)] * 30))
    next(loader)
    del loader  # closes it
    assert not prefetch_threads()


def test_process_that_fails_ends_with_its_own_error(tmp_path):
    """The thread runs C++ or Rust code at that moment, which would crash a process that is ending."""
    write_corpus(tmp_path, [1000] * 400, row_group_size=100, shard_size=400)
    program = """
import sys
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as loader
from nanochat.tokenizer import RustBPETokenizer
tokenizer = RustBPETokenizer.train_from_iterator(["some words"], 270)
batches = loader(tokenizer, 32, 2048, "train", device="cpu", source=sys.argv[1])
inputs, targets = next(batches)
raise ZeroDivisionError("in a step")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: in a step\n"), done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_the_gpu_equal_those_on_the_cpu(corpus):
    loader = packed(corpus, B=4, device="cuda")
    busy = torch.ones(2000, 2000, device="cuda")
    for inputs, targets, _ in take(packed(corpus, B=4), 200):
        busy = busy @ busy / 2000
        x, y, _ = next(loader)
        assert x.device.type == y.device.type == "cuda"
        assert torch.equal(x.cpu(), inputs) and torch.equal(y.cpu(), targets)
    loader.close()
