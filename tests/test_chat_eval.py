"""chat_eval's own decisions: which tasks run, what counts as ChatCORE, what is skipped and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager, engine, report, task_eval
from nanochat.common import UserError
from scripts import chat_eval
from scripts.chat_eval import CHATCORE, chat_core, chosen_tasks, main


def test_task_names_are_joined_repeated_and_defaulted():
    assert chosen_tasks(None) == CHATCORE
    assert chosen_tasks(["MMLU|GSM8K", " SampleWorld ", "MMLU"]) == ("MMLU", "GSM8K", "SampleWorld")
    with pytest.raises(UserError, match="unknown task Mmlu; choose from ARC-Easy"):
        chosen_tasks(["Mmlu"])
    with pytest.raises(UserError):
        chosen_tasks(["|"])


def test_chatcore_is_the_mean_of_centred_accuracies():
    """Three tasks at chance level and three at 0.3: (0 + 0 + 0 + 0.3 + 0.3 + 0.3) / 6."""
    baselines = dict(zip(CHATCORE, (0.25, 0.25, 0.25, 0.0, 0.0, 0.0)))
    results = {name: {"accuracy": b or 0.3, "baseline": b} for name, b in baselines.items()}
    assert chat_core(results) == pytest.approx(0.15)
    results["MMLU"]["accuracy"] = 1.0  # a perfect one adds a sixth
    assert chat_core(results) == pytest.approx(0.15 + 1 / 6)
    del results["HumanEval"]
    assert chat_core(results) is None


class FakeTask:
    def __init__(self, baseline):
        self.baseline, self.layers = baseline, ("limits",)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A run with everything beneath the script replaced: which tasks are out of reach, and what the others score."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    out_of_reach = set()
    asked = []

    def make_task(name, allow_unsafe_code):
        if name in out_of_reach:
            raise UserError(f"cannot load the data of {name}")
        return FakeTask(0.25 if name in CHATCORE[:3] else 0.0)

    def run_task(task, model, tokenizer, engine, compute, **options):
        asked.append(options)
        return 0.4, 50

    monkeypatch.setattr(chat_eval, "make_task", make_task)
    monkeypatch.setattr(task_eval, "run_task", run_task)
    monkeypatch.setattr(engine, "Engine", lambda model, tokenizer: None)
    model = SimpleNamespace(get_device=lambda: torch.device("meta"))
    monkeypatch.setattr(checkpoint_manager, "load_model", lambda *args, **kwargs: (model, None, {"step": 7}))
    return out_of_reach, asked, tmp_path


def test_all_six_give_chatcore_in_print_file_and_report(fake, capsys):
    _, asked, base = fake
    main(["-i", "mid", "-x", "50", "-k", "0", "--device-type", "cpu"])
    out = capsys.readouterr().out
    core = (3 * (0.4 - 0.25) / 0.75 + 3 * 0.4) / 6
    assert f"ChatCORE {core:.4f}" in out and "40.00% +- 6.93" in out
    written = json.loads((base / "report" / "chat_eval_mid.json").read_text())
    assert written["scores"]["ChatCORE"] == pytest.approx(core) and written["tasks"]["MMLU"]["n"] == 50
    (entry,) = report.read_jsonl(base / "report" / "report.jsonl")
    assert entry["data"] == written and entry["data"]["stage"] == "mid"
    assert all(options["max_problems"] == 50 and options["top_k"] is None for options in asked)


def test_what_is_out_of_reach_is_skipped_with_a_line_and_then_there_is_no_chatcore(fake, capsys):
    out_of_reach, asked, base = fake
    out_of_reach.add("MMLU")
    main(["--device-type", "cpu"])
    out = capsys.readouterr().out
    assert "MMLU           skipped: cannot load the data of MMLU" in out
    assert "no ChatCORE" in out and len(asked) == 5
    assert "ChatCORE" not in json.loads((base / "report" / "chat_eval_sft.json").read_text())["scores"]


def test_what_was_asked_for_by_name_is_not_skipped(fake):
    out_of_reach, _, base = fake
    out_of_reach.add("MMLU")
    with pytest.raises(UserError, match="data of MMLU"):
        main(["-a", "GSM8K|MMLU", "--device-type", "cpu"])
    out_of_reach.update(CHATCORE)
    with pytest.raises(UserError, match="none of the tasks"):
        main(["--device-type", "cpu"])
    assert not (base / "report").exists()


@pytest.mark.parametrize("arguments, says", [
    (["-n", "4"], "temperature 0"), (["-a", "Nope"], "unknown task"),
])  # fmt: skip
def test_flags_that_cannot_work_are_refused(fake, arguments, says):
    with pytest.raises(UserError, match=says):
        main(arguments)
