"""Checkpoints: exact, verified, complete or absent, for any number of ranks, found by stage, tag and step."""

import dataclasses
import errno
import json
import random
import re
import shutil
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from tiny import tiny_gpt

from nanochat import checkpoint_manager as cm
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import Compute, UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer, tokenizer_dir

SPECIAL = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
BYTES = RustBPETokenizer({bytes([i]): i for i in range(256)}, SPLIT_PATTERN, SPECIAL)  # every byte is a token
CPU = Compute(torch.device("cpu"), torch.float32)


def assert_same(a, b):
    """Same names, dtypes, shapes and bits (NaN and -0.0 included)."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a[name], b[name]))
        assert torch.equal(one, other), name


def some_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    state = {
        "float": torch.randn(5, 7, generator=g),
        "bf16": torch.randn(3, 4, generator=g).bfloat16(),
        "half": torch.randn(3, generator=g).half(),
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


def save(directory, step, **kwargs):
    return save_checkpoint(directory, step, some_state(), OPTIMIZER, {}, BYTES, CPU, **kwargs)


# -----------------------------------------------------------------------------
# Round trip


def test_round_trip_is_bit_exact_for_every_dtype(tmp_path):
    meta = {"model_config": {"n_layer": 2}, "loader_state": None, "lr": 0.1 + 0.2, "val_bpb": None}
    optimizer = {"a.exp_avg": torch.randn(4).bfloat16(), "a.step": torch.tensor(5)}
    folder = save_checkpoint(tmp_path / "d2", 12, some_state(), optimizer, meta, BYTES, CPU)
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "model.safetensors", "optimizer_rank0.safetensors", "vocabulary.json"
    ]  # fmt: skip
    model_state, loaded = cm.load_checkpoint(tmp_path / "d2", 12, CPU)
    assert_same(model_state, some_state())
    assert_same(cm.load_optimizer(tmp_path / "d2", 12, optimizer, rank=0), optimizer)
    assert loaded["step"] == 12 and loaded["model_tag"] == "d2" and {key: loaded[key] for key in meta} == meta
    save_checkpoint(tmp_path, 2, some_state(), None, {}, BYTES, CPU)
    with pytest.raises(UserError, match="saved without an optimizer state"):
        cm.load_optimizer(tmp_path, 2, OPTIMIZER, rank=0)


# -----------------------------------------------------------------------------
# Damage


def damage(path, other, rng):
    """Change the file in one of seven ways; `other` is the same file of another step. Returns which."""
    data = path.read_bytes()
    start = rng.randrange(len(data))
    end = rng.randrange(start, len(data)) + 1
    changes = {
        "flip": data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :],
        "truncate": data[:start],
        "remove": data[:start] + data[end:],
        "zero": data[:start] + bytes(end - start) + data[end:],
        "append": data + b"x",
        "of another step": other.read_bytes(),
        "delete": None,
    }
    kind = rng.choice([kind for kind, changed in changes.items() if changed != data])
    path.unlink()
    if changes[kind] is not None:
        path.write_bytes(changes[kind])
    return kind


@pytest.mark.parametrize("rounds", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_damage_is_named_in_one_line_and_the_previous_step_is_used(tmp_path, run_ranks, capsys, rounds):
    rng, original = random.Random(rounds), tmp_path / "original"
    for step in (2, 4):
        save_on(run_ranks, 2, original, step)
    for number in range(rounds):
        copy = shutil.copytree(original, tmp_path / f"copy{number}")
        path = rng.choice(sorted((copy / "step_000004").iterdir()))
        saved = path.read_bytes()
        kind = damage(path, copy / "step_000002" / path.name, rng)
        if path.name == "meta.json" and kind != "delete":
            with suppress(ValueError):
                if json.loads(path.read_bytes()) == json.loads(saved):
                    continue  # only white space changed
        named = "saved as step 2" if (path.name, kind) == ("meta.json", "of another step") else path.name
        message = f"checkpoint {copy}/step_000004 is damaged: [^\n]*{named}[^\n]*$"
        with pytest.raises(UserError, match=message):
            cm.verify(copy, 4)
        weights_only = path.name not in ("meta.json", "model.safetensors")  # are not damaged
        assert cm.find_last_step(copy) == 2 and "skipping step 4: checkpoint" in capsys.readouterr().out
        assert cm.find_last_step(copy, weights_only=True) == (4 if weights_only else 2)
        with nullcontext() if weights_only else pytest.raises(UserError, match=message):
            cm.load_checkpoint(copy, 4, CPU)
        shutil.rmtree(copy)


# -----------------------------------------------------------------------------
# Another number of ranks

WHOLE = {  # the complete state of an optimizer, unsharded
    "emb.exp_avg": np.arange(35, dtype=np.float32).reshape(7, 5),
    "emb.exp_avg_sq": np.arange(35, dtype=np.float32).reshape(7, 5) + 100,
    "head.exp_avg": np.arange(13, dtype=np.float32) + 200,
    "head.exp_avg_sq": np.arange(13, dtype=np.float32) + 300,
    "m0.momentum": np.arange(12, dtype=np.float32).reshape(3, 4) + 400,
    "m1.momentum": np.arange(12, dtype=np.float32).reshape(4, 3) + 500,
    "m2.momentum": np.arange(4, dtype=np.float32).reshape(2, 2) + 600,
}


def shard(rank, world_size, step=1):
    """One rank's shard of WHOLE: an equal range of emb and head, concatenated, and whole matrices in turn."""
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
            state[f"{name}.step"] = np.float32(step)
    return {key: torch.tensor(value) for key, value in state.items()}


