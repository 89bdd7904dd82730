"""Any causal language model of the `transformers` library behind the few names that CORE and bits per byte use.

Nothing is trained, exported or converted.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.common import Compute, UserError
from nanochat.tokenizer import concatenate_ids

LOGIT_ROWS = 1024  # positions whose logits are held at once: vocabularies reach 250,000


def load_hf_model(path: str, compute: Compute) -> tuple[HFModel, HFTokenizer]:
    """A model and its tokenizer from a folder or a hub id. Raises UserError if they cannot be loaded."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # not given, the library would ask
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--hf-path {path} could not be loaded: {reason}") from None
    model.to(device=compute.device, dtype=compute.dtype)
    return HFModel(model.eval()), HFTokenizer(tokenizer, path)


class HFModel:
    def __init__(self, model):
        self.model = model
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or 2048
        self.config = SimpleNamespace(sequence_len=context, vocab_size=config.vocab_size)
        # Some families scale or cap their logits after the head; then the logits take the place of the hidden states
        self.whole = False
        probe = torch.arange(4, device=self.get_device())[None]
        with torch.inference_mode():
            logits = self.logits(self.hidden(probe))
            self.whole = not torch.allclose(logits, model(probe).logits.float(), atol=1e-3)

    def get_device(self) -> torch.device:
        return self.model.device

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """idx (B, T) -> what `logits` takes: (B, T, d), or (B, T, vocab_size) if `whole`."""
        if self.whole:
            return self.model(idx, use_cache=False).logits
        return self.model.base_model(idx, use_cache=False).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> float32 logits (..., vocab_size)."""
        return (hidden if self.whole else self.model.get_output_embeddings()(hidden)).float()

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor, loss_reduction: str = "none") -> torch.Tensor:
        """Loss in nats of each target, (B, T) float32, 0 where a target is -1; other reductions are for training."""
        hidden, losses = self.hidden(idx).flatten(0, 1), []
        for h, t in zip(hidden.split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS)):
            losses.append(F.cross_entropy(self.logits(h), t, ignore_index=-1, reduction="none"))
        return torch.cat(losses).view_as(targets)

    def complete(self, tokenizer: HFTokenizer, prompt: str, max_tokens: int = 16) -> str:
        """The prompt with its greedy continuation, up to the end of the document."""
        ids = tokenizer.encode([prompt], prepend=tokenizer.get_bos_token_id())
        ids = torch.tensor(ids, device=self.get_device())
        mask = torch.ones_like(ids)  # without it the library warns
        output = self.model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        return tokenizer.tokenizer.decode(output[0], skip_special_tokens=True)


class HFTokenizer:
    def __init__(self, tokenizer, name: str):
        self.tokenizer, self.name = tokenizer, name

    def fingerprint(self) -> str:
        """Identifies the tokenizer in a loader's state."""
        return self.name

    def get_bos_token_id(self) -> int:
        """The token that starts a document: bos, or eos if (as in GPT-2) one token is both."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(f"the tokenizer of {self.name} has neither a bos nor an eos token to start a document with")

    def encode(self, texts: list[str], prepend: int | None = None) -> list[list[int]]:
        """Ids of each text. Special tokens spelt out in a text are encoded as text."""
        if not texts:  # the library fails
            return []
        first = [] if prepend is None else [prepend]
        many = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [first + ids for ids in many["input_ids"]]

    def encode_to_numpy(self, texts: list[str], num_threads: int = 8) -> tuple[np.ndarray, np.ndarray]:
        """Concatenated ids of all texts and their offsets."""
        return concatenate_ids(self.encode(texts), 2**32 - 1)

    def token_bytes(self) -> torch.Tensor:
        """(vocab_size,) int32: bytes of text behind each id, 0 for special tokens.

        Read off the vocabulary's own spelling, since decoding a lone id turns part of a character into U+FFFD.
        Byte-level vocabularies write one character per byte; SentencePiece writes a blank as "▁" and a byte as "<0x0A>".
        """
        vocab = self.tokenizer.get_vocab()
        byte_level = "Ġ" in vocab  # such vocabularies write a space like this
        if not byte_level and "▁" not in vocab and "<0x0A>" not in vocab:
            raise UserError(f"the tokenizer of {self.name} is of an unknown kind; bits per byte cannot be computed")
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}  # spelt as plain text
        special = set(self.tokenizer.all_special_ids)
        counts = torch.zeros(max(vocab.values()) + 1, dtype=torch.int32)
        for token, i in vocab.items():
            if i in special:
                continue
            if byte_level and token not in added:
                counts[i] = len(token)
            elif not byte_level and re.fullmatch("<0x..>", token):
                counts[i] = 1
            else:
                counts[i] = len(token.replace("▁", " ").encode())
        return counts
