"""How many of a task's problems a chat model solves.

A categorical task offers letters: only the logits of the letters where the reply would start are compared. In a
generative task the engine samples replies, which the task grades. Nothing depends on the number of ranks: padding is on
the right, where causal attention does not see it, and a problem's seed is its index.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from nanochat.common import Compute, UserError, cores_per_rank, print0
from nanochat.scheduler import Sequence


def pass_at_k(right: torch.Tensor, num_samples: int, k: int) -> tuple[float, float]:
    """How often one of `k` answers is right, from `right` (n,), the right ones among `num_samples` to each of n problems.

    Returns (mean over the problems, half the width of its 95% confidence interval). The estimate per problem is unbiased
    (Chen et al. 2021, arXiv:2107.03374). The interval is computed as if two more problems had been solved and two more
    not, so that a few problems with equal results do not pass for certainty (Agresti and Coull 1998, for proportions).
    """
    assert 1 <= k <= num_samples, f"{k} of {num_samples} answers"
    solved = [1 - math.comb(num_samples - int(c), k) / math.comb(num_samples, k) for c in right]
    padded = torch.tensor(solved + [0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    return sum(solved) / len(solved), 1.96 * padded.std(correction=0).item() / len(padded) ** 0.5


def count_right(
    task,
    model,
    tokenizer,
    engine,
    compute: Compute,
    max_problems: int | None = None,
    batch_size: int = 8,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = 50,
    name: str | None = None,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor | None:
    """The number of right answers to each of the first `max_problems` problems of `task` (None: all): (n,) int64.

    Every rank must call this, and gets the same. `batch_size` problems of a categorical task share a forward pass;
    those of a generative one get `num_samples` samples each. `stop` is polled between answers; if it returns True on any
    rank, the result is None. Raises UserError if the task has no problems or cannot be evaluated.
    """
    n = len(task) if max_problems is None else min(max_problems, len(task))
    name = name or type(task).__name__
    if n < 1:
        raise UserError(f"{name} has no problem to ask ({len(task)} in the task, limit {max_problems})")
    if task.eval_type == "categorical":
        answers, total = _categorical(task, model, tokenizer, compute, n, batch_size), n
    elif task.eval_type == "generative":
        settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        answers, total = _generative(task, tokenizer, engine, compute, n, num_samples, settings), n * num_samples
    else:
        raise UserError(f"{name} is for training only; it cannot grade answers")

    counts = torch.zeros(2, n, dtype=torch.long)  # right answers, answers to cropped prompts
    hidden = None if compute.is_main else True  # None: unless stderr is a terminal
    with tqdm(answers, desc=name, total=total // compute.world_size, disable=hidden, leave=False) as bar:
        for index, right, was_cropped in bar:
            counts[:, index] += torch.tensor([right, was_cropped])
            bar.set_postfix_str(f"{counts[0].sum()} right", refresh=False)
            compute.heartbeat()
            if stop and stop():
                break
    if stop and compute.sum(torch.tensor(int(stop()))) > 0:
        return None
    right, cropped = compute.sum(counts.to(compute.device)).cpu()
    if cropped.any():
        print0(f"{name}: {(cropped > 0).sum()} of {n} prompts exceeded the context of {model.config.sequence_len} tokens "
               "and lost their beginning")  # fmt: skip
    return right


class Prompt(NamedTuple):
    index: int  # of the problem in its task
    conversation: dict
    ids: list[int]
    was_cropped: bool


def render_prompts(task, tokenizer, indices, room: int) -> Iterator[Prompt]:
    """The prompts of some problems, each cropped to its last `room` tokens."""
    for index in indices:
        conversation = task[index]
        ids = tokenizer.render_for_completion(conversation)
        yield Prompt(index, conversation, ids[-room:], len(ids) > room)


@torch.no_grad()
def _categorical(task, model, tokenizer, compute, n, batch_size):
    """Yield (index, right, was_cropped) for this rank's problems; their answer is one of their `letters`."""
    size = 4 * batch_size
    for block in compute.shard(-(-n // size)):
        # Problems of similar length share a batch, so that little is padding
        indices = range(n)[block * size : (block + 1) * size]
        prompts = list(render_prompts(task, tokenizer, indices, model.config.sequence_len))
        prompts.sort(key=lambda prompt: -len(prompt.ids))
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            longest = len(batch[0].ids)
            padded = torch.tensor([prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in batch])
            hidden = model.hidden(padded.to(model.get_device()))  # (B, T, d)
            # The head is the largest matrix of a small model: it is applied to one position per row, not to all
            ends = torch.stack([row[len(prompt.ids) - 1] for row, prompt in zip(hidden, batch)])
            for prompt, logits in zip(batch, model.logits(ends).cpu()):  # (vocab_size,)
                letters = prompt.conversation["letters"]
                choices = [tokenizer.encode(letter) for letter in letters]
                assert all(len(ids) == 1 for ids in choices), f"letters {letters} must be one token each to be compared"
                answer = letters[int(logits[[ids[0] for ids in choices]].argmax())]
                yield prompt.index, int(task.evaluate(prompt.conversation, answer)), prompt.was_cropped


def _generative(task, tokenizer, engine, compute, n, num_samples, settings):
    """Yield (index, right, was_cropped) for each sample of this rank's problems, when it is graded.

    All are submitted at once; the engine runs as many of them together as fit.
    """
    # At least a quarter of the context is left for the reply
    room = engine.context - min(settings["max_tokens"], engine.context // 4)
    prompt_of = {}  # sequence -> Prompt
    for prompt in render_prompts(task, tokenizer, compute.shard(n), room):
        for i in range(num_samples):
            seq = engine.submit(prompt.ids, **settings, seed=prompt.index, sample_index=i)
            prompt_of[seq] = prompt

    def grade(seq: Sequence) -> bool:
        return task.evaluate(prompt_of[seq].conversation, completion_text(tokenizer, engine, seq))

    for seq, passed in generate_and_grade(engine, grade, compute):
        yield prompt_of[seq].index, int(bool(passed)), prompt_of[seq].was_cropped


def completion_text(tokenizer, engine, seq: Sequence) -> str:
    """The generated text of a sequence, without its terminal token."""
    return tokenizer.decode([id for id in seq.generated if id not in engine.terminal_tokens])


def generate_and_grade(engine, grade: Callable[[Sequence], Any], compute: Compute) -> Iterator[tuple[Sequence, Any]]:
    """Let the engine generate all submitted sequences; yields (sequence, grade(sequence)) as they finish.

    Grading may run programs, so it uses all cores of this rank, while other sequences are generated.
    """
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        grades: deque = deque()
        while engine.busy or grades:
            if engine.busy:
                grades += [(seq, pool.submit(grade, seq)) for seq, _, _ in engine.step() if seq.finish_reason]
                compute.heartbeat()
            while grades and (grades[0][1].done() or not engine.busy):
                seq, future = grades.popleft()
                yield seq, future.result()
