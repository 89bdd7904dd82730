"""The report: JSON lines in, markdown and plots out, from nothing but what was logged."""

import json
import re

import pytest

from nanochat import report


def write_metrics(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table_after(text, heading):
    """The first markdown table after a heading, as a list of lists of cells."""
    section = text.split(f"## {heading}\n", 1)[1]
    lines = re.search(r"(^\|.*\n)+", section, re.M)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def test_the_final_table_has_stages_across_and_the_latest_number_of_each(base_dir):
    report.log("a", {"stage": "sft", "scores": {"MMLU": 0.25}})
    report.log("b", {"stage": "base", "scores": {"CORE": 0.1, "val_bpb": 1.5}})
    report.log("c", {"stage": "base", "scores": {"CORE": 0.125}})
    rows = [["metric", "base", "sft"], ["CORE", "0.1250", "-"], ["val_bpb", "1.5000", "-"], ["MMLU", "-", "0.2500"]]
    assert table_after(report.generate().read_text(), "Results") == rows


def test_a_section_shows_values_tables_samples_and_flags(base_dir):
    flags = {"given": {"depth": 4}, "all": {"depth": 4, "warmup_steps": 40}}
    report.log("Base", {"parameters": 1234567, "lr": 2e-5, "flags": flags, "pipe": "a|b\nc", "nothing": None})
    report.log("Chat", {"tasks": {"ARC": {"accuracy": 0.5, "n": 10}, "GSM8K": {"accuracy": 0.0}}})
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "```code```"}]
    report.log("Samples", {"samples": ["The sky is \x1b[34mblue", conversation]})
    text = report.generate().read_text()
    assert table_after(text, "Base")[1:4] == [["parameters", "1,234,567"], ["lr", "2e-05"], ["pipe", "a\\", "b<br>c"]]
    assert "| flags given | `--depth=4` |\n" in text
    assert "<details><summary>All flags</summary>\n\n| flag | value |\n| --- | --- |\n| depth | 4 |\n| warmup_steps | 40 |\n\n</details>" in text
    assert table_after(text, "Chat") == [["tasks", "accuracy", "n"], ["ARC", "0.5000", "10"], ["GSM8K", "0", ""]]
    assert "```text\nThe sky is \\x1b[34mblue\n```\n" in text
    assert "````text\nuser: hi\nassistant: ```code```\n````\n" in text


@pytest.mark.parametrize("reinforcement", [False, True])
def test_metrics_become_a_plot_and_the_training_time(base_dir, reinforcement):
    usage = {"tok_per_sec": 12345.0, "peak_memory": 3 * 2**29, "mfu": None}
    rows = [{"step": i, "loss": 5 - i / 10, "total_time": i * 60.0, **usage} for i in range(10)]
    rows.insert(5, {"step": 5, "val_bpb": 1.5, "total_time": 290.0})
    if reinforcement:
        rows += [{"step": 9, "reward": 0.5, "total_time": 9.0}, {"step": 9, "accuracy": 0.5, "accuracy_ci": 0.1, "total_time": 540.0}]
    path = write_metrics(base_dir / "metrics.jsonl", rows)  # from the base folder, so that that can be moved; once absolute
    report.log("Base model training", {"metrics": path if reinforcement else "metrics.jsonl"})
    text = report.generate().read_text()
    plots = list((base_dir / "report").glob("*.png"))
    assert len(plots) == 1 and f"![Base model training]({plots[0].name})" in text
    assert plots[0].read_bytes().startswith(b"\x89PNG") and plots[0].stat().st_size > 5000
    assert ["Base model training", "0:00:00", "0:09:00", "12,345", "", "1.5 GiB"] in table_after(text, "Time and memory")


def test_the_latest_conversation_follows_the_results(base_dir):
    call = "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>"
    messages = [{"role": "user", "content": "2*3?"}, {"role": "assistant", "content": f"{call}It is 6."}]
    report.log("Chat evaluation (mid)", {"stage": "mid", "chat": [{"role": "user", "content": "earlier"}]})
    report.log("Chat evaluation (sft)", {"stage": "sft", "chat": messages})
    results, _, rest = report.generate().read_text().partition("## A conversation with the model (sft, temperature 0)\n")
    assert "## Results" in results and "## Chat" not in results and "earlier" not in rest
    assert rest.startswith("\n```text\nuser: 2*3?\nassistant: [2*3 = 6]It is 6.\n```\n")


@pytest.mark.parametrize("rows", [[], [7], [{"step": 0, "loss": 3.0, "total_time": 1.0}], [{"step": 0, "val_bpb": None}]])
def test_missing_metrics_and_an_incomplete_line_are_ignored(base_dir, rows):
    report.log("run", {"metrics": write_metrics(base_dir / "metrics.jsonl", rows)})
    with open(base_dir / "report" / "report.jsonl", "a") as file:
        file.write('7\n{}\n{"section": "incomplete", "da\n')
    report.log("moved away", {"metrics": str(base_dir / "none.jsonl")})
    text = report.generate().read_text()
    assert "## run" in text and "## moved away" in text and "incomplete" not in text


def test_reset_logs_the_environment_and_retains_the_earlier_report(base_dir):
    report.log("old", {"x": 1})
    report.main(["reset"])
    report.log("new", {"x": 2})
    text = report.generate().read_text()
    assert "## new" in text and "## old" not in text
    environment = dict(table_after(text, "Environment")[1:])
    assert environment["torch"].startswith("2.") and int(environment["cpu cores"]) >= 1
    kept = [path for path in base_dir.iterdir() if path.name.startswith("report-")]
    assert len(kept) == 1 and "old" in (kept[0] / "report.jsonl").read_text()
