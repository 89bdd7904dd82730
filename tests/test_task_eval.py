"""Task evaluation against one problem at a time, whatever the batch size, the ranks and the size of the task."""

import itertools
import time

import pytest
import torch

from nanochat.common import Compute, UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.task_eval import count_right, pass_at_k, run_task, standard_error

BOS, END = 256, 257
CPU = Compute(torch.device("cpu"), torch.float32)


class ByteTokenizer:
    """A byte is a token; a prompt is bos and the question's bytes."""

    def encode_special(self, name):
        return {"<|bos|>": BOS, "<|assistant_end|>": END}.get(name, 258)

    def get_bos_token_id(self):
        return BOS

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render_for_completion(self, conversation):
        return [BOS, *self.encode(conversation["messages"][0]["content"])]


TOKENIZER = ByteTokenizer()


class Letters:
    """Questions of many lengths; the right letter goes round."""

    eval_type, letters, baseline = "categorical", "ABCD", 0.25

    def __init__(self, n=23):
        self.n = n
        self.said = {}  # question -> letter that the model gave

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        words = f"question {i} " * (1 + i * 7 % 5)
        messages = [{"role": "user", "content": words}]
        return {"messages": messages, "letters": self.letters, "answer": self.letters[i % 4]}

    def evaluate(self, conversation, completion):
        assert completion in conversation["letters"]
        self.said[conversation["messages"][0]["content"]] = completion
        return completion == conversation["answer"]


class Words(Letters):
    """Right when the answer has an even number of bytes."""

    eval_type = "generative"

    def evaluate(self, conversation, completion):
        self.said.setdefault(conversation["messages"][0]["content"], []).append(completion)
        return len(completion) % 2 == 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=256, vocab_size=259, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.to_empty(device="cpu")
    model.init_weights(dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.normal_(std=0.3)
    return model.eval()


def measure(task, model, compute=CPU, **options):
    return run_task(task, model, TOKENIZER, Engine(model, TOKENIZER), compute, progress=False, **options)


# -----------------------------------------------------------------------------
# Letters


def by_hand(task, model):
    """One question at a time, all logits, plain argmax over the letters."""
    said = {}
    for i in range(len(task)):
        conversation = task[i]
        ids = TOKENIZER.render_for_completion(conversation)[-model.config.sequence_len :]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        letter = max(conversation["letters"], key=lambda letter: logits[ord(letter)])
        said[conversation["messages"][0]["content"]] = letter
    return said


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_letters_do_not_depend_on_the_batch_size(model, batch_size):
    task = Letters()
    expected = by_hand(task, model)
    assert len(set(expected.values())) > 1, "a model that always says the same would test little"
    accuracy, n = measure(task, model, batch_size=batch_size)
    assert task.said == expected
    right = sum(expected[task[i]["messages"][0]["content"]] == task[i]["answer"] for i in range(len(task)))
    assert (accuracy, n) == (right / len(task), len(task))


def test_only_the_letters_compete(model):
    """The model would say something else altogether; that does not matter."""
    task = Letters(1)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENIZER.render_for_completion(task[0])]))[0, -1]
    assert int(logits.argmax()) not in b"ABCD"
    measure(task, model)
    assert len(task.said) == 1


def test_a_prompt_that_does_not_fit_loses_its_beginning_and_a_line_says_so(model, capsys):
    task = Letters(3)
    task.__class__ = type("Long", (Letters,), {"__getitem__": lambda self, i: {
        **Letters.__getitem__(self, i), "messages": [{"role": "user", "content": "x" * 300 * (i == 1) + f"end {i}"}],
    }})  # fmt: skip
    measure(task, model)
    assert task.said == by_hand(task, model)
    assert "Long: 1 of 3 prompts exceeded the context of 256 tokens" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Words


def test_words_are_what_the_engine_writes(model):
    task, engine = Words(6), Engine(model, TOKENIZER)
    accuracy, n = measure(task, model, max_new_tokens=9, temperature=0.0)
    right = 0
    for i in range(6):
        ids = TOKENIZER.render_for_completion(task[i])
        (sequence,), _ = engine.generate_batch(ids, max_tokens=9, temperature=0.0)
        completion = TOKENIZER.decode(sequence[len(ids) :])
        assert task.said[task[i]["messages"][0]["content"]] == [completion]
        right += len(completion) % 2 == 0
    assert (accuracy, n) == (right / 6, 6)


def test_several_samples_solve_a_problem_when_one_is_right(model):
    class Second(Words):
        def evaluate(self, conversation, completion):
            super().evaluate(conversation, completion)
            return len(self.said[conversation["messages"][0]["content"]]) == 2

    options = {"max_new_tokens": 4, "temperature": 1.0}
    assert measure(Second(3), model, num_samples=1, **options) == (0.0, 3)
    assert measure(Second(3), model, num_samples=2, **options) == (1.0, 3)


def test_a_sampled_answer_depends_on_the_problem_and_not_on_how_many_are_asked(model):
    few, many = Words(3), Words(9)
    measure(few, model, max_new_tokens=6, temperature=1.0)
    measure(many, model, max_new_tokens=6, temperature=1.0)
    assert few.said.items() <= many.said.items()


