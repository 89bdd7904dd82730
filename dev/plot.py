"""Plots of runs: loss curves, and the miniseries with a power law fitted to it.

    python -m dev.plot                       # the runs of all base models, and the miniseries
    python -m dev.plot d20 d22               # these runs, by tag or by the path of their metrics.jsonl
    python -m dev.plot --add mini_d12        # append a line on this run to miniseries.jsonl

Reads only JSON lines that runs have written (each run's metrics.jsonl, report.jsonl, and miniseries.jsonl with one line per
model), so runs can be plotted anywhere and while they train. Plots go to plots/ in the base folder; the fit,
bpb = a + b * (C / C0)^-c with C the training FLOPs, is printed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from nanochat.common import UserError, atomic, base_dir_path, get_base_dir, run_script
from nanochat.report import read_jsonl, table

GPT2_CORE = 0.2565  # of GPT-2 with 1.6 billion parameters


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="tag of a base model, or path of a metrics.jsonl (default: all base models)")
    parser.add_argument("--miniseries", type=Path, help="file of JSON lines, one per model (default: miniseries.jsonl in the base folder)")
    parser.add_argument("--out", type=Path, help="folder for the plots (default: plots in the base folder)")
    parser.add_argument("--add", metavar="TAG", help="only append a line on this finished run to the miniseries")
    args = parser.parse_args(argv)

    series_path = args.miniseries or base_dir_path() / "miniseries.jsonl"
    if args.add:
        add_to_series(args.add, series_path)
        return
    names = args.runs or sorted(path.parent.name for path in base_dir_path().glob("base_checkpoints/*/metrics.jsonl"))
    if not names and not series_path.exists():
        raise UserError(f"nothing to plot: no run in {base_dir_path() / 'base_checkpoints'} and no {series_path}; train a model first")
    out = args.out or get_base_dir() / "plots"
    out.mkdir(parents=True, exist_ok=True)
    if names:
        draw_runs([load_run(name) for name in names], out / "runs.png")
        print(f"{len(names)} run(s): {out / 'runs.png'}")
    if args.miniseries or series_path.exists():
        series = load_series(series_path)
        fit = fit_power_law(*points(series, "training FLOPs", "val bpb"))
        draw_series(series, fit, out / "miniseries.png")
        print(series_text(series, fit), end="")
        print(f"miniseries of {len(series)} models: {out / 'miniseries.png'}")


# -----------------------------------------------------------------------------
# Input


def load_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines, without incomplete lines. Raises UserError if there are none."""
    if not path.exists():
        raise UserError(f"there is no {path}")
    rows = [row for row in read_jsonl(path) if isinstance(row, dict)]
    if not rows:
        raise UserError(f"{path} holds no line of JSON that can be plotted")
    return rows


