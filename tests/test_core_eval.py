"""CORE against examples worked by hand, a brute-force scorer in float64, and itself one question at a time."""

from __future__ import annotations

import json
import math
import random
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import core_eval, dataset
from nanochat.common import Compute, UserError
from nanochat.core_eval import (
    CoreTask,
    answer_rows,
    evaluate_core,
    fetch_bundle,
    fewshot_text,
    load_tasks,
    mark_question,
    plan_batches,
    read_rows,
    render_prompts,
    score_options,
    shared_length,
    summarize,
    unpack,
)
from nanochat.gpt import GPT, GPTConfig

CPU = Compute(torch.device("cpu"), torch.float32)
BOS = 0


class Letters:
    """A tokenizer whose tokens are characters: id = code point, bos = 0."""

    def get_bos_token_id(self):
        return BOS

    def encode(self, texts, prepend):
        return [[prepend, *map(ord, text)] for text in texts]


class Bigrams:
    """A model whose probabilities depend on the last token alone: those of `table[last][next]`, the rest even."""

    class config:
        sequence_len = 64

    def __init__(self, table: dict[str, dict[str, float]]):
        probabilities = torch.full((128, 128), 1 / 128)
        for last, following in table.items():
            rest = 1 - sum(following.values())  # shared by the tokens not named
            probabilities[ord(last)] = max(rest, 1e-6) / (128 - len(following))
            for token, probability in following.items():
                probabilities[ord(last), ord(token)] = probability
        self.log_probabilities = probabilities.log()

    def get_device(self):
        return torch.device("cpu")

    def hidden(self, idx):
        return idx[..., None].float()

    def logits(self, hidden):
        return self.log_probabilities[hidden[..., 0].long()]


def task_of(kind, path=None, num_fewshot=0, delimiter=" ", baseline=0.0, label="a task"):
    return CoreTask(label, kind, path, num_fewshot, delimiter, baseline)


def answer(model, kind, row):
    [(said, right)] = answer_rows(model, Letters(), task_of(kind), [row], range(1), batch_tokens=64)
    return said, right


# -----------------------------------------------------------------------------
# The three kinds of tasks, by hand


def test_multiple_choice_takes_the_lowest_mean_loss():
    # "q ab": P(a| )=1/2, P(b|a)=1/2, mean loss ln 2. "q b": P(b| )=1/3, loss ln 3. Summed, "b" would win.
    model = Bigrams({" ": {"a": 1 / 2, "b": 1 / 3}, "a": {"b": 1 / 2}})
    assert answer(model, "multiple_choice", {"query": "q", "choices": ["b", "ab"], "gold": 1}) == (1, True)
    assert answer(model, "multiple_choice", {"query": "q", "choices": ["b", "ab"], "gold": 0}) == (1, False)


def test_multiple_choice_scores_only_what_follows_the_common_prefix():
    # Both start with "a", which the model finds all but impossible; then b is likelier than c.
    model = Bigrams({"a": {"b": 0.6, "c": 0.4}})
    assert answer(model, "multiple_choice", {"query": "q", "choices": ["ac", "ab"], "gold": 1}) == (1, True)


@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_options_that_tie_give_the_first(batch_tokens):
    rows = [{"query": "q", "choices": ["x", "same", "y", "same"], "gold": 1}]
    model = Bigrams({" ": {"s": 0.9}})
    answers = answer_rows(model, Letters(), task_of("multiple_choice"), rows, range(1), batch_tokens)
    assert list(answers) == [(1, True)]


def test_schema_scores_the_common_suffix():
    # "xa c" or "xb c": the suffix " c" follows a with 1/2 and b with 1/4; that b itself is likelier is no matter.
    model = Bigrams({"x": {"a": 0.1, "b": 0.9}, "a": {" ": 1 / 2}, "b": {" ": 1 / 4}, " ": {"c": 1 / 2}})
    row = {"context_options": ["xb", "xa"], "continuation": "c", "gold": 1}
    assert answer(model, "schema", row) == (1, True)
    scores = score_options(model, [(Letters().encode(["xa c"], BOS)[0], 3)], 64)
    assert scores[0].loss == pytest.approx(math.log(2))  # the mean of ln 2 and ln 2


