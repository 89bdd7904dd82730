"""Checkpoints: whole or absent, exact, verified, found again; in ours and in the reference's layout."""

import dataclasses
import errno
import json
import os
import pickle
import resource
import shutil

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import Compute, UserError
from nanochat.gpt import GPT, GPTConfig

CPU = Compute(torch.device("cpu"), torch.float32)
TINY = GPTConfig(sequence_len=16, vocab_size=70, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, window_pattern="SL")


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(a, b):
    """Same names, dtypes, shapes and bits (NaN and -0.0 included)."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(bits(a[name]), bits(b[name])), name


def some_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    state = {
        "float": torch.randn(5, 7, generator=g),
        "bf16": torch.randn(3, 4, generator=g).bfloat16(),
        "half": torch.randn(3, generator=g).half(),
        "int": torch.randint(-9, 9, (4,), generator=g),
        "int32": torch.tensor([1, 2], dtype=torch.int32),
        "bool": torch.tensor([True, False]),
        "step": torch.tensor(17.0),  # 0-dim
        "steps": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 5, generator=g).t(),
    }
    state["float"][0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    return state


def save(directory, step, seed=0, **kwargs):
    optimizer = {"w.exp_avg": torch.full((3,), float(seed)), "w.step": torch.tensor(4.0)}
    return cm.save_checkpoint(directory, step, some_state(seed), optimizer, {"val_bpb": 1.25}, CPU, **kwargs)


def make_model(config=TINY, seed=0):
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.init_weights(torch.float32)
    for parameter in model.parameters():  # nothing left at zero, so that every weight matters
        torch.nn.init.normal_(parameter, std=0.2)
    return model


# -----------------------------------------------------------------------------
# Round trip


def test_round_trip_is_bit_exact_for_every_dtype(tmp_path):
    meta = {"model_config": {"n_layer": 2}, "loader_state": {"shard": 3, "rows": [1]}, "lr": 0.1 + 0.2, "val_bpb": None}
    optimizer = {"a.exp_avg": torch.randn(4).bfloat16(), "a.step": torch.tensor(5)}
    folder = cm.save_checkpoint(tmp_path / "d2", 12, some_state(), optimizer, meta, CPU)
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "model.safetensors", "optimizer_rank0.safetensors"
    ]  # fmt: skip
    model_state, optimizer_state, loaded = cm.load_checkpoint(tmp_path / "d2", 12, CPU, load_optimizer=True)
    assert_same(model_state, some_state())
    assert_same(optimizer_state, optimizer)
    assert loaded["step"] == 12 and loaded["model_tag"] == "d2" and {key: loaded[key] for key in meta} == meta


def test_optimizer_state_is_read_only_when_asked_for(tmp_path):
    save(tmp_path, 1)
    assert cm.load_checkpoint(tmp_path, 1, CPU)[1] is None
    cm.save_checkpoint(tmp_path, 2, some_state(), None, {}, CPU)
    with pytest.raises(UserError, match="saved without optimizer_rank0"):
        cm.load_checkpoint(tmp_path, 2, CPU, load_optimizer=True)


def test_a_checkpoint_of_another_number_of_ranks_is_not_resumed_in_part(tmp_path):
    save(tmp_path, 1)
    two = dataclasses.replace(CPU, world_size=2)
    cm.load_checkpoint(tmp_path, 1, two)  # weights alone are for anyone
    with pytest.raises(UserError, match=r"saved by 1 rank\(s\)"):
        cm.load_checkpoint(tmp_path, 1, two, load_optimizer=True)


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, seed=0)
    save(tmp_path, 3, seed=1)
    assert_same(cm.load_checkpoint(tmp_path, 3, CPU)[0], some_state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_keep_last_keeps_what_was_saved_last(tmp_path):
    save(tmp_path, 900)  # of an earlier, longer run under the same tag
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=2)
    assert cm.list_steps(tmp_path) == [2, 3]


def test_rng_state_goes_through_json():
    state = json.loads(json.dumps(cm.rng_state()))
    expected = torch.randn(5)
    torch.randn(100)
    cm.set_rng_state(state)
    assert torch.equal(torch.randn(5), expected)


# -----------------------------------------------------------------------------
# Complete or absent


@pytest.mark.parametrize("moment", ["_write_tensors", "_write_meta", "_publish", "_flush"])
def test_a_crash_at_any_moment_leaves_the_checkpoints_before_it(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)
    real = getattr(cm, moment)

    def crash(*args):
        if moment != "_publish":
            real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(cm, moment, crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert cm.find_last_step(tmp_path) == 1


def test_what_a_killed_process_left_is_never_seen_and_is_cleared_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / ".step_000002.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of one")
    assert cm.list_steps(tmp_path) == [1] and cm.find_last_step(tmp_path) == 1
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_a_file_that_outgrows_its_limit_is_an_oserror_and_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            cm.save_checkpoint(tmp_path, 2, {"w": torch.zeros(100_000)}, None, {}, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG and "model.safetensors" in raised.value.filename
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_full_disk_keeps_its_errno(tmp_path, monkeypatch):
    import safetensors.torch

    def full(state, path):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError) as raised:
        save(tmp_path / "d2", 2)
    assert raised.value.errno == errno.ENOSPC
    assert list((tmp_path / "d2").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_folder_that_may_not_be_written(tmp_path):
    save(tmp_path, 1)
    tmp_path.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # root may write anywhere, so be nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            save(tmp_path, 2)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)
    assert cm.list_steps(tmp_path) == [1]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    def flip(path):
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(cm, "_flush", flip)
    with pytest.raises(OSError, match="reads back changed"):
        save(tmp_path, 1)
    assert cm.list_steps(tmp_path) == []


# -----------------------------------------------------------------------------
# Damage


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE = {
    "flip": flip_bit,
    "truncate": truncate,
    "delete": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer_rank0.safetensors", "meta.json"])
def test_damage_is_named_in_one_line_and_the_one_before_is_used(tmp_path, capsys, name, kind):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    DAMAGE[kind](folder / name)
    with pytest.raises(UserError) as raised:
        cm.load_checkpoint(tmp_path, 2, CPU, load_optimizer=True)
    message = str(raised.value)
    assert "damaged" in message and name in message and str(folder) in message and "\n" not in message
    assert cm.find_last_step(tmp_path) == 1
    assert "passing over step 2" in capsys.readouterr().out
    assert cm.find_last_step(tmp_path, weights_only=True) == (2 if name.startswith("optimizer") else 1)


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
def test_files_or_folders_of_another_step_are_noticed(tmp_path, name):
    save(tmp_path, 1, seed=1)
    save(tmp_path, 2, seed=2)
    shutil.copy(tmp_path / "step_000001" / name, tmp_path / "step_000002" / name)
    with pytest.raises(UserError, match="damaged"):
        cm.load_checkpoint(tmp_path, 2, CPU)


def test_a_renamed_checkpoint_is_noticed(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step_000005")
    with pytest.raises(UserError, match="saved as step 1"):
        cm.load_checkpoint(tmp_path, 5, CPU)


def test_an_edited_number_in_meta_is_noticed(tmp_path):
    path = save(tmp_path, 1) / "meta.json"
    path.write_text(path.read_text().replace("1.25", "1.20"))
    with pytest.raises(UserError, match="meta.json is not as it was saved"):
        cm.load_checkpoint(tmp_path, 1, CPU)


def test_when_all_are_damaged_it_says_so(tmp_path):
    truncate(save(tmp_path, 1) / "model.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint"):
        cm.find_last_step(tmp_path)


# -----------------------------------------------------------------------------
# Finding


def test_last_is_what_was_saved_last_even_if_an_older_run_went_further(tmp_path):
    save(tmp_path, 500)
    save(tmp_path, 20)
    assert cm.list_steps(tmp_path) == [20, 500]
    assert cm.find_last_step(tmp_path) == 20


def test_the_tag_saved_last_is_taken_by_default(base_dir):
    for tag, step in (("d4", 10), ("d12", 3), ("d4", 20), ("d8", 1)):
        save(cm.checkpoint_dir("base", tag), step)
    assert cm.find_tags("base") == ["d8", "d4", "d12"]
    assert cm.resolve_checkpoint("base") == (base_dir / "base_checkpoints" / "d8", 1)
    assert cm.resolve_checkpoint("base", "d4") == (base_dir / "base_checkpoints" / "d4", 20)
    assert cm.resolve_checkpoint("base", "d4", 10) == (base_dir / "base_checkpoints" / "d4", 10)


def test_mistakes_are_answered_with_what_there_is(base_dir):
    with pytest.raises(UserError, match=r"no sft checkpoint in .*chatsft_checkpoints yet; run `.*scripts.chat_sft`"):
        cm.load_model("sft", CPU)
    save(cm.checkpoint_dir("base", "d4"), 10)
    with pytest.raises(UserError, match="tagged 'd5'; there are d4"):
        cm.load_model("base", CPU, model_tag="d5")
    with pytest.raises(UserError, match=r"no checkpoint of step 11 .* there are steps \[10\]"):
        cm.load_model("base", CPU, step=11)
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        cm.checkpoint_dir("base", "../d4")


# -----------------------------------------------------------------------------
# Models


def train_tokenizer(vocab_size):
    from nanochat.common import get_base_dir
    from nanochat.tokenizer import RustBPETokenizer

    tokenizer = RustBPETokenizer.train_from_iterator(["the cat sat on the mat " * 9], vocab_size)
    tokenizer.save(get_base_dir() / "tokenizer")
    return tokenizer


def test_load_model_gives_the_saved_model_in_eval_mode(base_dir):
    tokenizer = train_tokenizer(270)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.get_vocab_size())
    model = make_model(config)
    meta = {"model_config": dataclasses.asdict(config)}
    cm.save_checkpoint(cm.checkpoint_dir("mid", "d2"), 5, model.state_dict(), None, meta, CPU)
    loaded, _, meta = cm.load_model("mid", CPU)
    assert loaded.config == config and not loaded.training and meta["step"] == 5
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    assert torch.equal(loaded(tokens), model(tokens))


def test_a_tokenizer_that_is_not_the_models_own_is_refused(base_dir):
    train_tokenizer(270)
    meta = {"model_config": dataclasses.asdict(TINY)}
    cm.save_checkpoint(cm.checkpoint_dir("base", "d2"), 5, make_model().state_dict(), None, meta, CPU)
    with pytest.raises(UserError, match=r"another tokenizer \(70 tokens\) than the one here now \(270 tokens\)"):
        cm.load_model("base", CPU)


def test_nor_is_one_of_the_same_size(base_dir):
    tokenizer = train_tokenizer(270)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.get_vocab_size())
    meta = {"model_config": dataclasses.asdict(config), "tokenizer": tokenizer.fingerprint()}
    cm.save_checkpoint(cm.checkpoint_dir("base", "d2"), 5, make_model(config).state_dict(), None, meta, CPU)
    cm.load_model("base", CPU)
    meta["tokenizer"] = "of other merges"
    cm.save_checkpoint(cm.checkpoint_dir("base", "d2"), 6, make_model(config).state_dict(), None, meta, CPU)
    with pytest.raises(UserError, match="another tokenizer"):
        cm.load_model("base", CPU)


def test_weights_or_config_that_do_not_fit_are_a_users_error():
    state, config = make_model().state_dict(), dataclasses.asdict(TINY)
    with pytest.raises(UserError, match="do not fit"):
        cm.build_model(state, {**config, "n_layer": 3}, CPU)
    with pytest.raises(UserError, match="'flux'.* update the code"):
        cm.build_model(state, {**config, "flux": 1}, CPU)


# -----------------------------------------------------------------------------
# The reference's layout


def save_reference(directory, step, state, config):
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state, directory / f"model_{step:06d}.pt")
    (directory / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}))


def test_the_references_layout_loads_with_its_compile_prefix(tmp_path):
    model = make_model()
    save_reference(tmp_path, 7, {"_orig_mod." + k: v for k, v in model.state_dict().items()}, dataclasses.asdict(TINY))
    assert cm.list_steps(tmp_path) == [7] and cm.find_last_step(tmp_path) == 7
    state, optimizer, meta = cm.load_checkpoint(tmp_path, 7, CPU)
    assert_same(state, dict(model.state_dict()))
    assert optimizer is None and meta["model_config"] == dataclasses.asdict(TINY)
    with pytest.raises(UserError, match="weights only"):
        cm.load_checkpoint(tmp_path, 7, CPU, load_optimizer=True)


def test_an_old_model_without_the_learnt_extras_computes_what_it_did(tmp_path):
    """Extras missing from the file behave as if they were not there: checked against a model where they are neutral."""
    config = dataclasses.replace(TINY, window_pattern="L", rotary_base=10000.0, qk_scale=1.0)
    model = make_model(config)
    extras = ("resid_lambdas", "x0_lambdas", "smear", "backout", "value_embeds")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(extras) or "ve_gate" in name:
                parameter.fill_(1.0 if name == "resid_lambdas" else 0.0)
    old_state = {k: v for k, v in model.state_dict().items() if not k.startswith(extras) and "ve_gate" not in k}
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    save_reference(tmp_path, 7, old_state, {name: getattr(TINY, name) for name in names})
    state, _, meta = cm.load_checkpoint(tmp_path, 7, CPU)
    loaded = cm.build_model(state, meta["model_config"], CPU)
    assert loaded.config == config
    tokens = torch.randint(0, 70, (2, 16))
    assert torch.equal(loaded(tokens), model(tokens))


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", ["torch.save", "pickle"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, writer):
    trap = tmp_path / "trap"
    save_reference(tmp_path, 7, {}, dataclasses.asdict(TINY))
    if writer == "pickle":
        (tmp_path / "model_000007.pt").write_bytes(pickle.dumps({"w": Hostile(trap)}, protocol=2))
    else:
        torch.save({"w": Hostile(trap)}, tmp_path / "model_000007.pt")
    with pytest.raises(UserError, match="refused"):
        cm.load_checkpoint(tmp_path, 7, CPU)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["model_000007.pt", "meta_000007.json"])
@pytest.mark.parametrize("kind", ["truncate", "empty"])
def test_a_damaged_file_of_the_reference_is_a_users_error(tmp_path, name, kind):
    save_reference(tmp_path, 7, make_model().state_dict(), dataclasses.asdict(TINY))
    DAMAGE[kind](tmp_path / name)
    with pytest.raises(UserError, match="damaged"):
        cm.load_checkpoint(tmp_path, 7, CPU)
