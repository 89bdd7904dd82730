"""CORE against a slow reference, one option at a time; its prompts and errors by hand; its bundle from the fake hub."""

import json
import random
import zipfile

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import BOS, ByteTokenizer, tiny_gpt

from nanochat import core_eval
from nanochat.common import Compute, UserError
from nanochat.core_eval import (
    CoreTask, answer_rows, evaluate_core, fetch_bundle, fewshot_text, load_tasks, mark_options, plan_batches,
    read_rows, render_prompts, summarize, unpack,
)  # fmt: skip

CPU = Compute(torch.device("cpu"), torch.float32)
TOKENIZER = ByteTokenizer()


def task_of(kind, path=None, num_fewshot=0, delimiter=" ", baseline=0.0, label="a task"):
    return CoreTask(label, kind, path, num_fewshot, delimiter, baseline)


# -----------------------------------------------------------------------------
# Prompts


def test_prompts_join_examples_by_a_blank_line_and_the_delimiter():
    rows = [{"query": f"Q{i}", "choices": [f"no{i}", f"yes{i}"], "gold": 1} for i in range(2)]
    task = task_of("multiple_choice", num_fewshot=1, delimiter="\nAnswer: ")
    shot = "Q1\nAnswer: yes1\n\n"
    assert render_prompts(rows, 0, task) == [f"{shot}Q0\nAnswer: no0", f"{shot}Q0\nAnswer: yes0"]
    rows = [{"context_options": [f"a{i}", f"b{i}"], "continuation": "c", "gold": 0} for i in range(2)]
    assert render_prompts(rows, 1, task_of("schema", num_fewshot=1)) == ["a0 c\n\na1 c", "a0 c\n\nb1 c"]
    rows = [{"context": f" x{i} ", "continuation": "y"} for i in range(2)]
    assert render_prompts(rows, 1, task_of("language_modeling", num_fewshot=1)) == ["x0 y\n\nx1 y", "x0 y\n\nx1"]


@given(st.integers(1, 30), st.integers(0, 12), st.data())
def test_fewshot_examples_are_the_published_sample_of_all_other_rows(n, num_fewshot, data):
    i = data.draw(st.integers(0, n - 1))
    rows = [{"context": f"c{j}", "continuation": f"={j}"} for j in range(n)]
    text = fewshot_text(rows, i, task_of("language_modeling", num_fewshot=num_fewshot, delimiter=""))
    others = random.Random(1234 + i).sample([j for j in range(n) if j != i], min(num_fewshot, n - 1))
    assert text == "".join(f"c{j}={j}\n\n" for j in others)


def test_rows_are_shuffled_and_then_cut(tmp_path):
    task = task_of("language_modeling", tmp_path / "task.jsonl")
    rows = [{"context": f"\u2028{i}", "continuation": "x"} for i in range(50)]  # a line separator inside a row
    task.path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    random.Random(1337).shuffle(rows)
    assert read_rows(task) == rows and read_rows(task, max_rows=7) == rows[:7]


@pytest.mark.parametrize("kind, sequences, context, options", [
    ("multiple_choice", [[0, 1, 2, 3], [0, 1, 4, 3]], 9, [([0, 1, 2, 3], 2), ([0, 1, 4, 3], 2)]),
    ("schema", [[0, 1, 2, 3], [0, 9, 8, 2, 3]], 9, [([0, 1, 2, 3], 2), ([0, 9, 8, 2, 3], 3)]),
    # An option longer than the context loses its left end
    ("multiple_choice", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6]], 4, [([2, 3, 4, 5], 2), ([1, 2, 3, 6], 3)]),
    # When even the continuation does not fit, all that has a token before it counts
    ("multiple_choice", [[0, 1, 2, 3, 4], [0, 9, 9]], 3, [([2, 3, 4], 1), ([0, 9, 9], 1)]),
    # An option that is a prefix of the others, or equal to them, still has a token to score
    ("multiple_choice", [[0, 5, 6], [0, 5, 6, 7]], 9, [([0, 5, 6], 2), ([0, 5, 6, 7], 3)]),
    ("schema", [[0, 5], [0, 5]], 9, [([0, 5], 1), ([0, 5], 1)]),
])  # fmt: skip
def test_where_scoring_starts(kind, sequences, context, options):
    assert mark_options(sequences, kind, context) == options


