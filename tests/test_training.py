"""The shared steps of training: gradients and losses of a step, loss scaling, the meter, stop signals, where to resume."""

import json
import math
import signal
import time
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint_manager import CPU, save
from tiny import tiny_gpt
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import cross_entropy
from nanochat.common import UserError
from nanochat.device import peak_flops
from nanochat.optim import MuonAdamW
from nanochat.training import LossScale, Meter, StopSignal, make_optimizer, sampled_softmax, set_rates, step_to_resume, train_step


class TinyModel(torch.nn.Module):
    """A bigram table with the model's interface, whose gradient is easy to derive."""

    def __init__(self, vocab=11):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)))

    def forward(self, idx, targets, loss_reduction, importance=None):
        return F.cross_entropy(self.table[idx].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)


def batch(B, T, supervised, seed):
    """Random (inputs, targets) with that many supervised targets."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 11, (B, T), generator=g), torch.randint(0, 11, (B, T), generator=g)
    keep = torch.zeros(B * T, dtype=torch.bool)
    keep[torch.randperm(B * T, generator=g)[:supervised]] = True
    return x, torch.where(keep.view(B, T), y, -1)


def test_a_step_never_synchronises_and_compiles_once():
    """No value of a tensor is read, which would wait for a GPU, and new rates do not recompile."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            synchronising = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
            assert function not in synchronising, "this synchronises"
            return function(*args, **(kwargs or {}))

    model = tiny_gpt()
    optimizer = MuonAdamW(model.param_groups())
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    tokens = torch.randint(0, 64, (2, 32), dtype=torch.int32)
    pair = tokens, tokens.long()
    train_step(compiled, optimizer, [pair], CPU, count=64)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 4):
            set_rates(optimizer, step, step / 4, 2, 0.5, 0.1)
            train_step(compiled, optimizer, [pair, pair], CPU, count=128)
    with NoReading():
        train_step(model, optimizer, [pair, pair], CPU, count=128)
    with NoReading(), pytest.raises(AssertionError, match="this synchronises"):
        train_step(model, optimizer, [pair, pair], CPU)  # the check works


@pytest.mark.parametrize("world_size, scaled", [(1, False), (2, False), (2, True)])
def test_every_target_weighs_the_same_in_any_micro_batch_on_any_rank(run_ranks, world_size, scaled):
    """The gradients of the ranks, which the optimizer sums, add up to that of the mean over all targets; loss scaling or not."""
    batches = [batch(2, 6, n, seed=n) for n in (1, 12, 5, 0)]  # one of them has no target
    models = [TinyModel() for _ in range(world_size)]

    def step(compute):
        model, mine = models[compute.rank], batches[compute.rank :: world_size]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # subtracts the gradient of this rank
        return train_step(model, optimizer, mine, compute, LossScale(compute) if scaled else None)

    losses = run_ranks(world_size, step)
    x, y = (torch.cat(parts) for parts in zip(*batches))
    model = TinyModel()
    expected = F.cross_entropy(model.table.double()[x].flatten(0, 1), y.flatten(), ignore_index=-1)
    (gradient,) = torch.autograd.grad(expected, model.table)
    assert losses == [pytest.approx(expected.item(), rel=1e-6)] * world_size
    assert torch.allclose(sum(TinyModel().table - model.table for model in models), gradient, atol=1e-6)


def test_the_vocabulary_of_a_step_is_sampled_alike_on_every_rank_and_in_any_micro_batches(run_ranks, monkeypatch):
    monkeypatch.setattr(cross_entropy, "SAMPLE", 8)
    batches = [batch(2, 6, n, seed=n) for n in (1, 0, 3, 2)]
    expected = sampled_softmax([[torch.cat(parts) for parts in zip(*batches)]], 40, CPU, seed=5)
    targets = torch.cat([y.flatten() for _, y in batches])
    assert (expected[targets[targets >= 0]] == 1).all() and (expected > 0).sum() in (8, 16)
    for importance in run_ranks(2, lambda compute: sampled_softmax(batches[compute.rank :: 2], 40, compute, seed=5)):
        assert torch.equal(importance, expected)


def test_overflow_on_one_rank_skips_the_step_on_all(run_ranks):
    def step(compute):
        model, scale = TinyModel(), LossScale(compute)
        initial = scale.get_scale()
        if compute.rank == 1:
            model.table.register_hook(lambda grad: grad * math.inf)
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [batch(2, 6, 7, seed=1)], compute, scale)
        return torch.equal(model.table, TinyModel().table), scale.get_scale() / initial

    assert run_ranks(2, step) == [(True, 0.5)] * 2


