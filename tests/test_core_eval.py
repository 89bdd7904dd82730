"""CORE against examples worked by hand, a brute-force scorer in float64, and itself one question at a time."""

import json
import math
import random
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ByteTokenizer, tiny_gpt

from nanochat import core_eval
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
    summarize,
    unpack,
)

CPU = Compute(torch.device("cpu"), torch.float32)
TOKENIZER = ByteTokenizer()


class Bigrams:
    """A model whose next token depends on the last token alone: `table[last][next]`, the rest uniform."""

    class config:
        sequence_len = 64

    def __init__(self, table: dict[str, dict[str, float]]):
        probabilities = torch.full((262, 262), 1 / 262)
        for last, following in table.items():
            rest = 1 - sum(following.values())
            probabilities[ord(last)] = max(rest, 1e-6) / (262 - len(following))
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


# -----------------------------------------------------------------------------
# The three kinds of tasks, by hand


@pytest.mark.parametrize("table, choices, answer", [
    # P(a| )=1/2, P(b|a)=1/2, mean loss ln 2; P(b| )=1/3, loss ln 3. Summed, "b" would win.
    ({" ": {"a": 1 / 2, "b": 1 / 3}, "a": {"b": 1 / 2}}, ["b", "ab"], 1),
    # Both start with "a", which is nearly impossible, but only what follows the common prefix is scored.
    ({"a": {"b": 0.6, "c": 0.4}}, ["ac", "ab"], 1),
    ({" ": {"s": 0.9}}, ["x", "same", "y", "same"], 1),  # of equal options the first wins
])  # fmt: skip
@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_multiple_choice_takes_the_lowest_mean_loss_after_the_common_prefix(table, choices, answer, batch_tokens):
    rows = [{"query": "q", "choices": choices, "gold": gold} for gold in (answer, 0)]
    answers = answer_rows(Bigrams(table), TOKENIZER, task_of("multiple_choice"), rows, range(2), batch_tokens)
    assert list(answers) == [(answer, True), (answer, False)]


def test_schema_scores_the_common_suffix():
    # "xa c" or "xb c": the suffix " c" follows a with 1/2 and b with 1/4; that b itself is likelier is no matter.
    model = Bigrams({"x": {"a": 0.1, "b": 0.9}, "a": {" ": 1 / 2}, "b": {" ": 1 / 4}, " ": {"c": 1 / 2}})
    row = {"context_options": ["xb", "xa"], "continuation": "c", "gold": 1}
    assert list(answer_rows(model, TOKENIZER, task_of("schema"), [row], range(1), 64)) == [(1, True)]
    (score,) = score_options(model, [(TOKENIZER.encode("xa c"), 2)], 64)
    assert score.loss == pytest.approx(math.log(2))  # the mean of ln 2 and ln 2


def test_language_modelling_requires_every_token_to_be_the_likeliest():
    table = {"q": {" ": 0.9}, " ": {"a": 0.6, "c": 0.4}, "a": {"b": 0.5, "c": 0.4}}
    rows = [{"context": " q ", "continuation": text} for text in ("ab", "ac")]  # the context is stripped
    answers = answer_rows(Bigrams(table), TOKENIZER, task_of("language_modeling"), rows, range(2), 64)
    assert list(answers) == [([*b" ab"], True), ([*b" ab"], False)]


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
    assert mark_question(sequences, task_of(kind), gold=0, context=context).options == options


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


def test_scores_equal_brute_force(model):
    rng = random.Random(0)
    options = []
    for _ in range(40):
        ids = [rng.randrange(128) for _ in range(rng.randint(2, 90))]
        options.append((ids, rng.randint(1, len(ids) - 1)))
        options.append((ids[:-1] + [rng.randrange(128)], len(ids) - 1))  # shares the input, ends differently
    for (ids, start), score in zip(options, score_options(model, options, batch_tokens=400)):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, start - 1 : -1].double()
        log_probabilities = logits.log_softmax(dim=-1)
        expected = -log_probabilities[range(len(ids) - start), ids[start:]].mean().item()
        assert score.loss == pytest.approx(expected, abs=1e-5)
        assert score.greedy == logits.argmax(dim=-1).tolist()


@pytest.fixture
def bundle(hub, base_dir):
    """The bundle of the fake hub: one task of each kind with 12 questions."""
    return fetch_bundle(CPU)


def test_core_depends_neither_on_ranks_nor_on_batches(model, bundle, run_ranks, monkeypatch):
    monkeypatch.setattr(core_eval, "CHUNK", 5)
    lines = []
    expected = evaluate_core(model, TOKENIZER, CPU, bundle, batch_tokens=1, say=lines.append)
    assert run_ranks(2, lambda compute: evaluate_core(model, TOKENIZER, compute, bundle)) == [expected] * 2
    assert [task["examples"] for task in expected["tasks"].values()] == [12] * 3
    assert len(lines) == 3 and lines[0].startswith(" 1/3 questions: 12 questions")
    stops = run_ranks(2, lambda compute: evaluate_core(model, TOKENIZER, compute, bundle, stop=lambda: True))
    assert stops == [None] * 2


def test_questions_per_task_can_be_limited_but_not_to_none(model, bundle):
    result = evaluate_core(model, TOKENIZER, CPU, bundle, max_per_task=1)
    assert [task["examples"] for task in result["tasks"].values()] == [1, 1, 1]
    with pytest.raises(UserError, match="no question"):
        evaluate_core(model, TOKENIZER, CPU, bundle, max_per_task=0)


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


def test_unpack_publishes_the_whole_bundle_or_nothing(tmp_path):
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
        (cut, "not a whole zip file"),
        (flipped, "not a whole zip file"),
        (zip_of(tmp_path / "other.zip", "other/core.yaml"), "no eval_bundle/core.yaml"),
        *((archive, "outside") for archive in outside),
    ):
        with pytest.raises(UserError, match=message):
            unpack(archive, folder)
        assert not list(folder.parent.iterdir())
    unpack(good, folder)
    assert (folder / "eval_data" / "a.jsonl").stat().st_size == 5000
    assert list(folder.parent.iterdir()) == [folder]


def test_a_zip_placed_by_hand_is_unpacked(base_dir):
    zip_of(base_dir / "eval_bundle.zip", "eval_bundle/core.yaml")
    assert (fetch_bundle(CPU) / "core.yaml").exists()
    assert not (base_dir / "eval_bundle.zip").exists()


def test_the_bundle_is_downloaded_once_and_its_damage_names_the_remedy(hub, bundle, base_dir):
    tasks = {task.label: task for task in load_tasks(bundle)}
    assert {task.kind for task in tasks.values()} == {"multiple_choice", "schema", "language_modeling"}
    assert tasks["pronouns"].baseline == 0.5 and tasks["questions"].delimiter == "\nAnswer: "
    for task in tasks.values():
        for text in render_prompts(read_rows(task, 3), 0, task):
            assert text.count("\n\n") == task.num_fewshot
    hub.shutdown()
    assert fetch_bundle(CPU) == base_dir / "eval_bundle"
    (bundle / "eval_data" / "facts.jsonl").write_text('{"context": ')
    with pytest.raises(UserError, match="facts is damaged.*Delete .*eval_bundle"):
        read_rows(tasks["facts"])
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nfacts,25\n")
    with pytest.raises(UserError, match="damaged.*Delete"):
        load_tasks(bundle)
