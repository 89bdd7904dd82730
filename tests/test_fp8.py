"""Float8 products against float64 and an exact emulation; converted models against plain ones."""

import re

import pytest
import torch
from tiny import tiny_gpt

from nanochat import fp8
from nanochat.common import Compute
from nanochat.gpt import GPT, Linear
from nanochat.optim import MuonAdamW
from nanochat.training import train_step

CPU = torch.device("cpu")
HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def make(**changes) -> GPT:
    return tiny_gpt(**{"vocab_size": 12, "n_head": 1, "n_embd": 128, **changes})


def ids(seed=1, T=64):
    return torch.randint(0, 12, (2, T), generator=torch.Generator().manual_seed(seed))


def operands(M=256, K=128, N=512):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=rng) for size in ((M, K), (N, K), (M, N))]


def product_and_gradients(x, weight, grad):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8.Float8Product.apply(x, weight)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def emulated(x, mantissa, smallest, largest):
    """x rounded to float8: `mantissa` bits, exponents from `smallest` on, its largest element at `largest`."""
    scale = x.float().abs().max() / largest
    scaled = (x.float() / scale).double()
    step = 2.0 ** ((torch.frexp(scaled).exponent - 1).clamp(min=smallest) - mantissa)
    return (scaled / step).round() * step * scale.double()  # half to even, as in hardware


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not HAS_FLOAT8, reason="needs a GPU with float8"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_products_equal_the_emulation(dtype, rounding, device):
    x, weight, grad = (t.to(device) for t in operands())
    x, grad = x.to(dtype), grad.to(dtype)
    results = product_and_gradients(x, weight, grad)
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32]
    x8, w8, g8 = emulated(x, 3, -6, 448), emulated(weight, 3, -6, 448), emulated(grad, 2, -14, 57344)
    for low, exact in zip(results, (x8 @ w8.t(), g8 @ w8, g8.t() @ x8)):
        assert (low - exact).norm() < rounding * exact.norm()


@pytest.mark.parametrize("value, finite", [(0.0, True), (1e-38, True), (float("inf"), False), (float("nan"), False)])
@pytest.mark.parametrize("operand", range(3))
def test_zeros_give_finite_results_and_values_that_are_not_finite_stay_visible(operand, value, finite):
    tensors = operands(16, 128, 128)
    tensors[operand].fill_(value)
    assert all(result.isfinite().all() for result in product_and_gradients(*tensors)) == finite


def test_layouts_are_those_that_cuda_requires():
    """A CPU accepts any layout; the meta device checks CUDA's rules. Inputs may be transposed or expanded."""
    weight = torch.empty(256, 128, device="meta", requires_grad=True)
    for x in (torch.empty(64, 128, device="meta"), torch.empty(128, 64, device="meta").t()):
        for grad in (torch.empty(256, 64, device="meta").t(), torch.empty(256, device="meta").expand(64, 256)):
            x = x.detach().requires_grad_()
            y = fp8.Float8Product.apply(x, weight)
            y.backward(grad)
            assert (y.shape, x.grad.shape, weight.grad.shape) == ((64, 256), (64, 128), (256, 128))


def test_eligible_linears_of_the_blocks_are_converted_and_nothing_else_changes():
    model = make(n_embd=256, n_head=2)
    before, counts = dict(model.named_parameters()), (model.num_scaling_params(), model.estimate_flops())
    assert fp8.convert(model) == 12  # q, k, v, projection and two of the MLP, twice
    others = [name for name, module in model.named_modules() if type(module) is Linear]
    assert others == ["transformer.h.1.attn.ve_gate", "lm_head", "smear_gate"]
    assert [fp8.eligible(Linear(1280, size)) for size in (144, 112, 1288)] == [True, False, False]
    assert all(p is before.pop(name) for name, p in model.named_parameters()) and not before
    assert counts == (model.num_scaling_params(), model.estimate_flops()), "so MFU stays that of the bf16 peak"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_is_bit_equal_to_the_plain_model(dtype):
    plain, model = (make(dtype=dtype) for _ in range(2))
    fp8.convert(model)
    with torch.no_grad():
        assert torch.equal(model(ids()), plain(ids()))
    assert not torch.equal(model(ids(), ids(2)), plain(ids(), ids(2))), "with gradients it is float8"
    uneven = ids(T=60), ids(2, T=60)  # 120 rows, not a multiple of 16
    assert torch.equal(model(*uneven), plain(*uneven))


def test_training_follows_float32_compiled_without_graph_breaks_or_recompilation():
    """On a task that is soon learned: the target is the successor of the input."""

    def losses(float8):
        model = make(noise=0.0)
        optimizer, compute = MuonAdamW(model.param_groups()), Compute(CPU, torch.float32)
        if float8:
            fp8.convert(model)
            model.hidden = torch.compile(model.hidden, backend="aot_eager", fullgraph=True, dynamic=False)
        return [train_step(model, optimizer, [(ids(step), (ids(step) + 1) % 12)], compute).item() for step in range(6)]

    full = losses(False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        low = losses(True)
    assert full[0] > 2.4 and full[-1] < 0.1  # log(12) = 2.48
    assert full != low == pytest.approx(full, abs=0.01)


@pytest.mark.parametrize("capability, product, reason", [
    ((8, 0), None, "and this is a NVIDIA A100"),
    ((9, 0), lambda y: y, "None"),
    ((9, 0), None, "float8 products fail here: TypeError: 'NoneType' object is not callable"),
    ((9, 0), lambda y: 1.5 * y, "wrong here, by 5.%"),
])  # fmt: skip
def test_a_device_must_be_supported_and_pass_the_self_test(monkeypatch, capability, product, reason):
    self_test, original = fp8.self_test, torch._scaled_mm
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8, "self_test", lambda device, dtype: self_test(CPU, dtype))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **options: product(original(*args, **options)))
    assert re.search(f"{reason}$", str(fp8.unsupported_reason(torch.device("cuda"), torch.bfloat16)))
