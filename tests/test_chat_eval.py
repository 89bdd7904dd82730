"""chat_eval: which tasks run, the ChatCORE metric, what is skipped and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager, engine, report, task_eval
from nanochat.common import UserError
from scripts import chat_eval
from scripts.chat_eval import CHATCORE, chat_core, chosen_tasks, main


def test_task_names_may_be_joined_and_repeated():
    assert chosen_tasks(["MMLU|GSM8K", " SampleWorld ", "MMLU"]) == ("MMLU", "GSM8K", "SampleWorld")


def test_chatcore_is_the_mean_of_centred_accuracies():
    """Three tasks at chance level and three at 0.3: (0 + 0 + 0 + 0.3 + 0.3 + 0.3) / 6."""
    baselines = dict(zip(CHATCORE, (0.25, 0.25, 0.25, 0.0, 0.0, 0.0)))
    results = {name: {"accuracy": b or 0.3, "baseline": b} for name, b in baselines.items()}
    assert chat_core(results) == pytest.approx(0.15)
    results["MMLU"]["accuracy"] = 1.0  # a perfect one adds a sixth
    assert chat_core(results) == pytest.approx(0.15 + 1 / 6)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The script with a fake model and fake tasks: (names of unreachable tasks, options of each run, base folder)."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    unreachable = set()
    runs = []

    def make_task(name, allow_unsafe_code):
        if name in unreachable:
            raise UserError(f"cannot load the data of {name}")
        return SimpleNamespace(baseline=0.25 if name in CHATCORE[:3] else 0.0, layers=("limits",))

    def run_task(task, model, tokenizer, engine, compute, **options):
        runs.append(options)
        return 0.4, 50

    monkeypatch.setattr(chat_eval, "make_task", make_task)
    monkeypatch.setattr(task_eval, "run_task", run_task)
    monkeypatch.setattr(chat_eval, "converse", lambda engine, tokenizer, questions: [{"role": "user", "content": questions[0]}])
    monkeypatch.setattr(engine, "Engine", lambda model, tokenizer: None)
    model = SimpleNamespace(get_device=lambda: torch.device("meta"))
    monkeypatch.setattr(checkpoint_manager, "load_model", lambda *args, **kwargs: (model, None, {"step": 7, "user_config": {"examples": ["Hi?"]}}))
    return unreachable, runs, tmp_path


def test_all_six_tasks_give_chatcore_in_output_file_and_report(fake, capsys):
    _, runs, base = fake
    main(["-i", "mid", "-x", "50", "-k", "0", "--device-type", "cpu"])
    out = capsys.readouterr().out
    core = (3 * (0.4 - 0.25) / 0.75 + 3 * 0.4) / 6
    assert f"ChatCORE {core:.4f}" in out and "40.00% +- 6.93" in out
    saved = json.loads((base / "report" / "chat_eval_mid.json").read_text())
    assert saved["scores"]["ChatCORE"] == pytest.approx(core) and saved["tasks"]["MMLU"]["n"] == 50
    (entry,) = report.read_jsonl(base / "report" / "report.jsonl")
    assert entry["data"] == saved and saved["stage"] == "mid" and saved["chat"][0]["content"] == "Hi?"
    assert saved["flags"]["given"] == {"stage": "mid", "max_problems": 50, "top_k": 0, "device_type": "cpu"}
    assert all(options["max_problems"] == 50 and options["top_k"] is None for options in runs)


def test_an_unreachable_task_is_skipped_with_a_line_and_there_is_no_chatcore(fake, capsys):
    unreachable, runs, base = fake
    unreachable.add("MMLU")
    main(["--device-type", "cpu"])
    out = capsys.readouterr().out
    assert "MMLU           skipped: cannot load the data of MMLU" in out
    assert "no ChatCORE" in out and len(runs) == 5
    assert "ChatCORE" not in json.loads((base / "report" / "chat_eval_sft.json").read_text())["scores"]


def test_an_unreachable_task_requested_by_name_is_an_error(fake):
    unreachable, _, base = fake
    unreachable.add("MMLU")
    with pytest.raises(UserError, match="data of MMLU"):
        main(["-a", "GSM8K|MMLU", "--device-type", "cpu"])
    unreachable.update(CHATCORE)
    with pytest.raises(UserError, match="none of the tasks"):
        main(["--device-type", "cpu"])
    assert not (base / "report").exists()


@pytest.mark.parametrize("arguments, message", [
    (["-n", "4"], "temperature 0"),
    (["-a", "Mmlu"], "unknown task Mmlu; choose from ARC-Easy"), (["-a", "|"], "unknown task"),
])  # fmt: skip
def test_flags_that_cannot_work_are_refused(fake, arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)
