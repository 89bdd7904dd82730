"""The loaders: any number of ranks, exact resume, the thread that runs ahead. test_packing.py tests the rows."""

import json
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_packing import conversations, make_conversations, packed, stream, take, write_corpus

from nanochat import dataloader
from nanochat.common import UserError

LENGTHS = [3, 14, 5, 2, 9, 9, 1, 6, 30, 4, 8, 2, 2, 11, 7, 3, 5, 13, 2, 6, 40, 3, 3, 10, 5]
SHAPES = [(30, 3), (5, 2), (1, 1), (8, 0), (17, 16), (4, 1), (25, 24), (9, 2), (6, 5), (3, 2), (12, 1)]
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 3))  # rows of a micro-batch, ranks


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
    (tmp_path / "002.parquet").rename(tmp_path / "002b.parquet")
    refused(packed, tmp_path, state, "002.parquet has changed from 5 to no rows since the checkpoint")
    (tmp_path / "002b.parquet").rename(tmp_path / "003.parquet")  # now the shard of validation is one for training
    write_corpus(tmp_path, LENGTHS)
    for damage in ({"next": "x"}, {"next": [1]}, {"buffer": [[1, 99, 0, 0, 0]]}, {"buffer": [[1]]}, {"shards": 7}):
        refused(packed, tmp_path, take(packed(tmp_path), 1)[0][2] | damage, "loader state is damaged")
    state = take(conversations(make_conversations(SHAPES)), 1)[0][2]
    shorter = make_conversations([(1, 1)] * len(SHAPES))
    refused(conversations, shorter[:3], state, "changed from 11 to 3 rows since the checkpoint was saved")
    refused(conversations, shorter, state, "is shorter than when this run read it")


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
