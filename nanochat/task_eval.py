"""How many of a task's problems a chat model gets right.

Two kinds of task. A categorical one offers letters: the model reads the question once and only
the logits of the letters, at the position where its answer would begin, are compared. A
generative one has the engine write an answer, which the task checks; with several samples a
problem counts as solved when any of them is right (pass@n).

The one idea: blocks of problems are dealt to the ranks in turn, and only three sums cross them. Nothing
here depends on the number of ranks: a block is computed alike wherever it lands, padding stands
to the right, where causal attention never looks, and a problem's seed is its index.
"""

from __future__ import annotations

import torch

from nanochat.common import Compute, UserError, print0


def standard_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy measured on n independent problems: sqrt(p (1 - p) / n)."""
    return (accuracy * (1 - accuracy) / n) ** 0.5


def run_task(
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
) -> tuple[float, int]:
    """Measure `model` on the first `max_problems` problems of `task` (all of them if None or if it has fewer).

    Returns (accuracy, number of problems), the same on every rank; every rank must call.
    `batch_size` problems share a forward pass where answers are letters; `num_samples` answers
    are written where they are words. `name` is what bar and messages call the task. A prompt that does not
    fit the context loses its beginning, and a line says how many did. Raises UserError when the
    task has no problem to ask or cannot be evaluated.
    """
    n = len(task) if max_problems is None else min(max_problems, len(task))
    name = name or type(task).__name__
    if n < 1:
        raise UserError(f"{name} has no problem to ask ({len(task)} in the task, at most {max_problems} wanted)")
    if task.eval_type == "categorical":
        blocks = _deal(n, 4 * batch_size, compute)
        outcomes = _answer_letters(task, model, tokenizer, blocks, batch_size)
    elif task.eval_type == "generative":
        blocks = _deal(n, 1, compute)
        indices = [index for block in blocks for index in block]
        outcomes = _answer_in_words(
            task, model, tokenizer, engine, indices, num_samples, max_new_tokens, temperature, top_k
        )
    else:
        raise UserError(f"{name} is for training only; it has no way to check an answer")
    mine = sum(len(block) for block in blocks)
    correct, asked, cropped = _tally(outcomes, mine, name, compute, show=progress and compute.is_main)
    sums = compute.sum(torch.tensor([correct, asked, cropped], device=compute.device)).tolist()
    correct, asked, cropped = (int(x) for x in sums)
    assert asked == n, f"{asked} of {n} problems were asked"
    if cropped:
        context = model.config.sequence_len
        print0(f"{name}: {cropped} of {n} prompts did not fit the context of {context} tokens and lost their beginning")
    return correct / n, n


def _deal(n: int, size: int, compute: Compute) -> list[range]:
    """The blocks of up to `size` of n problems that fall to this rank."""
    blocks = [range(first, min(first + size, n)) for first in range(0, n, size)]
    return [blocks[i] for i in compute.mine(len(blocks))]


def _tally(outcomes, total: int, name: str, compute: Compute, show: bool) -> tuple[int, int, int]:
    """Count (correct, asked, cropped) over pairs (passed, was_cropped), with a bar that shows the accuracy so far."""
    from tqdm import tqdm

    correct = asked = cropped = 0
    with tqdm(total=total, desc=name, disable=not show, leave=False) as bar:
        for passed, was_cropped in outcomes:
            correct, asked, cropped = correct + passed, asked + 1, cropped + was_cropped
            bar.set_postfix_str(f"{correct}/{asked} = {100 * correct / asked:.1f}%", refresh=False)
            bar.update()
            compute.beat()
    return correct, asked, cropped


def _prompts(task, tokenizer, indices, room: int):
    """Yield (index, conversation, prompt ids, was_cropped); a prompt keeps its last `room` tokens."""
    for index in indices:
        conversation = task[index]
        ids = tokenizer.render_for_completion(conversation)
        yield index, conversation, ids[-room:], len(ids) > room


def _answer_letters(task, model, tokenizer, blocks, batch_size):
    """Yield (passed, was_cropped) for problems whose answer is one of their `letters`."""
    for block in blocks:
        # Problems of similar length share a batch, so that little is padding.
        prompts = sorted(_prompts(task, tokenizer, block, model.config.sequence_len), key=lambda prompt: -len(prompt[2]))
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            logits = _logits_at_end(model, [ids for _, _, ids, _ in batch], tokenizer.get_bos_token_id())  # (B, V)
            for (_, conversation, _, was_cropped), row in zip(batch, logits):
                letters = conversation["letters"]
                scores = row[[_letter_id(tokenizer, letter) for letter in letters]]
                yield bool(task.evaluate(conversation, letters[int(scores.argmax())])), was_cropped


def _letter_id(tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    assert len(ids) == 1, f"letter {letter!r} is {len(ids)} tokens; it must be one to be compared"
    return ids[0]


@torch.no_grad()
def _logits_at_end(model, prompts: list[list[int]], padding: int) -> torch.Tensor:
    """What the model expects after each prompt: (B, vocab_size) on the CPU, from one forward pass."""
    longest = max(len(ids) for ids in prompts)
    padded = torch.tensor([ids + [padding] * (longest - len(ids)) for ids in prompts], device=model.get_device())
    ends = torch.tensor([len(ids) - 1 for ids in prompts], device=padded.device)
    hidden = model.hidden(padded)  # (B, T, d)
    # The head is the largest matrix of a small model: it is applied to one position per row, not to all.
    return model.logits(hidden[torch.arange(len(prompts), device=padded.device), ends]).cpu()


def _answer_in_words(task, model, tokenizer, engine, indices, num_samples, max_new_tokens, temperature, top_k):
    """Yield (passed, was_cropped) for problems answered in free text, in the order in which their answers end.

    All are put in line at once; the engine writes as many of them together as it has room for.
    """
    context = model.config.sequence_len
    room = context - min(max_new_tokens, context // 4)  # at least a quarter of the context is left to answer in
    problems = {}  # of each row, shared by the samples of one problem
    for index, conversation, ids, was_cropped in _prompts(task, tokenizer, indices, room):
        ended: list = []
        for i in range(num_samples):
            row = engine.submit(ids, max_new_tokens, temperature, top_k, seed=index, sample_index=i)
            problems[row] = conversation, was_cropped, ended
    for row in engine.finish():
        conversation, was_cropped, ended = problems.pop(row)
        ended.append(tokenizer.decode([id for id in row.written if id not in engine.terminal_tokens]))
        if len(ended) == num_samples:
            yield any(task.evaluate(conversation, completion) for completion in ended), was_cropped
