"""Many ranks compute what one does: every stage under torchrun, two nodes on one machine, resume on another world size."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import free_port, write_text
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SIZE = ["--device-batch-size=4", "--eval-tokens=1024", "--eval-every=10", "--num-iterations=20"]
BASE = ["--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--core-metric-every=-1", "--sample-every=0", *SIZE]
CHAT = ["--tasks=SampleWorld", *SIZE]
RL = ["--task=SampleArithmetic", "--examples-per-step=7", "--num-samples=4", "--max-new-tokens=24", "--num-iterations=6",
      "--eval-every=3", "--eval-examples=7", "--eval-samples=2", "--device-type=cpu", "--device-batch-size=4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The text folder of a base folder that has text and a tokenizer."""
    from scripts import tok_train

    base = tmp_path_factory.mktemp("nanochat")
    folder = base / "text"
    write_text(folder, row_group_size=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main([f"--source={folder}", "--vocab-size=600"])
    return folder


def start(launcher, source, command, **more):
    """Start a process on the CPU, without the compiler, with one thread per rank; all processes share a base folder, as nodes do."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(source.parent), "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(ROOT), **more}  # fmt: skip
    two_cores = sorted(os.sched_getaffinity(0))[:2]
    return subprocess.Popen(
        [*launcher, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, two_cores),
    )  # fmt: skip


def base_train(source, tag, *flags):
    return ["-m", "scripts.base_train", *BASE, "--device-type=cpu", f"--source={source}", f"--model-tag={tag}", *flags]


def finish(processes):
    """The outputs of processes that must all succeed."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def curve(source, tag, folder="base_checkpoints"):
    """(step, name, value) of every training loss and every evaluation."""
    lines = (source.parent / folder / tag / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return [(line["step"], name, line[name]) for line in metrics for name in ("raw_loss", "val_bpb") if name in line]


def assert_same_curve(one, other, steps=20):
    assert [point[:2] for point in one] == [point[:2] for point in other]
    assert [step for step, name, _ in one if name == "raw_loss"] == list(range(1, steps + 1))
    assert [value for _, _, value in one] == pytest.approx([value for _, _, value in other], rel=1e-5)


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options]


def two_nodes(name):
    return torchrun("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-id={name}",
                    f"--rdzv-endpoint=127.0.0.1:{free_port()}")


# One stage in a process, with a reward that an untrained model can get
STAGE = """
import importlib, sys
from tasks.sample_world import SampleWorld
SampleWorld.reward = lambda task, conversation, completion: float(len(completion) % 2)
importlib.import_module(f"scripts.{sys.argv[1]}").main(sys.argv[2:])
"""


def test_every_stage_has_the_same_curve_on_three_ranks_as_on_one(source, tmp_path):
    """20 steps of three micro-batches and their evaluations agree within 1e-5; then six steps of reinforcement learning."""
    stage = tmp_path / "stage.py"
    stage.write_text(STAGE)
    batch = ["--total-batch-size=768", "--device-type=cpu"]
    commands = [
        ["base_train", *BASE, *batch, f"--source={source}"], ["mid_train", *CHAT, *batch], ["chat_sft", *CHAT, *batch], ["chat_rl", *RL],
        ["chat_eval", "-i", "rl", "-a", "SampleWorld", "-x", "7", "-m", "8"],
    ]  # fmt: skip
    launchers = {"alone": [sys.executable], "three": torchrun("--standalone", "--nproc-per-node=3")}
    for name, *flags in commands:
        tag = "-g" if name == "chat_eval" else "--model-tag"
        outputs = finish([start(launcher, source, [str(stage), name, *flags, tag, run]) for run, launcher in launchers.items()])
    answers = [re.search(r"SampleWorld .*problems.*", output)[0] for output in outputs]
    for folder in ("base_checkpoints", "mid_checkpoints", "chatsft_checkpoints"):
        assert_same_curve(curve(source, "three", folder), curve(source, "alone", folder))
    assert answers[0] == answers[1]
    alone, three = (
        [json.loads(line) for line in (source.parent / "chatrl_checkpoints" / tag / "metrics.jsonl").read_text().splitlines()]
        for tag in ("alone", "three")
    )
    assert len(alone) == 6 + 3 and sum(line.get("reward", 0) for line in alone) > 0
    for one, other in zip(alone, three, strict=True):
        for name in ("step", "reward", "length", "truncated", "nonzero_groups", "accuracy", "pass@2", "pass@2_ci"):
            assert one.get(name) == pytest.approx(other.get(name)), name
        assert one.get("raw_loss") == pytest.approx(other.get("raw_loss"), abs=1e-5)


@pytest.fixture(scope="module")
def one(source):
    """The curve of one rank that accumulates two micro-batches."""
    finish([start([sys.executable], source, base_train(source, "one", "--total-batch-size=512"))])
    return curve(source, "one")


def test_two_nodes_have_the_same_curve_as_one_rank(source, one):
    launcher = two_nodes("together")
    outputs = finish([start(launcher, source, base_train(source, "nodes", "--total-batch-size=512")) for _ in range(2)])
    assert sum("saved step 20" in output for output in outputs) == 1, "only one rank writes and prints"
    saved = sorted(path.name for path in (source.parent / "base_checkpoints/nodes/step_000020").iterdir())
    assert saved == ["meta.json", "model.safetensors", "optimizer_rank0.safetensors", "optimizer_rank1.safetensors", "vocabulary.json"]
    assert_same_curve(curve(source, "nodes"), one)


def test_a_job_that_loses_a_rank_resumes_by_itself(source, one):
    """torchrun restarts all ranks, and they resume from what this job has saved, not from an earlier run's checkpoints."""
    stale = source.parent / "base_checkpoints" / "restarted"
    shutil.copytree(source.parent / "base_checkpoints" / "one", stale)
    launcher = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    job = start(launcher, source, base_train(source, "restarted", "--total-batch-size=512", "--save-every=4"))
    seen = []
    for line in job.stdout:
        seen.append(line)
        if line.startswith("saved step 8 "):
            ranks = [child for child in psutil.Process(job.pid).children() if child.environ().get("RANK") == "1"]
            ranks[0].kill()
    assert job.wait(60) == 0, "".join(seen)
    resumed = [int(match[1]) for match in re.finditer(r"resumed from step (\d+)", "".join(seen))]
    assert len(resumed) == 1 and 8 <= resumed[0] < 20
    assert curve(source, "restarted") == one, "bit for bit, with as many ranks as micro-batches"


def test_resume_on_another_world_size_is_exact(source):
    """One rank, then three (four micro-batches are shared unevenly), then one: the same curve as one rank throughout."""
    flags = ["--device-batch-size=2", "--total-batch-size=512", "--num-iterations=12", "--save-every=4", "--eval-every=4"]
    finish([start([sys.executable], source, base_train(source, "steady", *flags))])
    moving = source.parent / "base_checkpoints" / "moving"
    shutil.copytree(moving.with_name("steady"), moving)
    for ranks, removed in ((3, [8, 12]), (1, [12])):
        for step in removed:
            shutil.rmtree(moving / f"step_{step:06d}")
        launcher = [sys.executable] if ranks == 1 else torchrun("--standalone", f"--nproc-per-node={ranks}")
        finish([start(launcher, source, base_train(source, "moving", *flags, "--resume-from-step=latest"))])
    assert_same_curve(curve(source, "moving"), curve(source, "steady"), steps=12)
    one, other = (load_file(path / "step_000012" / "model.safetensors") for path in (moving, moving.with_name("steady")))
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-2 * other[name].norm(), name
    states = [json.loads((path / "step_000012/meta.json").read_text())["loader_state"] for path in (moving, moving.with_name("steady"))]
    assert states[0] == states[1], "the same place in the data"


@pytest.mark.slow
def test_nodes_that_do_not_share_the_base_folder_are_a_user_error(source, tmp_path):
    launcher = two_nodes("apart")
    command = base_train(source, "apart", "--total-batch-size=512")
    nodes = [start(launcher, source, command), start(launcher, source, command, NANOCHAT_BASE_DIR=str(tmp_path))]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "NANOCHAT_BASE_DIR" in "".join(outputs) and "one folder that all nodes share" in "".join(outputs)