def points(rows: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """The values of two keys, of the rows in which both are finite numbers."""
    pairs = [(row.get(x), row.get(y)) for row in rows]
    pairs = [pair for pair in pairs if all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def finished_runs() -> dict[str, dict]:
    """{tag: what base_train logged when it finished}, the latest of each tag, from this report and earlier ones."""
    entries = [row for path in base_dir_path().glob("report*/report.jsonl") for row in read_jsonl(path) if isinstance(row, dict)]
    entries = [row for row in entries if row.get("section") == "Base model training"]
    return {row["data"]["model tag"]: row["data"] for row in sorted(entries, key=lambda row: row["time"])}


def load_run(name: str) -> dict:
    """{"name", "rows" of metrics.jsonl, "flops" per step}; "flops" is None for a run that has not finished."""
    path = Path(name)
    if path.suffix != ".jsonl":
        path = base_dir_path() / "base_checkpoints" / name / "metrics.jsonl"
    tag = path.parent.name
    entry = finished_runs().get(tag)
    return {"name": tag, "rows": load_lines(path), "flops": entry["training FLOPs"] / entry["steps"] if entry else None}


def load_series(path: Path) -> list[dict]:
    """The miniseries, sorted by FLOPs."""
    rows = [row for row in load_lines(path) if points([row], "training FLOPs", "val bpb")[0]]
    if not rows:
        raise UserError(f"no line of {path} has both \"training FLOPs\" and \"val bpb\"; python -m dev.plot --add TAG writes such lines")
    return sorted(rows, key=lambda row: row["training FLOPs"])


def add_to_series(tag: str, path: Path) -> None:
    """Append a line on a finished run to the miniseries; it replaces an earlier one with this tag."""
    entry = finished_runs().get(tag)
    if entry is None:
        raise UserError(f"no base model tagged {tag!r} has finished training, by the reports in {base_dir_path()}")
    core = points(load_run(tag)["rows"], "step", "core")[1]
    copied = ("depth", "parameters", "scaling parameters", "training tokens", "training FLOPs", "training minutes")
    line = {"tag": tag, **{key: entry.get(key) for key in copied}, "val bpb": entry["scores"]["val bpb"], "CORE": core[-1] if core else None}
    line["training FLOPs"] = float(line["training FLOPs"])
    others = [row for row in read_jsonl(path) if row.get("tag") != tag] if path.exists() else []
    with atomic(path) as tmp:
        tmp.write_text("".join(json.dumps(row) + "\n" for row in [*others, line]), encoding="utf-8")
    print(json.dumps(line))


# -----------------------------------------------------------------------------
# The power law


def fit_power_law(x: list[float], y: list[float]) -> dict | None:
    """y = a + b * (x / x0)^-c by least squares: {"a", "b", "c", "x0", "residuals"}; None for fewer than 4 different x.

    x0 is the geometric mean of x. For a given c, a and b solve a linear problem, so only c is searched, on a grid that is
    refined three times. a, the irreducible loss, is at least 0.
    """
    import numpy as np

    if len(set(x)) < 4:
        return None
    x, y = np.array(x, float), np.array(y, float)
    x0 = float(np.exp(np.log(x).mean()))

    def solve(c):
        power = (x / x0) ** -c  # (n,)
        a, b = np.linalg.lstsq(np.stack([np.ones_like(power), power], axis=1), y, rcond=None)[0]
        if a < 0:
            a, b = 0.0, (power @ y) / (power @ power)
        residuals = y - (a + b * power)
        return float(residuals @ residuals), float(a), float(b), float(c), residuals.tolist()

    low, high = 1e-3, 3.0
    for _ in range(4):
        grid = np.geomspace(low, high, 400)
        best = min(range(len(grid)), key=lambda i: solve(grid[i])[0])
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    _, a, b, c, residuals = solve(grid[best])
    return {"a": a, "b": b, "c": c, "x0": x0, "residuals": residuals}


def series_text(series: list[dict], fit: dict | None) -> str:
    """The miniseries as a table, and the power law."""
    columns = ("tag", "scaling parameters", "training tokens", "training FLOPs", "training minutes", "val bpb", "CORE")
    rows = [["-" if row.get(column) is None else row[column] for column in columns] for row in series]
    if fit is None:
        return table([*columns], rows) + "A power law needs four models of different sizes.\n"
    rows = [[*row, f"{residual:+.4f}"] for row, residual in zip(rows, fit["residuals"])]
    spread = math.sqrt(sum(residual**2 for residual in fit["residuals"]) / len(rows))
    return (
        table([*columns, "bpb - fit"], rows)
        + f"bpb = {fit['a']:.4f} + {fit['b']:.4f} * (FLOPs / {fit['x0']:.3g})^-{fit['c']:.4f}; root mean square residual {spread:.4f}\n"
    )


# -----------------------------------------------------------------------------
# Plots


def new_figure(width: float, height: float, rows: int, columns: int):
    """(figure, axes) without pyplot, which needs a window system and has global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in axes.flat:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_runs(runs: list[dict], path: Path) -> None:
    """Training loss (above) and validation bits per byte (below) by step (left) and by training FLOPs (right)."""
    figure, axes = new_figure(12, 8, 2, 2)
    kinds = (("loss", "training loss (nats per token)"), ("val_bpb", "validation bits per byte"))
    for row, (key, label) in zip(axes, kinds):
        settled, left = [], math.inf  # the axis shows values after the first tenth of each run; earlier ones would flatten the rest
        for number, run in enumerate(runs):
            steps, values = points(run["rows"], "step", key)
            settled += [value for step, value in zip(steps, values) if step >= steps[-1] / 10]
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "linewidth": 1.2}
            style |= {"marker": "o", "markersize": 3} if key == "val_bpb" else {}
            row[0].plot(steps, values, label=run["name"], **style)
            if run["flops"] and steps:
                row[1].plot([step * run["flops"] for step in steps], values, **style)
                left = min(left, run["flops"] * steps[-1] / 50)
        for one, name in zip(row, ("step", "training FLOPs (finished runs)")):
            one.set(xlabel=name, ylabel=label)
            if settled:
                margin = 0.05 * (max(settled) - min(settled)) or 0.05
                one.set_ylim(min(settled) - margin, max(settled) + margin)
            else:
                one.text(0.5, 0.5, "not measured", ha="center", va="center", transform=one.transAxes, color="gray")
        if left < math.inf:
            row[1].set(xscale="log", xlim=(left, None))
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_series(series: list[dict], fit: dict | None, path: Path) -> None:
    """Validation bits per byte with the power law (left), and CORE (right), by training FLOPs."""
    import numpy as np

    figure, (left, right) = new_figure(12, 4.6, 1, 2)
    for axes, key, label in ((left, "val bpb", "validation bits per byte"), (right, "CORE", "CORE")):
        rows = [row for row in series if points([row], "training FLOPs", key)[0]]
        axes.set(xlabel="training FLOPs", ylabel=label, xscale="log")
        axes.margins(x=0.12, y=0.1)
        axes.plot([row["training FLOPs"] for row in rows], [row[key] for row in rows], "o", color="C0")
        for row in rows:
            axes.annotate(row.get("tag", ""), (row["training FLOPs"], row[key]), xytext=(5, 5), textcoords="offset points", fontsize=8)
        if not rows:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="gray")
    if fit:
        flops = points(series, "training FLOPs", "val bpb")[0]
        x = np.geomspace(min(flops) / 1.5, max(flops) * 3, 100)
        words = f"{fit['a']:.3f} + {fit['b']:.3f} (C / {fit['x0']:.2g})$^{{-{fit['c']:.3f}}}$"
        left.plot(x, fit["a"] + fit["b"] * (x / fit["x0"]) ** -fit["c"], color="gray", linewidth=1, label=words)
        left.legend(frameon=False)
    if points(series, "training FLOPs", "CORE")[0]:
        right.axhline(GPT2_CORE, color="gray", linewidth=1, linestyle="--")
        style = {"xytext": (0, 3), "textcoords": "offset points", "fontsize": 8, "color": "gray"}
        right.annotate("GPT-2 (1.6B)", (0.01, GPT2_CORE), xycoords=("axes fraction", "data"), **style)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
