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

from nanochat.common import Compute, UserError, cores_per_rank, print0
from nanochat.scheduler import Sequence


def standard_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy measured on n independent problems: sqrt(p (1 - p) / n)."""
    return (accuracy * (1 - accuracy) / n) ** 0.5


def pass_at_k(right: torch.Tensor, num_samples: int, k: int) -> tuple[float, float]:
    """How often one of `k` answers is right, from `right` (n,), the right ones among `num_samples` to each of n problems.

    Returns (mean over the problems, half the width of its 95% confidence interval). The estimate for a problem with c
    right answers, 1 - C(num_samples - c, k) / C(num_samples, k), is unbiased (Chen et al. 2021, arXiv:2107.03374, section 2.1).
    The interval is computed as if two more problems had been solved and two more not, so that few problems which are
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
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor | None:
    """Evaluate `model` on the first `max_problems` problems of `task` (None: all of them). Every rank must call this.

    Returns the number of right answers to each problem, (n,) int64, the same on every rank. `batch_size` problems share
    a forward pass of a categorical task; a generative one gets `num_samples` samples. `name` is shown in the progress bar
    and messages. A prompt that exceeds the context loses its beginning, and a line says how many did. `stop` is polled
    between problems; if it returns True on any rank, the result is None. Raises UserError if the task has no problems or
    cannot be evaluated.
    """
    n = len(task) if max_problems is None else min(max_problems, len(task))
    name = name or type(task).__name__
    if n < 1:
        raise UserError(f"{name} has no problem to ask ({len(task)} in the task, limit {max_problems})")
    if task.eval_type == "categorical":
        blocks = _blocks(n, 4 * batch_size, compute)
        outcomes = _categorical(task, model, tokenizer, blocks, batch_size)
    elif task.eval_type == "generative":
        blocks = _blocks(n, 1, compute)
        indices = [index for block in blocks for index in block]
        outcomes = _generative(
            task, model, tokenizer, engine, compute, indices, num_samples, max_new_tokens, temperature, top_k
        )
    else:
        raise UserError(f"{name} is for training only; it cannot grade answers")
    mine = sum(len(block) for block in blocks)
    counts = _tally(outcomes, n, mine, name, compute, progress and compute.is_main, stop)
    if stop and compute.sum(torch.tensor(int(stop()))) > 0:
        return None
    right, evaluated, cropped = compute.sum(counts.to(compute.device)).cpu()
    assert (evaluated == 1).all(), f"{(evaluated == 1).sum()} of {n} problems were evaluated"
    if cropped.any():
        context = model.config.sequence_len
        print0(f"{name}: {cropped.sum()} of {n} prompts exceeded the context of {context} tokens and lost their beginning")
    return right


def _blocks(n: int, size: int, compute: Compute) -> list[range]:
    """This rank's blocks of up to `size` of n problems."""
    blocks = [range(first, min(first + size, n)) for first in range(0, n, size)]
    return [blocks[i] for i in compute.shard(len(blocks))]


def _tally(outcomes, n: int, mine: int, name: str, compute: Compute, show: bool, stop: Callable | None) -> torch.Tensor:
    """(3, n) per problem: right answers, whether it was evaluated on this rank, whether its prompt was cropped."""
    from tqdm import tqdm

    counts = torch.zeros(3, n, dtype=torch.long)
    done = solved = 0
    with tqdm(total=mine, desc=name, disable=not show, leave=False) as bar:
        for index, right, was_cropped in outcomes:
            counts[:, index] = torch.tensor([right, 1, was_cropped])
            done, solved = done + 1, solved + (right > 0)
            bar.set_postfix_str(f"{solved}/{done} = {100 * solved / done:.1f}%", refresh=False)
            bar.update()
            compute.heartbeat()
            if stop and stop():
                break
    return counts


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
                scores = row[[_letter_id(tokenizer, letter) for letter in letters]]
                yield index, int(task.evaluate(conversation, letters[int(scores.argmax())])), was_cropped


def _letter_id(tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    assert len(ids) == 1, f"letter {letter!r} is {len(ids)} tokens; it must be one to be compared"
    return ids[0]


@torch.no_grad()
def _logits_at_end(model, prompts: list[list[int]], padding: int) -> torch.Tensor:
    """Logits (B, vocab_size) after each prompt, on the CPU, from one forward pass."""
    longest = max(len(ids) for ids in prompts)
    padded = torch.tensor([ids + [padding] * (longest - len(ids)) for ids in prompts], device=model.get_device())
    ends = torch.tensor([len(ids) - 1 for ids in prompts], device=padded.device)
    hidden = model.hidden(padded)  # (B, T, d)
    # The head is the largest matrix of a small model: it is applied to one position per row, not to all.
    return model.logits(hidden[torch.arange(len(prompts), device=padded.device), ends]).cpu()


def _generative(task, model, tokenizer, engine, compute, indices, num_samples, max_new_tokens, temperature, top_k):
    """Yield (index, right answers, was_cropped) for generative problems, each when its last sample is graded.

    All are submitted at once; the engine runs as many of them together as fit.
    """
    context = model.config.sequence_len
    room = context - min(max_new_tokens, context // 4)  # at least a quarter of the context is left for the reply
    problems = {}  # sequence -> its problem, shared by the samples of one problem
    for index, conversation, ids, was_cropped in render_prompts(task, tokenizer, indices, room):
        graded: list = []
        for i in range(num_samples):
            seq = engine.submit(ids, max_new_tokens, temperature, top_k, seed=index, sample_index=i)
            problems[seq] = index, conversation, was_cropped, graded

    def grade(seq: Sequence) -> bool:
        return task.evaluate(problems[seq][1], completion_text(tokenizer, engine, seq))

    for seq, passed in generate_and_grade(engine, grade, compute):
        index, _, was_cropped, graded = problems.pop(seq)
        graded.append(bool(passed))
        if len(graded) == num_samples:
            yield index, sum(graded), was_cropped


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