def test_a_long_prompt_leaves_room_to_answer(model, capsys):
    task = Words(1)
    task.__class__ = type("Long", (Words,), {"__getitem__": lambda self, i: {
        "messages": [{"role": "user", "content": "y" * 5000}]
    }})  # fmt: skip
    assert measure(task, model, max_new_tokens=512)[1] == 1
    assert "Long: 1 of 1 prompts" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# How many, and by whom


@pytest.mark.parametrize("kind", [Letters, Words])
@pytest.mark.parametrize("max_problems, expected", [(None, 5), (3, 3), (5, 5), (1000, 5)])
def test_the_first_problems_or_as_many_as_there_are(model, kind, max_problems, expected):
    task = kind(5)
    _, n = measure(task, model, max_problems=max_problems, max_new_tokens=3)
    assert n == expected
    assert set(task.said) == {task[i]["messages"][0]["content"] for i in range(expected)}


@pytest.mark.parametrize("kind", [Letters, Words])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_problems_and_agree(model, kind, world_size, run_ranks):
    alone = kind(5)
    expected = measure(alone, model, max_new_tokens=5)
    task = kind(5)
    results = run_ranks(world_size, lambda compute: measure(task, model, compute, max_new_tokens=5))
    assert results == [expected] * world_size
    assert task.said == alone.said  # every problem once, with the same answer


@pytest.mark.parametrize("task, says", [
    (Letters(0), "no problem to ask"),
    (type("Lessons", (Letters,), {"eval_type": None})(4), "Lessons is for training only"),
])  # fmt: skip
def test_tasks_that_cannot_be_measured_are_refused(model, task, says):
    with pytest.raises(UserError, match=says):
        measure(task, model)
    with pytest.raises(UserError, match="no problem to ask"):
        measure(Letters(4), model, max_problems=0)


def test_standard_error_is_that_of_a_proportion():
    outcomes = torch.tensor([1.0] * 30 + [0.0] * 70, dtype=torch.float64)
    assert standard_error(0.3, 100) == pytest.approx(float(outcomes.std(correction=0)) / 100**0.5)
    assert standard_error(0.0, 5) == standard_error(1.0, 5) == 0.0


@pytest.mark.parametrize("n, k", [(5, 1), (5, 3), (4, 4), (6, 2)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one(n, k):
    right = torch.arange(n + 1)
    solved = []
    for c in right.tolist():
        choices = list(itertools.combinations([1] * c + [0] * (n - c), k))
        solved.append(sum(any(choice) for choice in choices) / len(choices))
    mean, half = pass_at_k(right, n, k)
    assert mean == pytest.approx(sum(solved) / len(solved))
    assert 0 < half < 0.5


def test_the_interval_of_pass_at_k_holds_the_truth_as_often_as_it_says():
    """Accuracies of 10% to 100%, measured on 40 problems, many times; at its worst such an interval is a little off 95%."""
    rng = torch.Generator().manual_seed(0)
    for truth in (0.1, 0.3, 0.5, 0.9, 1.0):
        measured = [pass_at_k(torch.rand(40, generator=rng) < truth, 1, 1) for _ in range(400)]
        held = sum(abs(mean - truth) <= half for mean, half in measured) / 400
        assert held > 0.91, truth
    assert pass_at_k(torch.ones(3), 1, 1) == (1.0, pytest.approx(1.96 * (10 / 49 / 7) ** 0.5)), "three of three is not certainty"


@pytest.mark.parametrize("world_size", [1, 3])
def test_right_answers_are_counted_problem_by_problem(model, world_size, run_ranks):
    task = Words(5)
    options = {"num_samples": 4, "max_new_tokens": 4, "temperature": 1.0, "progress": False}

    def count(compute):
        return count_right(task, model, TOKENIZER, Engine(model, TOKENIZER), compute, **options).tolist()

    counts = run_ranks(world_size, count)
    even = [sum(len(said) % 2 == 0 for said in task.said[task[i]["messages"][0]["content"]]) for i in range(5)]
    assert counts == [even] * world_size and len(set(even)) > 1


def test_answers_are_judged_while_others_are_written(model):
    """The first judgment waits until the engine has gone on, which it must not wait for."""
    engine = Engine(model, TOKENIZER, max_sequences=1)

    class Patient(Words):
        def evaluate(self, conversation, completion):
            return any(engine.generated_tokens > 3 or time.sleep(0.01) for _ in range(2000))

    accuracy, n = run_task(Patient(2), model, TOKENIZER, engine, CPU, max_new_tokens=3, progress=False)
    assert (accuracy, n) == (1.0, 2)


def test_an_error_in_a_judgment_is_raised(model):
    class Broken(Words):
        def evaluate(self, conversation, completion):
            raise UserError("no sandbox here")

    with pytest.raises(UserError, match="no sandbox"):
        measure(Broken(3), model, max_new_tokens=2)


def test_progress_shows_the_running_accuracy(model, capsys):
    class Slow(Letters):
        def evaluate(self, conversation, completion):
            time.sleep(0.12)  # the bar is drawn ten times a second
            return conversation["answer"] == "B"

    run_task(Slow(3), model, TOKENIZER, Engine(model, TOKENIZER), CPU)
    drawn = capsys.readouterr().err
    assert "1/2 = 50.0%" in drawn or "1/3 = 33.3%" in drawn
