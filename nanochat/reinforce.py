"""Policy gradient on answers that can be graded: sample a group of answers per question, learn from their differences.

With the rewards r_i of the answers a_i to a question, the loss of a step is

    L = -1/N * sum over questions, answers i, sampled tokens t of (r_i - mean(r)) * log pi(a_it | the tokens before it)

whose gradient is that of REINFORCE (Williams 1992) with the group's mean as its baseline. N is the number of sampled
tokens in the step, so each has the same weight, however long its answer is (DAPO, arXiv:2503.14476, section 3.3).
Advantages are not divided by their deviation: that favours questions nearly always or never solved (arXiv:2503.20783, 3.1).

pi is the distribution that was sampled from, temperature and top-k included, and each answer is used once, with the
weights that sampled it. So there is no importance ratio, no clipping and no KL term. What remains is a difference by
rounding, which is measured (`sampler_gap`). A truncated answer gets reward 0 and takes part in its group's mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanochat.common import Compute
from nanochat.scheduler import Sequence
from nanochat.task_eval import completion_text, render_prompts, generate_and_grade
from nanochat.training import LossScale, backward_and_step


@dataclass(frozen=True)
class Group:
    """The sampled answers to one question."""

    conversation: dict
    seqs: list[Sequence]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]

    @property
    def has_nonzero_advantage(self) -> bool:
        """Whether the rewards differ. If not, all advantages are 0."""
        return min(self.rewards) != max(self.rewards)


def sample_groups(
    engine, tokenizer, task, questions: list[tuple[int, int]], compute: Compute, num_samples: int, max_new_tokens: int,
    temperature: float, top_k: int | None,
) -> list[Group]:  # fmt: skip
    """`num_samples` graded answers to each of `questions`, all sampled in one batch; a question is (index in the task, seed)."""
    from tqdm import tqdm

    room = engine.context - min(max_new_tokens, engine.context // 4)  # at least a quarter of the context is left for the reply
    submitted, conversation_of = [], {}
    for index, seed in questions:
        ((_, conversation, ids, _),) = render_prompts(task, tokenizer, [index], room)
        seqs = [engine.submit(ids, max_new_tokens, temperature, top_k, seed=seed, sample_index=i) for i in range(num_samples)]
        submitted.append((conversation, seqs))
        conversation_of |= dict.fromkeys(seqs, conversation)

    def grade(seq: Sequence) -> float:
        return task.reward(conversation_of[seq], completion_text(tokenizer, engine, seq)) if seq.finish_reason == "stop" else 0.0

    graded = generate_and_grade(engine, grade, compute)
    rewards = dict(tqdm(graded, total=len(conversation_of), desc="answers", leave=False, disable=None if compute.is_main else True))
    return [Group(conversation, seqs, [rewards[seq] for seq in seqs]) for conversation, seqs in submitted]


def policy_batches(groups: list[Group], max_tokens: int, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """Micro-batches of answers of similar length, of up to `max_tokens` tokens, padded on the right.

    Each is (inputs, targets, advantages, log_probs), all (B, T). Targets are -1 where no token was sampled: in the
    prompt, in a tool's output and in the padding. log_probs are those at the time of sampling.
    """
    answers = [pair for group in groups if group.has_nonzero_advantage for pair in zip(group.seqs, group.advantages)]
    answers.sort(key=lambda answer: -len(answer[0].tokens))
    batches = []
    while answers:
        longest = len(answers[0][0].tokens) - 1
        size = max(1, max_tokens // longest)
        batch, answers = answers[:size], answers[size:]
        shape = len(batch), longest
        inputs, targets = torch.zeros(shape, dtype=torch.int32), torch.full(shape, -1)
        advantages, log_probs = torch.zeros(shape), torch.zeros(shape)
        for i, (seq, advantage) in enumerate(batch):
            end, first = len(seq.tokens) - 1, seq.prompt_length - 1
            inputs[i, :end] = torch.tensor(seq.tokens[:-1])
            targets[i, first:end] = torch.tensor(seq.generated).where(torch.tensor(seq.masks) == 1, -1)
            log_probs[i, first:end] = torch.tensor(seq.log_probs)
            advantages[i] = advantage
        batches.append(tuple(tensor.to(device) for tensor in (inputs, targets, advantages, log_probs)))
    return batches


def policy_step(
    model, optimizer, groups: list[Group], compute: Compute, max_tokens: int, temperature: float, top_k: int | None,
    python_start: int, loss_scale: LossScale | None = None,
) -> tuple[torch.Tensor, int, dict[str, float]]:  # fmt: skip
    """One update from the groups of all ranks; returns (loss, sampled tokens, metrics of the answers).

    If no group on any rank has a non-zero advantage, the weights do not change and the loss is 0.
    """
    seqs = [seq for group in groups for seq in group.seqs]
    batches = policy_batches(groups, max_tokens, compute.device)
    counts = {  # of this rank
        "answers": len(seqs),
        "reward": sum(sum(group.rewards) for group in groups),
        "length": sum(len(seq.generated) for seq in seqs),
        "truncated": sum(seq.finish_reason != "stop" for seq in seqs),
        "tool_calls": sum(python_start in seq.generated for seq in seqs),
        "sampled": sum(sum(seq.masks) for seq in seqs),
        "neg_log_prob": -sum(sum(seq.log_probs) for seq in seqs),
        "groups": len(groups),
        "nonzero_groups": sum(group.has_nonzero_advantage for group in groups),
        "supervised": sum(int((targets >= 0).sum()) for _, targets, _, _ in batches),
    }
    total = dict(zip(counts, compute.sum(torch.tensor([float(count) for count in counts.values()], dtype=torch.float64)).tolist()))
    differences = [torch.zeros((), device=compute.device)]  # between learner's and sampler's log-probabilities

    def losses():
        for inputs, targets, advantages, before in batches:
            log_probs = model.sampling_log_probs(inputs, targets, temperature, top_k)
            valid = targets >= 0
            differences.append((log_probs.detach() - before[valid]).abs().sum())
            yield -(advantages[valid] * log_probs).sum() / total["sampled"]

    loss = backward_and_step(losses(), optimizer, compute, loss_scale) if total["nonzero_groups"] else torch.zeros(())
    values = {name: total[name] / total["answers"] for name in ("reward", "length", "truncated", "tool_calls")}
    # On policy, the mean negative log-probability of the sampled tokens estimates the entropy of the distribution
    values["entropy"] = total["neg_log_prob"] / total["sampled"]
    values["nonzero_groups"] = total["nonzero_groups"] / total["groups"]
    values["sampler_gap"] = compute.sum(sum(differences)).item() / max(1.0, total["supervised"])
    return loss, int(total["sampled"]), values
