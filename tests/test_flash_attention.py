"""Attention against a naive float64 softmax, for every window, head grouping and cache shape; and how it is chosen.

The choice is tested on a CPU that passes for a device with kernels, some of which are wrong.
"""

from types import SimpleNamespace

import pytest
import torch

from nanochat import flash_attention
from nanochat.common import UserError
from nanochat.flash_attention import flash_attn


def naive(q, k, v, left, q_positions):
    """One query at a time in float64: softmax over the keys it may see. q (T, H, D), k and v (S, H_kv, D)."""
    T, H, D = q.shape
    group = H // k.size(1)
    out = torch.zeros(T, H, D, dtype=torch.float64)
    for t in range(T):
        p = q_positions[t]
        first = 0 if left < 0 else max(0, p - left)
        for h in range(H):
            keys, values = k[first : p + 1, h // group].double(), v[first : p + 1, h // group].double()
            out[t, h] = torch.softmax(keys @ q[t, h].double() / D**0.5, dim=0) @ values
    return out


def tensors(B, T, S, H, H_kv, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, heads, D, generator=g) for n, heads in ((T, H), (S, H_kv), (S, H_kv)))


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 16, 33])
@pytest.mark.parametrize("left", [-1, 0, 1, 8, 16, 100])
def test_whole_sequences_and_their_gradients(T, left, H, H_kv):
    leaves = [x.double().requires_grad_() for x in tensors(2, T, T, H, H_kv)]
    y = flash_attn.flash_attn_func(*leaves, causal=True, window_size=(left, 0))
    expected = torch.stack([naive(*row, left, range(T)) for row in zip(*leaves)])
    assert torch.allclose(y, expected, atol=1e-10)
    d_y = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, leaves, d_y, materialize_grads=True) for out in (y, expected))
    for mine, theirs in zip(*gradients):
        assert torch.allclose(mine, theirs, atol=1e-10)


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 1)])
@pytest.mark.parametrize("left", [-1, 0, 3, 50])
@pytest.mark.parametrize("rows, lens", [
    (None, [0, 0]), (None, [3, 3]), (None, [2, 7]),
    ([4, 5, 6, 7, 2, 0, 9], [5, 6, 390, 7, 0, 100, 1]),  # some rows of a larger cache, neighbours and not, in any order
])  # fmt: skip
@pytest.mark.parametrize("T, Q", [(1, 1), (4, 4), (5, 2)])  # new tokens, and how many of the last of them are queries
def test_with_cache(rows, lens, T, Q, left, H, H_kv):
    """Each row takes in its new keys and values at its own place and sees only its own past."""
    B, S = len(lens), max(lens) + 10
    q, k, v = tensors(B, T, T, H, H_kv, seed=1)
    _, *caches = tensors(B if rows is None else 10, 1, S, H, H_kv, seed=2)
    expected_caches = [cache.clone() for cache in caches]
    y = flash_attn.flash_attn_with_kvcache(
        q[:, -Q:], *caches, k=k, v=v, cache_seqlens=torch.tensor(lens, dtype=torch.int32),
        cache_batch_idx=None if rows is None else torch.tensor(rows, dtype=torch.int32), window_size=(left, 0),
    )  # fmt: skip
    for b, (row, n) in enumerate(zip(rows or range(B), lens)):
        for cache, new in zip(expected_caches, (k, v)):
            cache[row, n : n + T] = new[b]
        expected = naive(q[b], *(cache[row] for cache in expected_caches), left, range(n, n + T))[-Q:]
        assert torch.allclose(y[b].double(), expected, atol=1e-5)
    assert all(map(torch.equal, caches, expected_caches)), "nothing else in the cache has changed"


# -----------------------------------------------------------------------------
# The choice

HEADS = {"n_head": 4, "n_kv_head": 2, "head_dim": 16}


def fails(*_, **__):
    raise RuntimeError("this release has no\n  window")


def not_installed():
    raise ImportError("not installed")


def attending(change_y=lambda y: y, change_gradient=None, window_off_by=0):
    """A loader of exact attention with one thing changed: the output, the gradient by v or the window."""

    def attend(q, k, v, window):
        if change_gradient is not None:
            v = v.clone()
            v.register_hook(change_gradient)
        return change_y(flash_attention._blockwise(q, k, v, window + window_off_by if window >= 0 else window))

    return lambda: attend


