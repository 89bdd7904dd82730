"""What the tests share: a machine without internet, a folder for artifacts, a fake data hub.

Before any test module is imported, the address of the hub is set to a free port of this machine where nothing listens.
The fixture `hub` starts the fake hub on that very port for one test, since `datasets` reads the address only once.
"""

import os
import shutil
import signal
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(processes) -> list[str]:
    """The outputs of processes that must all succeed."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def write_shard(path: Path, texts, row_group_size: int = 2, column: str = "text") -> None:
    """A parquet file of one column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)


def write_program(path: Path, text: str) -> None:
    """An executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def pytest_configure(config) -> None:
    """Hermetic: no public address, no cache or artifacts of the user."""
    config.hub_port = free_port()
    config.scratch = tempfile.mkdtemp(prefix="nanochat_tests_")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "RANK", "LOCAL_RANK", "WORLD_SIZE",
                 "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        os.environ.pop(name, None)
    address = f"http://127.0.0.1:{config.hub_port}"
    os.environ |= {"HF_ENDPOINT": address, "NANOCHAT_FILES_URL": f"{address}/files", "NO_PROXY": "127.0.0.1,localhost",
                   "no_proxy": "127.0.0.1,localhost", "HF_HOME": f"{config.scratch}/huggingface",
                   "NANOCHAT_BASE_DIR": f"{config.scratch}/nanochat",
                   "NANOCHAT_DTYPE": "float32"}  # the same on every CPU  # fmt: skip
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
def prepared_base(tmp_path_factory) -> Path:
    """A base folder with a tokenizer and 900 documents in three shards in `text`, which no test changes."""
    from nanochat.sample_world import documents
    from scripts import tok_train

    base = tmp_path_factory.mktemp("prepared")
    texts = [text for _, text in zip(range(900), documents())]
    for shard in range(3):
        write_shard(base / "text" / f"shard_{shard}.parquet", texts[shard * 300 : (shard + 1) * 300], row_group_size=25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main([f"--source={base / 'text'}", "--vocab-size=600"])
    return base


@pytest.fixture(scope="module")
def trained_base(prepared_base, tmp_path_factory) -> Path:
    """A copy of `prepared_base` for the models that a test module trains."""
    return shutil.copytree(prepared_base, tmp_path_factory.mktemp("nanochat") / "base")


@pytest.fixture
def restored_signals():
    """The signal handlers that a training script replaces are restored after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def make_random_model():
    """`make_random_model(tokenizer, sequence_len)` returns a small random model that samples mostly letters."""
    import torch
    from tiny import tiny_gpt

    def make(tokenizer, sequence_len: int):
        model = tiny_gpt(noise=0.0, vocab_size=tokenizer.get_vocab_size(), sequence_len=sequence_len)
        with torch.no_grad():
            model.lm_head.weight.zero_()  # logits are 0 except for letters, which are far above or below
            model.lm_head.weight[ord("a") : ord("z") + 1].normal_(std=3.0)
        return model.eval()

    return make


@pytest.fixture
def chat_base(base_dir, make_random_model) -> Path:
    """A base folder with a small model, as base and sft d2 of step 5, that generates letters and never ends a reply."""
    import torch
    from chat_server import TOKENIZER

    from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
    from nanochat.common import Compute

    model, compute = make_random_model(TOKENIZER, sequence_len=4096), Compute(torch.device("cpu"), torch.float32)
    for stage in ("base", "sft"):
        meta = {"model_config": vars(model.config)}
        save_checkpoint(checkpoint_dir(stage, "d2"), 5, model.state_dict(), None, meta, TOKENIZER, compute)
    return base_dir


@pytest.fixture(scope="module")
def site():
    """A server whose model replies by a word of the prompt, see REPLIES; "hello" to other prompts."""
    from chat_server import REPLIES, ScriptedEngine, serving

    def reply(prompt):
        return next((text for word, text in REPLIES.items() if word in prompt), "hello")

    with serving(ScriptedEngine(reply)) as site:
        yield site


@pytest.fixture(scope="module")
def client(site):
    """OpenAI's Python client of `site`."""
    return site.openai


@pytest.fixture
def run_ranks():
    """`run_ranks(3, work)` returns the results of `work(compute)` on three ranks, which are threads of this process."""
    from dataclasses import dataclass

    import torch

    from nanochat.common import Compute

    @dataclass(frozen=True)
    class ThreadRank(Compute):
        values: list | None = None  # shared by all ranks
        barrier: threading.Barrier | None = None

        def gather(self, value, group=None):
            self.values[self.rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        def sum(self, x):
            return sum(self.gather(x))

        def heartbeat(self):  # a hang time-out would end the test process
            pass

    def run(world_size: int, work):
        shared = world_size, [None] * world_size, threading.Barrier(world_size, timeout=60)
        computes = [ThreadRank(torch.device("cpu"), torch.float32, rank, rank, *shared) for rank in range(world_size)]
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
