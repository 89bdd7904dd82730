"""The run scripts, the commands that documents quote, dev/estimate.py and dev/plot.py.

Fakes of python, torchrun and nvidia-smi record their arguments, so that speedrun.sh on eight GPUs takes a second; every
recorded command is then checked against the --help of its module. The slow tests run the scripts for real at toy size.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache

import pytest
from conftest import ROOT, write_program
from tiny import BYTES

from dev import estimate, plot
from nanochat import report
from nanochat.common import UserError
from nanochat.tokenizer import tokenizer_dir

# Records its arguments, fails for a command that matches $FAILS, and writes what stages.sh checks for: checkpoints and,
# unless the command matches $STOPS, lines of the report
FAKE = """
echo "$(basename "$0") $*" >>"$CALLS"
mkdir -p "$NANOCHAT_BASE_DIR/report" && cd "$NANOCHAT_BASE_DIR"
case "$*" in
    *--shards*) echo 123; exit ;;
    *"$FAILS"*) echo "error: fake failure"; exit 1 ;;
    *gen_identity*) touch identity_conversations.jsonl ;;
    *tok_train*) mkdir -p tokenizer; touch tokenizer/vocabulary.json ;;
    *base_train*) mkdir -p "base_checkpoints/${TAG:-d22}/step_000007" ;;
    *mid_train*) mkdir -p mid_checkpoints/d22/step_000007 ;;
