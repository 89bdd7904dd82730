"""CORE: the score of a base model on the 22 in-context tasks of the DCLM paper (arXiv:2406.11794, appendix G).

Every question becomes a few *options*, each a list of token ids and the position where scoring starts. Multiple choice
has one context and several continuations, a schema several contexts and one continuation; the answer is the option with
the lowest mean loss of its scored tokens. Language modelling has one of each and is right if each scored token is the
argmax. Prompts, few-shot examples and the order of the rows are those of the published scores.
"""

import csv
import json
import os
import random
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
import yaml

from nanochat.common import Compute, UserError, file_url, get_base_dir
from nanochat.dataset import fetch_file, write_once

MAX_UNPACKED = 2**31  # bytes of the unpacked bundle
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CHUNK = 64  # questions rendered, sorted and scored together: small enough to share among ranks
BATCH_TOKENS = {"cpu": 4096, "mps": 16384, "cuda": 32768}  # a CPU is fastest if a batch fits into its cache
LOGIT_ROWS = 1024  # positions whose logits are held at once

Option = tuple[list[int], int]  # token ids, and the index of the first scored one


class Question(NamedTuple):
    options: list[tuple[str, str]]  # (query, answer) pairs to choose from
    gold: int  # index of the right one


class CoreTask(NamedTuple):
    label: str
    kind: str  # "multiple_choice", "schema" or "language_modeling"
    questions: list[Question]
    num_fewshot: int
    delimiter: str  # between a query and its answer
    baseline: float  # accuracy of a random guess, 0..1


# -----------------------------------------------------------------------------
# The bundle


def fetch_bundle(compute: Compute) -> Path:
    """The unpacked bundle, downloaded once by the main rank. UserError on all ranks if it cannot be had or is damaged."""
    folder = get_base_dir() / "eval_bundle"

    def unpack(target: Path) -> None:
        archive = folder.with_suffix(".zip")
        with TemporaryDirectory(prefix=".eval_bundle.", dir=folder.parent) as tmp:
            fetch_file(file_url(BUNDLE_URL), archive, lambda path: extract(path, tmp))
            Path(tmp, "eval_bundle").rename(target)
        archive.unlink()

    compute.on_main(lambda: write_once(folder, unpack))
    return folder


def extract(archive: Path, target: str) -> None:
    """Unpack the zip file. A damaged one can raise nearly anything."""
    with zipfile.ZipFile(archive) as bundle:
        bundle.getinfo("eval_bundle/core.yaml")
        if sum(member.file_size for member in bundle.infolist()) > MAX_UNPACKED:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED:,} bytes")
        bundle.extractall(target)  # compares checksums, too


