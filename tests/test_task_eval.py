"""Task evaluation against one problem at a time, whatever the batch size, the ranks and the size of the task."""

import itertools

import pytest
import torch
from tiny import CPU, ByteTokenizer, tiny_gpt

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.task_eval import count_right, pass_at_k

TOKENIZER = ByteTokenizer()


class Letters:
    """Questions of many lengths; the right letter goes round. `long` is the index of one that exceeds the context."""

    eval_type, letters = "categorical", "ABCD"

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


def count(task, model, compute=CPU, **options):
    return count_right(task, model, TOKENIZER, Engine(model, TOKENIZER), compute, **options).tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_letters_are_those_of_one_question_at_a_time(model, batch_size, capsys):
    """Plain argmax over the letters, of all logits; a prompt that exceeds the context loses its beginning."""
    task, expected = Letters(long=7), {}
    for i in range(len(task)):
        ids = TOKENIZER.render_for_completion(task[i])[-256:]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        expected[task.question(i)] = [max(task.letters, key=lambda letter: logits[ord(letter)])]
    assert len(set(map(str, expected.values()))) > 1, "a model that always says the same would test little"
    right = [int(answer == [task.letters[i % 4]]) for i, answer in enumerate(expected.values())]
    assert count(task, model, batch_size=batch_size) == right and task.answers == expected
    assert "Letters: 1 of 23 prompts exceeded the context of 256 tokens" in capsys.readouterr().out


def test_generated_answers_are_those_of_the_engine(model, capsys):
    task, engine, right = Words(6, long=2), Engine(model, TOKENIZER), []
    counts = count(task, model, max_new_tokens=70, temperature=0.0)
    for i in range(6):
        ids = TOKENIZER.render_for_completion(task[i])[-(256 - 64) :]  # a quarter of the context is left for the answer
        (sequence,), _ = engine.generate_batch(ids, max_tokens=70, temperature=0.0)
        completion = TOKENIZER.decode(sequence[len(ids) :])
        assert task.answers[task.question(i)] == [completion]
        right.append(1 - len(completion) % 2)
    assert counts == right and "Words: 1 of 6 prompts" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [Letters, Words])
def test_right_answers_are_counted_problem_by_problem_on_any_number_of_ranks(model, kind, run_ranks):
    task, options = kind(5), {"num_samples": 4, "max_new_tokens": 4, "temperature": 1.0}
    counts = count(task, model, **options)
    answers = [task.answers[task.question(i)] for i in range(5)]
    assert {len(some) for some in answers} == {4 if kind is Words else 1}
    assert counts == [sum(kind().evaluate(task[i], answer) for answer in answers[i]) for i in range(5)]
    assert run_ranks(7, lambda compute: count(kind(5), model, compute, **options)) == [counts] * 7
    assert count(kind(5), model, max_problems=3, **options) == counts[:3]

    def stopped(compute):  # on one rank, which stops all
        stop = {"stop": lambda: compute.rank == 1}
        return count_right(kind(5), model, TOKENIZER, Engine(model, TOKENIZER), compute, **stop, **options)

    assert run_ranks(2, stopped) == [None, None]


class Broken(Words):
    def evaluate(self, conversation, completion):
        raise UserError("no sandbox here")


@pytest.mark.parametrize("task, message", [
    (Letters(0), "no problem to ask"),
    (type("Lessons", (Letters,), {"eval_type": None})(4), "Lessons is for training only"),
    (Broken(3), "no sandbox"),  # an error of a grader
])  # fmt: skip
def test_tasks_that_cannot_be_evaluated_are_refused(model, task, message):
    with pytest.raises(UserError, match=message):
        count(task, model, max_new_tokens=2)


@pytest.mark.parametrize("n, k", [(5, 1), (5, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one(n, k):
    solved = []
    for c in range(n + 1):
        choices = list(itertools.combinations([1] * c + [0] * (n - c), k))
        solved.append(sum(any(choice) for choice in choices) / len(choices))
    mean, half = pass_at_k(torch.arange(n + 1), n, k)
    assert mean == pytest.approx(sum(solved) / len(solved)) and 0 < half < 0.5
    assert pass_at_k(torch.ones(3), 1, 1) == (1.0, pytest.approx(1.96 * (10 / 49 / 7) ** 0.5)), "no certainty"
