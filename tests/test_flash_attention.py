"""Attention against a naive float64 softmax, for every window, head grouping and cache shape; and how it is chosen.

The choice is tried on a CPU that passes for a device with kernels, some of which are not what they seem.
"""

import pytest
import torch

from nanochat import attention_backends, flash_attention
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


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 7, 16, 33])
@pytest.mark.parametrize("left", [-1, 0, 1, 4, 8, 16, 32, 100])
def test_whole_sequences(T, left, H, H_kv):
    q, k, v = tensors(2, T, T, H, H_kv)
    y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    for b in range(2):
        assert torch.allclose(y[b].double(), naive(q[b], k[b], v[b], left, range(T)), atol=1e-5)


@pytest.mark.parametrize("left", [-1, 4, 5])
def test_gradients_of_windows(left):
    """The blockwise gradient equals that of one softmax under a band mask, written out."""
    T, D = 19, 8
    q, k, v = (x.double().requires_grad_() for x in tensors(2, T, T, 4, 2, D))
    weight = torch.randn(2, T, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (flash_attn.flash_attn_func(q, k, v, window_size=(left, 0)) * weight).sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    i = torch.arange(T)
    seen = i[None, :] <= i[:, None]
    if left >= 0:
        seen &= i[None, :] >= i[:, None] - left
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) / D**0.5
    probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    y = torch.einsum("bhts,bshd->bthd", probs, v.repeat_interleave(2, dim=2))
    (y * weight).sum().backward()
    for mine, x in zip(got, (q, k, v)):
        assert torch.allclose(mine, x.grad, atol=1e-10)


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 1)])
@pytest.mark.parametrize("left", [-1, 0, 3, 50])
@pytest.mark.parametrize("seqlens,T", [((0, 0), 5), ((3, 3), 1), ((0, 6), 1), ((2, 7), 4)])
def test_with_cache(seqlens, T, left, H, H_kv):
    """Rows of different lengths: each takes in its new keys at its own place and sees only its own past."""
    S = 12
    q, k_new, v_new = tensors(2, T, T, H, H_kv, seed=1)
    _, k_cache, v_cache = tensors(2, 1, S, H, H_kv, seed=2)
    before_k, before_v = k_cache.clone(), v_cache.clone()
    lens = torch.tensor(seqlens, dtype=torch.int32)
    y = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k=k_new, v=v_new, cache_seqlens=lens, causal=True, window_size=(left, 0)
    )
    for b, n in enumerate(seqlens):
        for cache, before, new in ((k_cache, before_k, k_new), (v_cache, before_v, v_new)):
            assert torch.equal(cache[b, n : n + T], new[b])
            assert torch.equal(cache[b, :n], before[b, :n]) and torch.equal(cache[b, n + T :], before[b, n + T :])
        expected = naive(q[b], k_cache[b], v_cache[b], left, range(n, n + T))
        assert torch.allclose(y[b].double(), expected, atol=1e-5)


@pytest.mark.parametrize("left", [-1, 0, 3, 50])
@pytest.mark.parametrize("T", [1, 3])
def test_with_some_rows_of_a_larger_cache(T, left):
    """Neighbours and loners, long and short, in any order; the rows that are not named stay as they are."""
    g = torch.Generator().manual_seed(3)
    S, rows, lens = 400, [4, 5, 6, 7, 2, 0, 9], [5, 6, 390, 7, 0, 100, 1]
    q, k_new, v_new = tensors(len(rows), T, T, 4, 2, seed=4)
    k_cache, v_cache = (torch.randn(10, S, 2, 8, generator=g) for _ in range(2))
    before = k_cache.clone()
    y = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k=k_new, v=v_new, cache_seqlens=torch.tensor(lens, dtype=torch.int32),
        cache_batch_idx=torch.tensor(rows, dtype=torch.int32), causal=True, window_size=(left, 0),
    )  # fmt: skip
    for b, (row, n) in enumerate(zip(rows, lens)):
        before[row, n : n + T] = k_new[b]
        assert torch.allclose(y[b].double(), naive(q[b], k_cache[row], v_cache[row], left, range(n, n + T)), atol=1e-5)
    assert torch.equal(k_cache, before)


