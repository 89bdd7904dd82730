"""CORE against a slow reference, one option at a time; its prompts and errors by hand; its bundle from the fake hub."""

import json
import random
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fake_hub import plain_files
from hypothesis import given, strategies as st
from tiny import BOS, CPU, ByteTokenizer, tiny_gpt

from nanochat import core_eval
from nanochat.common import UserError
from nanochat.core_eval import CoreTask, answer_questions, evaluate_core, fetch_bundle, load_tasks, mark_options
from nanochat.core_eval import parse_question, render_prompts

TOKENIZER = ByteTokenizer()


def task_of(kind, rows, num_fewshot=0, delimiter=" "):
    return CoreTask("a task", kind, [parse_question(row, kind) for row in rows], num_fewshot, delimiter, 0.0)


def test_prompts_join_examples_by_a_blank_line_and_the_delimiter():
    rows = [{"query": f"Q{i}", "choices": [f"no{i}", f"yes{i}"], "gold": 1} for i in range(2)]
    shot = "Q1\nAnswer: yes1\n\n"
    task = task_of("multiple_choice", rows, num_fewshot=1, delimiter="\nAnswer: ")
    assert render_prompts(task, 0) == [f"{shot}Q0\nAnswer: no0", f"{shot}Q0\nAnswer: yes0"]
    rows = [{"context_options": [f"a{i}", f"b{i}"], "continuation": "c", "gold": 0} for i in range(2)]
    assert render_prompts(task_of("schema", rows, num_fewshot=1), 1) == ["a0 c\n\na1 c", "a0 c\n\nb1 c"]
    rows = [{"context": f" x{i} ", "continuation": "y"} for i in range(2)]
    assert render_prompts(task_of("language_modeling", rows, num_fewshot=1), 1) == ["x0 y\n\nx1 y", "x0 y\n\nx1"]


@given(st.integers(1, 30), st.integers(0, 12), st.data())
def test_fewshot_examples_are_the_published_sample_of_all_other_questions(n, num_fewshot, data):
    i = data.draw(st.integers(0, n - 1))
    rows = [{"context": f"c{j}", "continuation": f"={j}"} for j in range(n)]
    prompt, _ = render_prompts(task_of("language_modeling", rows, num_fewshot, delimiter=""), i)
    others = random.Random(1234 + i).sample([j for j in range(n) if j != i], min(num_fewshot, n - 1))
    assert prompt == "".join(f"c{j}={j}\n\n" for j in others) + f"c{i}={i}"


@pytest.mark.parametrize("kind, sequences, context, options", [
    ("multiple_choice", [[0, 1, 2, 3], [0, 1, 4, 3]], 9, [([0, 1, 2, 3], 2), ([0, 1, 4, 3], 2)]),
    ("schema", [[0, 1, 2, 3], [0, 9, 8, 2, 3]], 9, [([0, 1, 2, 3], 2), ([0, 9, 8, 2, 3], 3)]),
    # An option longer than the context loses its left end
    ("multiple_choice", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6]], 4, [([2, 3, 4, 5], 2), ([1, 2, 3, 6], 3)]),
    # When even the continuation does not fit, all that has a token before it counts
    ("multiple_choice", [[0, 1, 2, 3, 4], [0, 9, 9]], 3, [([2, 3, 4], 1), ([0, 9, 9], 1)]),
    # An option that is a prefix of the others still has a token to score
    ("multiple_choice", [[0, 5, 6], [0, 5, 6, 7]], 9, [([0, 5, 6], 2), ([0, 5, 6, 7], 3)]),
])  # fmt: skip
def test_where_scoring_starts(kind, sequences, context, options):
    assert mark_options(sequences, kind, context) == options


@pytest.fixture(scope="module")
def model():
    return tiny_gpt(sequence_len=96, noise=0.1, head_std=0.1)


@pytest.fixture
def bundle(hub, base_dir):
    """The bundle of the fake hub: one task of each kind with 12 questions."""
    return fetch_bundle(CPU)


