"""The loaders against brute force: packing, lanes, exact resume, every supervised token once per epoch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
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

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import conversation_data_loader

BOS = 0
PACKED = dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit
STREAM = dataloader.tokenizing_distributed_data_loader_with_state


class WordTokenizer:
    """One token per word, and words are numbers. Conversations come as (ids, mask) already."""

    def get_bos_token_id(self):
        return BOS

    def encode_to_numpy(self, texts, num_threads=8):
        rows = [[int(word) for word in text.split()] for text in texts]
        return np.array([id for ids in rows for id in ids], np.uint16), np.cumsum([0, *map(len, rows)])

    def render_conversation(self, conversation, max_tokens=2048):
        assert max_tokens is None
        return conversation


def write_corpus(folder: Path, lengths: list[int], row_group_size: int = 4, shard_size: int = 10) -> list[list[int]]:
    """Document i has `lengths[i]` tokens, bos included, that no other has. Returns their ids, and adds a val shard."""
    documents, word = [], 1
    for length in lengths:
        documents.append(list(range(word, word + length - 1)))
        word += length - 1
    shards = [documents[i : i + shard_size] for i in range(0, len(documents), shard_size)] + [[[7, 7, 7]]]
    for number, shard in enumerate(shards):
        table = pa.table({"text": [" ".join(map(str, ids)) for ids in shard]})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=row_group_size)
    return [[BOS, *ids] for ids in documents]


def batches(loader_function, folder, n, B=2, T=8, split="train", resume=None, tokenizer=WordTokenizer(), **kwargs):
    kwargs = dict(device="cpu", resume_state_dict=resume, source=str(folder), **kwargs)
    loader = loader_function(tokenizer, B, T, split, **kwargs)
    taken = list(islice(loader, n))
    loader.close()
    return taken


def same(some, others) -> bool:
    return len(some) == len(others) and all(
        torch.equal(x, u) and torch.equal(y, v) and s == t for (x, y, s), (u, v, t) in zip(some, others)
    )


def rows_of(taken) -> list[list[int]]:
    """The rows of T + 1 tokens behind (inputs, targets)."""
    rows = []
    for inputs, targets, _ in taken:
        assert inputs.dtype == torch.int32 and targets.dtype == torch.int64
        assert inputs.shape == targets.shape
        assert torch.equal(inputs[:, 1:].long(), targets[:, :-1])
        rows += [[first, *rest] for first, rest in zip(inputs[:, 0].tolist(), targets.tolist())]
    return rows


# -----------------------------------------------------------------------------
# Pretraining


def brute_force_rows(documents, n, T, buffer_size, at_a_time):
    """The rule, the slow way: lists, searched from the front."""
    texts = [ids for ids in documents if len(ids) > 1]
    chunks = [texts[i : i + at_a_time] for i in range(0, len(texts), at_a_time)]
    buffer, read, rows = [], 0, []  # buffer: (epoch, ids), in the order of waiting
    for _ in range(n):
        row = []
        while len(row) < T:
            if len(buffer) < buffer_size and (not buffer or read // len(chunks) <= min(epoch for epoch, _ in buffer) + 1):
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
def test_packed_rows_are_those_of_brute_force(lengths, T, B, buffer_size, at_a_time, row_group_size):
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), lengths, row_group_size)
        taken = batches(PACKED, folder, 12, B, T, tokenizer_batch_size=at_a_time, buffer_size=buffer_size)
    rows = rows_of(taken)
    assert rows == brute_force_rows(documents, 12 * B, T, buffer_size, at_a_time)
    assert all(row[0] == BOS for row in rows)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 12), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5))
def test_the_pieces_of_a_document_joined_in_their_order_are_the_document(lengths, T, B, buffer_size, at_a_time):
    """No token is lost or seen twice, none is padding, and each piece begins with bos."""
    shard_size, row_group_size = 10, 4
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), lengths, row_group_size, shard_size)
        taken = batches(PACKED, folder, 15, B, T, tokenizer_batch_size=at_a_time, buffer_size=buffer_size)
    where = {token: (d, i) for d, ids in enumerate(documents) for i, token in enumerate(ids[1:])}
    begun = Counter()  # (document, how many of its tokens were seen) -> how often; several epochs may be under way
    for row in rows_of(taken):
        bos = [i for i, token in enumerate(row) if token == BOS] + [len(row)]
        for start, end in zip(bos, bos[1:]):
            piece = [where[token] for token in row[start + 1 : end]]
            if not piece:
                assert end == len(row)
                continue
            (d, first), (_, last) = piece[0], piece[-1]
            assert piece == [(d, i) for i in range(first, last + 1)]
            begun[d, first] -= first > 0
            begun[d, last + 1] += 1
            assert begun[d, first] >= 0
    stream = taken[-1][2]["streams"]["0"]
    epoch, *place = stream["next"]
    waiting = Counter()
    for _, shard, group, row, start in stream["buffer"]:
        waiting[shard * shard_size + group * row_group_size + row, start] += 1
    for d, ids in enumerate(documents):
        shard, row = divmod(d, shard_size)
        read = epoch - 1 + ([shard, *divmod(row, row_group_size)] < place) if len(ids) > 1 else 0
        under_way = {start: n for (other, start), n in waiting.items() if other == d}
        assert {i: n for (other, i), n in begun.items() if other == d and 0 < i < len(ids) - 1 and n} == {
            start: n for start, n in under_way.items() if start
        }
        assert begun[d, len(ids) - 1] == read - sum(under_way.values()) or not read


@settings(max_examples=25, deadline=None)
@given(corpora, st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
def test_the_plain_stream_loses_no_token(lengths, T, B, at_a_time):
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), lengths)
        taken = batches(STREAM, folder, 12, B, T, tokenizer_batch_size=at_a_time)
    once = [token for ids in documents if len(ids) > 1 for token in ids]
    endless = once * (12 * B * T // len(once) + 2)
    for i, (inputs, targets, _) in enumerate(taken):
        assert inputs.flatten().tolist() == endless[i * B * T : (i + 1) * B * T]
        assert targets.flatten().tolist() == endless[i * B * T + 1 : (i + 1) * B * T + 1]


LENGTHS = [3, 14, 5, 2, 9, 9, 1, 6, 30, 4, 8, 2, 2, 11, 7, 3, 5, 13, 2, 6, 40, 3, 3, 10, 5]


@pytest.mark.parametrize("loader_function", [PACKED, STREAM])
@pytest.mark.parametrize("rank, world_size, lanes", [(0, 1, None), (1, 3, None), (0, 2, 3)])
@pytest.mark.parametrize("buffer_size", [1, 6, 1000])
def test_resume_is_exact_at_every_point(tmp_path, loader_function, rank, world_size, lanes, buffer_size):
    write_corpus(tmp_path, LENGTHS)
    kwargs = dict(rank=rank, world_size=world_size, lanes=lanes, buffer_size=buffer_size, tokenizer_batch_size=3)
    uninterrupted = batches(loader_function, tmp_path, 40, **kwargs)
    assert uninterrupted[-1][2]["epoch"] > 2
    for stop in range(1, 36):
        state = json.loads(json.dumps(uninterrupted[stop - 1][2]))
        assert state == uninterrupted[stop - 1][2]
        assert same(batches(loader_function, tmp_path, 4, resume=state, **kwargs), uninterrupted[stop : stop + 4])


def test_a_state_of_documents_none_of_which_was_cut_may_be_of_an_older_version(tmp_path):
    write_corpus(tmp_path, LENGTHS)
    state = batches(PACKED, tmp_path, 3)[-1][2]
    older = json.loads(json.dumps(state))
    for entry in (stream := state["streams"]["0"])["buffer"]:
        entry[4] = 0
    older["streams"]["0"]["buffer"] = [entry[:4] for entry in stream["buffer"]]  # they had no fifth number
    assert len(stream["buffer"]) > 5
    assert same(batches(PACKED, tmp_path, 9, resume=older), batches(PACKED, tmp_path, 9, resume=state))


def test_a_document_of_many_rows_neither_stops_the_others_nor_grows_the_state(tmp_path):
    documents = write_corpus(tmp_path, [5, 4000, *[5 + i % 9 for i in range(300)]], shard_size=400)
    taken = batches(PACKED, tmp_path, 60, B=2, T=8, buffer_size=10, tokenizer_batch_size=5)
    rows = rows_of(taken)
    of_the_long = [row for row in rows if row[1] in documents[1]]
    assert 5 <= len(of_the_long) < 30
    joined = [token for row in of_the_long for token in row if token in documents[1][1:]]
    assert joined == documents[1][1 : len(joined) + 1]
    *_, (_, _, state) = taken
    assert len(state["streams"]["0"]["buffer"]) < 15
    assert [1, 0, 0, 1, len(joined)] in state["streams"]["0"]["buffer"]


def test_fewer_documents_wait_where_they_are_long(tmp_path, monkeypatch):
    write_corpus(tmp_path, [100] * 60)
    monkeypatch.setattr(dataloader, "LONG", 20)
    monkeypatch.setattr(dataloader, "FEW", 3)
    *_, (_, _, state) = batches(PACKED, tmp_path, 20, buffer_size=30, tokenizer_batch_size=1)
    waiting = state["streams"]["0"]["buffer"]
    assert 6 <= len(waiting) <= 15 and sum(100 - start for *_, start in waiting) <= 30 * 20 + 100


def test_a_document_larger_than_all_that_may_wait_shares_its_batches(tmp_path, monkeypatch):
    documents = write_corpus(tmp_path, [5, 4000, *[5 + i % 9 for i in range(300)]], shard_size=400)
    monkeypatch.setattr(dataloader, "LONG", 20)
    taken = batches(PACKED, tmp_path, 60, B=4, T=8, buffer_size=100, tokenizer_batch_size=5)
    for inputs, _, _ in taken[1:]:
        assert sum(row[1] in documents[1] for row in inputs.tolist()) < 4


@pytest.mark.parametrize("buffer_size", [1, 6, 1000])
def test_no_document_waits_for_ever(tmp_path, buffer_size):
    write_corpus(tmp_path, LENGTHS * 4)
    taken = batches(PACKED, tmp_path, 300, B=1, T=8, buffer_size=buffer_size, tokenizer_batch_size=4)
    buffers = [state["streams"]["0"]["buffer"] for _, _, state in taken]
    waited = Counter(tuple(place) for buffer in buffers for place in buffer)
    assert len(waited) > 100
    assert max(waited.values()) <= max(map(len, buffers))
    for (_, _, state), buffer in zip(taken, buffers):  # documents of at most two epochs wait while the next is read
        assert all(state["epoch"] - epoch <= 2 for epoch, *_ in buffer)


@pytest.mark.parametrize("row_group_size", [1, 4])
def test_ranks_share_the_documents_without_overlap(tmp_path, row_group_size):
    documents = write_corpus(tmp_path, LENGTHS, row_group_size)
    total = sum(map(len, documents))
    seen = Counter()
    for rank in range(3):
        taken = batches(STREAM, tmp_path, total, B=1, T=1, rank=rank, world_size=3)
        first_epoch = [x.item() for x, _, state in taken if state["epoch"] == 1]
        assert first_epoch
        seen.update(token for token in first_epoch if token != BOS)
    # A state's epoch is that of the token after the batch, so each rank's last token counts as the second's.
    missing = {token for ids in documents for token in ids[1:]} - set(seen)
    assert len(missing) <= 3
    assert set(seen.values()) == {1}


def test_the_names_without_state_give_the_same_batches(tmp_path):
    write_corpus(tmp_path, LENGTHS)
    for plain, stateful in [
        (dataloader.tokenizing_distributed_data_loader_bos_bestfit, PACKED),
        (dataloader.tokenizing_distributed_data_loader, STREAM),
    ]:
        pairs = batches(plain, tmp_path, 5)
        assert all(len(pair) == 2 for pair in pairs)
        assert same([(*pair, None) for pair in pairs], [(x, y, None) for x, y, _ in batches(stateful, tmp_path, 5)])


def test_validation_reads_the_last_shard_and_repeats_it(tmp_path):
    write_corpus(tmp_path, LENGTHS)
    taken = batches(PACKED, tmp_path, 3, split="val", T=7)
    assert rows_of(taken) == [[BOS, 7, 7, 7, BOS, 7, 7, 7]] * 6
    assert taken[-1][2]["epoch"] > 1


@pytest.mark.parametrize("loader_function", [PACKED, STREAM])
def test_too_little_data_is_a_plain_error(tmp_path, loader_function):
    write_corpus(tmp_path, [1, 1, 1])
    for world_size in (1, 2):
        with pytest.raises(UserError, match="no document with text in 1 shard"):
            batches(loader_function, tmp_path, 1, rank=0, world_size=world_size)
    assert batches(loader_function, tmp_path, 1, split="val", rank=1, world_size=2), "one document is enough for two lanes"
    (tmp_path / "000.parquet").unlink()
    with pytest.raises(UserError, match="nothing to train on"):  # at once, not at the first batch
        loader_function(WordTokenizer(), 1, 8, "train", device="cpu", source=str(tmp_path))


def test_a_resume_on_other_data_is_a_plain_error(tmp_path):
    write_corpus(tmp_path, LENGTHS)
    state = batches(PACKED, tmp_path, 3)[-1][2]
    write_corpus(tmp_path, [5, 5], row_group_size=1)
    with pytest.raises(UserError, match="the data has changed: document . in row group . of shard .*Put the shards back"):
        batches(PACKED, tmp_path, 1, resume=state)
    write_corpus(tmp_path, [2] * len(LENGTHS))
    with pytest.raises(UserError, match="the data has changed: .* is shorter than when this run read it"):
        batches(PACKED, tmp_path, 1, resume=state)


# -----------------------------------------------------------------------------
# Conversations


def make_conversations(shapes: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """(tokens, every how many of them is the assistant's; 0: none) -> ids that no other has, and the mask."""
    made, first = [], 1
    for length, every in shapes:
        made.append((list(range(first, first + length)), [int(every > 0 and i % every == 0) for i in range(length)]))
        first += length
    return made


def conversation_batches(conversations, n, B, T, supervise="assistant", resume=None, **kwargs):
    loader = conversation_data_loader(
        conversations, WordTokenizer(), B, T, supervise=supervise, device="cpu", resume_state_dict=resume, **kwargs
    )
    taken = list(islice(loader, n))
    loader.close()
    return taken


def supervised(conversations, supervise) -> Counter:
    """(input, target) of everything that must be trained on, once each."""
    return Counter(
        (ids[i], ids[i + 1])
        for ids, mask in conversations
        for i in range(len(ids) - 1)
        if supervise == "all" or mask[i + 1]
    )


def trained(inputs, targets) -> Counter:
    return Counter((x, y) for x, y in zip(inputs.flatten().tolist(), targets.flatten().tolist()) if y != -1)


chats = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(chats, st.integers(1, 9), st.integers(1, 3), st.integers(1, 20), st.booleans(), st.integers(1, 2))
def test_every_supervised_token_is_trained_on_once_per_epoch(shapes, T, B, buffer_size, all_tokens, world_size):
    supervise = "all" if all_tokens else "assistant"
    conversations = make_conversations(shapes)
    expected = supervised(conversations, supervise)
    trained_on = {1: Counter(), 2: Counter()}
    for rank in range(world_size):
        kwargs = dict(supervise=supervise, buffer_size=buffer_size, rank=rank, world_size=world_size)
        loader = conversation_data_loader(conversations, WordTokenizer(), 1, T, device="cpu", **kwargs)
        rows = []
        shares = [len(range((rank - epoch) % world_size, len(conversations), world_size)) for epoch in range(1, 100)]
        try:
            for inputs, targets, state in loader:  # rows one by one; none holds pieces of two epochs
                assert inputs.shape == targets.shape == (1, T)
                assert (targets != -1).any()
                assert inputs[targets == -1].ge(0).all()
                padding = (inputs == BOS).squeeze(0)
                assert (targets.squeeze(0)[padding] == -1).all() and padding.tolist() == sorted(padding.tolist())
                epoch = state["epoch"]
                assert sum(shares[: epoch - 1]) <= state["finished"] <= sum(shares[:epoch])
                if epoch > 2:
                    break
                rows.append((inputs, targets))
                trained_on[epoch] += trained(inputs, targets)
        except UserError as error:
            assert "none of the" in str(error) and not expected
            continue
        finally:
            loader.close()
        # Larger batches hold the same rows in the same order: an epoch's end is followed by the next's rows.
        taken = conversation_batches(conversations, len(rows) // B, B, T, **kwargs)
        together = [pair for inputs, targets, _ in taken for pair in zip(inputs.split(1), targets.split(1))]
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(together, rows))
    if expected:
        assert trained_on == {1: expected, 2: expected}


SHAPES = [(30, 3), (5, 2), (1, 1), (8, 0), (17, 16), (4, 1), (25, 24), (9, 2), (6, 5), (3, 2), (12, 1)]


@pytest.mark.parametrize("supervise", ["assistant", "all"])
@pytest.mark.parametrize("rank, world_size, lanes", [(0, 1, None), (1, 2, None), (0, 2, 3)])
@pytest.mark.parametrize("buffer_size", [1, 4, 256])
def test_conversations_resume_exactly_at_every_point(supervise, rank, world_size, lanes, buffer_size):
    conversations = make_conversations(SHAPES)
    kwargs = dict(B=2, T=7, supervise=supervise, rank=rank, world_size=world_size, lanes=lanes, buffer_size=buffer_size)
    uninterrupted = conversation_batches(conversations, 40, **kwargs)
    assert uninterrupted[-1][2]["epoch"] > 2
    for stop in range(1, 36):
        state = json.loads(json.dumps(uninterrupted[stop - 1][2]))
        assert same(conversation_batches(conversations, 4, resume=state, **kwargs), uninterrupted[stop : stop + 4])


def test_epochs_differ_in_order_and_a_seed_repeats_it():
    def order(seed):
        taken = conversation_batches(make_conversations([(2, 1)] * 9), 18, B=1, T=1, seed=seed)
        return [x.item() for x, _, _ in taken]

    assert order(1) == order(1) != order(2)
    assert order(1)[:9] != order(1)[9:]
    assert sorted(order(1)[:9]) == sorted(order(1)[9:]) == list(range(1, 18, 2))


def test_a_conversation_longer_than_a_row_is_in_consecutive_rows():
    (inputs, targets, _), *_ = conversation_batches(make_conversations([(11, 1)]), 1, B=3, T=4)
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, BOS, BOS]]
    assert targets.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, -1, -1]]


