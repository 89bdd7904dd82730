"""A model as a Hugging Face folder: config, weights, tokenizer and chat template, written and read.

    DIR/config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja README.md
        modeling_nanochat.py     only of a model with our own extras, which `transformers` does not know

hf_export/ has what is the same in all of them. Weights are float32, as in training; those of a plain model are named as in
the NanoChatForCausalLM of `transformers`, others as in gpt.py. Nothing here needs `transformers`, or executes what it reads.

That library takes "<|bos|>" for the control token wherever it stands. Therefore the chat template writes a "<|" that is part
of a message as "<\\ufdd0|", which the normalizer turns back after the control tokens have been found. Between two text parts of
a message, which we encode separately, it writes "\\ufdd1\\ufdd2", at which the tokenizer splits. All are Unicode noncharacters.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from string import Template

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig, window_sizes
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, check_vocabulary

FILES = Path(__file__).with_name("hf_export")
WITH_VOCABULARY = ("transformer.wte.", "lm_head.", "value_embeds.")  # weights with a row per token
NAMES = [  # ours, and those of `transformers`
    ("transformer.wte.", "model.embed_tokens."), ("transformer.h.", "model.layers."), (".attn.c_q.", ".self_attn.q_proj."),
    (".attn.c_k.", ".self_attn.k_proj."), (".attn.c_v.", ".self_attn.v_proj."), (".attn.c_proj.", ".self_attn.o_proj."),
    (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."),
]  # fmt: skip
SIZES = {  # the same of the config
    "vocab_size": "vocab_size", "sequence_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
}  # fmt: skip


def write_folder(folder: Path, model: GPT, tokenizer: RustBPETokenizer, card: dict[str, str]) -> None:
    """Write a model with its tokenizer; `card` fills in README.md. UserError if there is something in the folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another one, or delete it")
    config, bos = model.config, tokenizer.get_bos_token_id()
    end = tokenizer.encode_special("<|assistant_end|>")
    ends = {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": bos}  # a base model ends a document with bos
    filled = {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {"model_max_length": config.sequence_len},
        "generation_config.json": ends,
        "config.json": {**config_json(config), **ends},
    }
    state = {}
    for name, tensor in model.state_dict().items():
        rows = config.vocab_size if name.startswith(WITH_VOCABULARY) else len(tensor)
        state[renamed(name) if config.plain else name] = tensor[:rows].float().clone()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        for path in [*FILES.glob("[!.]*.*"), *(FILES / ("plain" if config.plain else "full")).glob("[!.]*.*")]:
            text = path.read_text(encoding="utf-8")
            if path.name in filled:
                text = json.dumps({**json.loads(text), **filled[path.name]}, indent=2)
            elif path.name == "README.md":
                text = Template(text).substitute(card)
            (folder / path.name).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:  # a full disk, for example
        raise UserError(f"cannot write {folder}: {error}") from error


def read_folder(folder: Path) -> tuple[dict, dict, RustBPETokenizer]:
    """(state dict, config, tokenizer) of a folder, for `build_model`. UserError if it is of another kind, or damaged."""
    path = folder / "config.json"
    try:
        config = read_config(read_json(path))
        tokenizer = read_tokenizer(path := folder / "tokenizer.json")
        files, state = {"model.safetensors"}, {}
        if (index := folder / "model.safetensors.index.json").exists():
            files = set(read_json(path := index)["weight_map"].values())
        for name in sorted(files):
            state |= load_file(path := folder / Path(name).name)  # never a file elsewhere
        path, vocab = folder, tokenizer.get_vocab_size()
        if config["vocab_size"] < vocab:
            raise ValueError(f"its model has a vocabulary of {config['vocab_size']}, its tokenizer of {vocab}")
        if config["plain"]:
            state = {renamed(name, back=True): tensor for name, tensor in state.items()}
        for name, tensor in state.items():
            if name.startswith(WITH_VOCABULARY):
                state[name] = F.pad(tensor[:vocab], (0, 0, 0, -vocab % 64))  # as in GPT
        return state, {**config, "vocab_size": vocab}, tokenizer
    except Exception as error:  # damaged files can raise nearly anything
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())[:200] or repr(error)}") from error


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# -----------------------------------------------------------------------------
# The model


