"""The report card of a run: JSON lines in, one page of markdown and its plots out.

    python -m nanochat.report reset       # start a report; an earlier one is renamed to report-DATE-TIME
    python -m nanochat.report generate    # write report/report.md from the log of the stages

A stage calls `log(section, data)`, which appends one line of JSON to report/report.jsonl. The page is
generated from these lines alone. Some keys of `data` have a meaning here:

    "stage"    "base", "mid", "sft" or "rl": the column of the final table
    "scores"   {metric: number}: that column's rows
    "metrics"  path of the run's metrics.jsonl, from the base folder: for a plot, training time, tokens per second and peak memory
    "flags"    {"given", "all"} of `flags.for_report`: the first are shown, the others folded away
    "chat"     messages, a conversation with the stage's model: the latest is shown near the top
    "samples"  list of texts, or of conversations (lists of {"role", "content"}): shown as code

All other keys are shown as a table. Only the main rank may call `log`.
"""

import json
import platform
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Iterable

from nanochat.common import CONTROLS, UserError, base_dir_path, get_base_dir, run_script
from nanochat.flags import make_parser

STAGES = ("base", "mid", "sft", "rl")
SPECIAL_KEYS = ("stage", "scores", "metrics", "flags", "chat", "samples")
BPB_NOTE = """Bits per byte of text, of conversations and of replies are measured on different data and targets (a reply is what
the assistant says, given what came before). Compare each with itself only.
"""


def log(section: str, data: dict) -> None:
    """Append one section: {"section", "time" (seconds since the epoch), "data"}."""
    path = get_base_dir() / "report" / "report.jsonl"
    path.parent.mkdir(exist_ok=True)
    append(path, {"section": section, "time": time.time(), "data": data})


def append(path: Path, row: dict) -> None:
    """Append a line of JSON, also after a line that a crash has truncated."""
    line = json.dumps(row, default=str) + "\n"
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut = file.read() not in (b"", b"\n")
        file.write(("\n" * cut + line).encode())


def read_jsonl(path: Path) -> list[dict]:
    """The objects in a file of JSON lines; none if it is missing or cannot be read. A truncated line is skipped."""
    rows = []
    with suppress(OSError, ValueError):  # ValueError: not a path
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_entries(path: Path) -> list[dict]:
    """The entries of a report.jsonl that can be shown; an other is named and skipped."""
    entries = []
    for entry in read_jsonl(path):
        try:
            data = entry["data"]
            page = section_text(entry["section"].lower(), data, None)
            page += final_table([entry])
            page += cost_table([entry], [[]])
            page += sample_text(data.get("chat", ""))
            page.encode()
            time.localtime(entry["time"])
            Path(data.get("metrics", ""))
            entries.append(entry)
        except Exception as error:  # it holds other kinds of values than `log` writes
            print(f"{path}: an entry is damaged and skipped ({error!r:.100})")
    return entries


def points(rows: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """The values of two keys, of the rows in which both are numbers that can be plotted."""
    numbers = [(row.get(x), row.get(y)) for row in rows]
    finite = [pair for pair in numbers if all(isinstance(n, (int, float)) and abs(n) < 1e30 for n in pair)]
    return [a for a, _ in finite], [b for _, b in finite]


def environment() -> dict:
    """The source, versions and machine of this run."""
    import psutil

    def output_of(*command):
        try:
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    versions = {package.name: package.version for package in distributions()}
    cpu = re.search(r"model name\s*: (.*)", output_of("cat", "/proc/cpuinfo"))  # Linux only
    return {
        "git commit": output_of("git", "rev-parse", "HEAD") or "not in git",
        "changed files": len(output_of("git", "status", "--porcelain").splitlines()),
        "python": platform.python_version(),
        **{name: versions.get(name, "not installed") for name in ("torch", "tiktoken", "rustbpe", "datasets")},
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
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def table(header: list, rows: Iterable[Iterable]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def sample_text(sample) -> str:
    """A text, or a conversation with one line per message, as a code block with a fence longer than any in the text.

    A tool call is shown as [6*7 = 42].
    """
    if not isinstance(sample, str):
        sample = "\n".join(f"{message['role']}: {message['content']}" for message in sample)
        call = r"<\|python_start\|>(.*?)<\|python_end\|><\|output_start\|>(.*?)<\|output_end\|>"
        sample = re.sub(call, r"[\1 = \2]", sample, flags=re.DOTALL)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sample)), default=0))
    return f"{fence}text\n{sample.translate(CONTROLS)}\n{fence}\n"


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if abs(seconds) < 1e12 else "unknown"  # 0:09:30


