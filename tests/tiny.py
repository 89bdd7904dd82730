"""What tests share: a tiny GPT in which every weight matters, a scripted fake model, and tokenizers of bytes, real and fake."""

from types import SimpleNamespace

import torch

from nanochat.common import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
SPECIALS = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
BOS, END = 256, 257
SPECIAL_IDS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
BYTES = RustBPETokenizer({bytes([i]): i for i in range(256)}, SPLIT_PATTERN, SPECIAL_IDS)  # every byte is a token


def tiny_gpt(seed=0, noise=0.05, head_std=0.0, dtype=torch.float32, **config) -> GPT:
    """`noise` is added to all weights: fresh output projections are zero, which hides everything before them.

    `head_std` is the standard deviation of the head's weights; a large one makes greedy output varied.
    """
    small = {"sequence_len": 64, "vocab_size": 262, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**small, **config}))
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape)
        if head_std:
            model.lm_head.weight.normal_(std=head_std)
    return model


class Script:
    """A fake model for the engine: its logits are nearly certain of one token, `next_token(tokens so far)`.

    The tokens are stored where a model stores its keys, so they follow whatever the engine does with its cache.
    """

    def __init__(self, next_token, sequence_len=64):
        self.config = SimpleNamespace(sequence_len=sequence_len, n_layer=1, n_head=1, n_kv_head=1, n_embd=4)
        self.next_token = next_token
        self.calls = []  # shape of the ids of every call
        self.seen = []  # tokens of each sequence in the last call

    def get_device(self):
        return torch.device("cpu")

    def parameters(self):
        return [torch.zeros(1)]

    def hidden(self, ids, kv_cache, last_only=False):
        self.calls.append(tuple(ids.shape))
        self.seen = []
        for new, slot, length in zip(ids, kv_cache.slots.tolist(), kv_cache.cache_seqlens.tolist()):
            stored = kv_cache.k_cache[0, slot, :, 0, 0]
            stored[length : length + len(new)] = new
            self.seen.append(stored[: length + len(new)].int().tolist())
        kv_cache.advance(ids.size(1))
        return torch.zeros(*ids.shape, 4)

    def logits(self, hidden):
        logits = torch.full((len(hidden), 265), -1e9)
        for row, tokens in zip(logits, self.seen):
            row[self.next_token(tokens)] = 0.0
        return logits


class ByteTokenizer:
    """A fake for tiny_gpt's small vocabulary: fewer special tokens than BYTES, and a prompt is its text only."""

    def encode_special(self, name):
        name = name.strip("<|>")
        return 256 + SPECIALS.index(name) if name in SPECIALS else 300

    def get_bos_token_id(self):
        return BOS

    def encode(self, text, prepend=None):
        if isinstance(text, list):
            return [self.encode(t, prepend) for t in text]
        return [*([] if prepend is None else [prepend]), *text.encode()]

    def id_to_bytes(self, i):
        return bytes([i]) if i < 256 else f"<|{SPECIALS[i - 256]}|>".encode()

    def decode(self, ids):
        return b"".join(map(self.id_to_bytes, ids)).decode(errors="replace")

    def render_for_completion(self, conversation):
        return [BOS, *self.encode(conversation["messages"][0]["content"])]