def test_queries_of_the_last_new_tokens_only():
    q, k_new, v_new = tensors(2, 2, 5, 4, 2, seed=5)
    caches = [torch.zeros(2, 20, 2, 8) for _ in range(4)]
    lens = torch.tensor([3, 9], dtype=torch.int32)
    five = torch.cat([torch.zeros(2, 3, 4, 8), q], dim=1)
    some = flash_attn.flash_attn_with_kvcache(q, *caches[:2], k=k_new, v=v_new, cache_seqlens=lens, window_size=(4, 0))
    every = flash_attn.flash_attn_with_kvcache(five, *caches[2:], k=k_new, v=v_new, cache_seqlens=lens, window_size=(4, 0))
    assert torch.allclose(some, every[:, 3:], atol=1e-6) and torch.equal(caches[0], caches[2])


# -----------------------------------------------------------------------------
# The choice

HEADS = {"n_head": 4, "n_kv_head": 2, "head_dim": 16}


class Spoilt(torch.autograd.Function):
    """Exact attention whose gradient by v is spoilt by `spoil`."""

    @staticmethod
    def forward(ctx, v, spoil):
        ctx.spoil = spoil
        return v.clone()

    @staticmethod
    def backward(ctx, d_v):
        return ctx.spoil(d_v), None


def fails(*_, **__):
    raise RuntimeError("this release has no\n  window")


def not_installed(device):
    raise ImportError("not installed")


def attending(change_y=lambda y: y, spoil=None, window_off_by=0):
    """A loader of exact attention with one thing changed."""

    def attend(q, k, v, window):
        v = v if spoil is None else Spoilt.apply(v, spoil)
        return change_y(flash_attention._blockwise(q, k, v, window + window_off_by if window >= 0 else window))

    return lambda device: attend


def breaking_the_graph(device):
    def attend(q, k, v, window):
        torch._dynamo.graph_break()
        return flash_attention._blockwise(q, k, v, window)

    return attend


CANDIDATES = {
    "absent": not_installed,
    "raising": lambda device: fails,
    "raising_backward": attending(spoil=fails),
    "wrong": attending(lambda y: 1.05 * y),
    "wrong_gradient": attending(spoil=lambda d_v: 1.05 * d_v),
    "nan": attending(lambda y: y.where(y < 2, torch.nan)),
    "misshapen": attending(lambda y: y.transpose(1, 2)),
    "one_too_many": attending(window_off_by=1),
    "one_too_few": attending(window_off_by=-1),
    "breaking": breaking_the_graph,
    "good": attending(),
    "also_good": attending(),
}


