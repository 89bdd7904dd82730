"""CORE: the score of a base model on the 22 in-context tasks of the DCLM paper (arXiv:2406.11794, appendix G).

Every question becomes a few *options*, each a list of token ids and the position where scoring starts.
Multiple choice has one context and several continuations, a schema several contexts and one continuation,
language modelling one of each. The answer to the first two is the option with the lowest mean loss of its
scored tokens; a language modelling question is right if each scored token is the argmax.

Prompts, few-shot examples and the order of the rows are those of the published scores.
"""

from __future__ import annotations

import csv
import json
import os
import random
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
import yaml
from filelock import FileLock

from nanochat.common import Compute, UserError, atomic, file_url, get_base_dir
from nanochat.dataset import fetch_file

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_LIMIT = 2**31  # bytes unpacked; the real bundle has 41 million
CHUNK = 64  # questions rendered, sorted and scored together: small enough to share among ranks
BATCH_TOKENS = {"cpu": 4096, "mps": 16384, "cuda": 32768}  # a CPU is fastest if a batch fits into its cache
LOGIT_ROWS = 1024  # positions whose logits are held at once

Option = tuple[list[int], int]  # token ids, and the index of the first scored one


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # "multiple_choice", "schema" or "language_modeling"
    path: Path  # JSON lines
    num_fewshot: int
    delimiter: str  # between a query and its answer
    baseline: float  # accuracy of a random guess, 0..1


# -----------------------------------------------------------------------------
# The bundle