def breaking_the_graph(q, k, v, window):
    torch._dynamo.graph_break()
    return flash_attention._blockwise(q, k, v, window)


CANDIDATES = {  # name: (function that returns the kernel, beginning of the reason why it is skipped)
    "absent": (not_installed, "not installed"),
    "raising": (lambda: fails, "this release has no"),
    "wrong": (attending(lambda y: 1.05 * y), "y has a relative error of 0.05"),
    "wrong_gradient": (attending(change_gradient=lambda d_v: 1.05 * d_v), "dv has a relative error of 0.05"),
    "nan": (attending(lambda y: y.where(y < 2, torch.nan)), "y has a relative error of nan"),
    "one_too_many": (attending(window_off_by=1), "y has a relative error of 0."),
    "one_too_few": (attending(window_off_by=-1), "y has a relative error of 0."),
    "breaking": (lambda: breaking_the_graph, ""),
    "good": (attending(), None),
}


@pytest.fixture
def tried(monkeypatch):
    """A CPU that passes for a device with these kernels; returns a list of those that were loaded."""
    loaded = []
    kernels = {name: lambda name=name, load=load: loaded.append(name) or load() for name, (load, _) in CANDIDATES.items()}
    monkeypatch.setattr(flash_attention, "KERNELS", kernels)
    monkeypatch.setattr(flash_attention, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(flash_attention, "TRIED_TOKENS", 48)
    monkeypatch.setattr(flash_attention, "_chosen", {})
    monkeypatch.setattr(flash_attention, "_printed", set())
    order(monkeypatch, *kernels)
    return loaded


def order(monkeypatch, *names):
    monkeypatch.setattr(flash_attention, "order", lambda device: names)


def choose(window=-1, dtype=torch.bfloat16):
    return flash_attention.choose("cpu", dtype, **HEADS, window=window)


def bfloat16s(B=1, T=20):
    return [x.bfloat16() for x in tensors(B, T, T, 4, 2, D=16)]


def test_the_first_correct_kernel_is_chosen_and_one_line_says_why_no_other(tried, capsys):
    before = torch.get_rng_state()
    with torch.inference_mode():  # as an engine calls it
        assert choose(window=10) == "good"
    assert torch.equal(before, torch.get_rng_state())
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.startswith("attention in a window of 10: good (absent: not installed; ")
    reasons = dict(reason.split(": ", 1) for reason in line.split("(", 1)[1].rstrip(")\n").split("; "))
    assert tried == list(CANDIDATES) == [*reasons, "good"]
    assert all(reason.startswith(CANDIDATES[name][1]) and reason for name, reason in reasons.items()), reasons


def test_each_kind_of_call_is_tried_once(tried, monkeypatch, capsys):
    order(monkeypatch, "one_too_many", "good")
    q, k, v = bfloat16s()
    for _ in range(2):
        flash_attn.flash_attn_func(q, k, v)
    flash_attn.flash_attn_func(q, k, v, window_size=(19, 0))  # which is everything
    assert capsys.readouterr().out == "attention: one_too_many\n" and tried == ["one_too_many"]
    flash_attn.flash_attn_func(q, k, v, window_size=(5, 0))  # a window may find another kernel than the full context
    assert capsys.readouterr().out.startswith("attention in a window of 5: good (one_too_many: ")
    assert choose(dtype=torch.float16) == "one_too_many"
    assert capsys.readouterr().out == "", "a result that was printed is not printed again"


def test_without_a_correct_kernel_attention_is_exact(tried, monkeypatch, capsys):
    order(monkeypatch, "absent", "nan")
    assert choose() == choose(dtype=torch.float32) == "sdpa"
    assert capsys.readouterr().out.splitlines() == [
        "attention: sdpa (absent: not installed; nan: y has a relative error of nan)", "attention: sdpa (no kernel supports float32)",
    ]  # fmt: skip
    monkeypatch.setattr(flash_attention, "TRIED_ON", ("cuda",))
    monkeypatch.setattr(flash_attention, "_first_correct", fails)
    assert choose(dtype=torch.float16) == "sdpa", "on a CPU nothing is tried"


def test_an_override_is_the_only_one_tried_and_refused_where_it_does_not_run(tried, monkeypatch):
    for name in ("good", "sdpa"):
        monkeypatch.setattr(flash_attention, "_override_impl", name)
        assert choose() == name
    assert tried == ["good"]
    for name, reason in (("nan", "nan: y has a relative error"), ("fa5", "choose from sdpa, absent, raising")):
        monkeypatch.setattr(flash_attention, "_override_impl", name)
        with pytest.raises(UserError, match=reason):
            choose()


def test_the_choice_is_a_constant_of_a_compiled_graph(tried, monkeypatch):
    """It must be made before; there is no second graph while it stays the same, and another one when it does not."""
    order(monkeypatch, "good")
    q, k, v = (x.requires_grad_() for x in bfloat16s())
    graphs = []

    def two_layers(q, k, v):
        y = flash_attn.flash_attn_func(q, k, v, window_size=(8, 0))
        return flash_attn.flash_attn_func(y, k, v)

    compiled = torch.compile(two_layers, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=False)
    with pytest.raises(Exception, match="before compiling"):
        compiled(q, k, v)
    assert not tried and [choose(window) for window in (-1, 8)] == ["good", "good"]
    compiled(q, k, v).sum().backward()
    assert torch.equal(compiled(q, k, v), two_layers(q, k, v)) and len(graphs) == 1
    good = flash_attention._chosen
    double = {key: ("double", lambda q, k, v, window: 2 * flash_attention._blockwise(q, k, v, window)) for key in good}
    monkeypatch.setattr(flash_attention, "_chosen", double)
    assert torch.equal(compiled(q, k, v), two_layers(q, k, v)) and len(graphs) == 2


def cached_with(**changes):
    def attend(q, *caches, **arguments):
        return flash_attention._cached(q, *caches, **{**arguments, **changes})

    return attend


def writing_elsewhere(q, k_cache, *rest, **more):
    return flash_attention._cached(q, k_cache.clone(), *rest, **more)


@pytest.mark.parametrize("attend, line", [
    (cached_with(), "fa3"),
    (cached_with(window_size=(-1, -1)), "sdpa (fa3: y has a relative error of"),
    (writing_elsewhere, "sdpa (fa3: the key cache has a relative error of"),
    (fails, "sdpa (fa3: this release has no"),
])  # fmt: skip
def test_a_kernel_for_the_cache_is_tried_too(tried, monkeypatch, capsys, attend, line):
    monkeypatch.setattr(flash_attention, "CACHED_KERNELS", {"fa3": lambda: attend})
    order(monkeypatch, "fa3", "aten")
    q, k, v = bfloat16s(B=2, T=1)
    caches = [torch.zeros(2, 20, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    lens = torch.tensor([0, 0], dtype=torch.int32)
    y = flash_attn.flash_attn_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=lens, window_size=(3, 0))
    assert capsys.readouterr().out.startswith(f"attention with a cache: {line}")
    assert torch.allclose(y, v.repeat_interleave(2, dim=2)), "of one token alone: its own value"


# -----------------------------------------------------------------------------
# The kernels' wrappers


@pytest.mark.parametrize("window", [-1, 5])
def test_the_installed_torch_has_the_aten_kernel_with_our_arguments(window):
    """On the meta device, where arguments are bound and shapes are computed, forward and backward."""
    leaves = [x.to("meta").requires_grad_() for x in bfloat16s()]
    y = flash_attention.aten()(*leaves, window)
    y.sum().backward()
    assert y.shape == leaves[0].shape and [x.grad.shape for x in leaves] == [x.shape for x in leaves]
    names = [a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    expected = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    assert names[:10] == expected.split() and {"window_size_left", "window_size_right"} <= set(names)


@pytest.mark.parametrize("result", ["y", ("y", "log-sum-exp")])
def test_builds_of_flash_attention_3_that_return_the_log_sum_exp_work_too(monkeypatch, result):
    def flash_attn_func(q, k, v, causal, window_size):
        assert (q, k, v, causal, window_size) == (1, 2, 3, True, (5, 0))
        return result

    monkeypatch.setattr(flash_attention, "fa3_module", lambda: SimpleNamespace(flash_attn_func=flash_attn_func))
    assert flash_attention.fa3()(1, 2, 3, 5) == "y"


def test_each_chip_has_an_order_of_known_names(monkeypatch):
    for major in (7, 8, 9, 10, 12):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        names = flash_attention.order(torch.device("cuda:0"))
        assert set(names) <= set(flash_attention.KERNELS) and ("fa3" in names) == (major == 9)