def save_on(run_ranks, world_size, directory, step=1):
    def work(compute):
        return save_checkpoint(directory, step, some_state(step), shard(compute.rank, world_size, step), {}, BYTES, compute)

    return run_ranks(world_size, work)[0]


def load_as(rank, world_size, directory):
    return cm.load_optimizer(directory, 1, {key: torch.zeros_like(value) for key, value in shard(rank, world_size).items()}, rank)


@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_optimizer_state_is_resharded_exactly(tmp_path, run_ranks, before, then):
    save_on(run_ranks, before, tmp_path)
    for rank in range(then):
        assert_same(load_as(rank, then, tmp_path), shard(rank, then))


def test_only_needed_files_are_read_and_each_is_verified(tmp_path, run_ranks):
    path = save_on(run_ranks, 3, tmp_path) / "optimizer_rank2.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    load_as(0, 3, tmp_path)  # as many ranks as before: its own file has it all
    needed = {"emb.exp_avg[4:30]": torch.zeros(26)}  # of the first two ranks
    assert cm.load_optimizer(tmp_path, 1, needed, rank=0)["emb.exp_avg[4:30]"].tolist() == list(range(4, 30))
    for rank, world_size in ((2, 3), (0, 1), (1, 2)):
        with pytest.raises(UserError, match="damaged: optimizer_rank2"):
            load_as(rank, world_size, tmp_path)


@pytest.mark.parametrize(
    "key, shape",
    [("m3.momentum", (2, 2)), ("m0.momentum", (4, 3)), ("emb.exp_avg", (8, 5)), ("emb.exp_avg[30:40]", (10,))],
)
def test_the_optimizer_state_of_another_model_is_refused_by_name(tmp_path, run_ranks, key, shape):
    save_on(run_ranks, 2, tmp_path)
    with pytest.raises(UserError, match=rf"is of another model: {re.escape(key)} is missing"):
        cm.load_optimizer(tmp_path, 1, {key: torch.zeros(shape)}, rank=0)


# -----------------------------------------------------------------------------
# Finding


def test_keep_last_counts_complete_checkpoints_only(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / "step_000005" / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "step_000004" / "meta.json").unlink()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    save(tmp_path, 6, keep_last=2)
    assert names_in(tmp_path) == ["notes.txt", "step_000003", "step_000004", "step_000005", "step_000006"]


