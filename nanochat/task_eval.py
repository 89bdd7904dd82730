"""How many of a task's problems a chat model solves.

A categorical task offers letters: only the logits of the letters where the reply would start are compared. In a
generative task the engine samples replies, which the task grades; with several samples a problem counts as solved if
any of them is right (pass@n).

Blocks of problems are assigned to the ranks in turn, and only sums are communicated. Nothing here depends on the
number of ranks: padding is on the right, where causal attention does not see it, and a problem's seed is its index.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from nanochat.common import Compute, UserError, cores_per_rank, print0
from nanochat.scheduler import Sequence


def standard_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy measured on n independent problems: sqrt(p (1 - p) / n)."""
    return (accuracy * (1 - accuracy) / n) ** 0.5


def pass_at_k(right: torch.Tensor, num_samples: int, k: int) -> tuple[float, float]:
    """How often one of `k` answers is right, from `right` (n,), the right ones among `num_samples` to each of n problems.

    Returns (mean over the problems, half the width of its 95% confidence interval). The estimate for a problem with c
    right answers, 1 - C(num_samples - c, k) / C(num_samples, k), is unbiased (Chen et al. 2021, arXiv:2107.03374).
    The interval is computed as if two more problems had been solved and two more not, so that a few problems which are
    all solved, or all not, do not pass for certainty (Agresti and Coull 1998, for proportions).
    """
    assert 1 <= k <= num_samples, f"{k} of {num_samples} answers"
    solved = [1 - math.comb(num_samples - int(c), k) / math.comb(num_samples, k) for c in right]
    padded = torch.tensor(solved + [0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    return sum(solved) / len(solved), 1.96 * padded.std(correction=0).item() / len(padded) ** 0.5


def run_task(*args, **options) -> tuple[float, int]:
    """(share of the problems that are solved, number of problems) of a task; the arguments are those of `count_right`."""
    right = count_right(*args, **options)
    return (right > 0).double().mean().item(), len(right)


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
    """Evaluate `model` on the first `max_problems` problems of `task` (None: all of them). Every rank must call this.

    Returns the number of right answers to each problem, (n,) int64, the same on every rank. `batch_size` problems share
    a forward pass of a categorical task; a generative one gets `num_samples` samples. `name` is shown in the progress bar
    and messages. `stop` is polled between problems; if it returns True on any rank, the result is None. Raises UserError
    if the task has no problems or cannot be evaluated.
    """
    n = len(task) if max_problems is None else min(max_problems, len(task))
    name = name or type(task).__name__
    if n < 1:
        raise UserError(f"{name} has no problem to ask ({len(task)} in the task, limit {max_problems})")
    if task.eval_type not in ("categorical", "generative"):
        raise UserError(f"{name} is for training only; it cannot grade answers")
    categorical = task.eval_type == "categorical"
    size = 4 * batch_size if categorical else 1  # of the blocks; problems of similar length in one share a batch
    blocks = [range(first, min(first + size, n)) for first in range(0, n, size)]
    mine = [blocks[i] for i in compute.shard(len(blocks))]
    if categorical:
        outcomes = _categorical(task, model, tokenizer, mine, batch_size)
    else:
        indices = [index for block in mine for index in block]
        settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        outcomes = _generative(task, tokenizer, engine, compute, indices, num_samples, settings)

    counts = torch.zeros(3, n, dtype=torch.long)  # right answers; 1 if evaluated on this rank; 1 if cropped
    solved = 0
    with tqdm(total=sum(map(len, mine)), desc=name, disable=None if compute.is_main else True, leave=False) as bar:
        for done, (index, right, was_cropped) in enumerate(outcomes, 1):
            counts[:, index] = torch.tensor([right, 1, was_cropped])
            solved += right > 0
            bar.update()
            bar.set_postfix_str(f"{solved}/{done} = {100 * solved / done:.1f}%", refresh=False)
            compute.heartbeat()
            if stop and stop():
                break
    if stop and compute.sum(torch.tensor(int(stop()))) > 0:
        return None
    right, evaluated, cropped = compute.sum(counts.to(compute.device)).cpu()
    assert (evaluated == 1).all(), f"{(evaluated == 1).sum()} of {n} problems were evaluated"
    if cropped.any():
        context = model.config.sequence_len
        print0(f"{name}: {cropped.sum()} of {n} prompts exceeded the context of {context} tokens and lost their beginning")
    return right


def render_prompts(task, tokenizer, indices, room: int):
    """Yield (index, conversation, prompt ids, was_cropped); a prompt keeps its last `room` tokens."""
    for index in indices:
        conversation = task[index]
        ids = tokenizer.render_for_completion(conversation)
        yield index, conversation, ids[-room:], len(ids) > room


def _categorical(task, model, tokenizer, blocks, batch_size):
    """Yield (index, right, was_cropped) for problems whose answer is one of their `letters`."""
    for block in blocks:
        # Problems of similar length share a batch, so that little is padding.
        prompts = sorted(render_prompts(task, tokenizer, block, model.config.sequence_len), key=lambda prompt: -len(prompt[2]))
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            logits = _logits_at_end(model, [ids for _, _, ids, _ in batch], tokenizer.get_bos_token_id())  # (B, V)
            for (index, conversation, _, was_cropped), row in zip(batch, logits):
                letters = conversation["letters"]
                choices = [tokenizer.encode(letter) for letter in letters]
                assert all(len(ids) == 1 for ids in choices), f"letters {letters} must be one token each to be compared"
                answer = letters[int(row[[ids[0] for ids in choices]].argmax())]
                yield index, int(task.evaluate(conversation, answer)), was_cropped


@torch.no_grad()
def _logits_at_end(model, prompts: list[list[int]], padding: int) -> torch.Tensor:
    """Logits (B, vocab_size) after each prompt, on the CPU, from one forward pass."""
    longest = max(len(ids) for ids in prompts)
    padded = torch.tensor([ids + [padding] * (longest - len(ids)) for ids in prompts], device=model.get_device())
    ends = torch.tensor([len(ids) - 1 for ids in prompts], device=padded.device)
    hidden = model.hidden(padded)  # (B, T, d)
    # The head is the largest matrix of a small model: it is applied to one position per row, not to all.
    return model.logits(hidden[torch.arange(len(prompts), device=padded.device), ends]).cpu()


def _generative(task, tokenizer, engine, compute, indices, num_samples, settings):
    """Yield (index, right answers, was_cropped) for generative problems, each when its last sample is graded.

    All are submitted at once; the engine runs as many of them together as fit.
    """
    # At least a quarter of the context is left for the reply
    room = engine.context - min(settings["max_tokens"], engine.context // 4)
    problem_of = {}  # sequence -> what `render_prompts` yielded
    grades = {index: [] for index in indices}
    for problem in render_prompts(task, tokenizer, indices, room):
        index, _, ids, _ = problem
        for i in range(num_samples):
            problem_of[engine.submit(ids, **settings, seed=index, sample_index=i)] = problem

    def grade(seq: Sequence) -> bool:
        _, conversation, _, _ = problem_of[seq]
        return task.evaluate(conversation, completion_text(tokenizer, engine, seq))

    for seq, passed in generate_and_grade(engine, grade, compute):
        index, _, _, was_cropped = problem_of[seq]
        grades[index].append(bool(passed))
        if len(grades[index]) == num_samples:
            yield index, sum(grades[index]), was_cropped


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
