"""chat_eval: which tasks run, the ChatCORE metric, what is skipped and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager, engine, report, task_eval
from nanochat.common import UserError
from scripts import chat_eval
from scripts.chat_eval import CHATCORE, main


@pytest.fixture
def fake(base_dir, monkeypatch):
    """The script with a fake model and fake tasks: (names of unreachable tasks, options of each run)."""
    unreachable, runs = set(), []

    def make_task(name, allow_unsafe_code):
        if name in unreachable:
            raise UserError(f"cannot load the data of {name}")
        return SimpleNamespace(baseline=0.25 if name in CHATCORE[:3] else 0.0, layers=("limits",))

    def count_right(task, model, tokenizer, engine, compute, **options):
        runs.append(options)
        return torch.tensor([0, 1, 0, 2, 0])

    monkeypatch.setattr(chat_eval, "make_task", make_task)
    monkeypatch.setattr(task_eval, "count_right", count_right)
    monkeypatch.setattr(chat_eval, "converse", lambda engine, tokenizer, questions: [{"role": "user", "content": questions[0]}])
    monkeypatch.setattr(engine, "Engine", lambda model, tokenizer, compiled: None)
    model = torch.nn.Identity()
    model.get_device = lambda: torch.device("meta")
    meta = {"step": 7, "user_config": {"examples": ["Hi?"]}}
    monkeypatch.setattr(checkpoint_manager, "load_model", lambda *args, **kwargs: (model, None, meta))
    return unreachable, runs


def test_all_six_tasks_give_chatcore_in_output_and_report(fake, base_dir, capsys):
    """The mean of the accuracies, 0.4, of which three are centred by a baseline of 0.25."""
    main(["-i", "mid", "-x", "50", "-k", "0", "--device-type", "cpu"])
    core = (3 * (0.4 - 0.25) / 0.75 + 3 * 0.4) / 6
    out = capsys.readouterr().out
    assert f"ChatCORE {core:.4f}" in out and "40.00% +- 21.91" in out
    [entry] = report.read_jsonl(base_dir / "report" / "report.jsonl")
    data = entry["data"]
    assert data["scores"]["ChatCORE"] == pytest.approx(core) and data["tasks"]["MMLU"]["n"] == 5
    assert data["stage"] == "mid" and data["chat"][0]["content"] == "Hi?"
    assert data["flags"]["given"] == {"stage": "mid", "max_problems": 50, "top_k": 0, "device_type": "cpu"}
    assert all(options["max_problems"] == 50 and options["top_k"] is None for options in fake[1])


def test_an_unreachable_task_is_skipped_with_a_line_unless_it_is_requested_by_name(fake, base_dir, capsys):
    unreachable, runs = fake
    unreachable.add("MMLU")
    main(["--device-type", "cpu"])
    out = capsys.readouterr().out
    assert "MMLU           skipped: cannot load the data of MMLU" in out and "no ChatCORE" in out and len(runs) == 5
    [entry] = report.read_jsonl(base_dir / "report" / "report.jsonl")
    assert "ChatCORE" not in entry["data"]["scores"]
    with pytest.raises(UserError, match="data of MMLU"):
        main(["-a", "GSM8K|SampleWorld", "-a", "MMLU", "--device-type", "cpu"])
    assert len(runs) == 5, "it is an error at the start"
    unreachable.update(CHATCORE)
    with pytest.raises(UserError, match="none of the tasks"):
        main(["--device-type", "cpu"])


@pytest.mark.parametrize("arguments, message", [
    (["-n", "4"], "temperature 0"), (["-a", "Mmlu"], "unknown task 'Mmlu'; choose from ARC-Easy.*or name a file"), (["-a", "|"], "unknown task"),
])  # fmt: skip
def test_flags_that_cannot_work_are_refused(fake, arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)
