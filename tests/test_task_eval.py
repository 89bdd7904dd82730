"""Task evaluation against one problem at a time, whatever the batch size, the ranks and the size of the task."""

import itertools
import time

import pytest
import torch
from tiny import ByteTokenizer, tiny_gpt

from nanochat.common import Compute, UserError
from nanochat.engine import Engine
from nanochat.task_eval import count_right, pass_at_k

CPU = Compute(torch.device("cpu"), torch.float32)
TOKENIZER = ByteTokenizer()


class Letters:
    """Questions of many lengths; the right letter goes round. `long` is the index of one that exceeds the context."""

    eval_type, letters, baseline = "categorical", "ABCD", 0.25

    def __init__(self, n=23, long=None):
        self.n, self.long = n, long
        self.answers = {}  # question -> the model's answers

    def __len__(self):
        return self.n

    def question(self, i):
        return f" question {i}" * (1 + i * 7 % 5 if i != self.long else 100)

    def __getitem__(self, i):
        messages = [{"role": "user", "content": self.question(i)}]
        return {"messages": messages, "letters": self.letters, "answer": self.letters[i % 4]}

    def evaluate(self, conversation, completion):
        self.answers.setdefault(conversation["messages"][0]["content"], []).append(completion)
        return completion == conversation["answer"]


class Words(Letters):
    """Right when the answer has an even number of bytes."""

    eval_type = "generative"

    def evaluate(self, conversation, completion):
        super().evaluate(conversation, completion)
        return len(completion) % 2 == 0


@pytest.fixture(scope="module")
def model():
    return tiny_gpt(seed=5, noise=0.3, head_std=0.3, sequence_len=256, n_embd=32).eval()


def measure(task, model, compute=CPU, **options):
    return run_task(task, model, TOKENIZER, Engine(model, TOKENIZER), compute, **options)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_letters_are_those_of_one_question_at_a_time(model, batch_size, capsys):
    """Plain argmax over the letters, of all logits; a prompt that exceeds the context loses its beginning."""
    task = Letters(long=7)
    expected, solved, others = {}, 0, 0
    for i in range(len(task)):
        ids = TOKENIZER.render_for_completion(task[i])[-256:]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        letter = max(task.letters, key=lambda letter: logits[ord(letter)])
        expected[task.question(i)] = [letter]
        solved += letter == task.letters[i % 4]
        others += int(logits.argmax()) not in b"ABCD"
    assert len(set(map(str, expected.values()))) > 1 and others, "a model that always says the same would test little"
    assert measure(task, model, batch_size=batch_size) == (solved / 23, 23) and task.answers == expected
    assert "Letters: 1 of 23 prompts exceeded the context of 256 tokens" in capsys.readouterr().out


def test_generated_answers_are_those_of_the_engine(model, capsys):
    task, engine = Words(6, long=2), Engine(model, TOKENIZER)
    accuracy, n = measure(task, model, max_new_tokens=70, temperature=0.0)
    solved = 0
    for i in range(6):
        ids = TOKENIZER.render_for_completion(task[i])[-(256 - 64) :]  # a quarter of the context is left for the answer
        (sequence,), _ = engine.generate_batch(ids, max_tokens=70, temperature=0.0)
        completion = TOKENIZER.decode(sequence[len(ids) :])
        assert task.answers[task.question(i)] == [completion]
        solved += len(completion) % 2 == 0
    assert (accuracy, n) == (solved / 6, 6)
    assert "Words: 1 of 6 prompts" in capsys.readouterr().out


def test_several_samples_solve_a_problem_when_one_is_right(model):
    class Second(Words):
        def evaluate(self, conversation, completion):
            super().evaluate(conversation, completion)
            return len(self.answers[conversation["messages"][0]["content"]]) == 2

    options = {"max_new_tokens": 4, "temperature": 1.0}
    assert measure(Second(3), model, num_samples=1, **options) == (0.0, 3)
    assert measure(Second(3), model, num_samples=2, **options) == (1.0, 3)