def test_pieces_with_nothing_to_learn_are_counted_not_trained_on():
    conversations = make_conversations([(9, 8), (8, 0)])  # the only supervised target is the ninth token of the first
    (inputs, targets, state), *_ = conversation_batches(conversations, 1, B=1, T=4)
    assert (inputs.tolist(), targets.tolist()) == ([[5, 6, 7, 8]], [[-1, -1, -1, 9]])
    assert state["skipped"] == 1 + 2
    assert (state["epoch"], state["finished"], state["num_conversations"]) == (1, 2, 2)


def test_conversations_without_a_supervised_token_are_a_plain_error():
    for world_size in (1, 3):
        with pytest.raises(UserError, match="none of the 2 conversations has a token that is supervised"):
            conversation_batches(make_conversations([(8, 0), (1, 1)]), 1, B=1, T=4, rank=0, world_size=world_size)
    assert conversation_batches(make_conversations([(8, 1)]), 1, B=1, T=4, rank=1, world_size=2)


def test_real_conversations_with_a_short_context_lose_no_word_of_the_assistant():
    from nanochat.tokenizer import RustBPETokenizer

    tokenizer = RustBPETokenizer.train_from_iterator(["the answer is a long one, and so on"], 256 + 9)
    answers = ["yes", "a long answer " * 30, [{"type": "text", "text": "so "}, {"type": "python", "text": "1+1"},
                                              {"type": "python_output", "text": "2"}, {"type": "text", "text": "!"}]]
    conversations = [
        {"messages": [{"role": "user", "content": "a question " * n}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers, start=1)
    ]
    loader = conversation_data_loader(conversations, tokenizer, 1, 16, supervise="assistant", device="cpu")
    learnt, state = Counter(), {"finished": 0}
    while state["finished"] < len(conversations):
        _, targets, state = next(loader)
        learnt.update(targets[targets != -1].tolist())
    loader.close()
    names = ("assistant_end", "python_start", "python_end")
    end, start, close = (tokenizer.encode_special(f"<|{name}|>") for name in names)
    spoken = ["yes", "a long answer " * 30, "so ", "1+1", "!"]
    assert learnt == Counter([id for text in spoken for id in tokenizer.encode(text)] + 3 * [end] + [start, close])


def test_a_resume_on_another_data_set_is_a_plain_error():
    conversations = make_conversations(SHAPES)
    state = conversation_batches(conversations, 1, B=1, T=4)[0][2]
    with pytest.raises(UserError, match="3 conversations now, 11 when the checkpoint was saved"):
        conversation_batches(conversations[:3], 1, B=1, T=4, resume=state)


# -----------------------------------------------------------------------------
# The thread


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_held_at_the_same_time_are_tensors_of_their_own(tmp_path):
    write_corpus(tmp_path, LENGTHS)
    for taken in (batches(PACKED, tmp_path, 12), conversation_batches(make_conversations(SHAPES), 12, B=2, T=7)):
        assert len({x.untyped_storage().data_ptr() for pair in taken for x in pair[:2]}) == 24


def test_the_thread_runs_ahead_a_little_and_ends_when_the_loader_is_closed(tmp_path):
    write_corpus(tmp_path, LENGTHS)
    before = len(prefetch_threads())
    encoded = []

    class Counting(WordTokenizer):
        def encode_to_numpy(self, texts, **kwargs):
            encoded.extend(texts)
            return super().encode_to_numpy(texts, **kwargs)

    kwargs = dict(device="cpu", source=str(tmp_path), buffer_size=1, tokenizer_batch_size=1)
    loader = STREAM(Counting(), 1, 4, "train", **kwargs)
    assert len(prefetch_threads()) == before  # nothing runs before the first batch is wanted
    next(loader)
    assert len(prefetch_threads()) == before + 1
    size = -1
    while size != len(encoded):  # until it waits
        size = len(encoded)
        time.sleep(0.05)
    assert size < len(LENGTHS)
    loader.close()
    assert len(prefetch_threads()) == before
    loader = dataloader.tokenizing_distributed_data_loader(Counting(), 1, 4, "train", **kwargs)
    next(loader)
    del loader
    assert len(prefetch_threads()) == before


def test_an_exception_in_the_thread_is_raised_where_the_batch_is_wanted():
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise KeyError("the disk is gone")

    before = len(prefetch_threads())
    loader = conversation_data_loader(Broken(), WordTokenizer(), 1, 4, supervise="all", device="cpu")
    with pytest.raises(KeyError, match="the disk is gone"):
        next(loader)
    assert len(prefetch_threads()) == before


def test_a_step_that_fails_ends_the_process_with_its_own_error(tmp_path):
    """The thread is at work in C++ or Rust then, where it must not be when the interpreter ends."""
    write_corpus(tmp_path, [1000] * 400, row_group_size=100, shard_size=400)
    program = """
import sys
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as loader
from nanochat.tokenizer import RustBPETokenizer
tokenizer = RustBPETokenizer.train_from_iterator(["some words"], 270)
batches = loader(tokenizer, 32, 2048, "train", device="cpu", source=sys.argv[1])
next(batches)
raise ZeroDivisionError("in a step")
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: in a step\n"), done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu_as_they_are_on_the_cpu(tmp_path):
    write_corpus(tmp_path, LENGTHS)
    expected = batches(PACKED, tmp_path, 200, B=4, T=8)
    loader = PACKED(WordTokenizer(), 4, 8, "train", device="cuda", source=str(tmp_path))
    busy = torch.ones(2000, 2000, device="cuda")
    for inputs, targets, _ in expected:
        busy = busy @ busy / 2000
        x, y, _ = next(loader)
        assert x.device.type == y.device.type == "cuda"
        assert torch.equal(x.cpu(), inputs) and torch.equal(y.cpu(), targets)
    loader.close()
