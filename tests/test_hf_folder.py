"""Exported folders under the real `transformers` and `tokenizers`: the same ids, rendering, logits and greedy text as ours."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import CPU, tiny_gpt

from nanochat import report
from nanochat.checkpoint_manager import checkpoint_dir, load_model, save_checkpoint
from nanochat.common import UserError
from nanochat.hf_folder import write_folder
from nanochat.hf_model import load_hf_model
from nanochat.sample_world import documents
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from scripts import export

transformers = pytest.importorskip("transformers")
MODELS = {
    "plain": {"plain": True, "n_layer": 3, "n_head": 4, "n_kv_head": 4},
    "plain, grouped heads": {"plain": True, "n_layer": 3, "n_head": 4, "n_kv_head": 2},
    "full": {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "window_pattern": "SSSL"},
    "full, grouped heads": {"n_layer": 3, "n_head": 4, "n_kv_head": 1, "window_pattern": "QS"},
}
TEXTS = st.text() | st.sampled_from(["<|user_end|> <|bos|>", "a<", " two ", "\n"])  # of messages
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": TEXTS}))


@pytest.fixture(scope="module")
def texts():
    return [text for _, text in zip(range(700), documents())]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return RustBPETokenizer.train_from_iterator(iter(texts[:400]), 700)


def make(kind, tokenizer):
    """Its windows are shorter than its context. Every token counts in its greedy text."""
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "sequence_len": 300, "head_std": 1.0}
    return tiny_gpt(**sizes, **MODELS[kind]).eval()


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """`exported(kind)` returns (our model, the library's model, its folder), each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            model, folder = make(kind, tokenizer), tmp_path_factory.mktemp("exported") / "model"
            write_folder(folder, model, tokenizer, dict.fromkeys(("title", "facts", "remote", "results"), ""))
            remote = not model.config.plain
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
            made[kind] = model, theirs.eval(), folder
        return made[kind]

    return get


@pytest.fixture(scope="module")
def theirs(exported):
    return transformers.AutoTokenizer.from_pretrained(exported("plain")[2])


# -----------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_ours(exported, kind):
    model, theirs, _ = exported(kind)
    ids = torch.randint(0, model.config.vocab_size, (2, 290), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = theirs(ids).logits, model(ids)
        assert logits.dtype == torch.float32 and torch.allclose(logits, expected, atol=1e-4)
        assert torch.allclose(theirs(ids, logits_to_keep=1).logits, expected[:, -1:], atol=1e-4)
        loss = theirs(ids, labels=ids).loss
    assert torch.allclose(loss, model(ids[:, :-1], ids[:, 1:]), atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_with_and_without_cache_and_with_left_padding_equals_ours(exported, kind):
    model, theirs, _ = exported(kind)
    prompts = [torch.arange(7, 7 + n).tolist() for n in (3, 150, 50)]  # of several lengths: padded
    expected = [list(model.generate(prompt, 6, temperature=0)) for prompt in prompts]
    padded = torch.tensor([[0] * (150 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (150 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for use_cache in (True, False):
        output = theirs.generate(padded, attention_mask=mask, use_cache=use_cache, **options)
        assert output[:, 150:].tolist() == expected
        output = theirs.generate(torch.tensor(prompts[1:2]), use_cache=use_cache, **options)
        assert output[0, 150:].tolist() == expected[1]


def test_a_full_model_continues_from_a_cache_of_the_library(exported):
    """In chunks of any length, since smear needs the last token of the previous chunk."""
    model, theirs, _ = exported("full")
    ids, cache, logits = torch.arange(40)[None], transformers.DynamicCache(config=theirs.config), []
    with torch.no_grad():
        for chunk in ids.split([5, 1, 20, 14], dim=1):
            logits.append(theirs(chunk, cache=cache).logits)
        assert torch.allclose(torch.cat(logits, dim=1), model(ids), atol=1e-4)


# -----------------------------------------------------------------------------
# The tokenizer


def test_ids_of_the_sample_corpus_equal_ours(tokenizer, theirs, texts):
    assert theirs(texts)["input_ids"] == tokenizer.encode(texts)
    assert theirs.decode(tokenizer.encode(texts[0])) == texts[0]


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet="aehl '\n\t.<|>é1日") | st.sampled_from(SPECIAL_TOKENS).map("a{} b".format))
def test_ids_of_any_text_equal_ours(tokenizer, theirs, text):
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)


def test_special_tokens_are_those_of_ours(tokenizer, theirs, exported):
    bos, end = (tokenizer.encode_special(name) for name in ("<|bos|>", "<|assistant_end|>"))
    assert theirs.convert_tokens_to_ids(SPECIAL_TOKENS) == [tokenizer.encode_special(name) for name in SPECIAL_TOKENS]
    assert theirs("<|bos|>a")["input_ids"] == [bos, *tokenizer.encode("a")]
    assert len(theirs) == tokenizer.get_vocab_size() and theirs.padding_side == "left"
    for kind in ("plain", "full"):
        assert exported(kind)[1].generation_config.eos_token_id == [end, bos]


@settings(max_examples=200, deadline=None)
@given(system=st.none() | TEXTS, turns=st.lists(st.tuples(TEXTS, TEXTS | PARTS), min_size=1, max_size=3))
def test_every_message_shape_is_rendered_as_ours(tokenizer, theirs, system, turns):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert (rendered["input_ids"], rendered["assistant_masks"]) == tokenizer.render_conversation({"messages": messages}, None)
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt == tokenizer.render_for_completion({"messages": messages})


def test_content_may_come_in_parts_and_a_last_reply_is_continued(tokenizer, theirs):
    messages = [{"role": role, "content": f"{role}s say"} for role in ("system", "user", "assistant")]
    expected = tokenizer.render_conversation({"messages": messages})[0][:-1]  # without the end of the reply
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    for shape in (messages, in_parts):
        assert theirs.apply_chat_template(shape, continue_final_message=True, return_dict=False) == expected
    with pytest.raises(Exception, match="must alternate"):
        theirs.apply_chat_template(messages[1:2] * 2)


# -----------------------------------------------------------------------------
# Export and import


@pytest.fixture
def checkpoint(base_dir, tokenizer):
    """`checkpoint(kind)` returns our model, saved as the sft model d3 of step 5."""

    def save(kind):
        model = make(kind, tokenizer)
        meta = {"model_config": vars(model.config)}
        save_checkpoint(checkpoint_dir("sft", "d3"), 5, model.state_dict(), None, meta, tokenizer, CPU)
        return model

    return save


@pytest.mark.parametrize("kind", ["plain, grouped heads", "full"])
def test_an_exported_model_comes_back_bit_for_bit(checkpoint, tokenizer, tmp_path, capsys, kind):
    model, ids = checkpoint(kind), torch.arange(64)[None]
    export.main(["-i", "sft", "--to", str(tmp_path / "out")])
    assert ("trust_remote_code" in capsys.readouterr().out) == (not model.config.plain)
    export.main(["--from", str(tmp_path / "out"), "--to-stage", "base", "-g", "back"])
    assert "scripts.chat_cli -i base -g back" in capsys.readouterr().out
    back, same, meta = load_model("base", CPU)
    assert torch.equal(back(ids), model(ids)) and back.config == model.config
    assert same.fingerprint() == tokenizer.fingerprint() and meta["step"] == 0


def test_a_folder_that_the_library_has_saved_is_imported(exported, tokenizer, theirs, base_dir, tmp_path):
    """In several files, with a larger vocabulary than the tokenizer's, in bfloat16."""
    model, library, _ = exported("plain, grouped heads")
    library = copy.deepcopy(library)
    library.resize_token_embeddings(712)
    library.bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    theirs.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    export.main(["--from", str(tmp_path / "shards")])
    back, same, _ = load_model("sft", CPU)
    assert same.fingerprint() == tokenizer.fingerprint() and back.config == model.config
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor[:700], model.state_dict()[name][:700].bfloat16().float()), name


@pytest.mark.parametrize("steps, shown", [(5, "| val bpb | 0.5000 |"), (9, "Not measured.")])
def test_the_card_shows_the_scores_in_the_report_if_they_are_of_this_model(checkpoint, tmp_path, steps, shown):
    checkpoint("plain")
    report.log("SFT", {"stage": "sft", "model tag": "d3", "steps": steps, "scores": {"val bpb": 0.5}})
    export.main(["--to", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# d3, a nanochat (sft)" in card and shown in card


def edit(name, **values):
    """Replaces values in a JSON file of the folder."""

    def change(folder):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))

    return change


def test_an_export_is_measured_like_any_model_of_the_library(exported):
    ours, _, folder = exported("plain")
    model, tokenizer = load_hf_model(str(folder), CPU)
    x = torch.tensor(tokenizer.encode(["Once upon a time"], prepend=tokenizer.get_bos_token_id()))
    assert torch.allclose(model(x, x), ours(x, x, loss_reduction="none"), atol=1e-4)
    with pytest.raises(UserError, match="could not be loaded: .*custom code"):
        load_hf_model(str(exported("full")[2]), CPU)


@pytest.mark.parametrize("change, message", [
    (edit("config.json", model_type="llama"), "config.json cannot be used: its model_type is 'llama'; only 'nanochat'"),
    (edit("config.json", hidden_act="silu"), "config.json cannot be used: its hidden_act is 'silu'; only 'relu2'"),
    (edit("config.json", rope_parameters={"rope_type": "yarn"}), "its rope_type is 'yarn'; only 'default'"),
    (edit("config.json", vocab_size=10), "its model has a vocabulary of 10, its tokenizer of 700"),
    (edit("config.json", num_hidden_layers=4), "is not of a model that this code knows: .*Missing"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be used"),
    (edit("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), "tokenizer.json cannot be used: it is not a byte-level BPE"),
    (edit("tokenizer.json", added_tokens=[]), "tokenizer.json cannot be used: it lacks the special tokens <.assistant_end"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json cannot be used: .*No such file"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"), "model.safetensors cannot be used"),
    (lambda folder: shutil.rmtree(folder), "there is no model in .*: neither config.json nor model_NNNNNN.pt"),
])  # fmt: skip
def test_what_cannot_be_imported_is_refused_in_one_line(exported, base_dir, tmp_path, change, message):
    folder = shutil.copytree(exported("plain")[2], tmp_path / "copy")
    change(folder)
    with pytest.raises(UserError, match=f"{message}[^\n]*$"):
        export.main(["--from", str(folder)])
    assert not list(base_dir.rglob("*.safetensors"))


def test_nothing_is_overwritten_or_mixed_with_what_is_there(checkpoint, exported, tmp_path):
    checkpoint("plain")
    (tmp_path / "mine").write_text("mine")
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            export.main(["--to", str(path)])
    for _ in range(2):  # an import may be repeated
        export.main(["--from", str(exported("plain")[2]), "-g", "d4"])
    with pytest.raises(UserError, match="holds other checkpoints; choose another --model-tag"):
        export.main(["--from", str(exported("plain")[2]), "-g", "d3"])
