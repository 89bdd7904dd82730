"""Every stage, run for real at depth 2 in a temporary base folder: whole checkpoints, exact resume, stops, failures, mistakes."""

import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint_manager import assert_same
from tiktoken_ext import openai_public

from dev import plot
from nanochat import checkpoint_manager, cross_entropy, loss_eval, report, schedule, task_eval, training
from nanochat.checkpoint_manager import update_meta
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import get_tokenizer
from tasks.sample_world import SampleWorld

pytestmark = pytest.mark.usefixtures("restored_signals")
BASE = ["--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=4", "--total-batch-size=512",
        "--num-iterations=8", "--core-metric-every=-1", "--eval-every=4", "--eval-tokens=1024", "--save-every=4", "--sample-every=-1",
        "--source=SOURCE"]
CHAT = ["--tasks=SampleWorld", "--num-iterations=8", "--eval-every=4", "--eval-tokens=1024", "--save-every=4"]
RL = ["--task=SampleArithmetic", "--num-iterations=8", "--examples-per-step=4", "--num-samples=4", "--max-new-tokens=24",
      "--eval-every=4", "--eval-examples=6", "--eval-samples=2", "--save-every=4"]
COMMANDS = {"base": ("base_train", *BASE), "mid": ("mid_train", *CHAT), "sft": ("chat_sft", *CHAT), "rl": ("chat_rl", *RL)}
FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


def run(script, *argv):
    source = Path(os.environ["NANOCHAT_BASE_DIR"]) / "text"
    importlib.import_module(f"scripts.{script}").main([flag.replace("SOURCE", str(source)) for flag in argv])


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Models are not compiled, and a completion of even length is right, which a model of eight steps can get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        patch.setattr(torch, "compile", lambda model, **options: model)
        patch.setattr(SampleWorld, "reward", lambda task, conversation, completion: float(len(completion) % 2 == 0))
        yield


