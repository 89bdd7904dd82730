"""Many ranks compute what one does, twice the same, and resume after any fault."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, finish, free_port
from safetensors.torch import load_file

from nanochat.checkpoint_manager import list_steps, verify

SIZE = ["--device-type=cpu", "--device-batch-size=4", "--eval-tokens=1024", "--eval-every=4", "--num-iterations=12"]
BASE = ["--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--core-metric-every=-1", "--sample-every=0", *SIZE]
CHAT = ["--tasks=SampleWorld", *SIZE]
RL = ["--task=SampleArithmetic", "--examples-per-step=7", "--num-samples=4", "--max-new-tokens=24", "--num-iterations=6",
      "--eval-every=3", "--eval-examples=7", "--eval-samples=2", "--device-type=cpu", "--device-batch-size=4"]


def start(launcher, base, command, cores=2, stdout=subprocess.PIPE, **more):
    """Start a process without the compiler, with one thread per rank; all processes share a base folder, as nodes do."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": os.pathsep.join(sys.path), **more}  # fmt: skip
    affinity = sorted(os.sched_getaffinity(0))[:cores]
    return subprocess.Popen(
        [*launcher, *command], cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, affinity),
    )  # fmt: skip


def base_train(base, tag, *flags):
    return ["-m", "scripts.base_train", *BASE, "--total-batch-size=512", f"--source={base}/text", f"--model-tag={tag}", *flags]


def metrics(base, tag, folder="base_checkpoints"):
    return [json.loads(line) for line in (base / folder / tag / "metrics.jsonl").read_text().splitlines()]


def curve(*run):
    """(step, name, value) of every training loss and every evaluation."""
    return [(line["step"], name, line[name]) for line in metrics(*run) for name in ("raw_loss", "val_bpb") if name in line]


def assert_same_curve(one, other):
    assert [point[:2] for point in one] == [point[:2] for point in other]
    assert [step for step, name, _ in one if name == "raw_loss"] == list(range(1, 13))
    assert [value for _, _, value in one] == pytest.approx([value for _, _, value in other], rel=1e-5)


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options]


def two_nodes(name):
    return torchrun("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-id={name}",
                    f"--rdzv-endpoint=127.0.0.1:{free_port()}")


# Several stages in one process, with a reward that an untrained model can get
STAGES = """
import importlib, json, sys
from tasks.sample_world import SampleWorld
SampleWorld.reward = lambda task, conversation, completion: float(len(completion) % 2)
for name, *flags in json.loads(sys.argv[1]):
    importlib.import_module(f"scripts.{name}").main(flags)
"""


def test_every_stage_has_the_same_curve_on_three_ranks_as_on_one(trained_base, tmp_path):
    """12 steps of three micro-batches and their evaluations agree within 1e-5; then six steps of reinforcement learning."""
    (tmp_path / "stages.py").write_text(STAGES)
    batch = "--total-batch-size=768"
    commands = [
        ["base_train", *BASE, batch, f"--source={trained_base}/text"], ["mid_train", *CHAT, batch], ["chat_sft", *CHAT, batch],
        ["chat_rl", *RL], ["chat_eval", "-i", "rl", "-a", "SampleWorld", "-x", "7", "-m", "8"],
    ]  # fmt: skip
    answers = []
    for tag, launcher in (("alone", [sys.executable]), ("three", torchrun("--standalone", "--nproc-per-node=3"))):
        tagged = [[*command, "-g" if command[0] == "chat_eval" else "--model-tag", tag] for command in commands]
        (output,) = finish([start(launcher, trained_base, [str(tmp_path / "stages.py"), json.dumps(tagged)])])
        answers.append(re.search(r"SampleWorld .*problems.*", output)[0])
    assert answers[0] == answers[1]
    for folder in ("base_checkpoints", "mid_checkpoints", "chatsft_checkpoints"):
        assert_same_curve(curve(trained_base, "three", folder), curve(trained_base, "alone", folder))
    alone, three = (metrics(trained_base, tag, "chatrl_checkpoints") for tag in ("alone", "three"))
    assert len(alone) == 6 + 3 and sum(line.get("reward", 0) for line in alone) > 0
    for one, other in zip(alone, three, strict=True):
        for name in ("step", "reward", "length", "truncated", "nonzero_groups", "accuracy", "pass@2", "pass@2_ci"):
            assert one.get(name) == pytest.approx(other.get(name)), name
        assert one.get("raw_loss") == pytest.approx(other.get("raw_loss"), abs=1e-5)


@pytest.fixture(scope="module")
def one(trained_base):
    """The curve of one rank that accumulates two micro-batches."""
    finish([start([sys.executable], trained_base, base_train(trained_base, "one", "--save-every=4"))])
    return curve(trained_base, "one")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_and_on_all_threads_the_same_command_twice_is_bit_equal(trained_base, one):
    """And without the compiler and on one thread, losses stay within 1e-3 over five steps and 0.1 over twelve."""
    cores = len(os.sched_getaffinity(0))
    env = {"TORCH_COMPILE_DISABLE": "0", "OMP_NUM_THREADS": str(cores), "TORCHINDUCTOR_CACHE_DIR": str(trained_base / "inductor")}
    for tag in ("compiled", "again"):
        finish([start([sys.executable], trained_base, base_train(trained_base, tag), cores, **env)])
    compiled, again = (curve(trained_base, tag) for tag in ("compiled", "again"))
    assert compiled == again
    differences = [abs(a - b) for (_, name, a), (_, _, b) in zip(compiled, one, strict=True) if name == "raw_loss"]
    assert 0 < max(differences[:5]) < 1e-3 and max(differences) < 0.1, differences


