"""The Transformer against a slow reference implementation, its sizes against hand-computed ones."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gpt

from nanochat.gpt import GPT, GPTConfig, ReluSquared, add_missing_weights, config_of_depth, window_sizes


def make(**changes) -> GPT:
    return tiny_gpt(**{"vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, **changes})


def ids(B=2, T=64, vocab=100, seed=1):
    return torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def reference(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The logits in float64, straight from the formulas, with a whole matrix of attention scores."""
    c, w = model.config, {name: p.detach().double() for name, p in model.state_dict().items()}
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    (B, T), D = idx.shape, c.n_embd // c.n_head
    x = rms(w["transformer.wte.weight"][idx])
    gate = torch.sigmoid(x[..., :24] @ w["smear_gate.weight"].T)
    left = torch.zeros_like(x)
    left[:, 1:] = x[:, :-1] * (idx[:, 1:] != c.document_start)[..., None]
    x = x0 = x + w["smear_lambda"] * gate * left
    t = torch.arange(T)
    angles = t[:, None] * c.rotary_base ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))  # (T, D/2)

    def rotate(v):  # (B, T, H, D) as complex numbers
        turned = torch.complex(v[..., : D // 2], v[..., D // 2 :]) * torch.polar(torch.ones_like(angles), -angles)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    for i, window in enumerate(window_sizes(c)):
        if i == c.n_layer // 2:
            middle = x
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h, pre = rms(x), f"transformer.h.{i}."
        q, k, v = ((h @ w[pre + f"attn.c_{n}.weight"].T).view(B, T, -1, D) for n in "qkv")
        if f"value_embeds.{i}.weight" in w:
            g = 3 * torch.sigmoid(h[..., :12] @ w[pre + "attn.ve_gate.weight"].T)
            v = v + g[..., None] * w[f"value_embeds.{i}.weight"][idx].view_as(v)
        q, k = (rms(rotate(n)) * c.qk_scale for n in (q, k))
        k, v = (n.repeat_interleave(c.n_head // c.n_kv_head, dim=2) for n in (k, v))
        hidden = (t > t[:, None]) | (t < t[:, None] - (window if window >= 0 else T))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
        y = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + y.reshape(B, T, -1) @ w[pre + "attn.c_proj.weight"].T
        x = x + (rms(x) @ w[pre + "mlp.c_fc.weight"].T).clamp(min=0).square() @ w[pre + "mlp.c_proj.weight"].T
    x = rms(x - w["backout_lambda"] * middle)
    return 15 * torch.tanh(x @ w["lm_head.weight"][: c.vocab_size].T / 15)


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_head": 4, "n_layer": 4}, {"n_layer": 1, "document_start": 7}, {"sequence_len": 300, "window_pattern": "QL", "n_layer": 2},
])  # fmt: skip
def test_forward_equals_the_reference(changes):
    model = make(**changes)
    x = ids(T=150 if "window_pattern" in changes else 64)  # longer than the window of 128
    expected = reference(model, x)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            logits = model(x)
        assert logits.shape == (*x.shape, 100) and logits.dtype == torch.float32
        assert torch.allclose(logits.double(), expected, atol=2e-4)


@pytest.mark.parametrize("document_start, reached", [(99, 0), (-1, 1)])
def test_smear_does_not_cross_the_start_of_a_document(document_start, reached):
    model = make(document_start=document_start)
    for block in model.transformer.h:  # only smear connects positions
        torch.nn.init.zeros_(block.attn.c_proj.weight)
    idx = ids(1, 12)
    idx[0, 5] = 99
    other = idx.clone()
    other[0, 4] += 1
    changed = (model(idx) != model(other)).any(-1)[0]
    assert changed[4:].tolist() == [True, bool(reached), *[False] * 6]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_all_gradients(reduction):
    model, x, y = make(plain=reduction == "sum"), ids(), ids(seed=2)
    y[0, :40] = -1
    loss = model(x, y, loss_reduction=reduction)
    loss.sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction=reduction)
    expected.sum().backward()
    assert torch.allclose(loss.flatten(), expected, rtol=1e-5)
    for name, p in model.named_parameters():
        assert got[name].any(), f"{name} gets no gradient"
        assert torch.allclose(got[name], p.grad, atol=1e-4 * p.grad.abs().max()), name
    assert len(model.lm_head.weight) == 128 and not model.lm_head.weight.grad[100:].any(), "the padding is never used"


@pytest.mark.parametrize("pattern, sequence_len, expected", [
    ("QSL", 2048, [512, 1024, -1, 512, -1]),
    ("Q", 600, [256] * 4 + [-1]),  # a quarter is 150, rounded up to a multiple of 128
    ("S", 100, [-1] * 5),  # a window wider than the context is the context
])  # fmt: skip
def test_windows(pattern, sequence_len, expected):
    assert window_sizes(GPTConfig(window_pattern=pattern, n_layer=5, sequence_len=sequence_len)) == expected


def test_initial_weights():
    w = make(noise=0.0, n_layer=4, n_embd=256, vocab_size=1000).state_dict()
    h = "transformer.h.0."
    deviations = {"transformer.wte": 0.8, "lm_head": 0.001, h + "attn.c_q": 1 / 16, h + "mlp.c_fc": 0.4 / 16}
    for name, deviation in deviations.items():
        assert w[f"{name}.weight"].std().item() == pytest.approx(deviation, rel=0.02)
    assert not w[h + "attn.c_proj.weight"].any() and not w[h + "mlp.c_proj.weight"].any()
    assert torch.allclose(w["resid_lambdas"], torch.tensor([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05]))
    assert torch.allclose(w["x0_lambdas"], torch.tensor([0.20, 0.15, 0.10, 0.05]))
    assert w["smear_lambda"] == 0 and w["backout_lambda"] == pytest.approx(0.2)
    assert [name for name in w if name.startswith("value_embeds")] == ["value_embeds.1.weight", "value_embeds.3.weight"]


def test_counts_and_flops():
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=512, vocab_size=32768, n_layer=4, n_head=2, n_kv_head=2, n_embd=256))
    counts = model.num_scaling_params()
    gates = 2 * 2 * 12
    assert counts["transformer_matrices"] == 4 * 12 * 256**2 + gates
    assert counts["lm_head"] == 32768 * 256 and counts["value_embeds"] == 2 * 32768 * 256
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    attention = 12 * 256 * (128 + 128 + 128 + 512)
    assert model.estimate_flops() == 6 * (4 * 12 * 256**2 + gates + 32768 * 256) + attention


