"""Models of the transformers library under our evaluations: tiny random ones, created here, saved and loaded again."""

import csv
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import Compute, UserError
from nanochat.hf_model import HFModel, HFTokenizer, load_hf_model
from nanochat.loss_eval import evaluate_bpb

CPU = Compute(torch.device("cpu"), torch.float32)
TEXT = 'The café sells naïve tea, 東京 style: 3.50 €. 🙂 Once upon a time there was a tea pot; it said "no".\n'


def tokenizer_of(path, tokens, blank, normalizer, pre_tokenizer, decoder, **special):
    """A BPE tokenizer that joins t+e, te+a and blank+tea, from a tokenizer.json written here."""
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*tokens, "te", "tea", blank + "tea"])}
    mark = {"id": 0, "content": tokens[0], "special": True}
    mark |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    merges = ["t e", "te a", f"{blank} tea"]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": "<0x00>" in vocab, "fuse_unk": False}
    model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder, "post_processor": None}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [mark], **parts, "model": model}
    path.write_text(json.dumps(whole), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)


def byte_level_tokenizer(folder):
    """As GPT-2's: BPE over bytes, each written as one character. Most characters beyond ASCII are several tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + n) for n in range(256 - len(printable))]  # "Ġ", the blank, is the 33rd of them
    tokens = ["<|endoftext|>", *map(chr, printable), *others]
    part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path = folder / "bytes.json"
    return tokenizer_of(path, tokens, "Ġ", None, part, part, eos_token="<|endoftext|>")


def sentencepiece_tokenizer(folder):
    """As Llama 2's: BPE over characters with "▁" for the blank, falling back to bytes."""
    tokens = ["<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzT", "é"]
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [to_blank, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return tokenizer_of(folder / "pieces.json", tokens, "▁", to_mark, None, decoder, bos_token="<s>")


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = byte_level_tokenizer(folder)
    torch.manual_seed(0)
    # initializer_range: large enough for varied predictions
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return load_hf_model(str(gpt2_folder), CPU)


def test_logits_and_losses_are_those_of_the_library(gpt2):
    model, tokenizer = gpt2
    assert model.config.sequence_len == 48 and not model.whole
    ids = torch.randint(0, len(tokenizer.tokenizer), (2, 20))
    targets = ids.roll(-1, dims=1)
    targets[0, 3] = -1
    with torch.no_grad():
        expected = model.model(ids).logits
        assert torch.allclose(model.logits(model.hidden(ids)), expected, atol=1e-5)
        losses = model(ids.int(), targets, loss_reduction="none")
    assert losses[0, 3] == 0
    expected = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_caps_its_logits_is_measured_with_the_cap():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=90, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, final_logit_softcapping=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = HFModel(Gemma2ForCausalLM(config).eval()), torch.arange(10)[None]
    with torch.no_grad():
        logits = model.logits(model.hidden(ids))
        assert torch.allclose(logits, model.model(ids).logits) and logits.abs().max() <= 0.1


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_token_bytes_add_up_to_the_bytes_of_the_text(make, tmp_path):
    tokenizer = HFTokenizer(make(tmp_path), "here")
    bos = tokenizer.get_bos_token_id()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.encode([TEXT, "tea"], prepend=bos)[0] == [bos, *ids] and tokenizer.encode([]) == []
    joined, offsets = tokenizer.encode_to_numpy([TEXT, "", "tea"])
    assert joined.tolist() == ids + tokenizer.encode("tea")
    assert offsets.tolist() == [0, len(ids), len(ids), len(joined)]
    special = "a " + tokenizer.tokenizer.decode([bos])
    decode = tokenizer.tokenizer.decode
    assert decode(tokenizer.encode(special)) == special and bos not in tokenizer.encode(special)
    assert decode(ids) == TEXT
    counts = tokenizer.token_bytes()
    assert counts[bos] == 0 and counts[ids].sum().item() == len(TEXT.encode()) > len(ids)  # there are merges


def test_bits_per_byte_and_greedy_samples_equal_the_library(gpt2):
    model, tokenizer = gpt2
    ids = torch.tensor([tokenizer.encode(TEXT, prepend=tokenizer.get_bos_token_id())[:41]])
    bpb = evaluate_bpb(model, [(ids[:, :-1].int(), ids[:, 1:])], 1, tokenizer.token_bytes(), CPU)
    with torch.no_grad():
        log_probabilities = model.model(ids[:, :-1]).logits.double().log_softmax(-1)[0]
    nats = -sum(log_probabilities[t, token].item() for t, token in enumerate(ids[0, 1:].tolist()))
    n_bytes = tokenizer.token_bytes()[ids[0, 1:]].sum().item()
    assert bpb == pytest.approx(nats / n_bytes / 0.6931471805599453, rel=1e-6)
    prompt = torch.tensor([tokenizer.encode("the tea", prepend=tokenizer.get_bos_token_id())])
    expected = model.model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert model.complete(tokenizer, "the tea", max_tokens=3) == tokenizer.tokenizer.decode(expected[0, 1:].tolist())


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="could not be loaded"):
        load_hf_model(str(tmp_path), CPU)  # a folder without a model
    words = SimpleNamespace(get_vocab=lambda: {"a": 0}, bos_token_id=None, eos_token_id=None)
    with pytest.raises(UserError, match="unknown kind"):
        HFTokenizer(words, "words").token_bytes()
    with pytest.raises(UserError, match="neither a bos nor an eos"):
        HFTokenizer(words, "words").get_bos_token_id()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs the transformers library"):
        load_hf_model("openai-community/gpt2", CPU)


