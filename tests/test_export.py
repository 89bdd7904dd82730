"""Import of the reference's layout: weights and tokenizer arrive exactly, and nothing in the files is executed."""

import argparse
import dataclasses
import json
import os
import pickle

import pytest
import torch
from tiny import BYTES, CPU, tiny_gpt

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.tokenizer import RustBPETokenizer, tokenizer_dir
from scripts import export


def make_model():
    return tiny_gpt(vocab_size=BYTES.get_vocab_size(), window_pattern="SL")


@pytest.fixture
def folder(tmp_path, base_dir):
    """A model of step 7 in the reference's layout, compiled when it was saved."""
    model = make_model()
    folder = tmp_path / "d2"
    folder.mkdir()
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "model_000007.pt")
    (folder / "meta_000007.json").write_text(json.dumps({"model_config": dataclasses.asdict(model.config), "val_bpb": 1.0}))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(BYTES.encoding))
    return folder


def test_an_imported_model_is_the_same_and_keeps_its_tokenizer(folder, capsys):
    """Training another tokenizer, even of the same size, never makes an existing model unusable."""
    export.main(["--from", str(folder), "--to-stage", "sft"])
    assert "scripts.chat_cli -i sft -g d2" in capsys.readouterr().out
    RustBPETokenizer(BYTES.ranks, ".", BYTES.special_tokens).save(tokenizer_dir())
    model, tokenizer, meta = load_model("sft", CPU)
    tokens = torch.randint(0, 256, (2, 16))
    assert meta["step"] == 7 and torch.equal(model(tokens), make_model()(tokens))
    assert model.config == make_model().config and not model.training
    assert tokenizer.fingerprint() == BYTES.fingerprint()


def test_models_without_the_learned_extras_get_neutral_ones(folder):
    state = torch.load(folder / "model_000007.pt")
    extras = ("resid_lambdas", "x0_lambdas", "smear", "backout", "value_embeds", "ve_gate")
    torch.save({name: tensor for name, tensor in state.items() if not any(extra in name for extra in extras)}, folder / "model_000007.pt")
    export.main(["--from", str(folder), "--to-stage", "base", "--model-tag", "old"])
    model, _, _ = load_model("base", CPU)
    assert model.config.window_pattern == "SL" and model.config.qk_scale == 1.2, "what its config says"
    assert model.resid_lambdas.tolist() == [1.0, 1.0] and model.smear_lambda == 0


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name, data, message", [
    ("tokenizer.pkl", pickle.dumps(Evil()), "refused: no tokenizer needs REDUCE"),
    ("tokenizer.pkl", pickle.dumps(argparse.Namespace()), "refused: it wants to run argparse.Namespace"),
    ("tokenizer.pkl", b"\x80\x04Nr\xff\xff\xff\x7f.", "refused: no tokenizer needs LONG_BINPUT"),  # a memo of 34 GB
    ("tokenizer.pkl", b"\x80\x05\x96\x00\x00\x00\x00\x08\x00\x00\x00.", "expected 34359738368 bytes"),
    ("tokenizer.pkl", b"\x80\x04})" + b"2\x86" * 200 + b"Ns.", "refused: no tokenizer needs DUP"),  # is hashed for ever
    ("tokenizer.pkl", b"no pickle", "tokenizer.pkl cannot be used"),
    ("tokenizer.pkl", pickle.dumps({"mergeable_ranks": {}}), "tokenizer.pkl cannot be used"),
    ("model_000007.pt", pickle.dumps(Evil()), "is damaged, or holds something other than weights"),
    ("meta_000007.json", b"[1]", "is damaged, or holds something other than weights"),
])  # fmt: skip
def test_files_with_code_or_damage_are_refused_in_one_line(folder, tmp_path, monkeypatch, name, data, message):
    monkeypatch.chdir(tmp_path)
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{message}[^\n]*$"):
        export.main(["--from", str(folder)])
    assert not (tmp_path / "executed").exists()


def test_a_missing_step_names_those_that_exist(folder):
    with pytest.raises(UserError, match=r"no model of step 9 .* steps \[7\]"):
        export.main(["--from", str(folder), "--step", "9"])
