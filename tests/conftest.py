"""What the tests share: a machine without internet, a folder for artifacts, a fake data hub.

Before any test module is imported, the address of the hub is set to a free port of this machine
where nothing listens, so every test starts with the hub down. The fixture `hub` starts the fake
hub on that very port for one test, so that libraries that read the address only once (`datasets`,
`huggingface_hub`) find it, too.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write_text(folder: Path, row_group_size: int) -> None:
    """900 documents of the sample world in three shards, the last of them for validation: enough to train for real."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nanochat.sample_world import documents

    folder.mkdir()
    texts = [text for _, text in zip(range(900), documents())]
    for shard in range(3):
        table = pa.table({"text": texts[shard * 300 : (shard + 1) * 300]})
        pq.write_table(table, folder / f"shard_{shard}.parquet", row_group_size=row_group_size)


def pytest_configure(config) -> None:
    """Hermetic: no public address, no cache or artifacts of the user."""
    config.hub_port = free_port()
    config.scratch = tempfile.mkdtemp(prefix="nanochat_tests_")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "RANK", "LOCAL_RANK", "WORLD_SIZE",
                 "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        os.environ.pop(name, None)
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{config.hub_port}"
    os.environ["NANOCHAT_FILES_URL"] = os.environ["HF_ENDPOINT"] + "/files"
    os.environ["HF_HOME"] = os.path.join(config.scratch, "huggingface")
    os.environ["NANOCHAT_BASE_DIR"] = os.path.join(config.scratch, "nanochat")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    import huggingface_hub.constants  # noqa: F401  # reads the address now, before a test changes it


def pytest_unconfigure(config) -> None:
    shutil.rmtree(config.scratch, ignore_errors=True)


@pytest.fixture
def base_dir(tmp_path, monkeypatch) -> Path:
    """An empty NANOCHAT_BASE_DIR for this test."""
    path = tmp_path / "base"
    path.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def make_random_model():
    """`make_random_model(tokenizer, sequence_len)` returns a small random model that samples mostly letters; its tokens are bytes."""
    import torch

    from nanochat.gpt import GPT, GPTConfig

    def make(tokenizer, sequence_len: int):
        vocab_size = tokenizer.get_vocab_size()
        config = GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=2, n_head=1, n_kv_head=1, n_embd=64)
        torch.manual_seed(0)
        with torch.device("meta"):
            model = GPT(config)
        model.to_empty(device="cpu")
        model.init_weights(torch.float32)
        with torch.no_grad():
            model.lm_head.weight.zero_()  # logits are 0 except for letters, which are far above or below
            model.lm_head.weight[ord("a") : ord("z") + 1].normal_(std=3.0)
        return model.eval()

    return make


@pytest.fixture
def run_ranks():
    """`run_ranks(3, work)` calls `work(compute)` on three ranks that are threads of this process; returns their results in order."""
    from dataclasses import dataclass

    import torch

    from nanochat.common import Compute

    @dataclass(frozen=True)
    class ThreadRank(Compute):
        shared: dict | None = None

        def gather(self, value, group=None):
            self.shared["values"][self.rank] = value
            self.shared["barrier"].wait()
            values = list(self.shared["values"])
            self.shared["barrier"].wait()
            return values

        def sum(self, x):
            return sum(self.gather(x))

        def heartbeat(self):  # a hang time-out would end the test process
            pass

    def run(world_size: int, work):
        shared = {"values": [None] * world_size, "barrier": threading.Barrier(world_size, timeout=60)}
        computes = [ThreadRank(torch.device("cpu"), torch.float32, r, r, world_size, shared=shared) for r in range(world_size)]
        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(work, computes))

    return run


@pytest.fixture
def hub(request):
    """A running fake hub (see fake_hub.py), to which HF_ENDPOINT and NANOCHAT_FILES_URL point."""
    from fake_hub import FakeHub

    server = FakeHub(request.config.hub_port)
    yield server
    server.shutdown()
    server.server_close()