def test_base_eval_writes_a_csv_and_a_section_or_says_why_not(gpt2_folder, base_dir, hub, capsys, monkeypatch):
    from nanochat import dataset
    from nanochat.report import read_jsonl
    from scripts.base_eval import main

    arguments = ["--hf-path", str(gpt2_folder), "--device-type", "cpu"]
    main(arguments)
    [path] = (base_dir / "base_eval").iterdir()
    with open(path, newline="") as file:
        *tasks, core = csv.DictReader(file)
    centered = {task["label"]: float(task["centered"]) for task in tasks}
    assert [task["examples"] for task in tasks] == ["12"] * 3
    assert float(tasks[1]["centered"]) == pytest.approx(2 * float(tasks[1]["accuracy"]) - 1, abs=1e-5)
    assert core["label"] == "CORE" and float(core["centered"]) == pytest.approx(sum(centered.values()) / 3, abs=1e-5)
    assert "CORE" in capsys.readouterr().out
    [entry] = read_jsonl(base_dir / "report" / "report.jsonl")
    assert entry["section"] == "Base model evaluation"
    assert {label: entry["data"][label] for label in centered} == pytest.approx(centered, abs=1e-4)

    shutil.rmtree(base_dir / "eval_bundle")
    hub.faults["eval_bundle.zip"] = [404]
    monkeypatch.setattr(dataset, "WAITS", (0,))
    main(arguments)
    assert "CORE skipped: cannot download eval_bundle.zip" in capsys.readouterr().out


def test_base_loss_measures_a_folder_of_parquet_files(gpt2_folder, base_dir, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from scripts.base_loss import main

    data = tmp_path / "texts"
    data.mkdir()
    for i in range(2):
        pq.write_table(pa.table({"text": [TEXT * 3] * 40}), data / f"shard_{i:05d}.parquet")
    flags = ["--hf-path", str(gpt2_folder), "--device-type", "cpu", "--source", str(data), "--device-batch-size", "4"]
    for tokens in ("400", "100"):  # also less than a batch
        main([*flags, "--split-tokens", tokens])
        out = capsys.readouterr().out
        assert "train bpb" in out and "val bpb" in out and "The capital of France is" in out
