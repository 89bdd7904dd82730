"""Models of the transformers library under our evaluations: tiny random ones, created here, saved and loaded again."""

import csv
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import CPU

from nanochat import dataset
from nanochat.common import UserError
from nanochat.hf_model import HFModel, HFTokenizer, load_hf_model
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import read_jsonl
from scripts import base_eval, base_loss

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")  # comes with it
TEXT = 'The café sells naïve tea, 東京 style: 3.50 €. 🙂 Once upon a time there was a tea pot; it said "no".\n'


def byte_level_tokenizer():
    """As GPT-2's: BPE over bytes, each written as one character. Most characters beyond ASCII are several tokens."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], 270, special_tokens=["<|endoftext|>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")


def sentencepiece_tokenizer():
    """As Llama 2's: BPE over characters with "▁" for the blank, falling back to bytes."""
    tokens = ["<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzT", "é", "te", "tea"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "e"), ("te", "a")], byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), byte_level_tokenizer()
    torch.manual_seed(0)
    # initializer_range: large enough for varied predictions
    sizes = {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return load_hf_model(str(gpt2_folder), CPU)


def test_a_model_that_caps_its_logits_is_measured_with_the_cap():
    config = transformers.Gemma2Config(
        vocab_size=90, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, final_logit_softcapping=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = HFModel(transformers.Gemma2ForCausalLM(config).eval()), torch.arange(10)[None]
    with torch.no_grad():
        logits = model.logits(model.hidden(ids))
        assert torch.allclose(logits, model.model(ids).logits) and logits.abs().max() <= 0.1


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_token_bytes_add_up_to_the_bytes_of_the_text(make):
    tokenizer = HFTokenizer(make(), "here")
    bos, decode = tokenizer.get_bos_token_id(), tokenizer.tokenizer.decode
    special = "a " + decode([bos])
    ids, tea, as_text = tokenizer.encode([TEXT, "tea", special])
    assert decode(ids) == TEXT and decode(as_text) == special and bos not in as_text
    assert tokenizer.encode(["tea"], prepend=bos) == [[bos, *tea]] and tokenizer.encode([]) == []
    joined, offsets = tokenizer.encode_to_numpy([TEXT, "", "tea"])
    assert joined.tolist() == ids + tea and offsets.tolist() == [0, len(ids), len(ids), len(joined)]
    counts = tokenizer.token_bytes()
    assert counts[bos] == 0 and counts[ids].sum().item() == len(TEXT.encode()) > len(ids)  # there are merges


def test_bits_per_byte_and_greedy_samples_equal_the_library(gpt2):
    model, tokenizer = gpt2
    bos = tokenizer.get_bos_token_id()
    ids = torch.tensor(tokenizer.encode([TEXT], prepend=bos))[:, :41]
    assert model.config.sequence_len == 96 and not model.whole
    bpb = evaluate_bpb(model, [(ids[:, :-1].int(), ids[:, 1:])], 1, tokenizer.token_bytes(), CPU)
    with torch.no_grad():
        assert torch.allclose(model.logits(model.hidden(ids)), model.model(ids).logits, atol=1e-5)
        nats = F.cross_entropy(model.model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="sum").item()
    n_bytes = tokenizer.token_bytes()[ids[0, 1:]].sum().item()
    assert bpb == pytest.approx(nats / n_bytes / math.log(2), rel=1e-6)
    [prompt] = tokenizer.encode(["the tea"])
    ids = [bos, *prompt]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert model.complete(tokenizer, "the tea", max_tokens=3) == tokenizer.tokenizer.decode(ids[1:])


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    words = HFTokenizer(SimpleNamespace(get_vocab=lambda: {"a": 0}, bos_token_id=None, eos_token_id=None), "words")
    with pytest.raises(UserError, match="could not be loaded"):
        load_hf_model(str(tmp_path), CPU)  # a folder without a model
    with pytest.raises(UserError, match="unknown kind"):
        words.token_bytes()
    with pytest.raises(UserError, match="neither a bos nor an eos"):
        words.get_bos_token_id()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="could not be loaded: .*transformers"):
        load_hf_model("openai-community/gpt2", CPU)


def test_base_eval_writes_a_csv_and_a_section_or_says_why_not(gpt2_folder, base_dir, hub, capsys, monkeypatch):
    arguments = ["--hf-path", str(gpt2_folder), "--device-type", "cpu"]
    base_eval.main(arguments)
    [path] = (base_dir / "base_eval").iterdir()
    *tasks, core = csv.DictReader(path.read_text().splitlines())
    centered = {task["label"]: float(task["centered"]) for task in [*tasks, core]}
    assert [task["examples"] for task in tasks] == ["12"] * 3 and core["label"] == "CORE"
    [entry] = read_jsonl(base_dir / "report" / "report.jsonl")
    assert {label: entry["data"][label] for label in centered} == pytest.approx(centered, abs=1e-4)

    shutil.rmtree(base_dir / "eval_bundle")
    hub.faults["eval_bundle.zip"] = [404]
    monkeypatch.setattr(dataset, "WAITS", (0,))
    base_eval.main(arguments)
    assert "CORE skipped: cannot download eval_bundle.zip" in capsys.readouterr().out


def test_base_loss_measures_a_folder_of_parquet_files(gpt2_folder, prepared_base, base_dir, capsys):
    source = ["--source", str(prepared_base / "text"), "--device-batch-size", "4", "--split-tokens", "100"]
    base_loss.main(["--hf-path", str(gpt2_folder), "--device-type", "cpu", *source])
    out = capsys.readouterr().out
    assert "train bpb" in out and "val bpb" in out and "The capital of France is" in out
