"""The Triton kernel, in Triton's interpreter, against exact attention to the cache; skipped without Triton."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which PyTorch for CUDA brings along")

# In a process of its own: the interpreter is chosen before Triton is imported.
CHECK = """
import itertools, torch
from nanochat.decode_attention import decode_attention
from nanochat.flash_attention import _check_cached, _triton_cached, flash_attn_with_kvcache

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(*shape, generator=generator)
heads, windows = [(1, 1), (4, 2), (3, 1)], [-1, 0, 5, 70]
for (H, H_kv), window, lengths in itertools.product(heads, windows, [[0], [3], [63, 64], [199, 0, 128], [65] * 5]):
    B, S, D = len(lengths), 200, 16
    rows = torch.randperm(7, generator=generator)[:B].int()
    caches = [random(7, S, H_kv, D) for _ in range(2)]
    theirs = [cache.clone() for cache in caches]
    q, k, v = random(B, 1, H + 2 * H_kv, D).split([H, H_kv, H_kv], dim=2)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    for row, length in zip(rows, lengths):
        caches[0][row, length:] = float("nan")  # keys beyond its length must not be read
    y = decode_attention(q, *caches, k, v, lengths, rows, window)
    expected = flash_attn_with_kvcache(q, *theirs, k, v, lengths, rows, window_size=(window, 0))
    assert torch.allclose(y, expected, atol=1e-5), (H, H_kv, window, lengths, (y - expected).abs().max())
    for row, length in zip(rows, lengths):
        for ours, other in zip(caches, theirs):
            assert torch.equal(ours[row, : length + 1], other[row, : length + 1]), "the new token is in the cache"
_check_cached(_triton_cached, torch.device("cpu"), torch.bfloat16, (4, 2, 16))
print("eligible")
"""


def test_the_kernel_equals_exact_attention_to_the_cache():
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and result.stdout.endswith("eligible\n"), result.stdout + result.stderr
