"""Two nodes on one machine: two torchrun agents that find each other on loopback train as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import free_port

ROOT = Path(__file__).parent.parent
FLAGS = ["--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=2", "--total-batch-size=512",
         "--num-iterations=6", "--core-metric-every=-1", "--eval-every=3", "--eval-tokens=512", "--save-every=-1", "--sample-every=-1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A base folder with text and a tokenizer; gives the folder of the text."""
    from nanochat.sample_world import documents
    from scripts import tok_train

    base = tmp_path_factory.mktemp("nanochat")
    folder = base / "text"
    folder.mkdir()
    texts = [text for _, text in zip(range(300), documents())]
    for shard in range(3):
        pq.write_table(pa.table({"text": texts[shard * 100 : (shard + 1) * 100]}), folder / f"shard_{shard}.parquet", row_group_size=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main([f"--source={folder}", "--vocab-size=600"])
    return folder


def start(launcher, source, tag, **more):
    """base_train under a launcher, on a CPU and uncompiled; all runs share one base folder, as nodes do."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(source.parent), "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", **more}
    command = [*launcher, "-m", "scripts.base_train", *FLAGS, "--device-type=cpu", f"--source={source}", f"--model-tag={tag}"]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes):
    """The outputs of processes that must all end well."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def curve(source, tag):
    lines = (source.parent / "base_checkpoints" / tag / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return [(line["step"], name, line[name]) for line in metrics for name in ("raw_loss", "val_bpb") if name in line]


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options]


@pytest.fixture(scope="module")
def alone(source):
    """The curve of one rank, which accumulates four micro-batches."""
    finish([start([sys.executable], source, "alone")])
    seen = curve(source, "alone")
    assert [step for step, name, _ in seen if name == "raw_loss"] == [1, 2, 3, 4, 5, 6]
    return seen


def two_nodes(name):
    return torchrun("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-id={name}",
                    f"--rdzv-endpoint=127.0.0.1:{free_port()}")


def assert_same_curve(one, other):
    assert [point[:2] for point in one] == [point[:2] for point in other]
    assert [value for _, _, value in one] == pytest.approx([value for _, _, value in other], rel=1e-5)


def test_two_nodes_train_as_one_rank_does(source, alone):
    launcher = two_nodes("together")
    outputs = finish([start(launcher, source, "nodes") for _ in range(2)])
    assert sum("saved step 6" in output for output in outputs) == 1, "one rank of all writes and tells"
    saved = sorted(path.name for path in (source.parent / "base_checkpoints/nodes/step_000006").iterdir())
    assert saved == ["meta.json", "model.safetensors", "optimizer_rank0.safetensors", "optimizer_rank1.safetensors"]
    assert_same_curve(curve(source, "nodes"), alone)


def test_two_ranks_of_one_node_train_as_one_rank_does(source, alone):
    finish([start(torchrun("--standalone", "--nproc-per-node=2"), source, "node")])
    assert_same_curve(curve(source, "node"), alone)


@pytest.mark.slow
def test_ranks_among_which_the_micro_batches_do_not_come_out_even(source, alone):
    """Four micro-batches on three ranks: one has two of them."""
    finish([start(torchrun("--standalone", "--nproc-per-node=3"), source, "uneven")])
    assert_same_curve(curve(source, "uneven"), alone)


@pytest.mark.slow
def test_a_node_with_a_base_folder_of_its_own_is_told_so(source, tmp_path):
    launcher = two_nodes("apart")
    nodes = [start(launcher, source, "apart"), start(launcher, source, "apart", NANOCHAT_BASE_DIR=str(tmp_path))]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "NANOCHAT_BASE_DIR" in "".join(outputs) and "one folder that all nodes share" in "".join(outputs)