@pytest.mark.parametrize("plain", [False, True])
def test_each_parameter_is_in_exactly_one_group(plain):
    model = make(plain=plain)
    groups = model.param_groups()
    named = [name for group in groups for name, _ in group["params"]]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert named[0] == "lm_head.weight" and groups[0]["lr"] == pytest.approx(0.008 * (64 / 768) ** -0.5)


def test_missing_extras_of_an_older_checkpoint_are_neutral():
    model, loaded = make(), make(seed=5)
    plain = ("transformer", "lm_head")
    old = {name: p for name, p in model.state_dict().items() if name.startswith(plain) and "ve_gate" not in name}
    loaded.load_state_dict(add_missing_weights(old, model))
    with torch.no_grad():
        model.resid_lambdas.fill_(1.0)
        for p in (model.x0_lambdas, model.smear_lambda, model.backout_lambda, *model.value_embeds.parameters()):
            p.zero_()
    assert torch.allclose(loaded(ids()), model(ids()), atol=1e-5)


def test_a_plain_model_is_one_whose_extras_are_neutral():
    model = make(plain=True)
    assert all(name.startswith(("transformer.wte", "transformer.h", "lm_head")) for name, _ in model.named_parameters())
    whole = make(window_pattern="L", qk_scale=1.0)
    whole.load_state_dict(add_missing_weights(model.state_dict(), whole))
    assert torch.allclose(model(ids()), whole(ids()), atol=1e-5)
    assert config_of_depth(4, 100, 64, plain=True).window_pattern == "L"


def test_invalid_lengths_and_shapes_are_refused():
    with pytest.raises(ValueError, match="context of 64"):
        make()(ids(T=65))
    with pytest.raises(ValueError, match="L, S and Q"):
        make(window_pattern="QX")
    with pytest.raises(ValueError, match="a plain model has no windows"):
        config_of_depth(4, 100, 64, plain=True, window_pattern="SSSL")
    for sizes in ({"n_embd": 100, "n_head": 3}, {"n_embd": 128, "n_head": 4, "n_kv_head": 3}):
        with pytest.raises(ValueError, match="multiple"):
            GPT(GPTConfig(**sizes))


def test_generate():
    model = make()
    greedy = list(model.generate([1, 2, 3], 5, temperature=0))
    assert greedy[0] == model(torch.tensor([[1, 2, 3]]))[0, -1].argmax()
    assert greedy == list(model.generate([1, 2, 3], 5, temperature=1.0, top_k=1))
    first, again, other = (list(model.generate([1], 8, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_close_to_float32(dtype):
    low = make(dtype=dtype)
    assert low.transformer.wte.weight.dtype == dtype and low.lm_head.weight.dtype == torch.float32
    assert (make()(ids()) - low(ids())).abs().max() < 0.15


def test_relu_squared_has_the_gradient_of_its_formula():
    x = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(ReluSquared.apply(x).sum(), x)[0], 2 * F.relu(x.detach()))


def test_compiling_changes_neither_loss_nor_gradients():
    """In one graph, which saves about as many values as `fit_device_batch` assumes."""
    results, activations = [], {}
    for compiled in (False, True):
        model = make(n_layer=6, n_kv_head=4)
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

        def record(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                activations[storage.data_ptr()] = storage.nbytes()
            return tensor

        run = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False) if compiled else model
        activations.clear()
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            loss = run(ids(B=16), ids(B=16, seed=2))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for mine, expected in zip(*results):
        assert torch.allclose(mine, expected, atol=1e-5 * expected.abs().max())
    values = sum(activations.values()) / 4 / (16 * 64 * model.config.n_layer * model.config.n_embd)
    assert values < 18  # device.SAVED_VALUES are those of a large model