def test_a_step_without_any_target_changes_nothing():
    model = TinyModel()
    before = model.table.clone()
    rates = {"lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.5}
    optimizer = MuonAdamW([{"kind": "adamw", "params": [("table", model.table)], **rates}])
    assert train_step(model, optimizer, [batch(2, 6, 0, seed=0)], CPU) == 0 and torch.equal(model.table, before)
    assert not any(state.any() for state in optimizer.state_dict().values())


@pytest.mark.parametrize("step, progress, factor, momentum, decay", [
    (0, 0.0, 0.25, 0.85, 1.0), (2, 0.02, 0.75, 0.8506, 0.999), (100, 0.25, 1.0, 0.88, 0.854), (400, 0.5, 1.0, 0.97, 0.5),
    (600, 0.75, 0.55, 0.935, 0.146), (800, 1.0, 0.1, 0.90, 0.0),
])  # fmt: skip
def test_rates_rise_stay_and_fall(step, progress, factor, momentum, decay):
    group = {"params": [], "weight_decay": 0.4}
    optimizer = MuonAdamW([{"kind": "muon", "lr": 0.02, **group}, {"kind": "adamw", "lr": 0.3, **group}])
    assert set_rates(optimizer, step, progress, warmup_steps=3, warmdown=0.5, final=0.1) == pytest.approx(factor)
    muon, adamw = optimizer.param_groups
    assert (muon["lr"], adamw["lr"], adamw["weight_decay"]) == pytest.approx((0.02 * factor, 0.3 * factor, 0.4))
    assert (muon["momentum"], muon["weight_decay"]) == pytest.approx((momentum, 0.4 * decay), abs=5e-4)


def meter(path, **state):
    return Meter(CPU, path, tokens_per_step=100, flops_per_token=10, **state)


def stop_step(m, step, loss):
    m.start()
    m.stop(step, step / 6, loss if hasattr(loss, "item") else torch.tensor(loss), 1.0, 1)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_short_run_raises_the_rates_of_matrices_and_embeddings_and_a_small_batch_lowers_all():
    flags = Namespace(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02, scalar_lr=0.5)
    rates = lambda *factors: torch.tensor([g["lr"] for g in make_optimizer(tiny_gpt(), flags, *factors, 0.0).param_groups])
    assert torch.allclose(rates(1.0, 1.0)[3:], torch.tensor([0.005, 0.5, 0.2, 0.02]))  # lambdas, x0's, gates, matrices
    assert torch.allclose(rates(1.0, 4.0) / rates(1.0, 1.0), torch.tensor([4.0, 4, 4, 1, 1, 1, 4]))
    assert torch.allclose(rates(0.1, 1.0), 0.1 * rates(1.0, 1.0)) and rates(2.0, 1.0)[5] == 0.2


def test_the_smoothed_loss_is_debiased_and_resumes_and_memory_is_measured(tmp_path, capsys):
    m = meter(tmp_path)
    stop_step(m, 1, 4.0)
    stop_step(m, 2, 2.0)
    saved = json.loads(json.dumps(m.state))
    m.log(2, val_bpb=1.5)  # an evaluation at the saved step is repeated after a resume
    stop_step(m, 3, 3.0)
    weights = [0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    lines = [line for line in logged(tmp_path) if "loss" in line]
    smooth = sum(w * x for w, x in zip(weights, [4.0, 2.0, 3.0])) / sum(weights)
    assert [line["loss"] for line in lines] == pytest.approx([4.0, (0.9 * 4 + 2) / 1.9, smooth])
    assert "step 00003 (50.0%)" in capsys.readouterr().out
    [peak] = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")]
    assert lines[2]["peak_memory"] == pytest.approx(peak, rel=0.05)

    m.path.write_text(m.path.read_text() + '{"step": 4, "lo')  # killed in the middle of a line
    stop_step(meter(tmp_path, state=saved), 3, 3.0)
    assert [(line["step"], line["loss"]) for line in logged(tmp_path)] == [(line["step"], line["loss"]) for line in lines]


def test_the_eta_leaves_out_the_first_step_which_compiles(tmp_path, monkeypatch, capsys):
    m = meter(tmp_path)
    monkeypatch.setattr(time, "perf_counter", iter([0, 6000, 6000, 6060, 6060, 6120, 6120, 6720]).__next__)  # start, end, ...
    for step in (1, 2, 3, 4):
        stop_step(m, step, 1.0)
    assert [line.split("eta ")[1] for line in capsys.readouterr().out.splitlines()] == ["-", "4.0 min", "3.0 min", "2.0 min"]


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", None),
    ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA L40", None), ("NVIDIA RTX A6000", 155),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200 NVL", 835), ("NVIDIA H20", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989),
    ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA GB300", 2500),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 5090", 209.5), ("AMD Instinct MI300X", 1307),
])  # fmt: skip
def test_the_peak_of_a_gpu_is_found_by_its_name(name, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (teraflops and teraflops * 1e12)


def test_on_a_gpu_a_step_is_reported_after_the_next_is_launched_and_nan_stops_the_run(tmp_path):
    read = []

    class Loss(float):
        def item(self):  # would wait for a GPU
            read.append(self)
            return float(self)

    m = meter(tmp_path)
    m.lags = True
    for step in (1, 2, 3):
        stop_step(m, step, Loss(step))
        assert read == list(range(1, step))
    m.flush()  # before an evaluation, whose time is not a step's
    m.flush()
    assert read == [1, 2, 3]
    time.sleep(0.2)
    stop_step(m, 4, Loss(math.nan))
    with pytest.raises(UserError, match="became nan at step 4 .*--resume-from-step latest"):
        m.flush()
    assert [line["raw_loss"] for line in logged(tmp_path)] == [1, 2, 3] and m.state["total_time"] < 0.2


def test_the_second_sigint_stops_at_once(restored_signals):
    stop = StopSignal(CPU)
    assert not stop.requested()
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_all_ranks_stop_when_one_is_signalled(run_ranks, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the ranks are threads

    def requested(compute):
        stop = StopSignal(compute)
        stop.received = compute.rank == 2
        return stop.requested()

    assert run_ranks(3, requested) == [True] * 3


def test_where_to_resume(tmp_path):
    directory = tmp_path / "d4"
    assert step_to_resume(directory, "-1", restarted=False) is None
    save(directory, 20)
    save(directory, 10)
    assert step_to_resume(directory, "latest", restarted=False) == 20, "by step, not by time"
    assert [step_to_resume(directory, wanted, restarted=True) for wanted in ("-1", "latest", "10")] == [20] * 3
    assert [step_to_resume(directory, wanted, restarted=False) for wanted in ("-1", "10")] == [None, 10]