def test_language_modelling_wants_every_token_to_be_the_likeliest():
    table = {"q": {" ": 0.9}, " ": {"a": 0.6, "c": 0.4}, "a": {"b": 0.5, "c": 0.4}}
    row = {"context": " q ", "continuation": "ab"}  # the blank around the context goes
    assert answer(Bigrams(table), "language_modeling", row) == ([ord(" "), ord("a"), ord("b")], True)
    table["a"] = {"b": 0.4, "c": 0.5}
    assert answer(Bigrams(table), "language_modeling", row) == ([ord(" "), ord("a"), ord("c")], False)


# -----------------------------------------------------------------------------
# Prompts


def test_prompts_join_examples_by_a_blank_line_and_the_delimiter():
    rows = [{"query": f"Q{i}", "choices": [f"no{i}", f"yes{i}"], "gold": 1} for i in range(2)]
    task = task_of("multiple_choice", num_fewshot=1, delimiter="\nAnswer: ")
    assert render_prompts(rows, 0, task) == [
        "Q1\nAnswer: yes1\n\nQ0\nAnswer: no0",
        "Q1\nAnswer: yes1\n\nQ0\nAnswer: yes0",
    ]
    rows = [{"context_options": [f"a{i}", f"b{i}"], "continuation": "c", "gold": 0} for i in range(2)]
    assert render_prompts(rows, 1, task_of("schema", num_fewshot=1)) == ["a0 c\n\na1 c", "a0 c\n\nb1 c"]
    rows = [{"context": f" x{i} ", "continuation": "y"} for i in range(2)]
    assert render_prompts(rows, 1, task_of("language_modeling", num_fewshot=1)) == ["x0 y\n\nx1 y", "x0 y\n\nx1"]


@given(st.integers(1, 30), st.integers(0, 12), st.data())
def test_fewshot_examples_are_the_published_sample_of_all_other_rows(n, num_fewshot, data):
    i = data.draw(st.integers(0, n - 1))
    rows = [{"context": f"c{j}", "continuation": f"={j}"} for j in range(n)]
    text = fewshot_text(rows, i, task_of("language_modeling", num_fewshot=num_fewshot, delimiter=""))
    drawn = random.Random(1234 + i).sample([j for j in range(n) if j != i], min(num_fewshot, n - 1))
    assert text == "".join(f"c{j}={j}\n\n" for j in drawn)


def test_rows_are_shuffled_and_then_cut(tmp_path):
    path = tmp_path / "eval_bundle" / "eval_data" / "some" / "task.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"context": f"\u2028{i}", "continuation": "x"} for i in range(50)]  # a line separator inside a row
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    random.Random(1337).shuffle(rows)
    assert read_rows(task_of("language_modeling", path)) == rows
    assert read_rows(task_of("language_modeling", path), max_rows=7) == rows[:7]
    path.write_text('{"context": ', encoding="utf-8")
    with pytest.raises(UserError, match="a task is damaged.*Delete .*eval_bundle"):
        read_rows(task_of("language_modeling", path))


def test_shared_length_by_hand():
    assert shared_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert shared_length([[1, 2], [1, 2, 4]]) == 2
    assert shared_length([[1, 2, 3], [9, 2, 3]], from_end=True) == 2
    assert shared_length([[3], [1, 2, 3]], from_end=True) == 1
    assert shared_length([[1], [2]]) == 0


