"""The policy gradient against its definition, and sampling; `test_ranks` has many ranks."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import BOS, CPU, ByteTokenizer, tiny_gpt

from nanochat.cross_entropy import sampling_log_probs
from nanochat.engine import Engine
from nanochat.optim import MuonAdamW
from nanochat.reinforce import Group, policy_batches, policy_step, sample_groups
from nanochat.scheduler import Sequence

TOKENIZER = ByteTokenizer()


class Letters:
    """Every answer is right."""

    eval_type = "generative"

    def __getitem__(self, index):
        return {"messages": [{"role": "user", "content": "abcd"[index]}]}

    def reward(self, conversation, completion):
        return 1.0


def test_truncated_answers_get_reward_0_and_become_less_likely():
    model = tiny_gpt()
    engine, questions = Engine(model, TOKENIZER, max_sequences=64), [(0, 1), (2, 2)]
    groups = sample_groups(engine, TOKENIZER, Letters(), questions, CPU, 32, 40, temperature=1.0, top_k=None)
    ends = {(seq.finish_reason, reward) for group in groups for seq, reward in zip(group.seqs, group.rewards)}
    assert ends == {("stop", 1.0), ("length", 0.0)}
    optimizer, steps = MuonAdamW(model.param_groups()), []
    for _ in range(3):
        loss, _, values = policy_step(model, optimizer, groups, CPU, 64, 1.0, None, python_start=6)
        steps.append((loss.item(), values["sampler_gap"]))
    assert steps[0] > steps[1] > steps[2], "the advantages weigh the log-probabilities"
    assert steps[0][1] < 1e-5, "the learner's distribution is the one that was sampled from"


class Bigrams(torch.nn.Module):
    """A policy that sees one token: a table of logits before the softcap."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(3 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))

    def sampling_log_probs(self, idx, targets, temperature, top_k):
        valid = targets >= 0
        return sampling_log_probs(self.table[idx[valid].long()], torch.eye(7), targets[valid], temperature, top_k)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 20, 1000]))
def test_loss_and_gradient_equal_those_of_the_definition(rng, max_tokens):
    """-1/N * sum of (reward - mean) * log p over the sampled tokens, differentiated by PyTorch in float64."""
    model = Bigrams()
    table = model.table.detach().double().requires_grad_()
    log_probs = (15 * torch.tanh(table / 15) / 1.7).log_softmax(-1)
    groups, total, count = [], 0 * table.sum(), 0
    for _ in range(3):
        seqs = [Sequence(tokens=[rng.randrange(7)], limit=99, finish_reason="stop") for _ in range(4)]
        groups.append(Group({}, seqs, rewards=[float(rng.random() < 0.5) for _ in seqs]))
        for seq, reward in zip(seqs, groups[-1].rewards):
            for _ in range(rng.randint(1, 5)):
                before, token, mask = seq.tokens[-1], rng.randrange(7), int(rng.random() < 0.8)
                seq.tokens.append(token)
                seq.masks.append(mask)
                seq.log_probs.append(mask * log_probs[before, token].item())
                total = total - mask * (reward - sum(groups[-1].rewards) / 4) * log_probs[before, token]
                count += mask
    expected = total / max(1, count)
    expected.backward()
    start, optimizer = model.table.detach().clone(), torch.optim.SGD(model.parameters(), lr=1.0)
    loss, tokens, values = policy_step(model, optimizer, groups, CPU, max_tokens, 1.7, None, python_start=0)
    assert tokens == count and values["sampler_gap"] < 1e-5
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(start - model.table, table.grad.float(), atol=1e-5)


def test_groups_of_equal_rewards_are_skipped():
    seq = Sequence(tokens=[1, 2], limit=99, finish_reason="stop", masks=[1], log_probs=[-1.0])
    model = optimizer = SimpleNamespace(param_groups=[])  # neither can be called
    loss, _, values = policy_step(model, optimizer, [Group({}, [seq] * 4, [0.25] * 4)], CPU, 8, 1.0, None, python_start=0)
    assert loss == 0 and values["nonzero_groups"] == 0 and values["reward"] == 0.25


def test_batches_supervise_the_sampled_tokens_only_and_metrics_count_all():
    long = Sequence(tokens=[1, 2], limit=9, finish_reason="stop")
    short = Sequence(tokens=[1], limit=9, finish_reason="length")
    long.tokens += [5, 3, 4]
    long.masks, long.log_probs = [1, 0, 1], [-0.5, 0.0, -0.25]
    short.tokens, short.masks, short.log_probs = [1, 6], [1], [-1.0]
    groups = [Group({}, [short, long], [0.0, 1.0])]
    ((inputs, targets, advantages, _),) = policy_batches(groups, 8, CPU.device)
    assert inputs.tolist() == [[1, 2, 5, 3], [1, 0, 0, 0]] and advantages[:, 0].tolist() == [0.5, -0.5]
    assert targets.tolist() == [[-1, 5, -1, 4], [6, -1, -1, -1]]
    model = Bigrams()
    optimizer = torch.optim.SGD(model.parameters())
    _, tokens, values = policy_step(model, optimizer, groups, CPU, 8, 1.0, None, python_start=5)
    del values["sampler_gap"]
    expected = {"reward": 0.5, "length": 2.0, "truncated": 0.5, "tool_calls": 0.5, "nonzero_groups": 1.0}
    assert tokens == 3 and values == {**expected, "entropy": pytest.approx(1.75 / 3)}


def test_the_engine_follows_the_weights_and_a_reset_empties_its_cache():
    model = tiny_gpt(noise=0.3)
    engine = Engine(model, TOKENIZER)

    def reply(engine):
        return engine.generate_batch([BOS, 0, 1, 2, 3], max_tokens=6, temperature=0.0)

    before = reply(engine)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    engine.reset()
    assert reply(engine) == reply(Engine(model, TOKENIZER)) != before
    assert engine.prefill_tokens == 4 + 4, "no keys and values of the old weights are reused"