def reference_answer(model, texts: list[str], kind: str):
    """The chosen option, or whether all tokens are greedy, from all logits of one option at a time in float64."""
    sequences = [[BOS, *text.encode()] for text in texts]
    columns = zip(*(ids[::-1] if kind == "schema" else ids for ids in sequences))
    equal = [len(set(column)) == 1 for column in columns]
    shared = equal.index(False) if False in equal else len(equal)
    losses, greedy = [], []
    for ids in sequences:
        start = max(1, min(len(ids) - shared if kind == "schema" else shared, len(ids) - 1))
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, start - 1 : -1].double()
        losses.append(F.cross_entropy(logits, torch.tensor(ids[start:])).item())
        greedy.append(logits.argmax(-1).tolist() == ids[start:])
    return (0 if greedy[0] else None) if kind == "language_modeling" else losses.index(min(losses))


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_answers_equal_those_of_a_slow_reference(model, batch_tokens):
    """Mean losses after the common prefix (multiple choice) or of the common suffix (schema), or greedy tokens."""
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choice(["ab", "cde", "f", "gh", "abc"]) for _ in range(n))

    def likely(letter):  # often what the model would continue with
        return chr(int(model(torch.tensor([[BOS, ord(letter)]]))[0, -1, :128].argmax()))

    rows = {
        "multiple_choice": [{"query": words(i % 9 + 1), "choices": [words(n) for n in (1, 2, 3)], "gold": 0} for i in range(20)],
        "schema": [{"context_options": [words(2), words(3)], "continuation": words(2), "gold": 0} for _ in range(20)],
        "language_modeling": [{"context": letter, "continuation": likely(letter)} for letter in "abcdefghijklmnopqrs"],
    }
    rows["multiple_choice"].append({"query": "q", "choices": ["x", "abc", "y", "abc"], "gold": 0})  # equal options
    for kind, rows in rows.items():
        task = task_of(kind, rows, delimiter="" if kind == "language_modeling" else " ")
        answers = answer_questions(model, TOKENIZER, task, range(len(rows)), batch_tokens)
        assert answers == [reference_answer(model, render_prompts(task, i), kind) for i in range(len(rows))]
        assert len(set(answers)) > 1, "a model that always answers the same would test little"


def test_core_is_the_mean_of_centred_accuracies_whatever_the_ranks_and_batches(model, bundle, run_ranks, monkeypatch):
    monkeypatch.setattr(core_eval, "CHUNK", 5)
    lines = []
    expected = evaluate_core(model, TOKENIZER, CPU, bundle, say=lines.append)
    monkeypatch.setitem(core_eval.BATCH_TOKENS, "cpu", 1)
    assert run_ranks(2, lambda compute: evaluate_core(model, TOKENIZER, compute, bundle)) == [expected] * 2
    assert len(lines) == 3 and lines[0].startswith(" 1/3 questions: 12 questions")
    for task, baseline in zip(expected["tasks"].values(), (0.25, 0.5, 0.0)):
        a = task["accuracy"]
        stderr = pytest.approx((a * (1 - a) / 12) ** 0.5 / (1 - baseline))
        assert task == {"accuracy": a, "centered": (a - baseline) / (1 - baseline), "stderr": stderr, "examples": 12}
    assert expected["core"] == pytest.approx(sum(task["centered"] for task in expected["tasks"].values()) / 3)
    limited = evaluate_core(model, TOKENIZER, CPU, bundle, max_per_task=1)
    assert [task["examples"] for task in limited["tasks"].values()] == [1] * 3
    stops = run_ranks(2, lambda compute: evaluate_core(model, TOKENIZER, compute, bundle, stop=lambda: True))
    assert stops == [None] * 2


def test_the_bundle_is_downloaded_once_and_its_rows_are_shuffled_and_then_cut(hub, bundle, base_dir):
    assert sorted(path.name for path in base_dir.iterdir() if path.suffix != ".lock") == ["eval_bundle"]
    hub.shutdown()
    assert fetch_bundle(CPU) == base_dir / "eval_bundle"
    choice, schema, facts = load_tasks(bundle)
    assert schema.baseline == 0.5 and choice.delimiter == "\nAnswer: " and choice.num_fewshot == 2
    rows = [{"context": f"\u2028{i}", "continuation": "x"} for i in range(50)]  # a line separator inside a row
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (bundle / "eval_data" / "facts.jsonl").write_text(text, encoding="utf-8")
    random.Random(1337).shuffle(rows)
    questions = [parse_question(row, "language_modeling") for row in rows]
    assert load_tasks(bundle)[2].questions == questions and load_tasks(bundle, 7)[2].questions == questions[:7]


