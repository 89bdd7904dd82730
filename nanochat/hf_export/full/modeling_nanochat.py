"""nanochat's own architecture for the transformers library, to be loaded with `trust_remote_code=True`.

The library's NanoChat with attention windows, scaled q and k, a residual mixed with the first embedding in each layer, value
embeddings, smear (a gated sum with the left neighbour) and backout (part of the mid-depth residual is subtracted at the end).
Formulas and names of the weights are those of nanochat/gpt.py. There are no buffers, which loading would leave empty.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The library's name for a cache depends on its version
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NanoChatFullConfig(PretrainedConfig):
    """config.json has the fields of nanochat's GPTConfig, and `windows`: how many earlier tokens each layer sees, -1 for all."""

    model_type = "nanochat_full"
    attribute_map = {
        "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }  # fmt: skip

    def __init__(self, n_layer=0, **kwargs):
        self.n_layer = n_layer
        # The library makes a cache of so many layers; the last one holds the token ids, which smear needs
        super().__init__(**{**kwargs, "num_hidden_layers": n_layer + 1})


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position embedding: x (B, H, T, D); cos, sin (B, 1, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def has_value_embed(layer, config):
    return layer % 2 == (config.n_layer - 1) % 2


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.n_embd // config.n_head
        self.qk_scale = config.qk_scale
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.ve_gate = nn.Linear(12, config.n_kv_head, bias=False) if has_value_embed(layer, config) else None

    def forward(self, x, value_embed, cos, sin, mask, cache):
        heads = *x.shape[:2], -1, self.head_dim
        q, k, v = (linear(x).view(heads) for linear in (self.c_q, self.c_k, self.c_v))  # (B, T, heads, D)
        if value_embed is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :12]))  # (B, T, H_kv)
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        q, k = (norm(rotate(heads, cos, sin)) * self.qk_scale for heads in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, *arguments):
        x = x + self.attn(norm(x), *arguments)
        return x + self.mlp(norm(x))


class NanoChatFullForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoChatFullConfig
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        blocks = [Block(config, layer) for layer in range(config.n_layer)]
        embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict({"wte": embed, "h": nn.ModuleList(blocks)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = nn.Linear(24, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.value_embeds = nn.ModuleDict()
        for layer in range(config.n_layer):
            if has_value_embed(layer, config):
                width = config.n_kv_head * config.n_embd // config.n_head
                self.value_embeds[str(layer)] = nn.Embedding(config.vocab_size, width)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None, use_cache=True, logits_to_keep=0, **kwargs):
        """input_ids (B, T) follow the tokens in the cache, if there is one; `attention_mask` (B, all tokens), 0 for padding."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        B, T = input_ids.shape
        S = past + T
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, S)
        real = attention_mask.bool()  # (B, S), not padding
        if position_ids is None:
            position_ids = (real.cumsum(1) - 1)[:, past:]

        # The embedding, and that of the left neighbours; the first token of a document has none
        ids = input_ids[:, None, :, None]
        if cache is not None:
            ids, _ = cache.update(ids, ids, self.config.n_layer)
        left = F.pad(ids[:, 0, :, 0], (1, 0))[:, past:S]
        has_left = F.pad(real, (1, 0))[:, past:S, None] & (input_ids != self.config.document_start)[..., None]
        x = norm(self.transformer.wte(input_ids))
        smear = self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., :24]))
        x = x0 = x + smear * norm(self.transformer.wte(left)) * has_left

        half = self.config.n_embd // self.config.n_head // 2
        half = torch.arange(half, dtype=torch.float32, device=x.device) / half
        frequencies = self.config.rotary_base**-half
        angles = position_ids[:, None, :, None] * frequencies  # (B, 1, T, D/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        positions = torch.arange(S, device=x.device)
        distance = positions[past:, None] - positions  # (T, S), from query to key
        seen = (distance >= 0) & real[:, None] | (distance == 0)  # padding sees itself: a softmax over nothing is NaN
        masks = {}
        for window in set(self.config.windows):
            within = distance <= (window if window >= 0 else S)
            masks[window] = (seen & within)[:, None]  # (B, 1, T, S)

        for layer, block in enumerate(self.transformer.h):
            if layer == self.config.n_layer // 2:
                x_middle = x
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            value_embed = self.value_embeds[str(layer)](input_ids) if str(layer) in self.value_embeds else None
            x = block(x, value_embed, cos, sin, masks[self.config.windows[layer]], cache)
        x = norm(x - self.backout_lambda * x_middle)

        logits = 15 * torch.tanh(self.lm_head(x[:, -logits_to_keep:]).float() / 15)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