@pytest.mark.parametrize("kind", [Letters, Words])
def test_a_limit_asks_the_first_problems_with_the_same_answers(model, kind):
    few, many = kind(5), kind(5)
    for task, limit, n in ((few, 3, 3), (many, 1000, 5)):
        assert measure(task, model, max_problems=limit, max_new_tokens=6, temperature=1.0)[1] == n
    assert set(few.answers) == {few.question(i) for i in range(3)} and few.answers.items() <= many.answers.items()


@pytest.mark.parametrize("kind", [Letters, Words])
@pytest.mark.parametrize("world_size", [1, 7])
def test_right_answers_are_counted_problem_by_problem_on_any_number_of_ranks(model, kind, world_size, run_ranks):
    task = kind(5)
    options = {"num_samples": 4, "max_new_tokens": 4, "temperature": 1.0}

    def count(compute):
        return count_right(task, model, TOKENIZER, Engine(model, TOKENIZER), compute, **options).tolist()

    counts = run_ranks(world_size, count)
    answers = [task.answers[task.question(i)] for i in range(5)]  # every problem was asked once
    right = [kind(5).evaluate(task[i], answer) for i in range(5) for answer in answers[i]]
    size = len(answers[0])
    assert size == (4 if kind is Words else 1) and {len(a) for a in answers} == {size}
    assert counts == [[sum(right[i * size : (i + 1) * size]) for i in range(5)]] * world_size


def test_a_stop_on_any_rank_ends_the_evaluation_on_all(model, run_ranks):
    def count(compute):
        options = {"batch_size": 1, "stop": lambda: compute.rank == 1}
        return count_right(Letters(5), model, TOKENIZER, Engine(model, TOKENIZER), compute, **options)

    assert run_ranks(2, count) == [None, None]


class Broken(Words):
    def evaluate(self, conversation, completion):
        raise UserError("no sandbox here")


@pytest.mark.parametrize("task, options, message", [
    (Letters(0), {}, "no problem to ask"),
    (Letters(4), {"max_problems": 0}, "no problem to ask"),
    (type("Lessons", (Letters,), {"eval_type": None})(4), {}, "Lessons is for training only"),
    (Broken(3), {"max_new_tokens": 2}, "no sandbox"),  # an error of a grader
])  # fmt: skip
def test_tasks_that_cannot_be_evaluated_are_refused(model, task, options, message):
    with pytest.raises(UserError, match=message):
        measure(task, model, **options)


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


def test_the_interval_of_pass_at_k_covers_the_truth_95_times_in_100():
    """Accuracies of 10% to 100%, each measured 400 times on 40 problems; at worst the interval is a little off 95%."""
    rng = torch.Generator().manual_seed(0)
    for truth in (0.1, 0.3, 0.5, 0.9, 1.0):
        measured = [pass_at_k(torch.rand(40, generator=rng) < truth, 1, 1) for _ in range(400)]
        covered = sum(abs(mean - truth) <= half for mean, half in measured) / 400
        assert covered > 0.91, truth
    assert pass_at_k(torch.ones(3), 1, 1) == (1.0, pytest.approx(1.96 * (10 / 49 / 7) ** 0.5)), "no certainty"
    outcomes = torch.tensor([1.0] * 30 + [0.0] * 70, dtype=torch.float64)
    assert standard_error(0.3, 100) == pytest.approx(float(outcomes.std(correction=0)) / 100**0.5)


def test_answers_are_graded_while_others_are_generated(model):
    """Each grade waits until the engine has finished, which must not wait for a grade."""
    engine = Engine(model, TOKENIZER, max_sequences=1)

    class Patient(Words):
        def evaluate(self, conversation, completion):
            return any(not engine.busy or time.sleep(0.01) for _ in range(2000))

    assert run_task(Patient(2), model, TOKENIZER, engine, CPU, max_new_tokens=3) == (1.0, 2)
