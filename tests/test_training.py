"""The verbs of training: what a step weighs, when something is due, what the meter keeps."""

import json
import math
import signal
import time
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from nanochat import training
from nanochat.common import Compute, UserError
from nanochat.optim import MuonAdamW
from nanochat.training import LossScale, Meter, StopSignal, due, inherit, largest_batch, set_rates, train_step

CPU = Compute(torch.device("cpu"), torch.float32)


class TinyModel(torch.nn.Module):
    """A bigram table: its loss has the model's interface, its gradient is easy to write down."""

    def __init__(self, vocab=11):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)))

    def forward(self, idx, targets, loss_reduction):
        return F.cross_entropy(
            self.table[idx].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction
        )


def sgd_like(model, lr=1.0):
    """An optimizer that writes the gradient it was given into `seen`."""

    class Recorder:
        param_groups = [{"params": [("table", model.table)]}]

        def step(self):
            self.seen = model.table.grad.clone()

        def zero_grad(self):
            model.table.grad = None

    return Recorder()


def batch(B, T, supervised, seed):
    """Random (inputs, targets) with that many supervised targets."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 11, (B, T), generator=g), torch.randint(0, 11, (B, T), generator=g)
    keep = torch.zeros(B * T, dtype=torch.bool)
    keep[torch.randperm(B * T, generator=g)[:supervised]] = True
    return x, torch.where(keep.view(B, T), y, -1)


def test_a_step_waits_for_nothing_and_compiles_once():
    """Reading a number of a tensor, which would wait for a GPU, happens nowhere, and rates may change without a new graph."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from nanochat.gpt import GPT, GPTConfig

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "this waits"
            return function(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=64))
    model.to_empty(device="cpu")
    model.init_weights(torch.float32)
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
    with NoReading(), pytest.raises(AssertionError, match="this waits"):
        train_step(model, optimizer, [pair, pair], CPU)  # the mode sees it


def test_every_token_weighs_the_same_whichever_micro_batch_it_came_in():
    model = TinyModel()
    optimizer = sgd_like(model)
    batches = [batch(2, 6, n, seed=n) for n in (1, 12, 5, 0)]  # one of them has nothing to learn
    loss = train_step(model, optimizer, batches, CPU)
    x, y = (torch.cat(parts) for parts in zip(*batches))
    expected = F.cross_entropy(model.table.double()[x].flatten(0, 1), y.flatten(), ignore_index=-1)
    (gradient,) = torch.autograd.grad(expected, model.table)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(optimizer.seen, gradient, atol=1e-7)


def test_nor_does_it_matter_which_rank_it_came_to(run_ranks):
    """The gradients of two ranks, which the optimizer sums, are together that of one; so is the loss, on both."""
    batches = [batch(2, 6, n, seed=n) for n in (1, 12, 5, 0)]
    alone, together = sgd_like(model := TinyModel()), [TinyModel(), TinyModel()]
    loss = train_step(model, alone, batches, CPU)
    recorders = [sgd_like(model) for model in together]

    def step(compute):
        return train_step(together[compute.rank], recorders[compute.rank], batches[compute.rank :: 2], compute)

    assert run_ranks(2, step) == [pytest.approx(loss.item(), rel=1e-6)] * 2
    assert torch.allclose(recorders[0].seen + recorders[1].seen, alone.seen, atol=1e-7)


def test_overflow_on_one_rank_skips_the_step_on_all(run_ranks):
    def unscale(compute):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.full((2,), math.inf if compute.rank == 1 else 8.0)
        scale = LossScale()
        return scale.unscale([p], compute), scale.scale

    assert run_ranks(2, unscale) == [(False, 2.0**14)] * 2


