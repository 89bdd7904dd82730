"""Horizons, batches and rates: plain numbers, checked by hand."""

import pytest
from hypothesis import given, strategies as st

from nanochat.common import UserError
from nanochat.schedule import D12_SCALING_PARAMS, D12_TOKENS, batch_lr_scale, check_batch, largest_device_batch, plan


def test_a_batch_that_does_not_divide_names_sizes_that_do():
    assert check_batch(4096, 8, 512, 1) == 1
    assert check_batch(16384, 8, 512, 3) == 4, "ranks need not get equally many"
    for size, world_size, nearest in ((5000, 1, "4096 or 8192"), (100, 1, "4096"), (8192, 4, "16384"), (17000, 4, "16384 or 20480")):
        with pytest.raises(UserError, match=f"; use {nearest}, or another --device-batch-size"):
            check_batch(size, 8, 512, world_size)


@given(rows=st.integers(1, 500), world_size=st.integers(1, 9), limit=st.integers(1, 40))
def test_the_automatic_device_batch_divides_the_step(rows, world_size, limit):
    size = largest_device_batch(rows * 64, 64, world_size, limit)
    assert size <= limit and rows % size == 0 and (rows // size >= world_size or size == 1)


def test_depth_12_is_the_reference_run():
    assert D12_SCALING_PARAMS == 84_934_656 + 25_165_824
    run = plan(6 * D12_SCALING_PARAMS, D12_SCALING_PARAMS, 2048)
    assert (run.total_batch_size, run.lr_scale, run.weight_decay, run.short_run) == (2**19, 1.0, pytest.approx(0.28, rel=1e-3), 1.0)
    assert run.num_iterations == round(D12_TOKENS / 2**19) and run.warmup_steps == 40


def test_batch_and_rates_are_scaled_from_depth_12():
    def batch(horizon):  # in tokens, at one FLOP per token
        return plan(1, D12_SCALING_PARAMS, 2048, target_flops=horizon).total_batch_size

    assert batch(D12_TOKENS * 6) == 2**20 and batch(D12_TOKENS // 6) == 2**18  # 6^0.383 = 1.99
    assert batch_lr_scale(2**17) == 0.5
    half = plan(1, D12_SCALING_PARAMS, 2048, total_batch_size=2**17, target_flops=2 * D12_TOKENS)
    assert (half.lr_scale, half.weight_decay) == (0.5, pytest.approx(0.28 / 4, rel=1e-3))
    short = plan(1, scaling_params=1000, sequence_len=1, num_iterations=1, total_batch_size=12)
    assert short.short_run == pytest.approx(1000**0.32)


def test_the_horizon_is_the_first_that_is_set():
    assert plan(1, 1000, 64, num_iterations=20, total_batch_size=640).tokens == 12800
    assert plan(100, 1000, 64, target_flops=6.4e5, total_batch_size=64).num_iterations == 100
    assert plan(100, 1000, 64, total_batch_size=64).num_iterations == 12 * 1000 // 64 + 1
    assert plan(100, 1000, 64, target_flops=1.0).num_iterations == 1
    assert plan(1, D12_SCALING_PARAMS, 96, num_iterations=20).total_batch_size % 96 == 0
    with pytest.raises(UserError, match="--num-iterations"):
        plan(1, 1, 1, target_param_data_ratio=-1)
