"""The model that the benches measure: random weights, sizes as base_train gives them to a depth."""

from __future__ import annotations


def build(depth: int, context: int, vocab_size: int, device, dtype=None, noise: bool = False):
    """`noise`: as if trained. At first the output projections are zero, and nothing that attention does would matter."""
    import torch

    from nanochat.gpt import GPT, config_of_depth

    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config_of_depth(depth, vocab_size, context))
    model.to_empty(device=device)
    model.init_weights(dtype)
    if noise:
        width = model.config.n_embd
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_proj.weight.normal_(std=width**-0.5)
                block.mlp.c_proj.weight.normal_(std=width**-0.5 / 2)
            model.lm_head.weight.normal_(std=0.02)
    return model