esac
case "$*" in *"$STOPS"*) ;; *scripts.*) echo '{}' >>report/report.jsonl ;; esac
echo "output of $*"
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts, in which setup.sh does nothing and activating the environment puts `programs` first in PATH."""
    folder = tmp_path / "project"
    (folder / "dev").mkdir(parents=True)
    for name in ("speedrun.sh", "run1000.sh", "miniseries.sh", "dev/stages.sh"):
        shutil.copy(ROOT / name, folder / name)
    write_program(folder / "dev/setup.sh", 'echo "setup $*" >>"$CALLS"')
    write_program(folder / ".venv/bin/activate", f"PATH={tmp_path / 'programs'}:$PATH")
    return folder


@pytest.fixture
def run(project, tmp_path):
    """`run("speedrun.sh", gpus=8, STOPS="mid_train")` returns (exit code, output, recorded commands)."""
    calls, programs = tmp_path / "calls", tmp_path / "programs"
    for name in ("python", "torchrun"):
        write_program(programs / name, FAKE)

    def run(script, gpus=8, **variables):
        calls.write_text("")
        write_program(programs / "nvidia-smi", f'for i in $(seq {gpus}); do echo "GPU $i: NVIDIA H100"; done')
        env = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(calls),
               "NANOCHAT_BASE_DIR": "~/base", "STOPS": "-none-", "FAILS": "-none-"}  # fmt: skip
        done = subprocess.run(["bash", script], cwd=project, env={**env, **variables}, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def stages_of(calls):
    """The modules that were run, in order."""
    return [match[1] for line in calls if (match := re.search(r"-m (?:scripts|dev|nanochat)\.(\w+)", line))]


@lru_cache(maxsize=None)
def flags_of(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", shown))
    return flags | flags_of("scripts.base_train") if module == "dev.estimate" else flags  # it ignores those


def assert_flags_exist(commands):
    """Of each `... -m MODULE FLAGS`, the module exists and knows the flags."""
    commands = [match.groups() for line in commands if (match := re.search(r"-m ([\w.]+)(.*)", line))]
    assert commands
    for module, arguments in commands:
        assert set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", arguments)) <= flags_of(module), (module, arguments)


def test_documents_quote_commands_and_flags_that_exist():
    for document in ("README.md", "AGENTS.md"):
        text = (ROOT / document).read_text()
        assert_flags_exist(re.findall(r"python (-m (?:scripts|nanochat|dev)[\w.]*[^\n`#|&]*)", text))


# -----------------------------------------------------------------------------
# The scripts, with fakes


def test_shell_scripts_have_no_syntax_errors():
    for script in [*ROOT.glob("*.sh"), *ROOT.glob("dev/*.sh")]:
        subprocess.run(["bash", "-n", script], check=True)


def test_speedrun_runs_every_stage_once(run, tmp_path):
    code, output, calls = run("speedrun.sh", RL="1")
    assert code == 0, output
    assert calls[0] == "setup gpu"
    stages = stages_of(calls)
    stages[5:7] = sorted(stages[5:7])  # these two run concurrently
    assert stages == [
        "report", "gen_identity", "estimate", "estimate", "dataset", "dataset", "tok_train", "tok_eval", "base_train", "base_loss",
        "base_eval", "mid_train", "chat_sft", "chat_eval", "chat_rl", "chat_eval", "report", "chat_cli",
    ]  # fmt: skip
    assert_flags_exist(calls)
    text = "\n".join(calls)
    for command in ("dataset -n 8 --source=climbmix", "dataset -n 123 -w 8", "tok_train --source=climbmix --vocab-size=49152",
                    "torchrun --standalone --nproc-per-node=8 -m scripts.base_train",
                    "base_train -- --model-tag=d22 --depth=22 --target-param-data-ratio=9.4"):  # fmt: skip
        assert command in text
    assert "--resume-from-step" not in text
    assert ".chat_eval " in (tmp_path / "base/log/d22/chat_eval.log").read_text()
    # A second run skips what is finished; chat_sft and chat_rl run again, since their fakes save no checkpoint
    code, output, calls = run("speedrun.sh")
    assert code == 0 and "base_train: already done" in output
    assert [stage for stage in stages_of(calls) if stage not in ("estimate", "dataset")] == ["chat_sft", "report", "chat_cli"]
    assert not any("report reset" in line for line in calls)


def test_a_stopped_training_ends_the_script_and_resumes_when_it_is_run_again(run, tmp_path):
    code, output, calls = run("speedrun.sh", STOPS="scripts.mid_train")
    assert code == 1 and "error: mid_train was stopped; run this again" in output
    assert stages_of(calls)[-1] == "mid_train"
    code, output, calls = run("speedrun.sh")
    [training] = [line for line in calls if "_train" in line]
    assert code == 0 and "mid_train" in training and training.endswith("--resume-from-step=latest")
    shutil.rmtree(tmp_path / "base/base_checkpoints")  # a new start
    _, _, calls = run("speedrun.sh")
    assert any("base_train" in line and "--resume" not in line for line in calls)


@pytest.mark.parametrize("fails, last", [("dev.estimate", "estimate"), ("-n 123", "tok_eval"), ("base_loss", "base_loss")])
def test_an_error_ends_the_script(run, fails, last):
    code, output, calls = run("speedrun.sh", FAILS=fails)
    assert code == 1 and "error: fake failure" in output
    assert [stage for stage in stages_of(calls) if stage != "dataset"][-1] == last


def test_too_few_gpus_are_an_error_before_setup(run):
    code, output, calls = run("speedrun.sh", gpus=2)
    assert code == 1 and not calls
    assert output == "error: 8 GPUs are needed and this machine has 2. Use NPROC=2; the same run then takes longer\n"
    assert "no GPU was found" in run("miniseries.sh", gpus=0)[1]
    _, _, calls = run("speedrun.sh", gpus=2, NPROC="2")
    assert "torchrun --standalone --nproc-per-node=2 -m scripts.base_train" in "\n".join(calls)


@pytest.mark.parametrize("script, variables, trainings", [
    ("run1000.sh", {"BASE_FLAGS": "--fp8", "TAG": "d34"}, ["--depth=34 .*--target-param-data-ratio=20 .*--device-batch-size=-1 --fp8"]),
    ("miniseries.sh", {"DEPTHS": "4 6"}, ["--depth=4 --model-tag=mini_d4 ", "--depth=6 --model-tag=mini_d6 "]),
])  # fmt: skip
def test_the_other_scripts_train_other_models(run, script, variables, trainings):
    code, output, calls = run(script, **variables)
    assert code == 0, output
    assert_flags_exist(calls)
    for line, flags in zip([line for line in calls if "scripts.base_train" in line], trainings, strict=True):
        assert re.search(flags, line)


# -----------------------------------------------------------------------------
# The scripts, for real


@pytest.mark.slow
@pytest.mark.parametrize("script, printed, files, skipped", [
    ("speedrun.sh", ["nanochat: ", "CORE skipped"], ["report/report.md"], 8),
    ("miniseries.sh", ["bpb = ", "4 finished model(s)"], ["plots/miniseries.png", "plots/runs.png"], 5),
])  # fmt: skip
def test_a_script_runs_at_toy_size_and_again(project, tmp_path, script, printed, files, skipped):
    """With TINY=1, this Python and no data hub."""
    paths = [ROOT / name for name in ("dev/identity.json", "nanochat", "scripts", "tasks")]
    for path in [*paths, *(ROOT / "dev").glob("*.py")]:
        (project / path.relative_to(ROOT)).symlink_to(path)
    write_program(tmp_path / "programs/python", f'exec {sys.executable} "$@"')
    write_program(tmp_path / "programs/torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    base = tmp_path / "base"
    env = {"NANOCHAT_BASE_DIR": str(base), "CALLS": "/dev/null", "PYTHONPATH": str(project), "TINY": "1", "RL": "1"}
    outputs = []
    for _ in range(2):
        done = subprocess.run(["bash", script], cwd=project, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        outputs.append(done.stdout)
    assert all(text in outputs[0] for text in printed) and all((base / name).exists() for name in files)
    assert outputs[1].count("already done") == skipped


# -----------------------------------------------------------------------------
# The estimate


def test_estimate_agrees_with_an_independent_calculation(capsys):
    flags = "--depth 22 --vocab-size 49152 --ratio 9.4 --gpus 8 --mfu 0.5 --dollars-per-gpu-hour 3".split()
    estimate.main(flags)
    text = capsys.readouterr().out
    width = 22 * 64
    gates = 11 * 12 * (width // 128)  # of the value embeddings
    scaling = 22 * 12 * width**2 + gates + 49152 * width
    steps = round(9.4 * scaling / 2**20)
    spans = 6 * 2048 + 16 * 512  # six layers attend to the whole context, the others to a quarter
    flops = steps * 2**20 * (6 * scaling + 12 * width * spans)
    hours = flops / (8 * 989e12 * 0.5) / 3600
    columns = text.splitlines()[1].split()
    assert columns == ["pretraining", "d22", "1.42B", f"{scaling / 1e6:.0f}M", f"{steps * 2**20 / 1e9:.3g}B", f"{steps:,}", "1,048,576",
                       f"{flops:.2e}", f"{hours:.2f}", f"{hours * 24:.0f}"]
    assert f"in all {hours:.2f} hours and {hours * 24:.0f} dollars" in text
    estimate.main([*flags, "--shards"])
    shards = math.ceil(steps * 2**20 / 55e6)
    assert f"{shards} shard(s) of text" in text and capsys.readouterr().out == f"{shards}\n"


def test_estimate_follows_the_flags_of_base_train_for_several_depths(capsys):
    estimate.main(["--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=4", "--total-batch-size=512",
                   "--num-iterations=8", "--vocab-size=600", "--save-every=500", "--depth", "2", "6", "--chat"])  # fmt: skip
    _, first, second, chat, *_ = capsys.readouterr().out.splitlines()
    for line, depth in ((first, 2), (second, 6)):
        assert line.startswith(f"pretraining d{depth} ") and line.split()[4:7] == ["4.1k", "8", "512"]
    assert chat.startswith("midtraining")


def test_estimate_rejects_an_unknown_gpu_a_full_disk_and_a_tokenizer_of_another_size(base_dir, monkeypatch):
    with pytest.raises(UserError, match="is not known; known are"):
        estimate.main(["--depth=4", "--gpu=Abacus"])
    free = shutil.disk_usage(base_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=10**9))
    with pytest.raises(UserError, match=r"takes about \d+ GB and .* has space for 1 GB. Point NANOCHAT_BASE_DIR"):
        estimate.main(["--depth=4", "--check"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=10**12))
    estimate.main(["--depth=4", "--check"])
    BYTES.save(tokenizer_dir())
    with pytest.raises(UserError, match="has 265 tokens, not 32768. Use it with VOCAB_SIZE=265"):
        estimate.main(["--depth=4", "--check"])


# -----------------------------------------------------------------------------
# The plots


def test_fit_recovers_a_known_power_law():
    x = [10 ** (17 + i / 3) for i in range(8)]
    x0 = math.exp(sum(map(math.log, x)) / len(x))
    for a, b, c in ((0.6, 0.2, 0.15), (0.0, 0.9, 0.05), (0.75, 0.02, 0.8)):
        fit = plot.fit_power_law(x, [a + b * (value / x0) ** -c for value in x])
        assert fit["x0"] == pytest.approx(x0)
        assert (fit["a"], fit["b"], fit["c"]) == pytest.approx((a, b, c), abs=2e-3)
        assert max(map(abs, fit["residuals"])) < 1e-5
    assert plot.fit_power_law(x[:3], x[:3]) is None, "three points determine it"


def test_plots_of_runs_and_of_the_miniseries_skip_an_empty_run(base_dir, capsys):
    def write(tag, rows, end=""):
        path = base_dir / "base_checkpoints" / tag / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)

    for number in range(5):
        tag, flops = f"mini_d{number}", 10.0 ** (17 + number / 2)
        bpb = 0.6 + 0.2 * (flops / 1e18) ** -0.2
        rows = [{"step": step, "loss": 4 + 3 / step} for step in range(1, 41)]
        rows += [{"step": 20, "val_bpb": bpb + 1}, {"step": 40, "val_bpb": bpb, "core": 0.1 + 0.03 * number if number else None}]
        write(tag, rows, end='{"step": 41, "lo')
        report.log("Base model training", {"model tag": tag, "steps": 40, "training FLOPs": flops, "training tokens": 99})
    write("empty", [{"step": 1, "loss": float("nan")}, {"step": 2}, {"val_bpb": None}, 7])
    write("unfinished", [{"step": 1, "loss": 3.0}])
    plot.main([])
    text = capsys.readouterr().out
    assert "empty/metrics.jsonl is skipped" in text and "6 run(s)" in text and "5 finished model(s)" in text
    assert "0.2200" in text and re.search(r"bpb = 0\.(60|59)\d+ \+ ", text) and text.count("+0.0000") + text.count("-0.0000") == 5
    for name in ("runs.png", "miniseries.png"):
        assert (base_dir / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_plot_without_usable_input_is_a_user_error(base_dir):
    (base_dir / "incomplete.jsonl").write_text("{incomplete")
    for argv, message in (
        ([], "nothing to plot"),
        (["d99"], "there is no .*d99"),
        ([str(base_dir / "incomplete.jsonl")], "no run has a training step"),
    ):
        with pytest.raises(UserError, match=message):
            plot.main(argv)