def section_text(section: str, data: dict, plot: str | None) -> str:
    """The section of one stage: its values, one table per value that is a table, plot, samples, all flags."""
    flags = data.get("flags", {})
    other = {key: value for key, value in data.items() if key not in SPECIAL_KEYS}
    tables = {key: value for key, value in other.items() if isinstance(value, dict) and dict in map(type, value.values())}
    plain = {key: value for key, value in other.items() if key not in tables} | data.get("scores", {})
    if given := flags.get("given"):
        texts = [f"--{name.replace('_', '-')}" + f"={value}" * (value is not True) for name, value in given.items()]
        plain["flags given"] = f"`{' '.join(texts)}`"
    parts = [f"## {section}\n"]
    if plain:
        parts.append(table(["", "value"], plain.items()))
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        cells = [[key, *(row.get(column, "") for column in columns)] for key, row in rows.items()]
        parts.append(table([name, *columns], cells))
    if plot:
        parts.append(f"![{section}]({plot})\n")
    parts += [sample_text(sample) for sample in data.get("samples", [])]
    if flags.get("all"):
        rows = table(["flag", "value"], flags["all"].items())
        parts.append(f"<details><summary>All flags</summary>\n\n{rows}\n</details>\n")
    return "\n".join(parts)


def final_table(entries: list[dict]) -> str:
    """A row per metric, a column per stage; of repeated measurements the last."""
    scores = {stage: {} for stage in STAGES}
    for entry in entries:
        scores.setdefault(entry["data"].get("stage"), {}).update(entry["data"].get("scores", {}))
    stages = [stage for stage in scores if scores[stage]]
    metrics = list(dict.fromkeys(metric for stage in stages for metric in scores[stage]))
    if not metrics:
        return "No stage has been evaluated yet.\n"
    cells = [[metric, *(scores[stage].get(metric, "-") for stage in stages)] for metric in metrics]
    rows = table(["metric", *stages], cells)
    return f"{rows}\n{BPB_NOTE}" if any("bpb" in metric for metric in metrics) else rows


def cost_table(entries: list[dict], runs: list[list[dict]]) -> str:
    """When each section was logged, and what its training took; `runs` holds its metrics, if it has any.

    Training time is without evaluations, speed and MFU are medians of the steps, memory is that of the main rank.
    """
    rows = []
    for entry, run in zip(entries, runs):
        keys = ("total_time", "tok_per_sec", "mfu", "peak_memory")
        seconds, speed, mfu, memory = (points(run, "step", key)[1] for key in keys)
        rows.append([
            entry["section"],
            duration(entry["time"] - entries[0]["time"]),
            duration(max(seconds)) if seconds else "",
            round(median(speed)) if speed else "",
            f"{100 * median(mfu):.1f}%" if mfu else "",
            f"{max(memory) / 2**30:.1f} GiB" if memory else "",
        ])
    return table(["section", "done after", "training", "tokens per second", "MFU", "peak memory"], rows)


# -----------------------------------------------------------------------------
# Plots


@dataclass
class Panel:
    """One pair of axes. A curve is (label, x, y, options of matplotlib's errorbar); labels go into a legend beside the axes."""

    title: str
    x_label: str
    curves: list[tuple[str | None, list[float], list[float], dict]]
    log_x: bool = False


