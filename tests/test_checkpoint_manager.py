"""Checkpoints: exact, verified, for any number of ranks, found again; in ours and in the reference's layout."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import time

import numpy as np
import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import Compute, UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.saver import save_checkpoint

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


OPTIMIZER = {"w.exp_avg": torch.arange(3.0), "w.step": torch.tensor(4.0)}


def save(directory, step, seed=0, **kwargs):
    return save_checkpoint(directory, step, some_state(seed), OPTIMIZER, {"val_bpb": 1.25}, CPU, **kwargs)


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
    meta = {"model_config": {"n_layer": 2}, "loader_state": None, "lr": 0.1 + 0.2, "val_bpb": None}
    optimizer = {"a.exp_avg": torch.randn(4).bfloat16(), "a.step": torch.tensor(5)}
    folder = save_checkpoint(tmp_path / "d2", 12, some_state(), optimizer, meta, CPU)
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "model.safetensors", "optimizer_rank0.safetensors"
    ]  # fmt: skip
    model_state, optimizer_state, loaded = cm.load_checkpoint(tmp_path / "d2", 12, CPU, optimizer)
    assert_same(model_state, some_state())
    assert_same(optimizer_state, optimizer)
    assert loaded["step"] == 12 and loaded["model_tag"] == "d2" and {key: loaded[key] for key in meta} == meta


def test_optimizer_state_is_read_only_when_asked_for(tmp_path):
    save(tmp_path, 1)
    assert cm.load_checkpoint(tmp_path, 1, CPU)[1] is None
    save_checkpoint(tmp_path, 2, some_state(), None, {}, CPU)
    with pytest.raises(UserError, match="saved without an optimizer state"):
        cm.load_checkpoint(tmp_path, 2, CPU, OPTIMIZER)


def test_rng_state_goes_through_json():
    state = json.loads(json.dumps(cm.rng_state()))
    expected = torch.randn(5)
    torch.randn(100)
    cm.set_rng_state(state)
    assert torch.equal(torch.randn(5), expected)


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
        cm.load_checkpoint(tmp_path, 2, CPU, OPTIMIZER)
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


def test_a_checkpoint_that_is_gone_when_it_is_read_is_passed_over(tmp_path, monkeypatch):
    save(tmp_path, 1)
    steps = cm.list_steps(tmp_path) + [2, 3]
    (tmp_path / "step_000003").mkdir()  # and this one is being deleted
    monkeypatch.setattr(cm, "list_steps", lambda directory: steps)
    assert cm.find_last_step(tmp_path) == 1
    for step in (2, 3):
        with pytest.raises(UserError, match="no checkpoint of step 2|damaged: meta.json"):
            cm.load_checkpoint(tmp_path, step, CPU)


def test_a_file_that_goes_between_verifying_and_reading_is_named(tmp_path, monkeypatch):
    import safetensors.torch

    folder = save(tmp_path, 1)

    def too_late(path, device):
        path.unlink()
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(safetensors.torch, "load_file", too_late)
    with pytest.raises(UserError, match=f"{folder} is damaged: model.safetensors cannot be read"):
        cm.load_checkpoint(tmp_path, 1, CPU)


# -----------------------------------------------------------------------------
# Another number of ranks

WHOLE = {  # the state of an optimizer, as nobody would save it: every tensor in one piece
    "emb.exp_avg": np.arange(35, dtype=np.float32).reshape(7, 5),
    "emb.exp_avg_sq": np.arange(35, dtype=np.float32).reshape(7, 5) + 100,
    "head.exp_avg": np.arange(13, dtype=np.float32) + 200,
    "head.exp_avg_sq": np.arange(13, dtype=np.float32) + 300,
    "m0.momentum": np.arange(12, dtype=np.float32).reshape(3, 4) + 400,
    "m1.momentum": np.arange(12, dtype=np.float32).reshape(4, 3) + 500,
    "m2.momentum": np.arange(4, dtype=np.float32).reshape(2, 2) + 600,
}


def shard(rank, world_size):
    """What one rank has of WHOLE: of emb and head, laid end to end, an equal share; of the matrices every so manieth."""
    state = {f"m{i}.momentum": WHOLE[f"m{i}.momentum"] for i in range(rank, 3, world_size)}
    share = -(-48 // world_size)
    for name, offset, size in (("emb", 0, 35), ("head", 35, 13)):
        a, b = (min(max(end - offset, 0), size) for end in (rank * share, (rank + 1) * share))
        for what in ("exp_avg", "exp_avg_sq"):
            if (a, b) == (0, size):
                state[f"{name}.{what}"] = WHOLE[f"{name}.{what}"]
            elif a < b:
                state[f"{name}.{what}[{a}:{b}]"] = WHOLE[f"{name}.{what}"].flatten()[a:b]
        if a < b:
            state[f"{name}.step"] = np.float32(9)
    return {key: torch.tensor(value) for key, value in state.items()}


def save_on(run_ranks, world_size, directory, step=1):
    def work(compute):
        return save_checkpoint(directory, step, some_state(), shard(compute.rank, world_size), {}, compute)

    return run_ranks(world_size, work)[0]


def blank(state):
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


def load_as(rank, world_size, directory, step=1):
    compute = dataclasses.replace(CPU, rank=rank, world_size=world_size)
    return cm.load_checkpoint(directory, step, compute, blank(shard(rank, world_size)))[1]


@pytest.mark.parametrize("then", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_every_rank_gets_exactly_its_part_whatever_number_of_ranks_saved(tmp_path, run_ranks, before, then):
    save_on(run_ranks, before, tmp_path)
    for rank in range(then):
        assert_same(load_as(rank, then, tmp_path), shard(rank, then))


def test_only_files_with_something_wanted_are_read_and_all_of_those_are_verified(tmp_path, run_ranks):
    folder = save_on(run_ranks, 3, tmp_path)
    flip_bit(folder / "optimizer_rank2.safetensors")
    load_as(0, 3, tmp_path)  # as many ranks as before: its own file has it all
    needed = {"emb.exp_avg[4:30]": torch.zeros(26)}  # of the first two ranks
    found = cm.load_checkpoint(tmp_path, 1, CPU, needed)[1]["emb.exp_avg[4:30]"]
    assert found.tolist() == list(range(4, 30))
    for rank, world_size in ((2, 3), (0, 1), (1, 2)):
        with pytest.raises(UserError, match="damaged: .*optimizer_rank2"):
            load_as(rank, world_size, tmp_path)
    with pytest.raises(UserError, match="damaged: .*optimizer_rank2"):
        cm.verify(tmp_path, 1)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_list_of_what_is_in_a_file_is_not_taken_for_another_model(tmp_path, run_ranks, kind):
    path = save_on(run_ranks, 2, tmp_path) / "optimizer_rank1.safetensors"
    if kind == "flip":
        data = path.read_bytes()
        assert data.count(b"m1.momentum") == 1
        path.write_bytes(data.replace(b"m1.momentum", b"m1.mumentum"))
    else:
        DAMAGE[kind](path)
    with pytest.raises(UserError, match="damaged: .*optimizer_rank1"):
        cm.load_checkpoint(tmp_path, 1, CPU, {"m1.momentum": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    "key, shape",
    [("m3.momentum", (2, 2)), ("m0.momentum", (4, 3)), ("emb.exp_avg", (8, 5)), ("emb.exp_avg[30:40]", (10,))],
)
def test_the_optimizer_state_of_another_model_is_refused_by_name(tmp_path, run_ranks, key, shape):
    save_on(run_ranks, 2, tmp_path)
    with pytest.raises(UserError, match=rf"is of another model: {re.escape(key)} is not there"):
        cm.load_checkpoint(tmp_path, 1, CPU, {key: torch.zeros(shape)})


# -----------------------------------------------------------------------------
# Finding


def test_last_is_what_was_saved_last_even_if_an_older_run_went_further(tmp_path):
    save(tmp_path, 500)
    save(tmp_path, 20)
    assert cm.list_steps(tmp_path) == [20, 500]
    assert cm.find_last_step(tmp_path) == 20


def test_what_was_saved_before_a_moment_can_be_left_out(tmp_path):
    save(tmp_path, 10)
    moment = time.time()
    with pytest.raises(UserError, match="no whole checkpoint"):
        cm.find_last_step(tmp_path, since=moment)
    truncate(save(tmp_path, 3) / "model.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint"):
        cm.find_last_step(tmp_path, since=moment)
    save(tmp_path, 2)
    assert cm.find_last_step(tmp_path, since=moment) == 2


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
    save_checkpoint(cm.checkpoint_dir("mid", "d2"), 5, model.state_dict(), None, meta, CPU)
    loaded, _, meta = cm.load_model("mid", CPU)
    assert loaded.config == config and not loaded.training and meta["step"] == 5
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    assert torch.equal(loaded(tokens), model(tokens))


def test_a_tokenizer_that_is_not_the_models_own_is_refused(base_dir):
    train_tokenizer(270)
    meta = {"model_config": dataclasses.asdict(TINY)}
    save_checkpoint(cm.checkpoint_dir("base", "d2"), 5, make_model().state_dict(), None, meta, CPU)
    with pytest.raises(UserError, match=r"another tokenizer \(70 tokens\) than the one here now \(270 tokens\)"):
        cm.load_model("base", CPU)


def test_nor_is_one_of_the_same_size(base_dir):
    tokenizer = train_tokenizer(270)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.get_vocab_size())
    meta = {"model_config": dataclasses.asdict(config), "tokenizer": tokenizer.fingerprint()}
    save_checkpoint(cm.checkpoint_dir("base", "d2"), 5, make_model(config).state_dict(), None, meta, CPU)
    cm.load_model("base", CPU)
    meta["tokenizer"] = "of other merges"
    save_checkpoint(cm.checkpoint_dir("base", "d2"), 6, make_model(config).state_dict(), None, meta, CPU)
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
        cm.load_checkpoint(tmp_path, 7, CPU, OPTIMIZER)


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
