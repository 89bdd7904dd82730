"""The Transformer: a decoder-only GPT.

The model knows tokens and tensors only: no data, no files, no optimizer. Weights are float32 and are cast to the
compute dtype where they are used (see `Linear`); the embeddings are stored in the compute dtype and so determine the
dtype of the activations.

Beyond the plain Transformer it has four small learned extras, each neutral when absent (`add_missing_weights`):
per-layer mixing of the residual with the first embedding, value embeddings, smear (a gated sum with the left
neighbour) and backout (part of the mid-depth residual is subtracted at the end). A `plain` model is without them, and is
exactly what the transformers library calls NanoChat.

The head and its loss are in `cross_entropy.py`: the logits of all tokens never exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import UserError, compute_dtype
from nanochat.cross_entropy import linear_cross_entropy, sampling_log_probs, softcap_, softcapped_logits, token_losses
from nanochat.flash_attention import Places, flash_attn

SMEAR_CHANNELS = 24  # channels that the smear gate reads
VALUE_GATE_CHANNELS = 12  # channels that the value-embedding gates read


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6  # fewer than n_head: grouped-query attention (arXiv:2305.13245)
    n_embd: int = 768
    window_pattern: str = "QQQL"  # tiled over the layers: L full, S half, Q quarter context
    rotary_base: float = 100000.0
    qk_scale: float = 1.2  # of q and k after their norm, since QK-norm alone makes attention too flat
    plain: bool = False  # without the learned extras, windows and the scale of q and k
    document_start: int = -1  # the token that starts a document, which smear does not cross; -1 in models before this field

    def __post_init__(self):
        if self.plain:
            self.window_pattern, self.qk_scale = "L", 1.0


def config_of_depth(
    depth: int, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int = 128, n_kv_head: int = -1,
    window_pattern: str = GPTConfig.window_pattern, plain: bool = False,
) -> GPTConfig:  # fmt: skip
    """The config for a depth: width depth * aspect_ratio, rounded up to whole heads. n_kv_head -1: as many as query heads."""
    if plain and window_pattern not in ("L", GPTConfig.window_pattern):
        raise UserError(f"a plain model has no windows; leave out --plain or --window-pattern={window_pattern}")
    n_head = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(
        sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=n_head, n_embd=n_head * head_dim,
        n_kv_head=n_kv_head if n_kv_head > 0 else n_head, window_pattern=window_pattern, plain=plain,
    )  # fmt: skip


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without a gain (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A linear layer without bias: a float32 weight, cast to the dtype of the input."""

    product = None  # a faster one for inference (inference.py)

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        if not torch.is_grad_enabled() and self.product and self.product.is_current:
            return self.product(x)
        return self.multiply(x, self.weight)

    def multiply(self, x, weight):  # fp8.py replaces it
        return F.linear(x, weight.to(x.dtype))


class Embedding(nn.Embedding):
    """Initialised by `init_weights` only: PyTorch's own initialisation imports its compiler on the meta device (3 s)."""

    def reset_parameters(self):
        pass


def has_value_embed(layer: int, config: GPTConfig) -> bool:
    """Every other layer has value embeddings, the last one included."""
    return not config.plain and layer % 2 == (config.n_layer - 1) % 2


def window_sizes(config: GPTConfig) -> list[int]:
    """The number of tokens before the current one that each layer attends to; -1 is all of them.

    A pattern letter means the whole context (L), half (S) or a quarter (Q), rounded up to a multiple of 128. The last
    layer always attends to the whole context.
    """
    divisors = {"L": 1, "S": 2, "Q": 4}
    pattern = config.window_pattern.upper()
    if not pattern or set(pattern) - set(divisors):
        raise UserError(f"window pattern {config.window_pattern!r} may contain only the letters L, S and Q")
    letters = (pattern * config.n_layer)[: config.n_layer - 1] + "L"
    windows = [-(-config.sequence_len // divisors[letter] // 128) * 128 for letter in letters]
    return [window if window < config.sequence_len else -1 for window in windows]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864): x (B, T, H, D); cos, sin (1 or B, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Attention(nn.Module):
    product = None  # a faster one for inference, with the weights of c_q, c_k and c_v

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.qk_scale = config.qk_scale
        self.c_q = Linear(config.n_embd, config.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if has_value_embed(layer, config) else None
        self.heads = config.n_head, config.n_kv_head

    def project(self, x):
        """q and k in one tensor (B, T, H + H_kv, D), and v (B, T, H_kv, D)."""
        H, H_kv = self.heads
        if not torch.is_grad_enabled() and self.product and self.product.is_current:
            qkv = self.product(x)
        else:
            qkv = self.c_q.multiply(x, torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight]))
        return qkv.unflatten(-1, (-1, self.head_dim)).split([H + H_kv, H_kv], dim=2)

    def forward(self, x, value_embed, cos, sin, window, cache, last_only=False):
        qk, v = self.project(x)
        if value_embed is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, H_kv)
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        q, k = rotate(norm(qk) * self.qk_scale, cos, sin).split(self.heads, dim=2)
        if last_only:
            q = q[:, -1:]
        if cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        else:
            k_cache, v_cache, places = cache
            y = places.attend(q, k_cache, v_cache, k, v, window)
        return self.c_proj(y.flatten(2))