def fetch_bundle(compute: Compute) -> Path:
    """The unpacked bundle, downloaded once by the main rank. Raises UserError on all ranks if that fails."""
    folder = get_base_dir() / "eval_bundle"

    def fetch() -> None:
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                archive = fetch_file(file_url(BUNDLE_URL), folder.with_suffix(".zip"))
                unpack(archive, folder)
                archive.unlink()

    compute.on_main(fetch)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `eval_bundle/...` of a zip file as `folder`, completely or not at all.

    Raises UserError if the file is damaged, is not the bundle, or has paths outside the folder.
    """
    try:
        with (
            zipfile.ZipFile(archive) as bundle,
            tempfile.TemporaryDirectory(prefix=".eval_bundle.", dir=folder.parent) as tmp,
            atomic(folder) as complete,
        ):
            for name in bundle.namelist():
                if not Path(tmp, name).resolve().is_relative_to(Path(tmp).resolve()):
                    raise UserError(f"{archive} was not unpacked: its member {name!r} has a path outside the folder")
            if sum(member.file_size for member in bundle.infolist()) > BUNDLE_LIMIT:
                raise UserError(f"{archive} unpacks to more than {BUNDLE_LIMIT >> 30} GiB; it is not the CORE bundle")
            bundle.extractall(tmp)  # checks each member's checksum
            if not Path(tmp, "eval_bundle", "core.yaml").exists():
                raise UserError(f"{archive} is not the CORE bundle: it has no eval_bundle/core.yaml. Delete it.")
            Path(tmp, "eval_bundle").rename(complete)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}). Delete it and run this again.") from None


def load_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks of core.yaml, with the random baselines of eval_meta_data.csv (in percent there)."""
    try:
        entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        return [
            CoreTask(
                label=entry["label"],
                kind=entry["icl_task_type"],
                path=bundle / "eval_data" / entry["dataset_uri"],
                num_fewshot=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[entry["label"]],
            )
            for entry in entries
        ]
    except (OSError, KeyError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the CORE bundle is damaged ({error!r}). Delete {bundle} and run this again.") from None


def read_rows(task: CoreTask, max_rows: int = -1) -> list[dict]:
    """The rows of a task, shuffled as for published scores and then cut to `max_rows` (-1: all)."""
    try:
        lines = [line for line in task.path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not lines:
            raise ValueError("it is empty")
        random.Random(1337).shuffle(lines)
        return [json.loads(line) for line in (lines if max_rows < 0 else lines[:max_rows])]
    except (OSError, ValueError) as error:
        raise UserError(f"{task.path} is damaged ({error}). Delete the folder eval_bundle and run this again.") from None


# -----------------------------------------------------------------------------
# From rows to token ids


def row_options(row: dict, kind: str) -> list[tuple[str, str]]:
    """The (query, answer) pairs to choose from: `{"query": "2+2=", "choices": ["3", "4"]}` has two."""
    if kind == "multiple_choice":
        return [(row["query"], choice) for choice in row["choices"]]
    if kind == "schema":
        return [(context, row["continuation"]) for context in row["context_options"]]
    assert kind == "language_modeling", kind
    return [(row["context"].strip(), row["continuation"])]


def fewshot_text(rows: list[dict], i: int, task: CoreTask) -> str:
    """The solved examples that precede row i, sampled from all other rows, each followed by a blank line."""
    others = [j for j in range(len(rows)) if j != i]
    shots = random.Random(1234 + i).sample(others, min(task.num_fewshot, len(others)))
    solved = [row_options(rows[j], task.kind)[rows[j].get("gold", 0)] for j in shots]
    return "".join(f"{query}{task.delimiter}{answer}\n\n" for query, answer in solved)


def render_prompts(rows: list[dict], i: int, task: CoreTask) -> list[str]:
    """Row i with its few-shot examples: one text per option, and for language modelling the bare query after it.

    The bare query ends before the delimiter's blank, which belongs to the answer's first token.
    """
    shots = fewshot_text(rows, i, task)
    options = row_options(rows[i], task.kind)
    prompts = [shots + query + task.delimiter + answer for query, answer in options]
    if task.kind == "language_modeling":
        prompts.append((shots + options[0][0] + task.delimiter).rstrip())
    return prompts


def mark_options(sequences: list[list[int]], kind: str, context: int) -> list[Option]:
    """The options of a question from the ids of `render_prompts`, each cut to its last `context` tokens.

    Multiple choice and language modelling score what follows the common prefix, a schema the common suffix.
    """
    if kind == "schema":
        suffix = len(os.path.commonprefix([ids[::-1] for ids in sequences]))
        starts = [len(ids) - suffix for ids in sequences]
    else:
        starts = [len(os.path.commonprefix(sequences))] * len(sequences)  # it takes lists of ids, too
    options = []
    for ids, start in zip(sequences[:1] if kind == "language_modeling" else sequences, starts):
        start = min(start, len(ids) - 1)  # an option that is a prefix of all others still scores its last token
        cut = max(0, len(ids) - context)
        options.append((ids[cut:], max(1, start - cut)))  # token 0 has no context
    return options


# -----------------------------------------------------------------------------
# Scoring


def plan_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Group indices so that each group, padded to its longest, has at most `budget` tokens (but one member at least).

    >>> plan_batches([3, 9, 4, 2], budget=9)
    [[1], [2, 0], [3]]
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.inference_mode()
def score_options(model, options: list[Option], batch_tokens: int) -> list[tuple[float, list[int]]]:
    """(mean loss in nats, greedy tokens) of the scored tokens ids[start:] of each option (ids, start).

    The input is ids[:-1], padded on the right, which causal attention does not see. Options that
    differ in their last token only ("A", "B", "C", "D") therefore share one input, and equal
    options tie exactly.
    """
    options_of: dict[tuple[int, ...], list[int]] = {}  # input -> the options that share it
    for i, (ids, start) in enumerate(options):
        assert 0 < start < len(ids)
        options_of.setdefault(tuple(ids[:-1]), []).append(i)
    rows, scores = list(options_of), [None] * len(options)
    for batch in plan_batches([len(row) for row in rows], batch_tokens):
        width = len(rows[batch[0]])
        inputs = torch.tensor([rows[r] + (0,) * (width - len(rows[r])) for r in batch])  # (B, T)
        hidden = model.hidden(inputs.to(model.get_device())).flatten(0, 1)  # (B*T, d)
        positions, targets, counts, scored = [], [], [], []
        for b, r in enumerate(batch):
            for i in options_of[rows[r]]:
                ids, start = options[i]
                positions += range(b * width + start - 1, b * width + len(ids) - 1)
                targets += ids[start:]
                counts.append(len(ids) - start)
                scored.append(i)
        losses, greedy = score_positions(model, hidden, torch.tensor(positions), torch.tensor(targets))
        for i, nats, tokens in zip(scored, losses.split(counts), greedy.split(counts)):
            scores[i] = nats.mean().item(), tokens.tolist()
    return scores


def score_positions(model, hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(losses in nats float64, greedy tokens) of the targets, each (N,) on the CPU, from rows of hidden (M, d).

    Only the rows that are scored go through the head, which would otherwise be most of the work.
    """
    losses, greedy = [], []
    for rows, expected in zip(positions.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
        logits = model.logits(hidden[rows.to(hidden.device)])  # (n, vocab_size) float32
        losses.append(F.cross_entropy(logits, expected.to(logits.device), reduction="none").cpu().double())
        greedy.append(logits.argmax(dim=-1).cpu())
    return torch.cat(losses), torch.cat(greedy)


# -----------------------------------------------------------------------------
# Tasks and CORE


def answer_rows(model, tokenizer, task: CoreTask, rows: list[dict], which: range, batch_tokens: int) -> list[tuple]:
    """(answer, whether it is right) for the rows of `which`; an answer is the chosen option, or the greedy tokens."""
    prompts = [render_prompts(rows, i, task) for i in which]
    all_texts = [text for texts in prompts for text in texts]
    encoded = iter(tokenizer.encode(all_texts, prepend=tokenizer.get_bos_token_id()))
    context = model.config.sequence_len
    questions = [mark_options([next(encoded) for _ in texts], task.kind, context) for texts in prompts]
    all_options = [option for options in questions for option in options]
    scores = iter(score_options(model, all_options, batch_tokens))
    answers = []
    for i, options in zip(which, questions):
        losses, greedy = zip(*(next(scores) for _ in options))
        if task.kind == "language_modeling":
            ids, start = options[0]
            answer, gold = greedy[0], ids[start:]
        else:
            answer, gold = losses.index(min(losses)), rows[i]["gold"]  # of options that tie, the first
        answers.append((answer, answer == gold))
    return answers


def evaluate_core(
    model,
    tokenizer,
    compute: Compute,
    bundle: Path,
    max_per_task: int = -1,
    batch_tokens: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> dict | None:
    """CORE and its tasks: {"core", "stderr", "tasks": {label: {"accuracy", "centered", "stderr", "examples"}}}.

    `model` has `hidden`, `logits`, `get_device` and `config.sequence_len`. Chunks of questions are assigned to the ranks
    in turn; the result does not depend on their number. `stderr` is one standard error of the centred value due to the
    sample of questions (binomial). `stop` is polled between chunks, equally often on all ranks, and must return the
    same on all of them; if it returns True, the result is None.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS[compute.device.type]
    tasks = load_tasks(bundle)
    counts = torch.zeros(len(tasks), 2, dtype=torch.int64)  # right answers, questions
    turn = 0
    for t, task in enumerate(tasks):
        began = time.monotonic()
        rows = read_rows(task, max_per_task)
        for first in range(0, len(rows), CHUNK):
            if stop and turn % compute.world_size == 0 and stop():
                return None
            if turn % compute.world_size == compute.rank:
                which = range(first, min(first + CHUNK, len(rows)))
                answers = answer_rows(model, tokenizer, task, rows, which, batch_tokens)
                right = sum(right for _, right in answers)
                counts[t] += torch.tensor([right, len(answers)])
                compute.heartbeat()
            turn += 1
        say(f"{t + 1:2d}/{len(tasks)} {task.label}: {len(rows)} questions, {time.monotonic() - began:.1f} s")
    return summarize(tasks, compute.sum(counts.to(compute.device)).tolist())


def summarize(tasks: list[CoreTask], counts: list[list[int]]) -> dict:
    """Accuracies from (right, questions) per task; centred so that guessing scores 0 and a perfect model 1."""
    results = {}
    for task, (right, total) in zip(tasks, counts):
        accuracy, room = right / total, 1 - task.baseline
        results[task.label] = {
            "accuracy": accuracy,
            "centered": (accuracy - task.baseline) / room,
            "stderr": (accuracy * (1 - accuracy) / total) ** 0.5 / room,
            "examples": total,
        }
    core = sum(result["centered"] for result in results.values()) / len(results)
    stderr = sum(result["stderr"] ** 2 for result in results.values()) ** 0.5 / len(results)
    return {"core": core, "stderr": stderr, "tasks": results}
