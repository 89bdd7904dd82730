"""The kernels' wrappers on a CPU: a fake of each library computes exactly what its arguments request, or refuses.

That the libraries do the same is checked by `flash_attention.choose` on every GPU before it relies on one of them.
"""

import contextlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from nanochat import attention_backends
from nanochat.attention_backends import BACKENDS, attention, attention_backward
from nanochat.flash_attention import _blockwise

CPU = torch.device("cpu")


def scores_of(q, k, window):
    """(B, H, T, T) float32, -inf where hidden."""
    keys = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    i = torch.arange(q.size(1))
    hidden = i[None, :] > i[:, None]
    if window >= 0:
        hidden |= i[None, :] < i[:, None] - window
    scores = torch.einsum("bthd,bshd->bhts", q.float(), keys.float()) / q.size(-1) ** 0.5
    return scores.masked_fill(hidden, -torch.inf)


def exact(q, k, v, window):
    """(y, log-sum-exp (B, H, T, 1))."""
    scores, values = scores_of(q, k, window), v.repeat_interleave(q.size(2) // v.size(2), dim=2)
    y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values.float())
    return y.to(q.dtype).contiguous(), scores.logsumexp(-1, keepdim=True)


def exact_backward(d_y, q, k, v, y, lse, window):
    """p = exp(s - lse), dv = p' dy, ds = p (dp - sum_d dy y), dq = ds k, dk = ds' q."""
    group, scale = q.size(2) // k.size(2), q.size(-1) ** -0.5
    p = (scores_of(q, k, window) - lse).exp()
    keys, values = (x.repeat_interleave(group, dim=2).float() for x in (k, v))
    dp = torch.einsum("bthd,bshd->bhts", d_y.float(), values)
    ds = scale * p * (dp - (d_y.float() * y.float()).sum(-1).transpose(1, 2).unsqueeze(-1))
    dq = torch.einsum("bhts,bshd->bthd", ds, keys)
    dk, dv = (torch.einsum("bhts,bthd->bshd", a, b.float()) for a, b in ((ds, q), (p, d_y)))
    return tuple(x.to(q.dtype) for x in (dq, *(x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))))


# -----------------------------------------------------------------------------
# Fakes of the libraries


class Slot:
    def __init__(self, dim=None, stride=None, data_type=None):
        self.dim, self.stride, self.data_type, self.output = dim, stride, data_type, False

    def __getattr__(self, name):
        assert name in ("set_output", "set_dim", "set_stride", "set_data_type")
        return lambda value: setattr(self, name.removeprefix("set_"), value) or self


