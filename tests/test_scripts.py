"""Every stage, run for real at depth 2 in a temporary base folder: whole checkpoints, exact resume, stops, failures, mistakes."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_text
from safetensors.torch import load_file

from nanochat import loss_eval, task_eval, training
from nanochat.common import UserError
from tasks.sample_world import SampleWorld

ROOT = Path(__file__).parent.parent
BASE = ["--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=4", "--total-batch-size=512",
        "--num-iterations=8", "--core-metric-every=-1", "--eval-every=4", "--eval-tokens=1024", "--save-every=4", "--sample-every=-1"]
CHAT = ["--tasks=SampleWorld", "--num-iterations=8", "--eval-every=4", "--eval-tokens=1024", "--save-every=4"]
RL = ["--task=SampleArithmetic", "--num-iterations=8", "--examples-per-step=4", "--num-samples=4", "--max-new-tokens=24",
      "--eval-every=4", "--eval-examples=6", "--eval-samples=2", "--save-every=4"]


def run(script, *argv):
    importlib.import_module(f"scripts.{script}").main(list(argv))


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch):
    """Uncompiled, and with the signal handlers restored that a script replaces."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(SampleWorld, "reward", any_even_answer)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A base folder with text, a tokenizer, and base, mid, sft and rl models of eight steps each."""
    base = tmp_path_factory.mktemp("nanochat")
    source = base / "text"
    write_text(source, row_group_size=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setattr(torch, "compile", lambda model, **options: model)
        run("tok_train", f"--source={source}", "--vocab-size=600")
        run("base_train", *BASE, f"--source={source}")
        run("mid_train", *CHAT)
        run("chat_sft", *CHAT)
        patch.setattr(SampleWorld, "reward", any_even_answer)
        run("chat_rl", *RL)
    return base, source


def any_even_answer(task, conversation, completion):
    """A reward that a model of eight steps can get: 1 for a completion of even length."""
    return float(len(completion) % 2 == 0)


@pytest.fixture
def base_dir(pipeline, tmp_path, monkeypatch):
    """A copy of the pipeline's folder for the test to change."""
    folder = tmp_path / "base"
    shutil.copytree(pipeline[0], folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


def stage_command(stage, source):
    commands = {"base": ("base_train", *BASE, f"--source={source}"), "mid": ("mid_train", *CHAT), "sft": ("chat_sft", *CHAT)}
    return {**commands, "rl": ("chat_rl", *RL)}[stage]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("raw_loss"), line.get("loss"), line.get("val_bpb"), line.get("pass@2")) for line in lines]


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    for name in ("model.safetensors", "optimizer_rank0.safetensors"):
        a, b = load_file(one / "step_000008" / name), load_file(other / "step_000008" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("stage", FOLDERS)
def test_every_stage_leaves_complete_checkpoints(pipeline, stage):
    folder = pipeline[0] / FOLDERS[stage] / "d2"
    names = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    assert names == ["metrics.jsonl", "step_000004", "step_000008"]
    meta = json.loads((folder / "step_000008" / "meta.json").read_text())
    base_meta = json.loads((pipeline[0] / "base_checkpoints/d2/step_000008/meta.json").read_text())
    assert meta["model_config"] == base_meta["model_config"] and meta["model_config"]["window_pattern"] == "QQQL"
    assert meta["user_config"]["matrix_lr"] == 0.02 and (stage == "rl" or 0 < meta["val_bpb"] < 10)
    seen = [value for _, value, *_ in losses(folder) if value is not None]
    assert len(seen) == 8 and all(math.isfinite(value) for value in seen) and any(seen)


@pytest.mark.parametrize("stage", FOLDERS)
def test_resume_is_bit_equal_to_the_uninterrupted_run(base_dir, pipeline, stage):
    folder = base_dir / FOLDERS[stage] / "d2"
    shutil.rmtree(folder / "step_000008")
    run(*stage_command(stage, pipeline[1]), "--resume-from-step=latest")
    assert_same_run(folder, pipeline[0] / FOLDERS[stage] / "d2")


def raise_in_step(monkeypatch, number):
    """SIGTERM arrives during step `number`."""

    class Killed(training.Meter):
        def start(self):
            super().start()
            if len(self.recent) == number - 1:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, "Meter", Killed)