def draw(panels: list[list[Panel]], path: Path, title: str = "") -> None:
    """Panels in rows, as a PNG. All curves of nanochat are drawn here."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(5.5 * len(panels[0]), 3.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(panels[0]), squeeze=False)
    for axes, panel in zip(grid.flat, [panel for row in panels for panel in row]):
        curves = [curve for curve in panel.curves if curve[1]]
        for label, x, y, options in curves:
            axes.errorbar(x, y, label=label, **options)
        if panel.log_x and curves:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}".replace("e+", "e"))
            axes.tick_params(axis="x", labelsize=8)
            axes.minorticks_off()
        if not curves:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="gray")
        elif not any(options.get("yerr") for *_, options in curves):
            # The first tenth of a curve and its highest percent would flatten the rest
            settled = [sorted(y[len(y) // 10 :]) for _, _, y, _ in curves]
            high = max(y[-1 - len(y) // 100] for y in settled)
            low = min(min(y) for _, _, y, _ in curves)
            margin = 0.06 * (high - low) or 0.05
            axes.set_ylim(low - margin, high + margin)
        if any(label for label, *_ in curves):
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.02))
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_xlabel(panel.x_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=110)


def draw_run(rows: list[dict], title: str, path: Path) -> None:
    """Training loss and validation bits per byte of a run; of reinforcement learning, reward and accuracy with its 95% interval."""
    line, dots = {"linewidth": 1.2}, {"marker": "o", "markersize": 4, "capsize": 3}
    curves = [("loss", "training loss (nats per token)", line), ("val_bpb", "validation bits per byte", dots)]
    if any("reward" in row for row in rows):
        curves = [("reward", "mean reward of the step's answers", line),
                  ("accuracy", "accuracy on held-out questions", dots)]
    panels = []
    for key, label, style in curves:
        x, y = points(rows, "step", key)
        intervals = [abs(half) for half in points(rows, key, f"{key}_ci")[1]]
        style |= {"color": "#2a6f97", "yerr": intervals if len(intervals) == len(y) else None}
        if y:
            label += f": {y[-1]:.3f} at the end"
        panels.append(Panel(label, "step", [(None, x, y, style)]))
    draw([panels], path, title)


# -----------------------------------------------------------------------------
# Commands


def generate() -> Path:
    """Write report.md and its plots; returns its path. Raises UserError if nothing has been logged."""
    folder = base_dir_path() / "report"
    source = folder / "report.jsonl"
    entries = read_entries(source)
    if not entries:
        raise UserError(f"{source} is empty or missing; run a stage first, for instance scripts.base_train")
    chats = [entry["data"] for entry in entries if entry["data"].get("chat")]
    environments = [entry["data"] for entry in entries if entry["section"] == "Environment"]
    stages = [entry for entry in entries if entry["section"] != "Environment"]
    runs = [read_jsonl(base_dir_path() / entry["data"].get("metrics", "")) for entry in stages]

    begin = time.strftime("%Y-%m-%d %H:%M", time.localtime(entries[0]["time"]))
    page = [
        "# nanochat report\n",
        f"Started {begin}, {duration(entries[-1]['time'] - entries[0]['time'])} until the last stage.\n",
        "## Results\n",
        final_table(stages),
    ]
    if chats:
        page += [f"## A conversation with the model ({chats[-1].get('stage')}, temperature 0)\n", sample_text(chats[-1]["chat"])]
    page += ["## Time and memory\n", cost_table(stages, runs)]
    for number, (entry, rows) in enumerate(zip(stages, runs)):
        plot = None
        if rows:
            plot = f"{number:02d}-{re.sub('[^a-z0-9]+', '-', entry['section'].lower())}.png"
            draw_run(rows, entry["section"], folder / plot)
        page.append(section_text(entry["section"], entry["data"], plot))
    page.append(section_text("Environment", environments[-1] if environments else environment(), None))
    path = folder / "report.md"
    path.write_text("\n".join(page), encoding="utf-8")
    return path


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=["reset", "generate"], nargs="?", default="generate")
    if parser.parse_args(argv).command == "reset":
        folder = base_dir_path() / "report"
        if (folder / "report.jsonl").exists():
            folder.rename(folder.with_name(time.strftime("report-%Y%m%d-%H%M%S")))
        log("Environment", environment())
        print(f"started a report: {folder / 'report.jsonl'}")
    else:
        path = generate()
        results, _, _ = path.read_text(encoding="utf-8").partition("## Time and memory")
        print(f"{results}\nwritten to {path}")


if __name__ == "__main__":
    run_script(main)