def renamed(name: str, back: bool = False) -> str:
    """transformer.h.0.mlp.c_fc.weight -> model.layers.0.mlp.fc1.weight, or back."""
    for ours, theirs in NAMES:
        name = name.replace(theirs, ours) if back else name.replace(ours, theirs)
    return name


def config_json(config: GPTConfig) -> dict:
    """What config.json has besides the constants in hf_export."""
    if not config.plain:
        return {**asdict(config), "windows": window_sizes(config)}
    rope = {"rope_type": "default", "rope_theta": config.rotary_base}
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    return {**sizes, "intermediate_size": 4 * config.n_embd, "rope_parameters": rope}


def read_config(config: dict) -> dict:
    """The fields of GPTConfig. ValueError for models that GPT is not."""
    plain, full = (read_json(FILES / kind / "config.json") for kind in ("plain", "full"))
    if config.get("model_type") == full["model_type"]:
        return {name: config[name] for name in asdict(GPTConfig())}
    flat = {"rope_type": "default", "rope_theta": 10000.0, **config, **(config.get("rope_parameters") or {})}
    expected = {name: plain[name] for name in ("model_type", "hidden_act", "final_logit_softcapping", "attention_bias")}
    expected |= {"intermediate_size": 4 * config.get("hidden_size", 0), "rope_type": "default"}
    for name, value in expected.items():
        if (found := flat.get(name)) != value:
            raise ValueError(f"its {name} is {found!r}; only {value!r} is supported")
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    return {**sizes, "rotary_base": flat["rope_theta"], "plain": True}


# -----------------------------------------------------------------------------
# The tokenizer


def byte_characters() -> dict[int, str]:
    """The printable character that byte-level vocabularies write for each byte, as GPT-2's does: 32 -> "Ġ"."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tokenizer_json(tokenizer: RustBPETokenizer) -> dict:
    """The tokenizer.json of a vocabulary, the format of the `tokenizers` library.

    Ours merges the neighbours whose concatenation has the lowest id; theirs follows a list of pairs. Hence all pairs that
    make a token are listed, in the order of the tokens' ids. A word that is a token is taken whole, as tiktoken does.
    """
    ranks, characters, contents = tokenizer.ranks, byte_characters(), read_json(FILES / "tokenizer.json")
    special = sorted((id, name) for name, id in tokenizer.special_tokens.items())
    if [id for id, _ in special] != list(range(len(ranks), tokenizer.get_vocab_size())):  # the library numbers them so
        raise UserError("a tokenizer whose special tokens do not follow the others cannot be exported")
    spelt = {token: "".join(characters[byte] for byte in token) for token in sorted(ranks, key=ranks.get)}
    merges = []
    for token in spelt:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: [ranks[part] for part in pair])
        merges += [[spelt[left], spelt[right]] for left, right in pairs]
    contents["model"] |= {"vocab": {text: ranks[token] for token, text in spelt.items()}, "merges": merges}
    contents["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = tokenizer.pattern
    [added] = contents["added_tokens"]
    contents["added_tokens"] = [{**added, "id": id, "content": name} for id, name in special]
    return contents


def read_tokenizer(path: Path) -> RustBPETokenizer:
    """The tokenizer in a tokenizer.json. ValueError or others if it is not byte-level BPE with nanochat's special tokens."""
    contents, ours = read_json(path), read_json(FILES / "tokenizer.json")
    steps, vocab = contents["pre_tokenizer"].get("pretokenizers", []), contents["model"]["vocab"]
    patterns = [step["pattern"]["Regex"] for step in steps if "Regex" in step.get("pattern", ())]
    kind = contents["model"]["type"], [step["type"] for step in steps[-1:]], len(patterns)
    if kind != ("BPE", ["ByteLevel"], 1) or contents["normalizer"] not in (None, ours["normalizer"]):
        raise ValueError("it is not a byte-level BPE that splits text by one pattern")
    special = {token["content"]: token["id"] for token in contents["added_tokens"]}
    if missing := set(SPECIAL_TOKENS) - set(special):
        raise ValueError(f"it lacks the special tokens {', '.join(sorted(missing))}")
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes(map(bytes_of.get, token)): id for token, id in vocab.items() if token not in special}
    check_vocabulary(ranks, special)
    return RustBPETokenizer(ranks, patterns[0], special)