# -----------------------------------------------------------------------------
# Batches and ranks


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 100))
def test_batches_hold_each_member_once_within_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.fixture(scope="module")
def model():
    return tiny_gpt(sequence_len=96, noise=0.1, head_std=0.1)


@pytest.fixture
def bundle(hub, base_dir):
    """The bundle of the fake hub: one task of each kind with 12 questions."""
    return fetch_bundle(CPU)


def reference_answer(model, texts: list[str], kind: str):
    """The chosen option, or the greedy tokens, from all logits of one option at a time in float64."""
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
        greedy.append(logits.argmax(-1).tolist())
    return greedy[0] if kind == "language_modeling" else losses.index(min(losses))


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_answers_equal_those_of_a_slow_reference(model, batch_tokens):
    """Mean losses after the common prefix (multiple choice) or of the common suffix (schema), or greedy tokens."""
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choice(["ab", "cde", "f", "gh", "abc"]) for _ in range(n))

    rows = {
        "multiple_choice": [{"query": words(i % 9 + 1), "choices": [words(n) for n in (1, 2, 3)], "gold": 0} for i in range(20)],
        "schema": [{"context_options": [words(2), words(3)], "continuation": words(2), "gold": 0} for _ in range(20)],
        "language_modeling": [{"context": f" {words(i)} ", "continuation": words(2)} for i in range(1, 9)],
    }
    rows["multiple_choice"].append({"query": "q", "choices": ["x", "abc", "y", "abc"], "gold": 0})  # equal options
    for kind, rows in rows.items():
        answers = answer_rows(model, TOKENIZER, task_of(kind), rows, range(len(rows)), batch_tokens)
        expected = [reference_answer(model, render_prompts(rows, i, task_of(kind)), kind) for i in range(len(rows))]
        assert [answer for answer, _ in answers] == expected
        assert len(set(map(str, expected))) > 1, "a model that always answers the same would test little"
        if kind != "language_modeling":
            assert [right for _, right in answers] == [answer == 0 for answer in expected]


def test_language_modelling_is_right_if_all_tokens_are_and_of_equal_options_the_first_wins(model, monkeypatch):
    def answer(kind, row, scores):
        monkeypatch.setattr(core_eval, "score_options", lambda *args: scores)
        return answer_rows(model, TOKENIZER, task_of(kind), [row], range(1), 99)

    row = {"context": "a", "continuation": "bc"}
    assert answer("language_modeling", row, [(9.0, [*b" bc"])]) == [([*b" bc"], True)]
    assert answer("language_modeling", row, [(0.1, [*b" bx"])]) == [([*b" bx"], False)]
    row = {"query": "q", "choices": [*"abcd"], "gold": 1}
    assert answer("multiple_choice", row, [(loss, []) for loss in (2.0, 1.0, 3.0, 1.0)]) == [(1, True)]


def test_core_depends_neither_on_ranks_nor_on_batches(model, bundle, run_ranks, monkeypatch):
    monkeypatch.setattr(core_eval, "CHUNK", 5)
    lines = []
    expected = evaluate_core(model, TOKENIZER, CPU, bundle, batch_tokens=1, say=lines.append)
    assert run_ranks(2, lambda compute: evaluate_core(model, TOKENIZER, compute, bundle)) == [expected] * 2
    assert [task["examples"] for task in expected["tasks"].values()] == [12] * 3
    assert len(lines) == 3 and lines[0].startswith(" 1/3 questions: 12 questions")
    limited = evaluate_core(model, TOKENIZER, CPU, bundle, max_per_task=1)
    assert [task["examples"] for task in limited["tasks"].values()] == [1] * 3
    stops = run_ranks(2, lambda compute: evaluate_core(model, TOKENIZER, compute, bundle, stop=lambda: True))
    assert stops == [None] * 2


