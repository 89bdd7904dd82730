"""Plots of base models: loss curves, and loss and CORE by training FLOPs with a power law fitted to the losses.

    python -m dev.plot                       # all base models
    python -m dev.plot mini_d10 mini_d12     # these, by tag or by the path of their metrics.jsonl

Reads only JSON lines that runs have written (each run's metrics.jsonl, and report.jsonl for models that have finished), so
runs can be plotted anywhere and while they train. Plots go to plots/ in the base folder; the fit,
bpb = a + b * (C / C0)^-c with C the training FLOPs, is printed.
"""

import math
import os
from pathlib import Path

from nanochat.common import UserError, base_dir_path, get_base_dir, run_script
from nanochat.flags import make_parser
from nanochat.report import Panel, draw, points, read_entries, read_jsonl, table

GPT2_CORE = 0.2565  # of GPT-2 with 1.6 billion parameters


def main(argv=None):
    parser = make_parser(__doc__)
    run_help = "tag of a base model, or path of a metrics.jsonl (default: all base models)"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=run_help)
    args = parser.parse_args(argv)

    checkpoints = base_dir_path() / "base_checkpoints"
    names = args.runs or sorted(path.parent.name for path in checkpoints.glob("*/metrics.jsonl"))
    if not names:
        raise UserError(f"nothing to plot: no run in {checkpoints}; train a model first")
    runs = load_runs(names)
    out = get_base_dir() / "plots"
    out.mkdir(exist_ok=True)
    draw_runs(runs, out / "runs.png")
    print(f"{len(runs)} run(s): {out / 'runs.png'}")
    if series := [run for run in runs if "training FLOPs" in run and run["val bpb"] is not None]:
        series.sort(key=lambda run: run["training FLOPs"])
        fit = fit_power_law([run["training FLOPs"] for run in series], [run["val bpb"] for run in series])
        draw_series(series, fit, out / "miniseries.png")
        print(series_text(series, fit), end="")
        print(f"{len(series)} finished model(s): {out / 'miniseries.png'}")


def load_runs(names: list[str]) -> list[dict]:
    """Runs as {"tag", "rows" of metrics.jsonl, the last "val bpb" and "CORE"}, with what base_train logged if it has finished.

    A run without a training step is skipped. Raises UserError for a run that does not exist, and if none is left.
    """
    entries = [entry for path in base_dir_path().glob("report*/report.jsonl") for entry in read_entries(path)]
    finished = {}
    for entry in sorted(entries, key=lambda entry: entry["time"]):
        data = entry["data"]
        steps, flops = points([data], "steps", "training FLOPs")
        if entry["section"] == "Base model training" and steps and min(steps + flops) > 0:
            finished[str(data.get("model tag"))] = data
    runs = []
    for name in names:
        path = base_dir_path() / "base_checkpoints" / name / "metrics.jsonl"
        if name.endswith(".jsonl"):
            path = Path(name)
        if not os.path.exists(path):  # the method raises an error for a name that is too long
            raise UserError(f"there is no {path}")
        tag, rows = path.parent.name, read_jsonl(path)
        if points(rows, "step", "loss")[0]:
            measured = {"val bpb": points(rows, "step", "val_bpb")[1], "CORE": points(rows, "step", "core")[1]}
            last = {key: values[-1] if values else None for key, values in measured.items()}
            runs.append({**finished.get(tag, {}), "tag": tag, "rows": rows, **last})
        else:
            print(f"{path} is skipped: it holds no training step")
    if not runs:
        raise UserError("no run has a training step (see above)")
    return runs