def test_an_option_longer_than_the_context_loses_its_left_end():
    task = task_of("multiple_choice")
    question = mark_question([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6]], task, gold=0, context=4)
    assert question.options == [([2, 3, 4, 5], 2), ([1, 2, 3, 6], 3)]
    # When even the continuation does not fit, all that has a token before it counts.
    question = mark_question([[0, 1, 2, 3, 4], [0, 9, 9]], task, gold=0, context=3)
    assert question.options == [([2, 3, 4], 1), ([0, 9, 9], 1)]


def test_an_option_that_begins_another_still_has_a_token_to_score():
    question = mark_question([[0, 5, 6], [0, 5, 6, 7]], task_of("multiple_choice"), gold=0, context=9)
    assert question.options == [([0, 5, 6], 2), ([0, 5, 6, 7], 3)]
    question = mark_question([[0, 5], [0, 5]], task_of("schema"), gold=0, context=9)
    assert question.options == [([0, 5], 1), ([0, 5], 1)]


# -----------------------------------------------------------------------------
# Batches


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 100))
def test_batches_hold_each_member_once_within_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.fixture(scope="module")
def model():
    """A small GPT in which, unlike in a fresh one, every token of the prompt matters."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=96, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    model.to_empty(device="cpu")
    model.init_weights()
    for parameter in [*model.transformer.h.parameters(), model.lm_head.weight]:
        torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return model


def test_scores_equal_brute_force(model):
    rng = random.Random(0)
    options = []
    for _ in range(40):
        ids = [rng.randrange(128) for _ in range(rng.randint(2, 90))]
        options.append((ids, rng.randint(1, len(ids) - 1)))
        options.append((ids[:-1] + [rng.randrange(128)], len(ids) - 1))  # reads the same, ends differently
    for (ids, start), score in zip(options, score_options(model, options, batch_tokens=400)):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, start - 1 : -1].double()
        log_probabilities = logits.log_softmax(dim=-1)
        expected = -log_probabilities[range(len(ids) - start), ids[start:]].mean().item()
        assert score.loss == pytest.approx(expected, abs=1e-5)
        assert score.greedy == logits.argmax(dim=-1).tolist()


def write_bundle(folder, sizes=(70, 9, 12)):
    """A bundle of one task of each kind, more few-shot examples asked of the second than there are rows."""
    rng = random.Random(5)

    def words(n):
        return " ".join(rng.choice(["ab", "cde", "f", "gh"]) for _ in range(n))

    rows = {
        "choice": [
            {"query": words(rng.randint(1, 9)), "choices": [words(k) for k in (1, 2, 3)], "gold": rng.randrange(3)}
            for _ in range(sizes[0])
        ],
        "schema": [
            {"context_options": [words(2), words(3)], "continuation": words(2), "gold": rng.randrange(2)}
            for _ in range(sizes[1])
        ],
        "words": [{"context": words(rng.randint(1, 40)), "continuation": "f"} for _ in range(sizes[2])],
    }
    (folder / "eval_data" / "all").mkdir(parents=True)
    for name, lines in rows.items():
        (folder / "eval_data" / "all" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: choice, dataset_uri: all/choice.jsonl, num_fewshot: [2], icl_task_type: multiple_choice,"
        ' continuation_delimiter: "\\nAnswer: "}\n'
        "- {label: schema, dataset_uri: all/schema.jsonl, num_fewshot: [10], icl_task_type: schema}\n"
        "- {label: words, dataset_uri: all/words.jsonl, num_fewshot: [0], icl_task_type: language_modeling}\n"
    )
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Random baseline,Description\nchoice,33.3,a\nschema,50,b\nwords,0,c\nunused,10,d\n"
    )
    return folder


def test_batching_changes_no_answer(model, tmp_path):
    for task in load_tasks(write_bundle(tmp_path / "eval_bundle")):
        rows = read_rows(task)
        alone = list(answer_rows(model, Letters(), task, rows, range(len(rows)), batch_tokens=1))
        batched = list(answer_rows(model, Letters(), task, rows, range(len(rows)), batch_tokens=2000))
        assert alone == batched


def test_two_ranks_give_the_numbers_of_one(model, tmp_path, run_ranks):
    bundle = write_bundle(tmp_path / "eval_bundle")
    results = run_ranks(2, lambda compute: evaluate_core(model, Letters(), compute, bundle))
    alone = evaluate_core(model, Letters(), CPU, bundle)
    assert results == [alone, alone]
    assert [task["examples"] for task in alone["tasks"].values()] == [70, 9, 12]


def test_few_questions_and_none(model, tmp_path):
    bundle = write_bundle(tmp_path / "eval_bundle")
    lines = []
    result = evaluate_core(model, Letters(), CPU, bundle, max_per_task=1, say=lines.append)
    assert [task["examples"] for task in result["tasks"].values()] == [1, 1, 1]
    assert len(lines) == 3 and lines[0].startswith(" 1/3 choice: 1 questions")
    with pytest.raises(UserError, match="no question"):
        evaluate_core(model, Letters(), CPU, bundle, max_per_task=0)


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


def zip_of(path, names):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, "text " * 1000)
    return path


def test_unpack_publishes_the_whole_bundle_or_nothing(tmp_path):
    folder = tmp_path / "eval_bundle"
    good = zip_of(tmp_path / "good.zip", ["eval_bundle/core.yaml", "eval_bundle/eval_data/a.jsonl"])
    cut, flipped = tmp_path / "cut.zip", tmp_path / "flipped.zip"
    data = bytearray(good.read_bytes())
    cut.write_bytes(data[: len(data) // 2])
    data[70] ^= 0xFF
    flipped.write_bytes(data)
    for bad in (cut, flipped):
        with pytest.raises(UserError, match="is damaged"):
            unpack(bad, folder)
    with pytest.raises(UserError, match="no eval_bundle/core.yaml"):
        unpack(zip_of(tmp_path / "other.zip", ["other/core.yaml"]), folder)
    for name in ("../evil", "/evil", "eval_bundle/../../evil"):
        with pytest.raises(UserError, match="outside"):
            unpack(zip_of(tmp_path / "evil.zip", ["eval_bundle/core.yaml", name]), folder)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".zip") == []
    unpack(good, folder)
    assert (folder / "eval_data" / "a.jsonl").stat().st_size == 5000
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".zip") == ["eval_bundle"]


def test_a_zip_put_there_by_hand_is_taken(base_dir):
    zip_of(base_dir / "eval_bundle.zip", ["eval_bundle/core.yaml"])
    assert (fetch_bundle(CPU) / "core.yaml").exists()
    assert not (base_dir / "eval_bundle.zip").exists()


def test_a_bundle_out_of_reach_is_an_error_on_all_ranks(base_dir, monkeypatch, run_ranks):
    monkeypatch.setattr(dataset, "WAITS", (0, 0, 0))

    def fetch(compute):
        with pytest.raises(UserError, match="eval_bundle.zip") as error:
            fetch_bundle(compute)
        return str(error.value)

    assert len(set(run_ranks(3, fetch))) == 1


def test_a_damaged_bundle_names_the_remedy(tmp_path):
    bundle = write_bundle(tmp_path / "eval_bundle")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\n")
    with pytest.raises(UserError, match="damaged.*Delete"):
        load_tasks(bundle)


def test_a_downloaded_bundle_is_read(hub, base_dir):
    tasks = {task.label: task for task in load_tasks(fetch_bundle(CPU))}
    assert {task.kind for task in tasks.values()} == {"multiple_choice", "schema", "language_modeling"}
    assert tasks["pronouns"].baseline == 0.5 and tasks["questions"].delimiter == "\nAnswer: "
    for task in tasks.values():
        for text in render_prompts(read_rows(task, 3), 0, task):
            assert text.count("\n\n") == task.num_fewshot
    assert core_eval.fetch_bundle(CPU) == base_dir / "eval_bundle"  # the second time from disk