@pytest.fixture
def tried(monkeypatch):
    """A CPU that passes for a device with these kernels; gives a list of what has been loaded."""
    loaded = []

    def counting(name):
        return lambda device: loaded.append(name) or CANDIDATES[name](device)

    monkeypatch.setattr(attention_backends, "BACKENDS", {name: counting(name) for name in CANDIDATES})
    monkeypatch.setattr(attention_backends, "order", lambda device: tuple(CANDIDATES))
    monkeypatch.setattr(flash_attention, "_override_impl", None)
    monkeypatch.setattr(flash_attention, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(flash_attention, "TRIED_TOKENS", 48)
    monkeypatch.setattr(flash_attention, "_chosen", {})
    monkeypatch.setattr(flash_attention, "_printed", set())
    flash_attention._load.cache_clear()
    yield loaded
    flash_attention._load.cache_clear()


def order(monkeypatch, *names):
    monkeypatch.setattr(attention_backends, "order", lambda device: names)


def choose(window=-1, dtype=torch.bfloat16, **heads):
    return flash_attention.choose("cpu", dtype, **{**HEADS, **heads}, window=window)


def test_the_first_that_is_right_is_chosen_and_every_other_has_its_reason_in_one_line(tried, capsys):
    assert choose(window=10) == "good"
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.startswith("attention in a window of 10: good (absent: not installed; ")
    reasons = dict(reason.split(": ", 1) for reason in line.split("(", 1)[1].rstrip(")\n").split("; "))
    assert list(reasons) == list(CANDIDATES)[:-2] and tried == list(CANDIDATES)[:-1]
    assert reasons["raising"] == reasons["raising_backward"] == "this release has no"
    assert reasons["wrong"].startswith("y has a relative error of 0.05") and reasons["wrong_gradient"].startswith("dv has a relative error of 0.05")
    assert reasons["nan"] == "y has a relative error of nan" and reasons["misshapen"].startswith("Mismatch in shape")
    assert all(float(reasons[name].removeprefix("y has a relative error of ")) > 0.3 for name in ("one_too_many", "one_too_few"))
    assert reasons["breaking"]


def test_it_is_asked_once_for_each_kind_of_call_and_loaded_once(tried, monkeypatch, capsys):
    order(monkeypatch, "raising", "good")
    q, k, v = (x.bfloat16() for x in tensors(1, 20, 20, 4, 2, D=16))
    for _ in range(2):
        flash_attn.flash_attn_func(q, k, v)
    assert capsys.readouterr().out == "attention: good (raising: this release has no)\n"
    flash_attn.flash_attn_func(q, k, v, window_size=(19, 0))  # which is everything
    assert len(flash_attention._chosen) == 1
    flash_attn.flash_attn_func(q, k, v, window_size=(5, 0))
    assert choose(n_kv_head=4) == "good"
    assert len(flash_attention._chosen) == 3 and tried == ["raising", "good"]
    assert capsys.readouterr().out == "", "nothing new was found"


def test_windows_and_the_full_context_may_differ(tried, monkeypatch, capsys):
    order(monkeypatch, "one_too_many", "good")
    assert [choose(), choose(10)] == ["one_too_many", "good"]
    assert "attention: one_too_many\nattention in a window of 10: good (one_too_many: " in capsys.readouterr().out


def test_without_any_that_is_right_it_is_exact(tried, monkeypatch, capsys):
    order(monkeypatch, "absent", "nan")
    with torch.inference_mode():  # as an engine calls it
        assert choose() == "sdpa"
    assert choose(dtype=torch.float32) == "sdpa"
    found = capsys.readouterr().out.splitlines()
    assert found == ["attention: sdpa (absent: not installed; nan: y has a relative error of nan)", "attention: sdpa (no kernel supports float32)"]


def test_on_this_cpu_nothing_is_tried(monkeypatch, capsys):
    monkeypatch.setattr(flash_attention, "_override_impl", None)
    monkeypatch.setattr(attention_backends, "order", fails)
    assert choose() == flash_attention.choose_cached("cpu", torch.bfloat16, **HEADS) == "sdpa"
    assert not capsys.readouterr().out


def test_the_global_generator_is_left_alone(tried, monkeypatch):
    order(monkeypatch, "good")
    before = torch.get_rng_state()
    choose()
    assert torch.equal(before, torch.get_rng_state())


def test_an_override_is_the_only_one_tried(tried, monkeypatch, capsys):
    for name in ("also_good", "sdpa"):
        monkeypatch.setattr(flash_attention, "_override_impl", name)
        assert choose() == name
    assert tried == ["also_good"] and capsys.readouterr().out == "attention: also_good\n"


@pytest.mark.parametrize("name,reason", [("nan", "nan: y has a relative error"), ("fa5", "choose from sdpa, absent, raising")])
def test_an_override_that_does_not_run_is_refused(tried, monkeypatch, name, reason):
    monkeypatch.setattr(flash_attention, "_override_impl", name)
    with pytest.raises(UserError, match=reason):
        choose()


@pytest.mark.parametrize("name", list(attention_backends.BACKENDS))
def test_no_kernel_of_a_gpu_can_be_had_on_a_cpu(monkeypatch, name):
    monkeypatch.setattr(flash_attention, "_override_impl", name)
    flash_attention._load.cache_clear()
    q, k, v = (x.bfloat16() for x in tensors(1, 4, 4, 2, 2))
    with pytest.raises(UserError, match="needs a GPU, not cpu"):
        flash_attn.flash_attn_func(q, k, v)


def test_the_choice_is_a_constant_of_a_compiled_graph(tried, monkeypatch):
    """No graph break, no second graph while it stays the same, and another one when it does not."""
    order(monkeypatch, "good")
    assert [choose(window) for window in (-1, 8)] == ["good", "good"]
    graphs = []

    def two_layers(q, k, v):
        y = flash_attn.flash_attn_func(q, k, v, window_size=(8, 0))
        return flash_attn.flash_attn_func(y, k, v)

    compiled = torch.compile(two_layers, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=False)
    q, k, v = (x.bfloat16().requires_grad_() for x in tensors(1, 20, 20, 4, 2, D=16))
    y = compiled(q, k, v)
    y.sum().backward()
    assert torch.equal(y, two_layers(q, k, v)) and torch.equal(y, compiled(q, k, v)) and len(graphs) == 1
    good = flash_attention._chosen
    double = {key: ("double", lambda q, k, v, window: 2 * flash_attention._blockwise(q, k, v, window)) for key in good}
    monkeypatch.setattr(flash_attention, "_chosen", double)
    assert torch.equal(compiled(q, k, v), two_layers(q, k, v)) and len(graphs) == 2


def test_nothing_is_tried_while_compiling(tried, monkeypatch):
    order(monkeypatch, "good")
    q, k, v = (x.bfloat16() for x in tensors(1, 20, 20, 4, 2, D=16))
    with pytest.raises(Exception, match="before compiling"):
        torch.compile(flash_attn.flash_attn_func, backend="eager", fullgraph=True)(q, k, v)
    assert not tried


def cached_with(**changes):
    def attend(q, *caches, **arguments):
        return flash_attention._cached(q, *caches, **{**arguments, **changes})

    return attend


def writing_elsewhere(q, k_cache, *rest, **more):
    return flash_attention._cached(q, k_cache.clone(), *rest, **more)


@pytest.mark.parametrize(
    "attend,said",
    [
        (cached_with(), "fa3"),
        (cached_with(window_size=(-1, -1)), "sdpa (fa3: y has a relative error of"),
        (writing_elsewhere, "sdpa (fa3: the key cache has a relative error of"),
        (fails, "sdpa (fa3: this release has no"),
    ],
)
def test_a_kernel_for_the_cache_is_tried_too(tried, monkeypatch, capsys, attend, said):
    monkeypatch.setattr(attention_backends, "BACKENDS", {"fa3": attending()})
    monkeypatch.setattr(attention_backends, "order", lambda device: ("fa3", "aten"))
    monkeypatch.setattr(attention_backends, "fa3_module", lambda: type("fa3", (), {"flash_attn_with_kvcache": staticmethod(attend)}))
    assert flash_attention.choose_cached("cpu", torch.bfloat16, **HEADS) == said.split()[0]
    assert capsys.readouterr().out.startswith(f"attention with a cache: {said}")
    q, k, v = (x.bfloat16() for x in tensors(2, 1, 1, 4, 2, D=16))
    caches = [torch.zeros(2, 20, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    lens = torch.tensor([0, 0], dtype=torch.int32)
    y = flash_attn.flash_attn_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=lens, window_size=(3, 0))
    assert torch.allclose(y, v.repeat_interleave(2, dim=2)), "of one token alone: its own value"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [-1, 512])
def test_what_is_chosen_on_a_gpu_is_right(window, monkeypatch):
    monkeypatch.setattr(flash_attention, "_override_impl", None)
    assert flash_attention.choose("cuda", torch.bfloat16, 6, 6, 128, window) in (*attention_backends.BACKENDS, "sdpa")
    q, k, v = (x.cuda().bfloat16() for x in tensors(2, 1000, 1000, 6, 6, D=128))
    y = flash_attn.flash_attn_func(q, k, v, window_size=(window, 0)).float()
    expected = flash_attention._blockwise(q.float(), k.float(), v.float(), window)
    assert (y - expected).norm() < 1e-2 * expected.norm()