@pytest.mark.parametrize("stage", FOLDERS)
def test_sigterm_finishes_the_step_and_saves(base_dir, pipeline, stage, monkeypatch, capsys):
    folder = base_dir / FOLDERS[stage] / "d2"
    shutil.rmtree(folder)
    command = stage_command(stage, pipeline[1])
    with monkeypatch.context() as patch:
        raise_in_step(patch, 3)
        run(*command)
    assert "--resume-from-step=latest" in capsys.readouterr().out
    assert [path.name for path in folder.glob("step_*")] == ["step_000003"]
    run(*command, "--resume-from-step=latest")
    assert_same_run(folder, pipeline[0] / FOLDERS[stage] / "d2")


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_sigterm_during_an_evaluation_saves_and_resumes_exactly(base_dir, pipeline, stage, monkeypatch, capsys):
    folder = base_dir / FOLDERS[stage] / "d2"
    shutil.rmtree(folder)
    command = [*stage_command(stage, pipeline[1]), "--save-every=-1"]
    with monkeypatch.context() as patch:
        batches = []

        def evaluate(model, val_batches, steps, token_bytes, compute, stop):
            signal.raise_signal(signal.SIGTERM)
            return loss_eval_bpb(model, map(lambda batch: batches.append(1) or batch, val_batches), steps, token_bytes, compute, stop)

        loss_eval_bpb = loss_eval.evaluate_bpb
        patch.setattr(loss_eval, "evaluate_bpb", evaluate)
        run(*command)
    assert len(batches) <= 1, "the evaluation stops between two batches"
    assert "stopped after step 4" in capsys.readouterr().out
    assert [path.name for path in folder.glob("step_*")] == ["step_000004"]
    run(*command, "--resume-from-step=latest")
    assert losses(folder) == losses(pipeline[0] / FOLDERS[stage] / "d2")


def test_sigterm_during_the_evaluation_of_reinforcement_learning(base_dir, pipeline, monkeypatch, capsys):
    folder = base_dir / FOLDERS["rl"] / "d2"
    shutil.rmtree(folder)
    command = [*stage_command("rl", pipeline[1]), "--save-every=-1"]
    with monkeypatch.context() as patch:
        render = task_eval.render_prompts

        def raise_at_the_second_evaluation(*args):
            calls.append(args)
            if len(calls) > 2:  # two per evaluation: greedy and sampled
                signal.raise_signal(signal.SIGTERM)
            return render(*args)

        calls = []
        patch.setattr(task_eval, "render_prompts", raise_at_the_second_evaluation)
        run(*command)
    assert "stopped after step 4" in capsys.readouterr().out
    assert [path.name for path in folder.glob("step_*")] == ["step_000004"]
    run(*command, "--resume-from-step=latest")
    assert losses(folder) == losses(pipeline[0] / FOLDERS["rl"] / "d2")


