"""Horizons, batches and rates: plain numbers, checked by hand."""

import pytest

from nanochat import schedule
from nanochat.common import UserError


def test_depth_12_is_the_reference_point():
    assert schedule.D12_SCALING_PARAMS == 84_934_656 + 25_165_824
    assert schedule.best_batch_size(schedule.D12_TOKENS) == 2**19
    assert schedule.batch_lr_scale(2**19) == 1.0
    assert schedule.weight_decay_scale(2**19, schedule.D12_TOKENS) == 1.0


def test_batch_grows_with_the_horizon():
    assert schedule.best_batch_size(schedule.D12_TOKENS * 6) == 2**20  # 6^0.383 = 1.99
    assert schedule.best_batch_size(schedule.D12_TOKENS // 6) == 2**18
    assert schedule.batch_lr_scale(2**17) == 0.5
    assert schedule.weight_decay_scale(2**17, 2 * schedule.D12_TOKENS) == 0.25


def test_short_runs_learn_faster():
    assert schedule.short_run_lr_scale(12 * 1000, scaling_params=1000) == 1.0
    assert schedule.short_run_lr_scale(50 * 1000, scaling_params=1000) == 1.0
    assert schedule.short_run_lr_scale(12, scaling_params=1000) == pytest.approx(1000**0.32)


def test_horizon_is_the_first_that_is_set():
    assert schedule.horizon_tokens(6e9, 12, flops_per_token=6000, scaling_params=10) == 1_000_000
    assert schedule.horizon_tokens(-1, 12, flops_per_token=6000, scaling_params=10) == 120
    with pytest.raises(UserError, match="--num-iterations"):
        schedule.horizon_tokens(-1, -1, 1, 1)


def test_micro_batches():
    assert schedule.micro_batches(4096, 8, 512, 1) == 1
    assert schedule.micro_batches(24576, 8, 512, 3) == 6
    assert schedule.micro_batches(16384, 8, 512, 3) == 4, "ranks need not get equally many"
    with pytest.raises(UserError, match="use 4096 or 8192"):
        schedule.micro_batches(5000, 8, 512, 1)
    with pytest.raises(UserError, match="use 4096$"):
        schedule.micro_batches(100, 8, 512, 1)
    with pytest.raises(UserError, match="too few for 4 ranks; use --total-batch-size 16384 or --device-batch-size 4"):
        schedule.micro_batches(8192, 8, 512, 4)


def test_learning_rate_is_a_trapezoid():
    def lr(step):
        return schedule.lr_multiplier(step, step / 100, warmup_steps=3, warmdown=0.5, final=0.1)

    assert [lr(s) for s in (0, 1, 2, 3, 50)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr(75) == pytest.approx(0.55) and lr(100) == pytest.approx(0.1)
    assert all(lr(s + 1) <= lr(s) for s in range(50, 100))


def test_momentum_and_decay():
    assert schedule.muon_momentum(0, 0.0, 0.5) == pytest.approx(0.85)
    assert schedule.muon_momentum(400, 0.3, 0.5) == pytest.approx(0.97)
    assert schedule.muon_momentum(1000, 1.0, 0.5) == pytest.approx(0.90)
    assert schedule.weight_decay_multiplier(0) == 1 and schedule.weight_decay_multiplier(1) == pytest.approx(0)
    assert schedule.weight_decay_multiplier(0.5) == pytest.approx(0.5)