def load_tasks(bundle: Path, max_questions: int = -1) -> list[CoreTask]:
    """The tasks of core.yaml, with the random baselines of eval_meta_data.csv (in percent there).

    Questions are shuffled as for published scores, then cut to `max_questions` (-1: all). UserError if anything is damaged.
    """
    tasks, path, end = [], bundle / "core.yaml", None if max_questions < 0 else max_questions
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases, by which a short text can stand for a huge one")
        entries = yaml.safe_load(text)["icl_tasks"]
        path = bundle / "eval_meta_data.csv"
        with open(path, encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        for entry in entries:
            label, kind, num_fewshot = entry["label"], entry["icl_task_type"], int(entry["num_fewshot"][0])
            delimiter = str(entry.get("continuation_delimiter", " "))
            path = bundle / "eval_data" / entry["dataset_uri"]
            if not path.resolve().is_relative_to(bundle.resolve()):
                raise ValueError("it lies outside the bundle")
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            random.Random(1337).shuffle(lines)
            questions = [parse_question(json.loads(line), kind) for line in lines[:end]]
            if not questions or num_fewshot < 0 or not 0 <= baselines[label] < 1:
                raise ValueError(f"{label}: {len(questions)} questions, {num_fewshot} examples, baseline {baselines[label]}")
            tasks.append(CoreTask(label, kind, questions, num_fewshot, delimiter, baselines[label]))
    except Exception as error:  # damaged data can raise nearly anything
        reason = " ".join(repr(error).split())[:300]
        raise UserError(f"{path} is damaged ({reason}). Delete the folder {bundle} and run this again") from error
    return tasks


def parse_question(row: dict, kind: str) -> Question:
    """`{"query": "2+2=", "choices": ["3", "4"], "gold": 1}` has the options ("2+2=", "3") and ("2+2=", "4")."""
    match kind, row:
        case "multiple_choice", {"query": str(query), "choices": [*choices], "gold": int(gold)}:
            options = [(query, choice) for choice in choices]
        case "schema", {"context_options": [*contexts], "continuation": str(answer), "gold": int(gold)}:
            options = [(context, answer) for context in contexts]
        case "language_modeling", {"context": str(context), "continuation": str(answer)}:
            options, gold = [(context.strip(), answer)], 0
        case _:
            options, gold = [], 0
    texts = [text for option in options for text in option]
    if gold not in range(len(options)) or not all(isinstance(text, str) for text in texts) or ("", "") in options:
        raise ValueError(f"no question of type {kind!r}: {row}")
    return Question(options, gold)


# -----------------------------------------------------------------------------
# From questions to token ids


def render_prompts(task: CoreTask, i: int) -> list[str]:
    """Question i after its solved examples: one text per option, and for language modelling the bare query after it.

    The examples are sampled from all other questions, and each is followed by a blank line. The bare query ends before
    the delimiter's blank, which belongs to the answer's first token.
    """
    others = [j for j in range(len(task.questions)) if j != i]
    shots = ""
    for j in random.Random(1234 + i).sample(others, min(task.num_fewshot, len(others))):
        options, gold = task.questions[j]
        query, answer = options[gold]
        shots += f"{query}{task.delimiter}{answer}\n\n"
    options = task.questions[i].options
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


@torch.inference_mode()
def score_options(model, options: list[Option], batch_tokens: int) -> list[tuple[float, bool]]:
    """(mean loss in nats, whether each is the argmax) of the scored tokens ids[start:] of each option (ids, start).

    The input is ids[:-1], padded on the right, which causal attention does not see; a batch has up to `batch_tokens` tokens.
    Options that differ in their last token only ("A", "B", "C", "D") share one input, and equal options tie exactly.
    """
    options_of: dict[tuple[int, ...], list[int]] = {}  # input -> the options that share it
    for i, (ids, _) in enumerate(options):
        options_of.setdefault(tuple(ids[:-1]), []).append(i)
    rows, scores = sorted(options_of, key=len, reverse=True), [None] * len(options)
    while rows:
        longest = len(rows[0])
        size = max(1, batch_tokens // longest)
        batch, rows = rows[:size], rows[size:]
        inputs = torch.tensor([row + (0,) * (longest - len(row)) for row in batch])
        hidden = model.hidden(inputs.to(model.get_device()))  # (B, T, d)
        scored, used, targets = [], [], []
        for b, row in enumerate(batch):
            for i in options_of[row]:
                ids, start = options[i]
                scored.append(i)
                used.append(hidden[b, start - 1 : len(ids) - 1])
                targets.append(torch.tensor(ids[start:]))
        # Only the positions that are scored go through the head, which would otherwise be most of the work
        counts = [len(ids) for ids in targets]
        used, targets = torch.cat(used), torch.cat(targets).to(hidden.device)
        losses, greedy = [], []
        for h, t in zip(used.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
            logits = model.logits(h)  # (n, vocab_size) float32
            losses.append(F.cross_entropy(logits, t, reduction="none"))
            greedy.append(logits.argmax(dim=-1) == t)
        losses = torch.cat(losses).cpu().double().split(counts)
        greedy = torch.cat(greedy).cpu().split(counts)
        for i, nats, is_argmax in zip(scored, losses, greedy):
            scores[i] = nats.mean().item(), bool(is_argmax.all())
    return scores


def answer_questions(model, tokenizer, task: CoreTask, which: range, batch_tokens: int) -> list[int | None]:
    """The option that the model chooses for each question of `which`; for language modelling 0, or None if it is wrong."""
    prompts = [render_prompts(task, i) for i in which]
    all_texts = [text for texts in prompts for text in texts]
    encoded = iter(tokenizer.encode(all_texts, prepend=tokenizer.get_bos_token_id()))
    context = model.config.sequence_len
    marked = [mark_options([next(encoded) for _ in texts], task.kind, context) for texts in prompts]
    scores = iter(score_options(model, [option for options in marked for option in options], batch_tokens))
    answers = []
    for options in marked:
        losses, greedy = zip(*(next(scores) for _ in options))
        if task.kind == "language_modeling":
            answers.append(0 if greedy[0] else None)
        else:
            answers.append(losses.index(min(losses)))  # of options that tie, the first
    return answers


def evaluate_core(
    model,
    tokenizer,
    compute: Compute,
    bundle: Path,
    max_per_task: int = -1,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> dict | None:
    """CORE and its tasks: {"core", "stderr", "tasks": {label: {"accuracy", "centered", "stderr", "examples"}}}.

    `model` has `hidden`, `logits`, `get_device` and `config.sequence_len`. Accuracies are centred so that guessing scores
    0 and a perfect model 1; `stderr` is the standard error of that due to the sample of questions (binomial). Chunks of
    questions are assigned to the ranks in turn; the result does not depend on their number. `stop` is polled between
    chunks and must return the same on all ranks; then the result is None.
    """
    tasks = load_tasks(bundle, max_per_task)
    right = torch.zeros(len(tasks), dtype=torch.int64, device=compute.device)  # answers to each task
    turn = 0
    for t, task in enumerate(tasks):
        began, total = time.monotonic(), len(task.questions)
        for first in range(0, total, CHUNK):
            if stop and turn % compute.world_size == 0 and stop():
                return None
            if turn % compute.world_size == compute.rank:
                which = range(total)[first : first + CHUNK]
                answers = answer_questions(model, tokenizer, task, which, BATCH_TOKENS[compute.device.type])
                right[t] += sum(answer == task.questions[i].gold for i, answer in zip(which, answers))
                compute.heartbeat()
            turn += 1
        say(f"{t + 1:2d}/{len(tasks)} {task.label}: {total} questions, {time.monotonic() - began:.1f} s")

    results = {}
    for task, count in zip(tasks, compute.sum(right).tolist()):
        total, room = len(task.questions), 1 - task.baseline
        accuracy = count / total
        results[task.label] = {
            "accuracy": accuracy,
            "centered": (accuracy - task.baseline) / room,
            "stderr": (accuracy * (1 - accuracy) / total) ** 0.5 / room,
            "examples": total,
        }
    core = sum(result["centered"] for result in results.values()) / len(results)
    stderr = sum(result["stderr"] ** 2 for result in results.values()) ** 0.5 / len(results)
    return {"core": core, "stderr": stderr, "tasks": results}