def test_the_newest_tag_is_the_default(base_dir):
    with pytest.raises(UserError, match="not a valid folder name"):
        cm.checkpoint_dir("base", "../d4")
    for tag, step in (("d4", 10), ("cut", 5), ("d12", 3), ("d4", 20), ("d8", 1)):
        folder = save(cm.checkpoint_dir("base", tag), step)
    (folder.parent.parent / "cut" / "step_000005" / "meta.json").write_text("{")
    assert cm.find_tags("base") == ["d8", "d4", "d12", "cut"], "one damaged run does not affect the others"
    for arguments, found in (((), ("d8", 1)), (("d4",), ("d4", 20)), (("d4", 10), ("d4", 10))):
        assert cm.resolve_checkpoint("base", *arguments) == (base_dir / "base_checkpoints" / found[0], found[1])


# -----------------------------------------------------------------------------
# Models


def test_a_model_is_loaded_with_its_own_tokenizer(base_dir):
    """Training another tokenizer, even of the same size, never makes an existing model unusable."""
    tokenizer = RustBPETokenizer.train_from_iterator(["the cat sat on the mat " * 9], 270)
    model = tiny_gpt(vocab_size=tokenizer.get_vocab_size())
    meta = {"model_config": dataclasses.asdict(model.config), "tokenizer": tokenizer.fingerprint()}
    save_checkpoint(cm.checkpoint_dir("mid", "d2"), 5, model.state_dict(), None, meta, tokenizer, CPU)
    RustBPETokenizer.train_from_iterator(["quite another text " * 9], 270).save(tokenizer_dir())
    loaded, own, meta = cm.load_model("mid", CPU)
    assert loaded.config == model.config and not loaded.training and meta["step"] == 5
    assert own.fingerprint() == tokenizer.fingerprint()
    tokens = torch.randint(0, model.config.vocab_size, (2, 16))
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("change, message", [({"n_moons": 3}, "n_moons"), ({"n_embd": 128}, "do not fit")])
def test_a_config_with_unknown_fields_or_other_weights_is_refused(change, message):
    model = tiny_gpt()
    with pytest.raises(UserError, match=message):
        cm.build_model(model.state_dict(), {**dataclasses.asdict(model.config), **change}, CPU)


# -----------------------------------------------------------------------------
# Complete or absent


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("moment", ["_write_tensors", "_write_meta", "_hidden", "flush_to_disk"])
def test_a_failure_at_any_moment_leaves_earlier_checkpoints(tmp_path, monkeypatch, moment):
    with pytest.raises(UserError, match="no complete checkpoint"):
        cm.find_last_step(tmp_path)
    save(tmp_path, 1)
    real = getattr(cm, moment)

    def fail(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cm, moment, fail)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert [name for name in names_in(tmp_path) if not name.startswith(".")] == ["step_000001"]
    assert cm.find_last_step(tmp_path) == 1
    save(tmp_path, 3)
    assert names_in(tmp_path) == ["step_000001", "step_000003"], "leftovers are removed by the next save"


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "part"), RuntimeError("unexpected")])
def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path, run_ranks, monkeypatch, failing, error):
    write = cm._write_tensors

    def fail(path, state):
        if path.name == f"optimizer_rank{failing}.safetensors":
            raise error
        return write(path, state)

    def work(compute):
        with pytest.raises((OSError, RuntimeError)) as raised:
            save_checkpoint(tmp_path, 2, some_state(), OPTIMIZER, {}, BYTES, compute)
        return raised.value

    monkeypatch.setattr(cm, "_write_tensors", fail)
    raised = run_ranks(3, work)
    assert raised.pop(failing) is error and names_in(tmp_path) == []
    for other in raised:
        assert f"on rank {failing}: " in str(other) and other.errno == getattr(error, "errno", errno.EIO)