class ReluSquared(torch.autograd.Function):
    """ReLU squared (arXiv:2109.08668). Saves its output, which the next product saves anyway: the slope is 2 sqrt(y)."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 2 * y.sqrt() * grad


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(ReluSquared.apply(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, value_embed, cos, sin, window, cache, last_only=False):
        y = self.attn(norm(x), value_embed, cos, sin, window, cache, last_only)
        x = (x[:, -1:] if last_only else x) + y
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Created on the meta device, then given memory and values:

    >>> with torch.device("meta"):
    ...     model = GPT(config)
    >>> model.to_empty(device=device)
    >>> model.init_weights()
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head or config.n_head % config.n_kv_head:
            sizes = f"n_embd {config.n_embd}, n_head {config.n_head} and n_kv_head {config.n_kv_head}"
            raise UserError(f"each of {sizes} must be a multiple of the next")
        if config.n_embd // config.n_head % 2 or config.n_embd < SMEAR_CHANNELS:
            sizes = f"heads of {config.n_embd // config.n_head} and a width of {config.n_embd}"
            raise UserError(f"{sizes} are not possible: heads must be even (rotary embedding), and the width at least {SMEAR_CHANNELS}")
        self.config = config
        self.window_sizes = window_sizes(config)
        vocab = -(-config.vocab_size // 64) * 64  # multiples of 64 are faster; the extra rows are never used
        head_dim = config.n_embd // config.n_head
        blocks = [Block(config, layer) for layer in range(config.n_layer)]
        self.transformer = nn.ModuleDict({"wte": Embedding(vocab, config.n_embd), "h": nn.ModuleList(blocks)})
        self.lm_head = Linear(config.n_embd, vocab)
        if not config.plain:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict()
        for layer in range(config.n_layer):
            if has_value_embed(layer, config):
                self.value_embeds[str(layer)] = Embedding(vocab, config.n_kv_head * head_dim)
        self.register_buffer("cos", torch.empty(1, config.sequence_len, 1, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(1, config.sequence_len, 1, head_dim // 2), persistent=False)

    def to_empty(self, *, device):
        """Allocate the weights. `nn.Module.to_empty` on the meta device would import torch's compiler (3 s)."""
        return self._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))

    @torch.no_grad()
    def init_weights(self, dtype: torch.dtype | None = None) -> None:
        """Initialise all weights. `dtype` is the compute dtype, by default that of the model's device."""
        self.set_compute_dtype(dtype or compute_dtype(self.get_device().type))
        bound = (3 / self.config.n_embd) ** 0.5  # uniform(-bound, bound) has standard deviation 1/sqrt(n_embd)
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.attn.c_proj.weight)  # every block starts as the identity
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        for embed in self.value_embeds.values():
            nn.init.uniform_(embed.weight, -bound, bound)  # like c_v
        if self.config.plain:
            return
        depth = torch.linspace(0, 1, self.config.n_layer, device=self.get_device())
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        self.smear_lambda.fill_(0.0)
        self.backout_lambda.fill_(0.2)

    @torch.no_grad()
    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Convert the embeddings and the rotary tables, which determine the dtype of the activations."""
        self.transformer.wte.to(dtype)
        self.value_embeds.to(dtype)
        half = torch.arange(self.cos.size(-1), dtype=torch.float32, device=self.get_device()) / self.cos.size(-1)
        positions = torch.arange(self.config.sequence_len, dtype=torch.float32, device=self.get_device())
        angles = torch.outer(positions, self.config.rotary_base**-half)[None, :, None, :]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def get_device(self) -> torch.device:
        return self.transformer.wte.weight.device

    # -------------------------------------------------------------------------
    # Forward

    def hidden(self, idx: torch.Tensor, kv_cache=None, last_only: bool = False) -> torch.Tensor:
        """The normed input of the head: idx (B, T) -> (B, T, n_embd).

        With a cache, idx are the tokens that follow those in the cache, and the cache is advanced. With a cache and
        `last_only` the result is (B, 1, n_embd), for the last position, and the last layer computes little besides
        keys and values. Raises UserError if the tokens exceed the context.
        """
        assert kv_cache is not None or not last_only
        T = idx.size(1)
        if kv_cache is None:
            if T > self.config.sequence_len:
                raise UserError(f"{T} tokens exceed the model's context of {self.config.sequence_len}")
            cos, sin = self.cos[:, :T], self.sin[:, :T]
            x = norm(self.transformer.wte(idx))
            previous = F.pad(x[:, :-1], (0, 0, 1, 0))  # left neighbours; the first token has none
        else:
            places = Places(kv_cache.cache_seqlens, kv_cache.slots, T)
            cos, sin = self.cos[0, places.positions], self.sin[0, places.positions]  # (B, T, 1, D/2)
            last = kv_cache.last_tokens[:, None]  # (B, 1), -1 for none
            embedded = norm(self.transformer.wte(torch.cat([last.clamp(min=0), idx], dim=1)))
            previous, x = embedded[:, :-1], embedded[:, 1:]
            previous = torch.where(F.pad(last < 0, (0, T - 1))[..., None], 0, previous)
            kv_cache.last_tokens.copy_(idx[:, -1])
        plain = self.config.plain
        if not plain:
            smear = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
            previous = torch.where((idx == self.config.document_start)[..., None], 0, previous)
            x = x0 = x + smear * previous
            resid_lambdas, x0_lambdas = self.resid_lambdas.to(x.dtype), self.x0_lambdas.to(x.dtype)

        for layer, block in enumerate(self.transformer.h):
            if layer == self.config.n_layer // 2:
                x_middle = x
            if not plain:
                x = resid_lambdas[layer] * x + x0_lambdas[layer] * x0
            value_embed = self.value_embeds[str(layer)](idx) if str(layer) in self.value_embeds else None
            at_end = last_only and layer == self.config.n_layer - 1
            cache = None if kv_cache is None else (*kv_cache.get_layer_cache(layer), places)
            x = block(x, value_embed, cos, sin, self.window_sizes[layer], cache, at_end)
        if kv_cache is not None:
            kv_cache.advance(T)
        if not plain:
            x = x - self.backout_lambda.to(x.dtype) * (x_middle[:, -1:] if last_only else x_middle)
        return norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Soft-capped float32 logits of any number of positions: (..., n_embd) -> (..., vocab_size)."""
        if torch.is_grad_enabled():
            return softcapped_logits(hidden, self._head())
        return softcap_(self.lm_head(hidden)[..., : self.config.vocab_size].float())

    def _head(self) -> torch.Tensor:
        return self.lm_head.weight[: self.config.vocab_size]

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean", importance=None):
        """Logits (B, T, vocab_size) in float32, or, with targets (B, T), the loss in nats.

        Targets of -1 are ignored. `loss_reduction`: "mean" over the valid targets (0 if there are none), "sum" over
        them, or "none" for (B, T) with zeros where ignored. `importance`: see `linear_cross_entropy`.
        """
        hidden = self.hidden(idx, kv_cache)
        if targets is None:
            return self.logits(hidden)
        hidden, flat = hidden.flatten(0, 1), targets.flatten()
        if loss_reduction == "none":
            return token_losses(hidden, self._head(), flat).view_as(targets)
        loss = linear_cross_entropy(hidden, self._head(), flat, importance)
        return loss / (flat >= 0).sum().clamp(min=1) if loss_reduction == "mean" else loss

    def sampling_log_probs(self, idx: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, top_k: int | None = None):
        """Log-probabilities (N,), in nats, of sampling each target that is not -1 after idx (B, T)."""
        valid = targets >= 0
        return sampling_log_probs(self.hidden(idx)[valid], self._head(), targets[valid], temperature, top_k)

    @torch.inference_mode()
    def generate(
        self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 42
    ) -> Iterator[int]:
        """Yield sampled token ids, one full forward pass each: slow, the reference implementation for the engine."""
        rng = torch.Generator(device=self.get_device()).manual_seed(seed)
        ids = torch.tensor([tokens], device=self.get_device())
        for _ in range(max_tokens):
            logits = self(ids)[:, -1]  # (1, vocab_size)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                if top_k is not None:
                    smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < smallest, -float("inf"))
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=rng)
            ids = torch.cat([ids, token], dim=1)
            yield token.item()

    # -------------------------------------------------------------------------
    # Parameter counts, FLOPs, parameter groups

    def num_scaling_params(self) -> dict[str, int]:
        """Parameter counts by kind. The horizon depends on "scaling" = matrices + head (see schedule.py)."""
        kinds = {
            "wte": self.transformer.wte,
            "value_embeds": self.value_embeds,
            "lm_head": self.lm_head,
            "transformer_matrices": self.transformer.h,
            "total": self,
        }
        counts = {kind: sum(p.numel() for p in module.parameters()) for kind, module in kinds.items()}
        counts["scaling"] = counts["transformer_matrices"] + counts["lm_head"]
        return counts

    def estimate_flops(self) -> int:
        """Floating-point operations per token, forward and backward, as in PaLM (arXiv:2204.02311, appendix B).

        6 per weight of a matrix product, and 12 * heads * head_dim * span per layer for attention, where
        the span is the layer's window or the context. Embeddings count nothing.
        """
        spans = [window if window >= 0 else self.config.sequence_len for window in self.window_sizes]
        return 6 * self.num_scaling_params()["scaling"] + 12 * self.config.n_embd * sum(spans)

    def param_groups(
        self, embedding_lr: float = 0.3, unembedding_lr: float = 0.008, matrix_lr: float = 0.02, scalar_lr: float = 0.5,
        weight_decay: float = 0.28,
    ) -> list[dict]:  # fmt: skip
        """Groups for `MuonAdamW`: every parameter once, as (name, parameter), with its rates.

        Rates of the embeddings and the head were tuned at width 768 and scale with 1/sqrt(width).
        """
        scale = (self.config.n_embd / 768) ** -0.5

        def named(prefix):
            return [(name, p) for name, p in self.named_parameters() if name.startswith(prefix)]

        # At initialisation the gradients of the scalars are zero in exact arithmetic (the output projections are zero, so
        # the residual is a multiple of x0, and the last norm ignores its scale). Computed, they are rounding noise of
        # about 1e-11, which a smaller eps would turn into whole steps of random sign (dev/LOG.md, 16).
        def adamw(params, lr, betas, weight_decay, eps=1e-10):
            return {"kind": "adamw", "params": params, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}

        smear_and_backout = named("smear_gate.") + named("smear_lambda") + named("backout_lambda")
        gates = [(name, p) for name, p in named("transformer.h.") if name.endswith("ve_gate.weight")]
        matrices = [(name, p) for name, p in named("transformer.h.") if not name.endswith("ve_gate.weight")]
        return [
            adamw(named("lm_head."), unembedding_lr * scale, (0.8, 0.96), 0.01),
            adamw(named("transformer.wte."), embedding_lr * scale, (0.8, 0.995), 0.001),
            adamw(named("value_embeds."), embedding_lr * scale * 0.5, (0.8, 0.995), 0.01),
            adamw(named("resid_lambdas"), scalar_lr * 0.01, (0.8, 0.95), 0.05, eps=1e-7),
            adamw(named("x0_lambdas"), scalar_lr, (0.96, 0.95), 0.0, eps=1e-7),
            adamw(smear_and_backout + gates, min(0.2, 0.4 * scalar_lr), (0.8, 0.95), 0.0, eps=1e-7),
            {"kind": "muon", "params": matrices, "lr": matrix_lr, "momentum": 0.95, "beta2": 0.9, "weight_decay": weight_decay,
             "dtype": self.transformer.wte.weight.dtype},
        ]


def add_missing_weights(state: dict[str, torch.Tensor], model: GPT) -> dict[str, torch.Tensor]:
    """A state dict of an older model, completed with neutral values for the extras it lacks."""
    extras = ("resid_lambdas", "x0_lambdas", "smear_", "backout_lambda", "value_embeds.")
    added = {}
    for name, parameter in model.state_dict().items():
        if name not in state and (name.startswith(extras) or name.endswith("ve_gate.weight")):
            added[name] = torch.full(parameter.shape, 1.0 if name == "resid_lambdas" else 0.0)
    return {**state, **added}