def fit_power_law(x: list[float], y: list[float]) -> dict | None:
    """y = a + b * (x / x0)^-c by least squares, x FLOPs and y bits per byte; None for fewer than 4 different x.

    Returns {"a", "b", "c", "x0", "residuals", "formula"}; x0 is the geometric mean of x. For a given c, a and b solve a
    linear problem, so only c is searched, on a grid that is refined three times. a, the irreducible loss, is at least 0.
    """
    import numpy as np

    if len(set(x)) < 4:
        return None
    x, y = np.array(x, float), np.array(y, float)
    x0 = float(np.exp(np.log(x).mean()))

    def solve(c):
        power = (x / x0) ** -c  # (n,)
        terms = np.stack([np.ones_like(power), power], axis=1)  # (n, 2)
        a, b = np.linalg.lstsq(terms, y, rcond=None)[0]
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
    formula = f"{a:.4f} + {b:.4f} * (FLOPs / {x0:.3g})^-{c:.4f}"
    return {"a": a, "b": b, "c": c, "x0": x0, "residuals": residuals, "formula": formula}


def series_text(series: list[dict], fit: dict | None) -> str:
    """The miniseries as a table, and the power law."""
    columns = ["tag", "scaling parameters", "training tokens", "training FLOPs", "training minutes", "val bpb", "CORE"]
    rows = [["-" if row.get(column) is None else row[column] for column in columns] for row in series]
    if fit is None:
        return table(columns, rows) + "A power law needs four models of different sizes.\n"
    rows = [[*row, f"{residual:+.4f}"] for row, residual in zip(rows, fit["residuals"])]
    spread = math.hypot(*fit["residuals"]) / math.sqrt(len(rows))
    return table([*columns, "bpb - fit"], rows) + f"bpb = {fit['formula']}; root mean square residual {spread:.4f}\n"


def draw_runs(runs: list[dict], path: Path) -> None:
    """Training loss (above) and validation bits per byte (below) by training FLOPs (left) and by step (right)."""
    panels = []
    for key, title in (("loss", "training loss (nats per token)"), ("val_bpb", "validation bits per byte")):
        by_flops = Panel(title, "training FLOPs (finished runs)", [], log_x=True)
        by_step = Panel(title, "step", [])
        for number, run in enumerate(runs):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "linewidth": 1.2}
            style |= {"marker": "o", "markersize": 3} if key == "val_bpb" else {}
            steps, values = points(run["rows"], "step", key)
            by_step.curves.append((f"{run['tag']}  {values[-1]:.3f}" if values else None, steps, values, style))
            if "training FLOPs" in run:
                late = [(step, value) for step, value in zip(steps, values) if step >= run["steps"] / 20]
                flops = [step * run["training FLOPs"] / run["steps"] for step, _ in late]
                by_flops.curves.append((None, flops, [value for _, value in late], style))
        panels.append([by_flops, by_step])
    draw(panels, path)


def draw_series(series: list[dict], fit: dict | None, path: Path) -> None:
    """Validation bits per byte with the power law (left), and CORE (right), by training FLOPs."""
    low, high = series[0]["training FLOPs"] / 1.5, series[-1]["training FLOPs"] * 3
    bpb = Panel("validation bits per byte", "training FLOPs", [], log_x=True)
    core = Panel("CORE", "training FLOPs", [], log_x=True)
    for panel, key in ((bpb, "val bpb"), (core, "CORE")):
        for number, run in enumerate(series):
            if run[key] is not None:
                style = {"fmt": "o", "color": f"C{number % 10}"}
                label = f"{run['tag']}  {run[key]:.4f}"
                panel.curves.append((label, [run["training FLOPs"]], [run[key]], style))
    line = {"color": "gray", "linewidth": 1, "zorder": 0}
    if fit:
        x = [low * (high / low) ** (i / 99) for i in range(100)]
        y = [fit["a"] + fit["b"] * (flops / fit["x0"]) ** -fit["c"] for flops in x]
        bpb.curves.append(("power law", x, y, line))
    if core.curves:
        core.curves.append((f"GPT-2 (1.6B)  {GPT2_CORE}", [low, high], [GPT2_CORE] * 2, line | {"linestyle": "--"}))
    draw([[bpb, core]], path, f"bpb = {fit['formula']}" if fit else "")


if __name__ == "__main__":
    run_script(main)