@pytest.fixture(scope="module")
def pipeline(trained_base):
    """A base folder with text, a tokenizer, and base, mid, sft and rl models of eight steps each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(trained_base))
        for stage in FOLDERS:
            run(*COMMANDS[stage])
    return trained_base


@pytest.fixture
def base_dir(pipeline, tmp_path, monkeypatch):
    """A copy of the pipeline's folder for the test to change."""
    folder = shutil.copytree(pipeline, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


def metrics(folder):
    return report.read_jsonl(folder / "metrics.jsonl")


def losses(folder):
    return [[line.get(name) for name in ("step", "raw_loss", "loss", "val_bpb", "pass@2")] for line in metrics(folder)]


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


@pytest.mark.parametrize("stage", FOLDERS)
def test_every_stage_leaves_complete_checkpoints(pipeline, stage):
    folder = pipeline / FOLDERS[stage] / "d2"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["metrics.jsonl", "step_000004", "step_000008"]
    meta, base_meta = (meta_of(pipeline / FOLDERS[name] / "d2" / "step_000008") for name in (stage, "base"))
    assert meta["model_config"] == base_meta["model_config"] and meta["model_config"]["window_pattern"] == "QQQL"
    assert meta["user_config"]["matrix_lr"] == 0.02
    assert meta["user_config"]["short_run"] == base_meta["user_config"]["short_run"], "each stage inherits it"
    bpbs = [line["val_bpb"] for line in metrics(folder) if "val_bpb" in line]
    assert stage == "rl" or 0 < bpbs[-1] == meta["val_bpb"] < 10
    seen = [line["raw_loss"] for line in metrics(folder) if "raw_loss" in line]
    assert len(seen) == 8 and all(math.isfinite(value) for value in seen) and any(seen)


def signal_in_call(patch, number, owner, name):
    """SIGTERM arrives when a function is called for the `number`-th time."""
    function, numbers = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(numbers) == number:
            signal.raise_signal(signal.SIGTERM)
        return function(*args, **kwargs)

    patch.setattr(owner, name, call)


@pytest.mark.parametrize("stage", FOLDERS)
@pytest.mark.parametrize("step, calls", [
    (3, [(3, training.Meter, "start")]),
    (4, [(1, loss_eval, "evaluate_bpb"), (4, task_eval, "count_right")]),  # the latter in reinforcement learning
], ids=["in a step", "in an evaluation"])  # fmt: skip
def test_sigterm_saves_and_the_resumed_run_is_bit_equal(base_dir, pipeline, stage, step, calls, monkeypatch, capsys):
    folder = base_dir / FOLDERS[stage] / "d2"
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        for call in calls:
            signal_in_call(patch, *call)
        run(*COMMANDS[stage], "--save-every=-1")
    out = capsys.readouterr().out
    assert f"stopped after step {step}" in out and "--resume-from-step=latest" in out
    assert [path.name for path in folder.glob("step_*")] == [f"step_{step:06d}"]
    run(*COMMANDS[stage], "--resume-from-step=latest")
    uninterrupted = pipeline / FOLDERS[stage] / "d2"
    assert losses(folder) == losses(uninterrupted)
    for name in ("model.safetensors", "optimizer_rank0.safetensors"):
        assert_same(*(load_file(path / "step_000008" / name) for path in (folder, uninterrupted)))


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_whatever_fails_beside_the_training_costs_a_line_and_the_exit_code_but_not_the_run(base_dir, stage, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such file")

    for module, name in ((loss_eval, "evaluate_bpb"), (loss_eval, "sample_texts"), (task_eval, "count_right"), (report, "log")):
        monkeypatch.setattr(module, name, fail)
    wandb = SimpleNamespace(id="x", log=fail, finish=fail)
    monkeypatch.setattr(training, "wandb_run", lambda *args: wandb)
    folder = base_dir / FOLDERS[stage] / "d2"
    before = (folder / "step_000008" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is saved in .*, but these failed: .*, the report, wandb$"):
        run(*COMMANDS[stage])
    out = capsys.readouterr().out
    assert out.count("failed (RuntimeError: no such file); the run continues") >= 4 and "step 8 is missing in" in out
    assert (folder / "step_000008" / "model.safetensors").read_bytes() == before


def test_core_is_measured_while_training(base_dir, hub):
    flags = ["--num-iterations=2", "--core-metric-every=1", "--core-metric-max-per-task=3", "--model-tag=c"]
    run("base_train", *BASE, *flags, "--device-batch-size=-1")
    cores = [(line["step"], line["core"]) for line in metrics(base_dir / "base_checkpoints/c") if "core" in line]
    assert [step for step, _ in cores] == [1, 2] and all(-1 <= core <= 1 for _, core in cores)


def test_a_wandb_run_continues_after_a_resume(base_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    flags = ["--model-tag=w", "--run=name", "--save-every=1"]
    run("base_train", *BASE, *flags, "--num-iterations=2")
    run("base_train", *BASE, *flags, "--num-iterations=4", "--resume-from-step=latest")
    first, last = (meta_of(base_dir / f"base_checkpoints/w/step_00000{step}")["loop_state"]["wandb_id"] for step in (2, 4))
    assert first == last and list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))


def test_evaluating_and_chatting(base_dir, capsys, monkeypatch):
    tokenizer = get_tokenizer()
    parts = {"mergeable_ranks": tokenizer.ranks, "pat_str": tokenizer.pattern, "special_tokens": {}}
    monkeypatch.setattr(openai_public, "ENCODING_CONSTRUCTORS", {"cl100k_base": lambda: parts})
    run("tok_eval", "--source=SOURCE")
    run("tok_eval")
    run("base_loss", "--split-tokens=512", "--device-batch-size=4")
    run("chat_eval", "-i", "sft", "-a", "SampleWorld", "-x", "4", "-m", "8")
    run("chat_cli", "-p", "What is the capital of France?", "-i", "sft")
    out = capsys.readouterr().out
    assert "skipped GPT-2" in out and "skipped the train text" in out and "GPT-4" in out and "\nKorean " in out and "\nval " in out
    assert "val bpb" in out and "The capital of France is" in out and "SampleWorld" in out
    importlib.import_module("nanochat.report").main(["generate"])
    text = (base_dir / "report" / "report.md").read_text()
    for title in ("Base model training", "Midtraining", "Supervised fine-tuning", "Reinforcement learning", "Base model loss"):
        assert title in text
    assert "A conversation with the model (sft" in text and f"user: {SampleWorld.examples[0]}\nassistant: " in text
    assert list((base_dir / "report").glob("*.png"))


def test_own_text_and_conversations_need_no_preparation(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "notes.md").write_text("".join(f"# Note {i}\nIt is about {i * i}.\n\n" for i in range(900)))
    lines = (json.dumps({"prompt": f"Who are you, {i}?", "completion": "I am Ada."}) for i in range(60))
    (tmp_path / "ada.jsonl").write_text("\n".join(lines))
    run("tok_train", f"--source={tmp_path}/notes.md", "--vocab-size=300")
    run("base_train", *BASE[:-1], f"--source={tmp_path}/notes.md")
    run("chat_sft", "--stage=base", f"--tasks={tmp_path}/ada.jsonl", *CHAT[1:])
    run("chat_eval", f"--task-name={tmp_path}/ada.jsonl", "--max-new-tokens=4")
    out = capsys.readouterr().out
    assert out.count("documents of") == 1 and "ada.jsonl   0.00% +- 0.00  (6 problems" in out
    assert out.count("step 00008 | val bpb") == 2


META, REPORT = "step_000008/meta.json", "../../report/report.jsonl"
DAMAGES = [  # file of a run, its content (None: a folder; a dict: changed values), the step that resumes or the reason why none
    (META, b"", 4), (META, b"{", 4), (META, b"[" * 100_000, 4), (META, b"\xff\xfe", 4), (META, None, 4),
    *((META, {"model_config": {**GPTConfig().__dict__, **change}}, 4) for change in (
        {"n_layer": 300_000}, {"n_head": 0}, {"n_embd": -64}, {"n_embd": math.nan}, {"n_layer": "2"}, {"sequence_len": 2**40})),
    *((META, change, 4) for change in (
        {"step": -1}, {"step": math.inf}, {"saved_at": "now"}, {"saved_at": math.nan}, {"files": 7}, {"model_config": None},
        {"files": {"/dev/zero": {"size": 0}}}, {"files": {"model.safetensors": 1}}, {"user_config": [1]})),
    (META, {"loop_state": {}}, "damaged: KeyError"), (META, {"rng_state": {"cpu": "?"}}, "damaged"),
    (META, {"loader_state": {"next": "x"}}, "loader state is damaged"), (META, {"model_config": {"n_layer": 3}}, "n_layer 3 -> 2"),
    ("step_000008", b"a file", 4), ("step_000009", b"", 8), ("step_0000008", None, 8), ("step_next", None, 8),
    ("metrics.jsonl", b"", 8), ("metrics.jsonl", b'{"step": 3, "lo', 8), ("metrics.jsonl", b"\\0\\xff", 8),
    ("metrics.jsonl", b'[1]\n{"step": 1e400, "loss": 1}\n{"step": 1, "loss": "x"}\n{"step": 1, "loss": 1e29}\n', 8),
    ("../.bad.lock", None, "cannot train into"), ("", b"", "cannot train into"),
    (REPORT, b'{"section": "Base', 8), (REPORT, b"[" * 100_000, 8),
    *((REPORT, json.dumps({"section": "Base model training", "time": 1.0, **change}).encode(), 8) for change in (
        {"time": 1e99, "data": {}}, {"section": 1, "data": {}}, {"data": {"scores": [1]}}, {"data": {"metrics": 7}},
        {"data": {"model tag": "bad", "steps": 0, "training FLOPs": "x", "rows": 1}})),
]  # fmt: skip


@pytest.mark.parametrize("name, content, resumed", DAMAGES)
def test_a_damaged_file_stops_no_other_run_and_an_older_checkpoint_serves(base_dir, name, content, resumed, capsys, monkeypatch):
    if not name.endswith(".jsonl"):
        monkeypatch.setattr(report, "draw", lambda *args: None)  # takes most of the time
        monkeypatch.setattr(plot, "draw", lambda *args: None)
    good, bad = base_dir / "base_checkpoints/d2", base_dir / "base_checkpoints/bad"
    shutil.copytree(good, bad)
    path = bad / name
    if isinstance(content, dict):
        checkpoint_manager._write_meta(path.parent, {**meta_of(path.parent), **content})  # with a checksum that is right
    elif path.name == "report.jsonl":
        path.write_bytes(path.read_bytes() + content)  # a crash or another program
    else:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)

    assert "d2" in checkpoint_manager.find_tags("base") and checkpoint_manager.resolve_checkpoint("base", "d2") == (good, 8)
    text = report.generate().read_text()
    assert "## Base model training" in text and "## Reinforcement learning" in text
    plot.main([])
    assert "finished model(s)" in capsys.readouterr().out
    resume = "base_train", *BASE, "--model-tag=bad", "--resume-from-step=latest"
    if isinstance(resumed, int):
        run(*resume)
        assert f"resumed from step {resumed}" in capsys.readouterr().out and losses(bad)[-1] == losses(good)[-1]
        entry = report.read_entries(base_dir / "report/report.jsonl")[-1]  # on a line of its own
        assert entry["data"]["metrics"] == "base_checkpoints/bad/metrics.jsonl", "relative, so that the base folder can be moved"
    else:
        with pytest.raises(UserError, match=f"^[^\n]*{resumed}[^\n]*$"):
            run(*resume)


def test_a_run_from_before_a_field_of_the_config_existed_is_resumed(base_dir):
    folder = base_dir / "base_checkpoints" / "d2"
    config = meta_of(folder / "step_000008")["model_config"]
    update_meta(folder, 8, model_config={name: value for name, value in config.items() if name != "plain"})
    run("base_train", *BASE, "--resume-from-step=latest")


def test_a_plain_model_is_trained_resumed_tuned_evaluated_and_exported(base_dir, tmp_path, capsys):
    flags = ["--plain", "--model-tag=p"]
    run("base_train", *BASE, *flags)
    folder = base_dir / "base_checkpoints" / "p"
    before = losses(folder), load_file(folder / "step_000008" / "model.safetensors")
    run("base_train", *BASE, *flags, "--resume-from-step=4")
    assert before[0] == losses(folder) and "resumed from step 4" in capsys.readouterr().out
    assert_same(before[1], load_file(folder / "step_000008" / "model.safetensors"))
    run("mid_train", *CHAT, "--model-tag=p")
    run("chat_sft", *CHAT, "--model-tag=p")
    run("chat_cli", "-p", "What is the capital of France?", "-g", "p")
    run("base_loss", "--split-tokens=512", "--device-batch-size=4", "-g", "p")
    run("export", "-i", "sft", "-g", "p", "--to", str(tmp_path / "out"))
    config, card = ((tmp_path / "out" / name).read_text() for name in ("config.json", "README.md"))
    assert json.loads(config)["architectures"] == ["NanoChatForCausalLM"] and "| val bpb of replies |" in card


def test_a_run_in_bfloat16_with_a_sampled_softmax_learns_and_is_resumed_exactly(base_dir, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    monkeypatch.setattr(cross_entropy, "SAMPLE", 300)
    monkeypatch.setattr(schedule, "FULL_SOFTMAX", 0.5)
    run("base_train", *BASE, "--model-tag=half", "--save-every=2")
    assert "until step 4 the training loss is of a part of the vocabulary" in capsys.readouterr().out
    folder, exact = (base_dir / "base_checkpoints" / tag for tag in ("half", "d2"))
    before = losses(folder), load_file(folder / "step_000008" / "model.safetensors")
    run("base_train", *BASE, "--model-tag=half", "--resume-from-step=2")
    assert before[0] == losses(folder)
    assert_same(before[1], load_file(folder / "step_000008" / "model.safetensors"))
    bpb, expected = (meta_of(path / "step_000008")["val_bpb"] for path in (folder, exact))
    assert bpb == pytest.approx(expected, rel=0.1) and bpb != expected
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    run("base_loss", "--split-tokens=512", "--device-batch-size=4", "-g", "half")


USER_ERRORS = [  # (command, message, folder that is removed first)
    ("tok_train --source=SOURCE --vocab-size=1000000", "at most", None),
    ("tok_train --source=SOURCE --vocab-size=99999999", "not possible", None),
    ("base_train BASE --head-dim=7", "must be even", None),
    ("base_train BASE", "tok_train", "tokenizer"),
    ("mid_train CHAT", "base_train", "base_checkpoints"),
    ("chat_sft CHAT", "mid_train", "mid_checkpoints"),
    ("chat_rl RL", "chat_sft", "chatsft_checkpoints"),
    ("chat_rl --task=Chess", "Chess.*SampleArithmetic", None),
    ("mid_train --tasks=Chess", "Chess.*SampleWorld", None),
    ("chat_sft CHAT --model-tag=d9", "d9.*d2", None),
    ("base_loss --model-step=77", "77.*4, 8", None),
    ("base_train BASE --total-batch-size=500", "use 256 or 512", None),
    ("base_train BASE --window-pattern=XY", "L, S and Q", None),
    ("base_train BASE --window-pattern=L --depth=3 --model-tag=d2 --resume-from-step=latest", "another run .*n_layer", None),
    ("base_train BASE --plain --resume-from-step=latest", "another run .*plain False -> True", None),
    ("base_train BASE --plain --window-pattern=SSSL", "a plain model has no windows", None),
    ("export --to=x --from=y", "not allowed with", None),
    ("base_train BASE --resume-from-step=newest", "neither a step nor", None),
    ("base_train BASE --resume-from-step=latest --model-tag=x", "no complete checkpoint", None),
    ("base_train BASE --total-batch-size=256 --resume-from-step=latest", "another run .total_batch_size 512 -> 256.*--model-tag", None),
    ("base_train BASE --source=/nowhere/at/all", "neither one of", None),
    ("base_train --depth=0", "--depth", None),
    ("base_train BASE --save-every=0", "at least 1, or -1", None),
    ("base_train BASE --aspect-ratio=1 --head-dim=2", "width at least 24", None),
    ("base_train BASE --n-kv-head=7", "must be a multiple", None),
    ("mid_train CHAT --num-epochs=0", "at least 0.001", None),
    ("chat_sft CHAT --device-batch-size=0", "at least 1, or -1", None),
]  # fmt: skip


@pytest.mark.parametrize("command, message, missing", USER_ERRORS, ids=[command for command, *_ in USER_ERRORS])
def test_user_errors_are_one_clear_line(base_dir, command, message, missing, capsys):
    if missing:
        shutil.rmtree(base_dir / missing)
    before = sorted(base_dir.glob("*_checkpoints/[!.]*/*"))
    lists = {"BASE": BASE, "CHAT": CHAT, "RL": RL}
    with pytest.raises((UserError, SystemExit)) as error:
        run(*(flag for word in command.split() for flag in lists.get(word, [word])))
    if error.type is SystemExit:  # a flag that is refused where it is parsed
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    else:
        assert re.search(message, str(error.value)) and str(error.value).count("\n") <= 1
    assert sorted(base_dir.glob("*_checkpoints/[!.]*/*")) == before, "nothing is moved, and no new folder appears"


@pytest.mark.parametrize("script", ["base_train", "mid_train", "chat_sft", "chat_rl", "base_loss", "base_eval", "chat_eval",
                                    "chat_cli", "chat_web", "export"])  # fmt: skip
@pytest.mark.parametrize("tag", ["..", ".", "a/b", "/abs", "", 300 * "x", "a\nb", "-x", ".hidden"])
def test_a_tag_that_cannot_be_a_folder_is_refused_before_anything_is_built(script, tag, capsys):
    with pytest.raises(SystemExit):
        run(script, f"--model-tag={tag}")
    assert "is not a valid folder name" in capsys.readouterr().err.splitlines()[-1]


def test_training_with_another_tokenizer_is_refused(base_dir):
    run("tok_train", "--source=SOURCE", "--vocab-size=600", "--max-chars=20000")
    with pytest.raises(UserError, match="another run .tokenizer"):
        run("base_train", *BASE, "--resume-from-step=latest")
    run("base_loss", "--split-tokens=512", "--device-batch-size=4")  # the model keeps its own tokenizer