def test_two_nodes_have_the_same_curve_as_one_rank(trained_base, one, tmp_path):
    """And one of them sends it to wandb: behind -- torchrun leaves --run to the script."""
    launcher, [module, name, *flags] = two_nodes("together"), base_train(trained_base, "nodes", "--run=name")
    command, wandb = [module, name, "--", *flags], {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    outputs = finish([start(launcher, trained_base, command, **wandb) for _ in range(2)])
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert sum("saved step 12" in output for output in outputs) == 1, "only one rank writes and prints"
    assert_same_curve(curve(trained_base, "nodes"), one)


def test_a_job_that_loses_a_rank_resumes_by_itself(trained_base, one):
    """torchrun restarts all ranks, and they resume from what this job has saved, not from an earlier run's checkpoints."""
    stale = trained_base / "base_checkpoints" / "restarted"
    shutil.copytree(stale.with_name("one"), stale)
    launcher = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    job = start(launcher, trained_base, base_train(trained_base, "restarted", "--save-every=4"))
    seen = []
    for line in job.stdout:
        seen.append(line)
        if line.startswith("saved step 4 "):
            ranks = [child for child in psutil.Process(job.pid).children() if child.environ().get("RANK") == "1"]
            ranks[0].kill()
    assert job.wait(60) == 0, "".join(seen)
    resumed = [int(match[1]) for match in re.finditer(r"resumed from step (\d+)", "".join(seen))]
    assert len(resumed) == 1 and 4 <= resumed[0] < 12
    assert curve(trained_base, "restarted") == one, "bit for bit, with as many ranks as micro-batches"


def test_resume_on_another_world_size_is_exact(trained_base, one):
    """One rank, then three (four micro-batches are shared unevenly), then one: the same curve as one rank throughout."""
    steady, moving = (trained_base / "base_checkpoints" / tag for tag in ("one", "moving"))
    shutil.copytree(steady, moving)
    for ranks, removed in ((3, [8, 12]), (1, [12])):
        for step in removed:
            shutil.rmtree(moving / f"step_{step:06d}")
        launcher = [sys.executable] if ranks == 1 else torchrun("--standalone", f"--nproc-per-node={ranks}")
        flags = ["--save-every=4", "--device-batch-size=2", "--resume-from-step=latest"]
        finish([start(launcher, trained_base, base_train(trained_base, "moving", *flags))])
    assert_same_curve(curve(trained_base, "moving"), one)
    weights, expected = (load_file(path / "step_000012" / "model.safetensors") for path in (moving, steady))
    for name in weights:  # another order of summation, which Muon amplifies where singular values are small
        assert (weights[name] - expected[name]).norm() <= 5e-2 * expected[name].norm(), name
    states = [json.loads((path / "step_000012/meta.json").read_text())["loader_state"] for path in (moving, steady)]
    assert states[0] == states[1], "the same place in the data"


@pytest.mark.slow
def test_nodes_that_do_not_share_the_base_folder_are_a_user_error(trained_base, tmp_path):
    launcher, command = two_nodes("apart"), base_train(trained_base, "apart")
    nodes = [start(launcher, trained_base, command), start(launcher, tmp_path, command)]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "NANOCHAT_BASE_DIR" in "".join(outputs) and "one folder that all nodes share" in "".join(outputs)


@pytest.mark.slow
def test_kills_lose_nothing(trained_base, rounds=24):
    """SIGKILL or SIGTERM to a rank, to torchrun or to all; at start, in a step or during a save."""
    rng, log = random.Random(0), trained_base / "log"
    reference, killed = (trained_base / "base_checkpoints" / name for name in ("reference", "killed"))
    last = 36 * rounds  # a round trains for at most 12 steps before the kill, and for a few after it

    def train(folder, resume="-1"):
        flags = [f"--num-iterations={last}", "--save-every=2", "--keep-last=3", "--eval-every=0", f"--resume-from-step={resume}"]
        command = base_train(trained_base, folder.name, *flags)
        with open(log, "w") as stdout:
            return start(torchrun("--standalone", "--nproc-per-node=2"), trained_base, command, stdout=stdout)

    assert train(reference).wait(600) == 0, log.read_text()
    for number in range(rounds):
        before = max(list_steps(killed), default=0)
        job = train(killed, "latest" if before else "-1")  # a kill may come before the first checkpoint
        steps = rng.randint(1, 12) if number % 6 else 0
        while job.poll() is None and log.read_text().count("\nstep ") < steps:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1 if steps else 6))  # the latter: while it starts
        assert job.poll() is None, log.read_text()

        torchrun_process = psutil.Process(job.pid)
        ranks = torchrun_process.children()
        victims = ([torchrun_process], ranks[:1], ranks[1:], [*ranks, torchrun_process])[number % 4]
        for victim in victims or [torchrun_process]:
            victim.send_signal(signal.SIGTERM if number % 3 == 0 else signal.SIGKILL)
        job.wait(90)
        deadline = time.monotonic() + 60
        while any(psutil.pid_exists(rank.pid) and rank.status() != "zombie" for rank in ranks):
            assert time.monotonic() < deadline, f"round {number}: a rank outlives the job"
            time.sleep(0.1)
        assert max(list_steps(killed), default=0) >= before, f"round {number} lost step {before}"
        for step in list_steps(killed):
            verify(killed, step)
    assert train(killed, "latest").wait(600) == 0, log.read_text()
    assert verify(reference, last)["files"] == verify(killed, last)["files"]
    assert curve(trained_base, reference.name) == curve(trained_base, killed.name)
