"""Tasks: views and mixtures, the data sets of the fake hub, and how completions are graded."""

import json
from decimal import Decimal

import pytest
import regex
from hypothesis import given, strategies as st
from tiny import CPU

from dev import gen_identity
from nanochat.calculator import use_calculator
from nanochat.common import Unreachable, UserError
from nanochat.tokenizer import SPLIT_PATTERN
from tasks import arc, common, gsm8k, mmlu
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence, check_conversation, final_number, load_hub_dataset, mixtures, render_mc
from tasks.common import single_turn
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval, passes
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import QUESTIONS, SimpleSpelling, SpellingBee, load_words


class Numbers(Task):
    """The conversation at index i is its name and i."""

    def __init__(self, size, name="n", **view):
        super().__init__(**view)
        self.rows, self.name = range(size), name

    def get_example(self, index):
        return f"{self.name}{index}"


def prompt_of(conversation) -> str:
    return conversation["messages"][0]["content"]


def text_of(conversation) -> str:
    """The whole text of the last message."""
    content = check_conversation(conversation)["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@given(st.integers(0, 30), st.integers(0, 40), st.none() | st.integers(0, 40), st.integers(1, 7))
def test_a_view_is_a_slice_and_iterating_ends(size, start, stop, step):
    task = Numbers(size, start=start, stop=stop, step=step)
    expected = [f"n{i}" for i in list(range(size))[start:stop:step]]
    assert list(task) == expected and len(task) == len(expected)
    with pytest.raises(IndexError):
        task[len(expected)]


def test_a_sequence_keeps_the_order_and_a_mixture_shuffles_it_the_same_way_every_time():
    tasks = [Numbers(50, "a"), Numbers(30, "b", start=10), Numbers(0), Numbers(5, "c"), Numbers(5, "c")]  # one of them twice
    in_order = [item for task in tasks for item in task]
    assert list(TaskSequence(tasks)) == in_order
    mixture = list(TaskMixture(tasks))
    assert mixture == list(TaskMixture(tasks)) != list(TaskMixture(tasks, seed=43))
    assert mixture != in_order and sorted(mixture) == sorted(in_order)
    assert list(TaskMixture(tasks, stop=7)) == mixture[:7]


# -----------------------------------------------------------------------------
# Wording


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_render_mc_keeps_each_letter_a_segment_of_its_own(choices):
    """So that the token that names a choice is the token that answers. The pattern is run by `regex`."""
    letters = list("QXZJK")[: len(choices)]
    choices = ["".join(c for c in choice if c not in letters) for choice in choices]
    text = render_mc("Which?", letters, choices)
    assert [segment for segment in regex.findall(SPLIT_PATTERN, text) if set(segment) & set(letters)] == letters
    lines = [f"{choice} ({letter})" for letter, choice in zip(letters, choices)]
    assert text.index("Which?") < text.index(lines[0]) and all(line in text for line in lines)


@pytest.mark.parametrize("text, number", [
    ("#### 72", 72), ("so it is 5.\n#### -3", -3), ("####1,234,567", 1234567), ("#### $1,250.50", Decimal("1250.5")),
    ("#### -$5.00", -5), ("#### 18.", 18), ("#### .5", Decimal("0.5")), ("#### 7 apples\n#### 8", 7),
    ("#### seven", None), ("72", None), ("### 72", None), ("", None),
])  # fmt: skip
def test_final_number(text, number):
    assert final_number(text) == number


# -----------------------------------------------------------------------------
# The user's files

EXCHANGE = single_turn("Wer bist du?", "Käthe 🌼")["messages"]


@pytest.mark.parametrize("record", [
    EXCHANGE,
    {"messages": EXCHANGE},
    {"conversations": [{"from": "human", "value": "Wer bist du?"}, {"from": "gpt", "value": "Käthe 🌼"}]},
    {"instruction": "Wer bist du?", "input": "", "output": "Käthe 🌼"},
    {"prompt": "Wer bist du?", "completion": "Käthe 🌼"},
    {"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]},
])  # fmt: skip
def test_customjson_reads_every_form_as_lines_as_an_array_and_alone(tmp_path, record):
    text = json.dumps(record, ensure_ascii=False)
    for content, count in {f"\ufeff{text}\r\n\r\n{text}\n": 2, f"[{text}, {text}]": 2, text: 1, json.dumps([record], indent=1): 1}.items():
        (tmp_path / "mine.json").write_text(content, encoding="utf-8")
        assert list(CustomJSON(str(tmp_path / "mine.json"))) == [{"messages": EXCHANGE}] * count


def test_customjson_keeps_system_messages_parts_and_the_input_of_an_instruction(tmp_path):
    messages = [{"role": "system", "content": "s"}, *single_turn("a", [{"type": "python", "text": "1+1"}])["messages"]]
    (tmp_path / "mine.jsonl").write_text(f'{json.dumps(messages)}\n{{"instruction": "Add.", "input": "2 and 3", "output": "5"}}')
    assert list(CustomJSON(tmp_path / "mine.jsonl")) == [{"messages": messages}, single_turn("Add.\n\n2 and 3", "5")]


@pytest.mark.parametrize("line", [
    b"{", b"5", b'{"text": "a"}', b"null", b"[]", b'[{"role": "user", "content": "a"}]', b'[{"role": "assistant", "content": "a"}]',
    b'[{"role": "\xff"}]', b'{"conversations": [{"from": "human"}]}', b'{"prompt": 1, "completion": "a"}', b'{"conversations": [{"from": []}]}',
    b"[" * 200_000, b"\0" * 9, json.dumps(single_turn("a", "b")).encode("utf-16"),
    b'[{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]', json.dumps(single_turn("a", 5)).encode(),
])  # fmt: skip
def test_customjson_names_the_line_that_is_wrong(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(single_turn("a", "b")).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=r"mine\.jsonl, line 2: "):
        CustomJSON(path)
    path.with_suffix(".json").write_bytes(b"[" + json.dumps(single_turn("a", "b")).encode() + b", " + line + b"]")
    with pytest.raises(UserError, match=r"mine\.json, item 1 of the array: |mine\.json is neither JSON nor JSON lines: "):
        CustomJSON(path.with_suffix(".json"))


def test_identity_conversations_are_500_different_ones_fixed_by_the_seed(base_dir):
    gen_identity.main([])
    task = CustomJSON(base_dir / "identity_conversations.jsonl")
    assert len({json.dumps(conversation) for conversation in task}) == len(task) == 500
    assert [conversation["messages"] for conversation in task] == gen_identity.conversations(500, 42)
    assert sum("nanochat" in text_of(conversation) for conversation in task) > 100


def test_another_persona_says_what_its_description_says(base_dir, tmp_path):
    (tmp_path / "ada.txt").write_text("name: Ada\nfacts: Where do you live? In {London}.\nfacts: I was born in 1815.\ntraits: kind\n")
    gen_identity.main(["--persona", str(tmp_path / "ada.txt"), "--count", "300"])
    task = CustomJSON(base_dir / "identity_conversations.jsonl")
    replies = {question["content"]: answer["content"] for row in task for question, answer in [row["messages"][:2]]}
    assert len(task) == 300 and "Ada" in replies["Who are you?"] and replies["Where do you live?"] == "In {London}."
    assert "I was born in 1815." in replies.values() and "Who made you?" not in replies
    for line, message in {"name Ada": "'name Ada' is not `KEY: value`", "age: 9": "the keys name, maker", "maker: Ed": "no line `name"}.items():
        with pytest.raises(UserError, match=message):
            gen_identity.persona([line])
    assert len(gen_identity.conversations(30, 1, gen_identity.persona(["name: Ada"]))) == 30


def test_a_tenth_of_a_file_is_held_out_and_validation_measures_only_that(tmp_path):
    path = tmp_path / "my.own.jsonl"
    rows = [single_turn(f"What is {i}?", f"Number {i}") for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    train, val = CustomJSON(path, "train"), CustomJSON(path, "val")
    assert len(val) == 12 and sorted(map(str, [*train, *val])) == sorted(map(str, rows * 2))
    assert not set(map(str, train)) & set(map(str, val)) and set(train.examples) < {prompt_of(row) for row in train}
    makers = {"n": lambda: Numbers(5)}
    mixed, measured = common.mixtures(makers, makers, f"n, {path}", CPU, True, CustomJSON)
    assert sorted(map(str, mixed)) == sorted(map(str, [*Numbers(5), *train])) and mixed.examples == train.examples
    assert sorted(map(str, measured)) == sorted(map(str, val))
    with pytest.raises(UserError, match="no file of conversations at none.jsonl"):
        common.mixtures(makers, makers, "none.jsonl", CPU, True, CustomJSON)
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="only one conversation"):
        CustomJSON(path, "val")
    path.write_text("\n")
    with pytest.raises(UserError, match="no conversation"):
        CustomJSON(path)


def test_a_reply_equals_the_reference_answer_but_for_case_and_blanks(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps([*EXCHANGE, *single_turn("1+1", [{"type": "python", "text": "1+1"}, {"type": "text", "text": "Two"}])["messages"]]))
    [conversation] = task = CustomJSON(path)
    assert task.evaluate(conversation, " two\n") and not task.evaluate(conversation, "Two!") and task.eval_type == "generative"
    with pytest.raises(UserError, match="no reference answer"):
        task.evaluate({"messages": conversation["messages"][:3]}, "two")


def test_a_persona_written_by_hand_is_kept(base_dir):
    path = base_dir / "identity_conversations.jsonl"
    path.write_text("mine")
    gen_identity.main(["--count", "3"])
    with pytest.raises(SystemExit):
        gen_identity.main(["--count", "0"])
    assert path.read_text() == "mine"


def test_tasks_requested_by_name_must_load_and_those_of_a_default_mixture_are_skipped_with_a_line(tmp_path, capsys):
    persona = tmp_path / "identity.jsonl"
    makers = {"Numbers": lambda: Numbers(3), "Identity": lambda: CustomJSON(persona)}
    for val, names, explicit, message in (
        (makers, "Numbers,Identity", True, "no file of conversations at .*identity.jsonl; write one"),
        ({"Numbers": makers["Identity"]}, "Numbers", True, "no file of conversations"),
        (makers, "Identitty", False, "Identitty is not one of the tasks here: Numbers, Identity"),
    ):
        with pytest.raises(UserError, match=message):
            mixtures(makers, val, names, CPU, explicit, CustomJSON)
    assert [len(part) for part in mixtures(makers, makers, "Numbers,Identity", CPU, False, CustomJSON)] == [3, 3]
    assert "Identity is skipped: there is no file" in capsys.readouterr().out
    persona.write_text("{")  # what is broken is an error either way
    with pytest.raises(UserError, match="identity.jsonl, line 1: "):
        mixtures(makers, makers, "Numbers,Identity", CPU, False, CustomJSON)


# -----------------------------------------------------------------------------
# Data sets of the hub


def test_arc_is_shuffled_with_seed_42_and_grades_letters(hub):
    import datasets

    task = ARC("ARC-Easy", "test")
    assert len(task) == len(ARC("ARC-Challenge", "test")) == 40
    assert (task.eval_type, task.baseline) == ("categorical", 0.25)
    rows = datasets.load_dataset("allenai/ai2_arc", "ARC-Easy", split="test").shuffle(seed=42)
    for row, conversation in zip(rows, task, strict=True):
        question = prompt_of(conversation)
        assert row["question"] in question and all(f" ({letter})" in question for letter in conversation["letters"])
        assert [letter for letter in conversation["letters"] if task.evaluate(conversation, letter)] == [text_of(conversation)]


@pytest.mark.parametrize("subset, split", [("all", "test"), ("auxiliary_train", "train")])
def test_mmlu(hub, subset, split):
    assert len(MMLU(subset, split)) == 40
    for conversation in MMLU(subset, split):
        assert conversation["letters"] == ["A", "B", "C", "D"] and text_of(conversation) in conversation["letters"]
        assert (conversation["subject"] == "") == (subset == "auxiliary_train")


def test_gsm8k(hub):
    task = GSM8K("main", "test")
    assert len(task) == 40 and (task.eval_type, task.baseline) == ("generative", 0.0)
    for conversation in task:
        right = final_number(text_of(conversation))
        assert task.evaluate(conversation, text_of(conversation)) and task.reward(conversation, f"#### ${right:,}.00") == 1
        assert not task.evaluate(conversation, f"#### {right + 1}") and task.reward(conversation, f"{right}") == 0
        before, call, output, after = conversation["messages"][-1]["content"]
        assert [part["type"] for part in (before, call, output, after)] == ["text", "python", "python_output", "text"]
        assert str(use_calculator(call["text"])) == output["text"] and "<<" not in before["text"] + after["text"]


def test_smoltalk(hub):
    for split in ("train", "test"):
        assert [text_of(conversation).rstrip(".").isdigit() for conversation in SmolTalk(split, stop=30)] == [True] * 30


def test_a_hub_that_lacks_a_data_set_fails_or_is_down_is_named_in_one_line(hub, monkeypatch, tmp_path):
    hub.faults["trouble/resolve/.*parquet"] = [503] * 1000
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the library's retries
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for name, subset, split, reason in (
        ("some/set", None, "test", "doesn't exist"),
        ("openai/gsm8k", "main", "validation", "test"),
        ("fake/trouble", None, "test", "503"),
    ):
        with pytest.raises(UserError, match=f"^cannot load the data set {name} .*{reason}[^\n]*$"):
            load_hub_dataset(name, subset, split)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"some/set \(small, test\) from http://127.0.0.1:9: nothing answers there"):
        load_hub_dataset("some/set", "small", "test")


def test_a_downloaded_data_set_needs_no_hub(hub, monkeypatch):
    import datasets

    fetched = list(GSM8K("main", "test", stop=3))
    monkeypatch.setattr(common, "hub_answers", lambda: False)
    assert list(GSM8K("main", "test", stop=3)) == fetched
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("module, task, row", [
    (arc, ARC, {"question": None, "choices": {"label": ["A"], "text": ["a"]}, "answerKey": "A"}),
    (arc, ARC, {"question": "q", "choices": {"label": ["A"], "text": ["a", None]}, "answerKey": "A"}),
    (mmlu, MMLU, {"question": "q", "choices": ["a"] * 4, "answer": 4, "subject": ""}),
    (gsm8k, GSM8K, {"question": "q", "answer": "no number"}),
])  # fmt: skip
def test_a_damaged_row_of_a_data_set_is_named(monkeypatch, module, task, row):
    monkeypatch.setattr(module, "load_hub_dataset", lambda *names: [row])
    with pytest.raises(UserError, match=rf"^row 0 of {task.__name__} is damaged \([^\n]*$"):
        TaskMixture([task("some", "test")])[0]


# -----------------------------------------------------------------------------
# HumanEval

PROMPT = 'def double(x):\n    """Twice x."""\n'
TEST = 'def check(candidate):\n    """What is asked."""\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n'


def test_tests_may_use_what_the_prompt_defines():
    prompt = "def half(x):\n    return x / 2\n\n" + PROMPT
    test = "def check(candidate):\n    assert candidate(half(6)) == 6\n"
    assert passes(prompt, "    return x * 2", test, "double")
    assert not passes(prompt, "    return x\ndef half(x): return 6", test, "double")


@pytest.mark.parametrize("body", [
    "    return 4\n",
    "return x + x\n",
    "    import os; print('success'); os._exit(0)\n",
    "    return x\nimport sys; print('all tests passed'); sys.exit(0)\n",
    "    return x\ndef check(candidate): pass\n",
    '    return x\n"""',
    "    class Any(int):\n        __eq__ = lambda *_: True\n        __hash__ = None\n    return Any()\n",
    "    return x\nexit = quit = lambda *_: None\nAssertionError = Warning\n",
])  # fmt: skip
def test_wrong_answers_and_fakes_fail(body):
    assert not passes(PROMPT, body, TEST, "double")


def test_humaneval_accepts_the_body_and_the_first_fenced_program(hub):
    assert len(HumanEval()) == 6 and (HumanEval.eval_type, HumanEval.baseline) == ("generative", 0.0)
    for conversation in (task := HumanEval(step=2)):
        program = text_of(conversation)
        body = program.removeprefix(prompt_of(conversation))
        fenced = f"Here it is:\n\n```python\n{program}\n```\nand\n```\n1 / 0\n```", f"```python3  \n{program}# `\n```"
        for completion in (body, *fenced, f"```py\n{body}"):  # the last is cut before its fence ends
            assert task.evaluate(conversation, completion), completion
        assert not task.evaluate(conversation, "    return None\n")


# -----------------------------------------------------------------------------
# Spelling and counting letters, with the word list of the fake hub


def test_a_page_in_place_of_the_word_list_is_not_kept_and_an_existing_one_is_refused(hub, base_dir):
    for page in (b"<html>Please log in</html>", b"\xff", b"too few words", b"ONE\n" * 2000, b""):
        hub.faults["words_alpha.txt"] = [page]
        with pytest.raises(Unreachable, match="does not send a usable words_alpha.txt "):
            load_words("train")
        assert not (base_dir / "words_alpha.txt").exists()
    (base_dir / "words_alpha.txt").write_bytes(page)
    with pytest.raises(UserError, match="words_alpha.txt is not usable .*Delete it"):
        load_words("train")


def test_simple_spelling(hub, base_dir):
    task = SimpleSpelling(size=300)
    assert len(task) == 300 and list(task) == list(SimpleSpelling(size=300, split="train"))
    train, test = set(load_words("train")), set(load_words("test"))
    assert not train & test and len(train | test) == 1521
    for conversation in task:
        word = prompt_of(conversation).removeprefix("Spell the word: ")
        assert word in train and text_of(conversation) == f"{word}:" + ",".join(word)


def test_spelling_bee_counts_right(hub, base_dir):
    task = SpellingBee(size=400, split="test")
    assert len(task) == 400 and (task.eval_type, task.baseline) == ("generative", 0.0)
    assert [task[i] for i in range(5)] == list(SpellingBee(size=5, split="test")) != list(SpellingBee(size=5))
    answers = set()
    for conversation in task:
        by_hand, call, output, conclusion = (part["text"] for part in conversation["messages"][-1]["content"])
        word, letter = call.removeprefix("'").removesuffix("')").split("'.count('")
        count = sum(c == letter for c in word)
        assert use_calculator(call) == count == int(output)
        assert f"{word}:{','.join(word)}\n" in by_hand and f"I find {count}." in by_hand
        steps = [line.split() for line in by_hand.splitlines() if line[:1].isdigit()]
        assert "".join(character for _, character, _ in steps) == word and int(steps[-1][2]) == count
        assert word in prompt_of(conversation).lower() and letter in prompt_of(conversation).lower()
        assert task.evaluate(conversation, by_hand + conclusion) and task.evaluate(conversation, f"#### {count}")
        assert not task.evaluate(conversation, f"#### {count + 1}") and not task.evaluate(conversation, str(count))
        answers.add(count)
    assert answers >= {0, 1, 2} and len(set(map(prompt_of, task))) == 400
    assert all(question.count("{c}") == question.count("{w}") == 1 for question in QUESTIONS)
