"""Horizons, batches and rates: plain numbers, checked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import schedule
from nanochat.common import UserError


def test_rates_are_scaled_from_depth_12():
    assert schedule.D12_SCALING_PARAMS == 84_934_656 + 25_165_824
    assert schedule.best_batch_size(schedule.D12_TOKENS) == 2**19
    assert schedule.batch_lr_scale(2**19) == 1.0
    assert schedule.weight_decay_scale(2**19, schedule.D12_TOKENS) == 1.0
    # The batch grows with the horizon
    assert schedule.best_batch_size(schedule.D12_TOKENS * 6) == 2**20  # 6^0.383 = 1.99
    assert schedule.best_batch_size(schedule.D12_TOKENS // 6) == 2**18
    assert schedule.batch_lr_scale(2**17) == 0.5
    assert schedule.weight_decay_scale(2**17, 2 * schedule.D12_TOKENS) == 0.25


def test_short_runs_get_higher_rates():
    assert schedule.short_run_lr_scale(50 * 1000, scaling_params=1000) == 1.0
    assert schedule.short_run_lr_scale(12, scaling_params=1000) == pytest.approx(1000**0.32)


def test_horizon_is_the_first_that_is_set():
    assert schedule.horizon_tokens(6e9, 12, flops_per_token=6000, scaling_params=10) == 1_000_000
    assert schedule.horizon_tokens(-1, 12, flops_per_token=6000, scaling_params=10) == 120
    with pytest.raises(UserError, match="--num-iterations"):
        schedule.horizon_tokens(-1, -1, 1, 1)


def test_a_batch_that_does_not_divide_names_sizes_that_do():
    assert schedule.check_batch(4096, 8, 512, 1) == 1
    assert schedule.check_batch(16384, 8, 512, 3) == 4, "ranks need not get equally many"
    with pytest.raises(UserError, match="use 4096 or 8192"):
        schedule.check_batch(5000, 8, 512, 1)
    with pytest.raises(UserError, match="use 4096$"):
        schedule.check_batch(100, 8, 512, 1)
    with pytest.raises(UserError, match="too few for 4 ranks; use --total-batch-size 16384 or --device-batch-size 4"):
        schedule.check_batch(8192, 8, 512, 4)


@given(rows=st.integers(1, 500), world_size=st.integers(1, 9), limit=st.integers(1, 40))
def test_the_automatic_device_batch_divides_the_step(rows, world_size, limit):
    size = schedule.largest_device_batch(rows * 64, 64, world_size, limit)
    assert size <= limit and rows % size == 0 and (rows // size >= world_size or size == 1)


def test_plan():
    """Depth 12 gives the reference run; given numbers are taken as they are; neither ranks nor micro-batches matter."""
    run = schedule.plan(6 * schedule.D12_SCALING_PARAMS, schedule.D12_SCALING_PARAMS, 2048)
    assert (run.total_batch_size, run.lr_scale, run.weight_decay, run.short_run) == (2**19, 1.0, pytest.approx(0.28, rel=1e-3), 1.0)
    assert run.num_iterations == round(schedule.D12_TOKENS / 2**19) and run.warmup_steps == 40
    short = schedule.plan(1, 1000, 64, num_iterations=20, total_batch_size=640)
    assert (short.tokens, short.warmup_steps, short.short_run) == (12800, 1, 1.0)
    tiny = schedule.plan(1, schedule.D12_SCALING_PARAMS, 96, num_iterations=20)
    assert tiny.total_batch_size % 96 == 0 and tiny.short_run > 1
    assert schedule.plan(100, 1000, 64, target_flops=6.4e5, total_batch_size=64).num_iterations == 100


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