class Graph:
    """Records the calls to cudnn.pygraph (frontend 1.15 to 1.32) and computes the result in PyTorch."""

    built = []

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert (io_data_type, intermediate_data_type, compute_data_type, handle) == ("bf16", "f32", "f32", "a handle")
        self.steps = []

    def tensor(self, dim, stride, data_type):
        assert isinstance(dim, list) and isinstance(stride, list)
        return Slot(dim, stride, data_type)

    def sdpa(self, *, q, k, v, generate_stats, **options):
        assert generate_stats is True
        self.inputs, self.outputs, self.window = (q, k, v), (Slot(), Slot()), self.window_of(options, q)
        return self.outputs

    def sdpa_backward(self, *, q, k, v, o, dO, stats, **options):
        self.inputs, self.outputs = (dO, q, k, v, o, stats), (Slot(), Slot(), Slot())
        self.window = self.window_of(options, q)
        return self.outputs

    def window_of(self, options, q):
        assert options.pop("diagonal_alignment") == "top left" and options.pop("diagonal_band_right_bound") == 0
        assert options.pop("attn_scale") == q.dim[-1] ** -0.5
        bound = options.pop("diagonal_band_left_bound", 0)  # counts the query itself
        assert not options
        return bound - 1

    def step(name):
        return lambda self, *arguments: self.steps.append(name)

    validate, build_operation_graph, create_execution_plans = map(step, ("validate", "operations", "plans"))
    check_support, build_plans = map(step, ("support", "build"))

    def get_workspace_size(self):
        assert self.steps == ["validate", "operations", "plans", "support", "build"]
        Graph.built.append(self)
        return 64

    def execute(self, pack, workspace, handle):
        assert workspace.numel() == 64 and handle == "a handle"
        for slot, x in pack.items():
            assert not x.requires_grad, "DLPack would refuse it"
            if slot in self.inputs or slot.stride is not None:
                assert (list(x.shape), list(x.stride())) == (slot.dim, slot.stride)
            assert slot.output == (slot in self.outputs)
            assert (x.data_ptr() % 16, x.stride(-1)) == (0, 1)
        # cuDNN's layout is (B, H, T, D); statistics stay as they are
        inputs = [pack[slot].transpose(1, 2) if slot.data_type != "f32" else pack[slot] for slot in self.inputs]
        results = exact(*inputs, self.window) if len(inputs) == 3 else exact_backward(*inputs, self.window)
        for slot, result in zip(self.outputs, results):
            pack[slot].copy_(result.transpose(1, 2) if slot.data_type != "f32" else result)


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that passes for a GPU."""
    monkeypatch.setattr(attention_backends, "_needs", lambda device, *majors: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


def fa4_forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, return_lse):
    assert not any(x.requires_grad for x in (q, k, v)), "DLPack would refuse it"
    assert (softmax_scale, causal, window_size_right, return_lse) == (q.size(-1) ** -0.5, True, 0, True)
    y, lse = exact(q, k, v, -1 if window_size_left is None else window_size_left)
    return y, lse.squeeze(-1)


def fa4_backward(q, k, v, out, dout, lse, softmax_scale, causal, window_size_left, window_size_right):
    assert not any(x.requires_grad for x in (q, k, v, out, dout, lse)), "DLPack would refuse it"
    assert (softmax_scale, causal, window_size_right) == (q.size(-1) ** -0.5, True, 0) and lse.dim() == 3
    return exact_backward(dout, q, k, v, out, lse[..., None], -1 if window_size_left is None else window_size_left)


@pytest.fixture
def libraries(gpu, monkeypatch):
    """cudnn and flash_attn.cute as modules whose kernels are exact."""
    types = SimpleNamespace(BFLOAT16="bf16", HALF="f16", FLOAT="f32")
    cudnn = module(
        "cudnn", data_type=types, pygraph=Graph, diagonal_alignment=SimpleNamespace(TOP_LEFT="top left"),
        heur_mode=SimpleNamespace(A="a", FALLBACK="b"), create_handle=lambda: "a handle",
        set_stream=lambda *, handle, stream: None,
    )  # fmt: skip
    interface = module("flash_attn.cute.interface", _flash_attn_fwd=fa4_forward, _flash_attn_bwd=fa4_backward)
    cute = module("flash_attn.cute", interface=interface, __path__=[])
    for m in (cudnn, module("flash_attn", cute=cute, __path__=[]), cute, interface):
        monkeypatch.setitem(sys.modules, m.__name__, m)
    Graph.built.clear()
    yield
    attention_backends._cudnn_handle.cache_clear()
    attention_backends.cudnn_graph.cache_clear()


def module(name, **contents):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, is_package=True)
    vars(made).update(contents)
    return made


def tensors(T, H=4, H_kv=2, D=16, seed=0, B=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, h, D, generator=g).bfloat16().requires_grad_() for h in (H, H_kv, H_kv)]


# -----------------------------------------------------------------------------
# Tests


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("T", [128, 40])  # 40: padded to 128 for cuDNN
@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_forward_and_backward_are_those_of_attention(libraries, name, T, window):
    leaves = tensors(T)
    y = BACKENDS[name](CPU)(*leaves, window)
    expected = _blockwise(*leaves, window)
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert y.shape == expected.shape and torch.allclose(y, expected, atol=2e-2)
    for mine, theirs in zip(torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(expected, leaves, d_y)):
        assert (mine - theirs).float().norm() < 1e-2 * theirs.float().norm()


def test_cudnn_uses_tensors_in_place_and_copies_only_unaligned_ones(libraries):
    """q, k and v split from one tensor keep their strides; one that starts in the middle of 16 bytes is copied."""
    attend = BACKENDS["cudnn"](CPU)
    together = torch.randn(2, 128, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = together.split([4, 2, 2], dim=2)
    y = attend(q, k, v, -1)
    assert Graph.built[0].inputs[0].stride == [128 * 128, 16, 128, 1], "of (B, H, T, D)"
    unaligned = torch.zeros(q.numel() + 1).bfloat16()[1:].view(q.shape).copy_(q)
    assert torch.equal(attend(unaligned, k, v, -1), y)
    assert Graph.built[1].inputs[0].stride == [128 * 64, 16, 64, 1]
    grad = torch.autograd.grad(attend(*(x := tensors(128)), -1).sum(), x[0])[0]  # d_y is one number, expanded
    assert torch.isfinite(grad).all()


def test_a_graph_is_built_once_per_shape(libraries):
    attend = BACKENDS["cudnn"](CPU)
    for T in (100, 128, 70):
        attend(*tensors(T), -1).sum().backward()
    assert attention_backends.cudnn_graph.cache_info().misses == 2, "one forward, one backward"


@pytest.mark.parametrize("kernel", ["cudnn", "fa4"])
def test_the_operators_agree_with_their_declarations(libraries, kernel):
    """Schema, fake tensors (shapes, strides, dtypes), autograd and tracing agree with what is computed."""
    q, k, v = tensors(128)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention, (q, k, v, 5, kernel), test_utils=checks)
    y, lse = attention(q, k, v, 5, kernel)
    backward = (torch.ones_like(y), *(x.detach() for x in (q, k, v, y, lse)), 5, kernel)
    torch.library.opcheck(attention_backward, backward, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(BACKENDS[kernel](CPU), backend="aot_eager", fullgraph=True, dynamic=False)
    (got,) = torch.autograd.grad(compiled(q, k, v, 5).float().square().sum(), q)
    (expected,) = torch.autograd.grad(attention(q, k, v, 5, kernel)[0].float().square().sum(), q)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("window", [-1, 5])
def test_the_installed_torch_has_the_aten_kernel_with_our_arguments(gpu, window):
    """On the meta device, where arguments are bound and shapes are computed, forward and backward."""
    leaves = [x.detach().to("meta").requires_grad_() for x in tensors(24)]
    y = BACKENDS["aten"](CPU)(*leaves, window)
    y.sum().backward()
    assert y.shape == leaves[0].shape and [x.grad.shape for x in leaves] == [x.shape for x in leaves]
    names = [a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    order = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    assert names[:10] == order.split() and {"window_size_left", "window_size_right"} <= set(names)


def test_cudnn_by_way_of_pytorch_has_no_window(gpu):
    with pytest.raises(RuntimeError, match="has no window"):
        BACKENDS["cudnn_sdpa"](CPU)(*tensors(8), 4)


@pytest.mark.parametrize("with_lse", [False, True])
def test_flash_attention_3_of_the_hub_is_requested_by_version(gpu, monkeypatch, with_lse):
    def flash_attn_func(q, k, v, causal, window_size):
        assert causal and window_size == (5, 0)
        y = _blockwise(q, k, v, 5)
        return (y, None) if with_lse else y

    def get_kernel(name, version):
        assert (name, version) == ("kernels-community/flash-attn3", 1)
        return SimpleNamespace(flash_attn_func=flash_attn_func)

    monkeypatch.setattr(attention_backends, "find_spec", lambda name: name if name == "kernels" else None)
    monkeypatch.setitem(sys.modules, "kernels", module("kernels", get_kernel=get_kernel))
    attention_backends.fa3_module.cache_clear()
    q, k, v = tensors(20)
    assert torch.equal(BACKENDS["fa3"](CPU)(q, k, v, 5), _blockwise(q, k, v, 5))
    attention_backends.fa3_module.cache_clear()


@pytest.mark.parametrize("name", list(BACKENDS))
def test_no_kernel_of_a_gpu_runs_on_a_cpu(name):
    with pytest.raises(RuntimeError, match="needs a GPU, not cpu"):
        BACKENDS[name](CPU)


def test_each_chip_has_an_order_of_known_names(monkeypatch):
    for major in (7, 8, 9, 10, 12):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        names = attention_backends.order(torch.device("cuda:0"))
        assert set(names) <= set(BACKENDS) and len(set(names)) == len(names)
        assert ("fa3" in names) == (major == 9)