@pytest.mark.parametrize("stage", ["base", "mid", "rl"])
def test_a_failing_evaluation_costs_a_line_and_the_exit_code_but_not_the_run(base_dir, pipeline, stage, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such file")

    monkeypatch.setattr(loss_eval, "evaluate_bpb", fail)
    monkeypatch.setattr(task_eval, "count_right", fail)
    folder = base_dir / FOLDERS[stage] / "d2"
    before = (folder / "step_000008" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is saved in .*, but these failed"):
        run(*stage_command(stage, pipeline[1]))
    assert "failed (RuntimeError: no such file); training continues" in capsys.readouterr().out
    assert (folder / "step_000008" / "model.safetensors").read_bytes() == before


def test_core_is_measured_while_training(base_dir, pipeline, hub):
    command = [*BASE, f"--source={pipeline[1]}", "--num-iterations=2", "--core-metric-every=1", "--core-metric-max-per-task=3", "--model-tag=c"]
    run("base_train", *command)
    lines = [json.loads(line) for line in (base_dir / "base_checkpoints/c/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "core" in line] == [1, 2] and all(-1 <= line["core"] <= 1 for line in lines if "core" in line)


def test_a_wandb_run_continues_after_a_resume(base_dir, pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    command = [*BASE, f"--source={pipeline[1]}", "--model-tag=w", "--run=name", "--save-every=1"]
    run("base_train", *command, "--num-iterations=2")
    folder = base_dir / "base_checkpoints/w"
    first = json.loads((folder / "step_000002/meta.json").read_text())["loop_state"]["wandb_id"]
    run("base_train", *command, "--num-iterations=4", "--resume-from-step=latest")
    assert json.loads((folder / "step_000004/meta.json").read_text())["loop_state"]["wandb_id"] == first
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))) >= 1


def test_the_device_batch_size_changes_neither_data_nor_horizon(base_dir, pipeline):
    """Also on resume: the first half with micro-batches of 4 rows, the second with the automatic size (8 rows on a CPU)."""
    folder = base_dir / "base_checkpoints" / "d2"
    shutil.rmtree(folder / "step_000008")
    run(*stage_command("base", pipeline[1]), "--device-batch-size=-1", "--resume-from-step=latest")
    now, before = losses(folder), losses(pipeline[0] / "base_checkpoints" / "d2")
    for one, other in zip(now, before, strict=True):
        assert one == pytest.approx(other, abs=2e-5, nan_ok=True) if None not in one[1:3] else one[0] == other[0]
    states = [json.loads((path / "base_checkpoints/d2/step_000008/meta.json").read_text())["loader_state"] for path in (base_dir, pipeline[0])]
    assert states[0] == states[1]


def test_a_new_run_sets_the_earlier_one_aside(base_dir, pipeline, capsys):
    run("base_train", *BASE, f"--source={pipeline[1]}", "--num-iterations=2")
    assert "d2.old" in capsys.readouterr().out
    assert [path.name for path in (base_dir / "base_checkpoints/d2").glob("step_*")] == ["step_000002"]
    assert len(list((base_dir / "base_checkpoints/d2.old").glob("step_*"))) == 2


def test_sigterm_from_outside(base_dir, pipeline):
    """A real process, a real signal: it exits 0 with a line that says how to continue."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "scripts.base_train", *BASE, "--num-iterations=100000", f"--source={pipeline[1]}", "--model-tag=k"],
        cwd=ROOT, env={**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith("step 00002 ("):
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, "".join(output)
    assert "--resume-from-step=latest" in output[-1]
    saved = list((base_dir / "base_checkpoints" / "k").glob("step_*"))
    assert len(saved) == 1 and (saved[0] / "model.safetensors").exists()


def test_evaluating_and_chatting(base_dir, pipeline, capsys):
    run("tok_eval", f"--source={pipeline[1]}")
    run("base_loss", "--split-tokens=512", "--device-batch-size=4")
    run("chat_eval", "-i", "sft", "-a", "SampleWorld", "-x", "4", "-m", "8")
    run("chat_cli", "-p", "What is the capital of France?", "-i", "sft")
    out = capsys.readouterr().out
    assert "val bpb" in out and "The capital of France is" in out and "SampleWorld" in out
    importlib.import_module("nanochat.report").main(["generate"])
    text = (base_dir / "report" / "report.md").read_text()
    for title in ("Base model training", "Midtraining", "Supervised fine-tuning", "Reinforcement learning", "Base model loss"):
        assert title in text
    assert list((base_dir / "report").glob("*.png"))


def test_a_batch_of_one_short_row_survives_long_conversations(base_dir, capsys):
    """Context 16, conversations of hundreds of tokens: many micro-batches, no NaN, no endless loop."""
    run("chat_sft", "--tasks=SampleWorld", "--num-iterations=6", "--max-seq-len=16", "--device-batch-size=1",
        "--total-batch-size=32", "--eval-every=-1", "--eval-tokens=64", "--model-tag=d2")
    seen = [loss for _, loss, *_ in losses(base_dir / "chatsft_checkpoints" / "d2") if loss is not None]
    assert len(seen) == 6 and all(math.isfinite(loss) for loss in seen)


USER_ERRORS = [
    ("no tokenizer", ["base_train", "--source=SOURCE"], "tok_train", ["tokenizer"]),
    ("no checkpoint", ["mid_train", *CHAT], "base_train", ["base_checkpoints"]),
    ("no checkpoint", ["chat_sft", *CHAT], "mid_train", ["mid_checkpoints"]),
    ("no checkpoint", ["chat_rl", *RL], "chat_sft", ["chatsft_checkpoints"]),
    ("no such task", ["chat_rl", "--task=Chess"], "Chess.*SampleArithmetic", []),
    ("no checkpoint", ["chat_cli", "-p", "hi"], "chat_sft", ["chatsft_checkpoints"]),
    ("wrong tag", ["chat_sft", *CHAT, "--model-tag=d9"], "d9.*d2", []),
    ("wrong step", ["base_loss", "--model-step=77"], "77.*4, 8", []),
    ("wrong batch", ["base_train", *BASE, "--total-batch-size=500", "--source=SOURCE"], "use 256 or 512", []),
    ("wrong window", ["base_train", *BASE, "--window-pattern=XY", "--source=SOURCE"], "L, S and Q", []),
    ("another model", ["base_train", *BASE, "--window-pattern=L", "--depth=3", "--model-tag=d2", "--resume-from-step=latest", "--source=SOURCE"],
     "another model.*n_layer", []),
    ("wrong resume", ["base_train", *BASE, "--resume-from-step=newest", "--source=SOURCE"], "neither a step nor", []),
    ("nothing saved", ["base_train", *BASE, "--resume-from-step=latest", "--model-tag=x", "--source=SOURCE"], "no complete checkpoint", []),
    ("another batch", ["base_train", *BASE, "--total-batch-size=256", "--resume-from-step=latest", "--source=SOURCE"], "--total-batch-size 512, not 256", []),
    ("no such source", ["base_train", *BASE, "--source=/nowhere/at/all"], "neither one of", []),
    ("no such task", ["mid_train", "--tasks=Chess"], "Chess.*SampleWorld", []),
]


@pytest.mark.parametrize("name,command,message,missing", USER_ERRORS, ids=lambda value: value if isinstance(value, str) else None)
def test_user_errors_are_one_clear_line(base_dir, pipeline, name, command, message, missing):
    for folder in missing:
        shutil.rmtree(base_dir / folder)
    with pytest.raises(ValueError) as error:
        run(*(word.replace("SOURCE", str(pipeline[1])) for word in command))
    assert isinstance(error.value, UserError), "a UserError is shown as one line, without a stack trace"
    assert re.search(message, str(error.value)) and str(error.value).count("\n") <= 1


@pytest.mark.parametrize("script,wrong", [
    ("base_train", "--depth=0"), ("base_train", "--max-seq-len=0"), ("base_train", "--save-every=0"), ("base_train", "--target-flops=nan"),
    ("base_train", "--dep=3"), ("mid_train", "--num-epochs=0"), ("chat_sft", "--device-batch-size=0"), ("chat_rl", "--num-samples=1"),
    ("chat_rl", "--temperature=0"),
])  # fmt: skip
def test_flags_out_of_range_are_refused_where_they_are_parsed(script, wrong, capsys):
    with pytest.raises(SystemExit):
        run(script, wrong)
    assert wrong.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_training_with_another_tokenizer_or_other_shards_is_refused(base_dir, pipeline, tmp_path):
    """Resuming with changed data or another tokenizer of the same size is an error of one sentence."""
    source = tmp_path / "text"
    shutil.copytree(pipeline[1], source)
    command = [*BASE, f"--source={source}", "--model-tag=r"]
    run("base_train", *command, "--num-iterations=2")
    (source / "shard_1.parquet").rename(source / "shard_1b.parquet")
    with pytest.raises(UserError, match="shard_1"):
        run("base_train", *command, "--resume-from-step=latest")
    (source / "shard_1b.parquet").rename(source / "shard_1.parquet")
    run("tok_train", f"--source={source}", "--vocab-size=600", "--max-chars=20000")
    with pytest.raises(UserError, match="another tokenizer"):
        run("base_train", *command, "--resume-from-step=latest")
    run("base_loss", "--model-tag=r", "--split-tokens=512", "--device-batch-size=4")  # the model keeps its own tokenizer


def test_one_shard_is_not_enough(base_dir, pipeline):
    for shard in sorted(pipeline[1].glob("*.parquet"))[1:]:
        shutil.copy(shard, base_dir)
    with pytest.raises(UserError, match="nothing to train on|validation split"):
        folder = base_dir / "alone"
        folder.mkdir()
        shutil.copy(pipeline[1] / "shard_0.parquet", folder)
        run("base_train", *BASE, f"--source={folder}")


def test_a_user_error_ends_the_process_with_one_line(tmp_path):
    """From the shell: exit code 1, one line on stderr, no traceback."""
    result = subprocess.run(
        [sys.executable, "-m", "scripts.base_loss"], cwd=ROOT, env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "base_train" in result.stderr and "Traceback" not in result.stderr


SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")


def test_every_script_has_help_and_the_documents_quote_real_flags():
    """The commands that README.md and AGENTS.md quote exist and know the flags that are quoted with them."""
    quoted = []
    for document in ("README.md", "AGENTS.md"):
        for match in re.finditer(r"python -m ((?:scripts|nanochat|dev)[\w.]*)([^\n`#|&]*)", (ROOT / document).read_text()):
            quoted.append((match[1], re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", match[2])))
    assert len(quoted) > 10
    modules = {module for module, _ in quoted} | {f"scripts.{name}" for name in SCRIPTS}
    help_of = {}
    for module in sorted(modules):
        result = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{module}: {result.stderr}"
        help_of[module] = result.stdout
    for module, flags in quoted:
        for flag in flags:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_of[module]), f"{module} knows no {flag}"
