"""The report card of a run: JSON lines in, one page of markdown and its plots out.

    python -m nanochat.report reset       # start a report; an earlier one is renamed
    python -m nanochat.report generate    # write report/report.md from the log of the stages

A stage calls `log(section, data)`, which appends one line of JSON to report/report.jsonl. The page is
generated from these lines alone. Four keys of `data` have a meaning here:

    "stage"    "base", "mid", "sft" or "rl": the column of the final table
    "scores"   {metric: number}: that column's rows
    "metrics"  path of the run's metrics.jsonl: for a plot and the training time
    "samples"  list of texts, or of conversations (lists of {"role", "content"}): shown verbatim

All other keys are shown as a table. Only the main rank may call `log`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nanochat.common import UserError, base_dir_path, get_base_dir, run_script

STAGES = ("base", "mid", "sft", "rl")
SPECIAL_KEYS = ("stage", "scores", "metrics", "samples")


def report_dir() -> Path:
    return base_dir_path() / "report"


def log(section: str, data: dict) -> None:
    """Append one section: {"section", "time" (seconds since the epoch), "data"}."""
    line = json.dumps({"section": section, "time": time.time(), "data": data}, default=str)
    path = get_base_dir() / "report" / "report.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The objects in a file of JSON lines. A line that a crash has truncated is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def environment() -> dict:
    """The source, versions and machine of this run."""
    import psutil

    root = Path(__file__).resolve().parent.parent

    def output_of(*command):
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    def version_of(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    cpu = re.search(r"model name\s*: (.*)", output_of("cat", "/proc/cpuinfo"))  # Linux only
    return {
        "git commit": output_of("git", "rev-parse", "HEAD") or "not in git",
        "changed files": len(output_of("git", "status", "--porcelain").splitlines()),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "tiktoken", "rustbpe", "datasets")},
        "system": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu cores": psutil.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "gpus": output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader") or "none",
    }


# -----------------------------------------------------------------------------
# Markdown


def cell(value) -> str:
    """One value in a table."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def table(header: list, rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def fenced(text: str) -> str:
    """`text` as a code block, with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def sample_text(sample) -> str:
    """A sample as text: a conversation has one line per message."""
    if isinstance(sample, str):
        return sample
    return "\n".join(f"{message['role']}: {message['content']}" for message in sample)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m {seconds:02d}s" if hours else f"{minutes}m {seconds:02d}s"


def section_text(section: str, data: dict, plot: str | None) -> str:
    """The section of one stage: its values, one table per value that is a table, plot, samples."""
    tables = {key: value for key, value in data.items() if is_table(value) and key not in SPECIAL_KEYS}
    plain = {key: value for key, value in data.items() if key not in tables and key not in SPECIAL_KEYS}
    parts = [f"## {section}\n"]
    plain.update(data.get("scores", {}))
    if plain:
        parts.append(table(["", "value"], [[key, value] for key, value in plain.items()]))
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        parts.append(table([name, *columns], [[key, *(row.get(c, "") for c in columns)] for key, row in rows.items()]))
    if plot:
        parts.append(f"![{section}]({plot})\n")
    parts += [fenced(sample_text(sample)) for sample in data.get("samples", [])]
    return "\n".join(parts)


def is_table(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(row, dict) for row in value.values())


def final_table(entries: list[dict]) -> str:
    """A row per metric, a column per stage; of repeated measurements the last."""
    scores = {stage: {} for stage in STAGES}
    for entry in entries:
        scores.setdefault(entry["data"].get("stage"), {}).update(entry["data"].get("scores", {}))
    stages = [stage for stage in scores if scores[stage]]
    metrics = list(dict.fromkeys(metric for stage in stages for metric in scores[stage]))
    if not metrics:
        return "No stage has been evaluated yet.\n"
    return table(["metric", *stages], [[m, *(scores[stage].get(m, "-") for stage in stages)] for m in metrics])


def clock_table(entries: list[dict], training_time: dict[int, float]) -> str:
    """When each section was logged, and how long its training took without evaluations."""
    start = entries[0]["time"]
    rows = [
        [e["section"], duration(e["time"] - start), duration(training_time[i]) if i in training_time else ""]
        for i, e in enumerate(entries)
    ]
    return table(["section", "done after", "of which training"], rows)


# -----------------------------------------------------------------------------
# Plots


def draw(rows: list[dict], title: str, path: Path) -> None:
    """A run's curves as a PNG: a value of each training step on the left, evaluations on held-out data on the right.

    For reinforcement learning: the reward by step, and the accuracy of greedy answers with its 95% interval by training
    time. Otherwise: training loss and validation bits per byte.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    if any("reward" in row for row in rows):
        curves = ("reward", "mean reward of the step's answers"), ("accuracy", "accuracy on held-out questions")
    else:
        curves = ("loss", "training loss (nats per token)"), ("val_bpb", "validation bits per byte")
    for axes, (name, label), by_time in ((left, curves[0], False), (right, curves[1], True)):
        points = [
            (row["total_time"] / 60 if by_time else row["step"], row[name], row.get(f"{name}_ci"))
            for row in rows
            if row.get(name) is not None
        ]
        if points:
            x, y, intervals = zip(*points)
            axes.plot(x, y, color="#2a6f97", **({"marker": "o", "markersize": 4} if by_time else {"linewidth": 1.2}))
            if None not in intervals:
                low, high = ([value + sign * ci for value, ci in zip(y, intervals)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color="#2a6f97", alpha=0.15, linewidth=0)
            axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(0, 6), textcoords="offset points", ha="right")
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="gray")
        axes.set(xlabel="training time (minutes)" if by_time else "step", ylabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# Commands


def reset() -> None:
    """Start a report. An existing one is renamed to report-DATE-TIME."""
    folder = report_dir()
    if (folder / "report.jsonl").exists():
        folder.rename(folder.with_name(time.strftime("report-%Y%m%d-%H%M%S")))
    log("Environment", environment())


def generate() -> Path:
    """Write report.md and its plots; returns its path. Raises UserError if nothing has been logged."""
    folder = report_dir()
    source = folder / "report.jsonl"
    entries = read_jsonl(source) if source.exists() else []
    if not entries:
        raise UserError(f"{source} is empty or missing; run a stage first, for instance scripts.base_train")
    if not any(entry["section"] == "Environment" for entry in entries):
        entries.insert(0, {"section": "Environment", "time": entries[0]["time"], "data": environment()})
    sections, training_time = [], {}
    for number, entry in enumerate(entries):
        plot, metrics = None, entry["data"].get("metrics")
        if metrics and Path(metrics).exists() and (rows := read_jsonl(Path(metrics))):
            plot = f"{number:02d}-{re.sub('[^a-z0-9]+', '-', entry['section'].lower())}.png"
            draw(rows, entry["section"], folder / plot)
            training_time[number] = rows[-1].get("total_time", 0.0)
        sections.append(section_text(entry["section"], entry["data"], plot))
    begin = time.strftime("%Y-%m-%d %H:%M", time.localtime(entries[0]["time"]))
    page = [
        "# nanochat report\n",
        f"Started {begin}, {duration(entries[-1]['time'] - entries[0]['time'])} until the last stage.\n",
        "## Results\n",
        final_table(entries),
        "## Wall clock\n",
        clock_table(entries, training_time),
        *sections,
    ]
    path = folder / "report.md"
    path.write_text("\n".join(page), encoding="utf-8")
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["reset", "generate"], nargs="?", default="generate")
    if parser.parse_args(argv).command == "reset":
        reset()
        print(f"started a report: {report_dir() / 'report.jsonl'}")
    else:
        path = generate()
        results, _, _ = path.read_text(encoding="utf-8").partition("## Wall clock")
        print(f"{results}\nwritten to {path}")


if __name__ == "__main__":
    run_script(main)