def in_each_header(offset: int, value: bytes, data: bytes) -> bytes:
    """Damage at an offset into each file's header, which the directory at the end of a zip file repeats 2 bytes later."""
    pattern = rb"(?s)(PK\x03\x04.{%d}|PK\x01\x02.{%d}).{%d}" % (offset, offset + 2, len(value))
    return re.sub(pattern, lambda match: match[1] + value, data)


@pytest.mark.parametrize("damage, reason", [
    (lambda data: data[: len(data) // 2], "not a zip file"),
    (lambda data: data[:70] + bytes([data[70] ^ 0xFF]) + data[71:], "Bad CRC-32"),
    (lambda data: data.replace(b"eval_data/facts.jsonl", b"core.yaml/facts.jsonl"), "Not a directory"),
    (lambda data: data.replace(b"eval_bundle/core.yaml", b"eval_bundle/cole.yaml"), "no item named"),
    (partial(in_each_header, 2, b"\x01"), "encrypted"), (partial(in_each_header, 4, b"\x63"), "compression method"),
    (partial(in_each_header, 18, b"\xff\xff\xff\x7f"), "unpacks to more than"),
])  # fmt: skip
def test_a_damaged_zip_file_is_not_published_and_one_that_exists_is_refused(hub, base_dir, damage, reason):
    archive = base_dir / "eval_bundle.zip"
    hub.faults[archive.name] = [damage(plain_files()[archive.name])]
    with pytest.raises(UserError, match=f"does not send a usable eval_bundle.zip .*{reason}"):
        fetch_bundle(CPU)
    assert not [path for path in base_dir.iterdir() if path.suffix != ".lock"]
    archive.write_bytes(damage(plain_files()[archive.name]))
    with pytest.raises(UserError, match=f"eval_bundle.zip is not usable .*{reason}.*Delete it and run this again"):
        fetch_bundle(CPU)


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 1}
SCHEMA = {"context_options": ["a", "b"], "continuation": "c", "gold": 1}
ENTRY = {"label": "facts", "dataset_uri": "facts.jsonl", "num_fewshot": [2], "icl_task_type": "language_modeling"}


@pytest.mark.parametrize("name, text", [
    *(("questions", json.dumps({key: value for key, value in GOOD.items() if key != missing})) for missing in GOOD),
    *(("questions", json.dumps({**GOOD, **change})) for change in ({"choices": "ab"}, {"choices": ["a", 2]}, {"gold": 2})),
    *(("pronouns", json.dumps({key: value for key, value in SCHEMA.items() if key != missing})) for missing in SCHEMA),
    ("facts", '{"context": "a"}'), ("facts", "[1]"), ("facts", '{"context": '), ("facts", "\n"),
    ("facts", "[" * 100_000), ("questions", json.dumps({"query": "", "choices": ["", "a"], "gold": 1})),
    ("core.yaml", "icl_tasks: [1]"), ("core.yaml", "a: ["), ("eval_meta_data.csv", "Eval Task,Random baseline\nfacts,25\n"),
    ("core.yaml", "[" * 1000), ("core.yaml", "a: &a [x]\nicl_tasks: [*a]"),
    ("eval_meta_data.csv", "Eval Task,Random baseline\nquestions,25\npronouns,50\nfacts,100\n"),
    *(("core.yaml", json.dumps({"icl_tasks": [{**ENTRY, "dataset_uri": uri}]})) for uri in ("/etc/passwd", "../../x", 5)),
    *(("core.yaml", json.dumps({"icl_tasks": [{**ENTRY, "num_fewshot": n}]})) for n in ([-1], [float("inf")], 2)),
])  # fmt: skip
def test_any_damage_of_the_bundle_is_one_error_that_names_the_remedy(bundle, name, text):
    (bundle / name if "." in name else bundle / "eval_data" / f"{name}.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"is damaged .*Delete the folder {re.escape(str(bundle))} and run this again$"):
        load_tasks(bundle)