def test_a_step_without_any_target_changes_nothing():
    model = TinyModel()
    before = model.table.clone()
    optimizer = MuonAdamW([{"kind": "adamw", "params": [("table", model.table)], "lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.5}])
    loss = train_step(model, optimizer, [batch(2, 6, 0, seed=0)], CPU)
    assert loss == 0 and torch.equal(model.table, before)
    assert not any(state.any() for state in optimizer.state_dict().values())


def test_loss_scaling_changes_nothing_but_skips_overflow():
    plain, scaled = TinyModel(), TinyModel()
    one, two = sgd_like(plain), sgd_like(scaled)
    train_step(plain, one, [batch(2, 6, 7, seed=1)], CPU)
    scale = LossScale()
    train_step(scaled, two, [batch(2, 6, 7, seed=1)], CPU, scale)
    assert torch.allclose(one.seen, two.seen, rtol=1e-5)
    scale.scale = math.inf
    del two.seen
    train_step(scaled, two, [batch(2, 6, 7, seed=1)], CPU, scale)
    assert not hasattr(two, "seen"), "an overflowing step is skipped"


def test_due():
    assert [step for step in range(10) if due(step, 4)] == [4, 8]
    assert due(9, 4, last=True) and due(9, -1, last=True)
    assert not due(8, -1) and not due(0, 4) and not due(9, 0, last=True)


def test_a_rank_that_had_nothing_to_learn_from_overflows_nothing():
    scale = LossScale()
    assert scale.unscale([torch.nn.Parameter(torch.ones(2))], CPU) and scale.good_steps == 1


def test_rates_reach_the_groups():
    group = {"params": [], "weight_decay": 0.4}
    optimizer = MuonAdamW([{"kind": "muon", "lr": 0.02, **group}, {"kind": "adamw", "lr": 0.3, **group}])
    lrm = set_rates(optimizer, step=75, progress=0.75, warmup_steps=0, warmdown=0.5, final=0.0)
    muon, adamw = optimizer.param_groups
    assert lrm == pytest.approx(0.5) and muon["lr"] == pytest.approx(0.01) and adamw["lr"] == pytest.approx(0.15)
    assert muon["weight_decay"] == pytest.approx(0.4 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert adamw["weight_decay"] == 0.4


def meter(path, **state):
    return Meter(CPU, path, tokens_per_step=100, flops_per_token=10, **state)


def test_the_smoothed_loss_is_debiased_and_resumes(tmp_path, capsys):
    m = meter(tmp_path)
    for step, loss in enumerate([4.0, 2.0, 3.0], start=1):
        m.start()
        m.stop(step, step / 6, torch.tensor(loss), 1.0, 1)
        if step == 2:
            saved = m.state(2)
    weights = [0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    expected = sum(w * x for w, x in zip(weights, [4.0, 2.0, 3.0])) / sum(weights)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(4.0) and lines[2]["loss"] == pytest.approx(expected)
    assert "step 00003 (50.0%)" in capsys.readouterr().out

    resumed = meter(tmp_path, state=saved)  # step 3 is forgotten, and then said again, equally
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    resumed.start()
    resumed.stop(3, 0.5, torch.tensor(3.0), 1.0, 1)
    again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_on_a_gpu_a_step_is_told_of_when_the_next_is_on_its_way(tmp_path):
    class Loss:
        """Notes when it is read, which is what waits for a GPU."""

        def __init__(self, value):
            self.value = value

        def item(self):
            read.append(self.value)
            return self.value

    m, read = meter(tmp_path), []
    m.lags = True
    seen = []
    for step in (1, 2, 3):
        m.start()
        time.sleep(0.02)
        m.stop(step, step / 6, Loss(float(step)), 1.0, 1)
        seen.append(list(read))
    assert seen == [[], [1.0], [1.0, 2.0]]
    m.flush()  # before a measurement, say, whose time is not a step's
    m.flush()
    assert read == [1.0, 2.0, 3.0] and m.state(3)["step"] == 3
    time.sleep(0.2)
    m.start()
    m.stop(4, 4 / 6, Loss(math.nan), 1.0, 1)
    with pytest.raises(UserError, match="step 4"):
        m.flush()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["raw_loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert m.total_time < 0.2


def test_the_largest_batch_that_does_not_run_out_of_memory():
    tried = []

    def attempt(rows, most=24):
        tried.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError

    assert largest_batch(attempt, 128) == 16 and tried == [128, 64, 32, 16]
    with pytest.raises(UserError, match="not even one row"):
        largest_batch(lambda rows: attempt(rows, most=0), 4)
    with pytest.raises(ZeroDivisionError):
        largest_batch(lambda rows: 1 / 0, 8)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, loss):
    m = meter(tmp_path)
    m.start()
    with pytest.raises(UserError, match=r"step 7 .*--resume-from-step latest"):
        m.stop(7, 0.5, torch.tensor(loss), 1.0, 1)


def test_stop_signals_are_asked_for_politely_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopSignal(CPU)
        assert not stop.asked()
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):  # whoever presses Ctrl-C now means it
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_all_ranks_stop_when_one_is_asked_to(run_ranks):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stops = {rank: StopSignal(CPU) for rank in range(3)}

        def asked(compute):
            stops[compute.rank].compute = compute
            stops[compute.rank].heard = compute.rank == 2
            return stops[compute.rank].asked()

        assert run_ranks(3, asked) == [True] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_a_restarted_job_goes_on_from(tmp_path, monkeypatch, capsys):
    """From the newest that the job itself saved; a new job, or one that saved nothing, does what its flags say."""
    saved = {}  # step -> when
    monkeypatch.setattr(training, "job_name", lambda: job)

    def find_last_step(directory, since=None):
        steps = [step for step, when in saved.items() if when > (since or 0)]
        if not steps:
            raise UserError("no whole checkpoint")
        return max(steps, key=saved.get)

    monkeypatch.setattr(training, "find_last_step", find_last_step)
    job, saved[900] = "monday/", time.time()  # another run's
    assert training._step_to_resume(tmp_path, "-1", restarted=False) is None
    assert training._step_to_resume(tmp_path, "-1", restarted=True) is None
    assert "no whole checkpoint: beginning as at first" in capsys.readouterr().out
    assert training._step_to_resume(tmp_path, "900", restarted=True) == 900
    saved[20] = time.time() + 1
    assert [training._step_to_resume(tmp_path, wanted, restarted=True) for wanted in ("-1", "latest", "900")] == [20] * 3
    assert training._step_to_resume(tmp_path, "900", restarted=False) == 900, "a fresh start does as it is told"
    job = "tuesday/"  # killed before it came so far as to say that it began
    assert training._step_to_resume(tmp_path, "-1", restarted=True) is None


def test_a_run_of_epochs_is_done_when_every_lane_is():
    streams = {"0": {"next": [2, 0]}, "3": {"next": [1, 40]}}
    state = {"finished": 30, "streams": streams}
    assert training.conversations_done(state, 1.0).tolist() == [30, 1]
    assert training.conversations_done(state, 0.5).tolist() == [30, 0]
    assert training.conversations_done(state, 2.0).tolist() == [30, 2]


def test_inherit():
    args = Namespace(matrix_lr=None, max_seq_len=64, model_tag=None)
    inherit(args, {"user_config": {"matrix_lr": 0.02, "max_seq_len": 512}})
    assert args.matrix_lr == 0.02 and args.max_seq_len == 64 and args.model_tag is None
    with pytest.raises(UserError, match="--matrix-lr"):
        inherit(Namespace(matrix_lr=None), {"user_config": {}})