def test_core_is_the_mean_of_centred_accuracies_with_its_error():
    tasks = [task_of("schema", baseline=0.5, label="a"), task_of("language_modeling", baseline=0.0, label="b")]
    result = summarize(tasks, [[3, 4], [1, 2]])
    assert result["tasks"]["a"]["accuracy"] == 0.75 and result["tasks"]["a"]["centered"] == 0.5
    assert result["core"] == 0.5  # of 0.5 and 0.5
    # Binomial: sqrt(.75*.25/4)/.5 = 0.4330 and sqrt(.5*.5/2) = 0.3536; together sqrt(.1875 + .125)/2
    assert result["tasks"]["a"]["stderr"] == pytest.approx(0.4330, abs=1e-4)
    assert result["stderr"] == pytest.approx((0.1875 + 0.125) ** 0.5 / 2)


# -----------------------------------------------------------------------------
# The bundle


def zip_of(path, *names):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, "text " * 1000)
    return path


def test_unpack_publishes_the_whole_bundle_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(core_eval, "BUNDLE_LIMIT", 20_000)
    folder, core = tmp_path / "out" / "eval_bundle", "eval_bundle/core.yaml"
    folder.parent.mkdir()
    good = zip_of(tmp_path / "good.zip", core, "eval_bundle/eval_data/a.jsonl")
    cut, flipped = tmp_path / "cut.zip", tmp_path / "flipped.zip"
    data = bytearray(good.read_bytes())
    cut.write_bytes(data[: len(data) // 2])
    data[70] ^= 0xFF
    flipped.write_bytes(data)
    outside = [zip_of(tmp_path / f"{i}.zip", core, name) for i, name in enumerate(("../evil", "/evil", "a/../../evil"))]
    for archive, message in (
        (cut, "is damaged"),
        (flipped, "is damaged"),
        (zip_of(tmp_path / "other.zip", "other/core.yaml"), "no eval_bundle/core.yaml"),
        (zip_of(tmp_path / "bomb.zip", core, *"abcd"), "not the CORE bundle"),
        *((archive, "outside") for archive in outside),
    ):
        with pytest.raises(UserError, match=message):
            unpack(archive, folder)
        assert not list(folder.parent.iterdir())
    unpack(good, folder)
    assert (folder / "eval_data" / "a.jsonl").stat().st_size == 5000
    assert list(folder.parent.iterdir()) == [folder]


def test_the_bundle_is_downloaded_once_and_its_damage_names_the_remedy(hub, bundle, base_dir):
    assert not (base_dir / "eval_bundle.zip").exists()
    tasks = {task.label: task for task in load_tasks(bundle)}
    assert {task.kind for task in tasks.values()} == {"multiple_choice", "schema", "language_modeling"}
    assert tasks["pronouns"].baseline == 0.5 and tasks["questions"].delimiter == "\nAnswer: "
    for task in tasks.values():
        for text in render_prompts(read_rows(task, 3), 0, task):
            assert text.count("\n\n") == task.num_fewshot
    hub.shutdown()
    assert fetch_bundle(CPU) == base_dir / "eval_bundle"
    for damaged in ('{"context": ', "\n"):
        (bundle / "eval_data" / "facts.jsonl").write_text(damaged)
        with pytest.raises(UserError, match="facts.jsonl is damaged.*Delete .*eval_bundle"):
            read_rows(tasks["facts"])
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nfacts,25\n")
    with pytest.raises(UserError, match="damaged.*Delete"):
        load_tasks(bundle)
