"""Checkpoints: exact, verified, complete or absent, for any number of ranks, found by stage, tag and step."""

import dataclasses
import errno
import os
import re
from contextlib import nullcontext

import pytest
import torch
from tiny import BYTES, CPU, tiny_gpt

from nanochat import checkpoint_manager as cm
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError

OPTIMIZER = {"w.exp_avg": torch.arange(3.0), "w.step": torch.tensor(4.0)}


def assert_same(a, b):
    """Same names, dtypes, shapes and values, NaN included."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def some_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "float": torch.randn(5, 7, generator=g),
        "special": torch.tensor([float("nan"), -0.0, float("inf")]),
        "bf16": torch.randn(3, 4, generator=g).bfloat16(),
        "half": torch.randn(3, generator=g).half(),
        "bool": torch.tensor([True, False]),
        "step": torch.tensor(17),  # 0-dim
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 5, generator=g).t(),
    }


def save(directory, step, **kwargs):
    return save_checkpoint(directory, step, some_state(), OPTIMIZER, {}, BYTES, CPU, **kwargs)


def test_round_trip_is_bit_exact_for_every_dtype(tmp_path):
    meta = {"model_config": {"n_layer": 2}, "loader_state": None, "lr": 0.1 + 0.2, "val_bpb": None}
    optimizer = {"a.exp_avg": torch.randn(4).bfloat16(), "a.step": torch.tensor(5)}
    folder = save_checkpoint(tmp_path / "d2", 12, some_state(), optimizer, meta, BYTES, CPU)
    assert names_in(folder) == ["meta.json", "model.safetensors", "optimizer_rank0.safetensors", "vocabulary.json"]
    model_state, loaded = cm.load_checkpoint(tmp_path / "d2", 12, CPU)
    assert_same(model_state, some_state())
    assert_same(cm.load_optimizer(tmp_path / "d2", 12, optimizer, rank=0), optimizer)
    assert loaded["step"] == 12 and loaded["model_tag"] == "d2" and {key: loaded[key] for key in meta} == meta
    save_checkpoint(tmp_path, 2, some_state(), None, {}, BYTES, CPU)
    with pytest.raises(UserError, match="saved without an optimizer state"):
        cm.load_optimizer(tmp_path, 2, OPTIMIZER, rank=0)


DAMAGES = {  # the bytes of a file, and of the same file of another step -> what is left of them
    "bit flipped": lambda data, other: data[:99] + bytes([data[99] ^ 1]) + data[100:],
    "truncated": lambda data, other: data[:-3],
    "of another step": lambda data, other: other,
    "other JSON": lambda data, other: b"[1]",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "optimizer_rank1.safetensors"])
def test_damage_is_named_in_one_line_and_the_previous_step_is_used(tmp_path, run_ranks, capsys, name, kind):
    path, other = (save_on(run_ranks, 2, tmp_path, step) / name for step in (4, 2))
    path.write_bytes(DAMAGES[kind](path.read_bytes(), other.read_bytes()))
    message = f"checkpoint {tmp_path}/step_000004 is damaged: {name}: [^\n]*$"
    with pytest.raises(UserError, match=message):
        cm.verify(tmp_path, 4)
    assert cm.find_last_step(tmp_path) == 2 and "skipping step 4: checkpoint" in capsys.readouterr().out
    usable = name.startswith("optimizer")  # without it the model is complete
    assert cm.find_last_step(tmp_path, cm.MODEL_FILES) == (4 if usable else 2)
    with nullcontext() if usable else pytest.raises(UserError, match=message):
        cm.load_checkpoint(tmp_path, 4, CPU)


WHOLE = {  # the complete state of an optimizer, unsharded
    "emb.exp_avg": torch.arange(35.0).view(7, 5),
    "scalar.exp_avg": torch.arange(2.0) + 300,
    "m0.momentum": torch.arange(12.0).view(3, 4) + 400,
    "m1.momentum": torch.arange(12.0).view(4, 3) + 500,
    "m2.momentum": torch.arange(4.0).view(2, 2) + 600,
}


def shard(rank, world_size, step=1):
    """One rank's shard of WHOLE: an equal range of each tensor for AdamW, if it gets any, and matrices in turn."""
    state = {f"m{i}.momentum": WHOLE[f"m{i}.momentum"] for i in range(rank, 3, world_size)}
    for name in ("emb", "scalar"):
        whole = WHOLE[f"{name}.exp_avg"]
        share = -(-whole.numel() // world_size)
        a, b = rank * share, min((rank + 1) * share, whole.numel())
        if a < b:
            key = f"{name}.exp_avg" + f"[{a}:{b}]" * (world_size > 1)
            state[key] = whole.flatten()[a:b] if world_size > 1 else whole
            state[f"{name}.step"] = torch.tensor(float(step))
    return state


def save_on(run_ranks, world_size, directory, step=1):
    def work(compute):
        return save_checkpoint(directory, step, some_state(step), shard(compute.rank, world_size, step), {}, BYTES, compute)

    return run_ranks(world_size, work)[0]


def load_as(rank, world_size, directory):
    return cm.load_optimizer(directory, 1, {key: torch.zeros_like(value) for key, value in shard(rank, world_size).items()}, rank)


@pytest.mark.parametrize("before", [1, 2, 3])
def test_optimizer_state_is_resharded_exactly(tmp_path, run_ranks, before):
    save_on(run_ranks, before, tmp_path)
    for rank, world_size in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)):
        assert_same(load_as(rank, world_size, tmp_path), shard(rank, world_size))
    for key, shape in (("m3.momentum", (2, 2)), ("emb.exp_avg", (8, 5)), ("emb.exp_avg[30:40]", (10,))):
        with pytest.raises(UserError, match=rf"is of another model: {re.escape(key)} is missing"):
            cm.load_optimizer(tmp_path, 1, {key: torch.zeros(shape)}, rank=0)


def test_only_needed_files_are_read_and_each_is_verified(tmp_path, run_ranks):
    path = save_on(run_ranks, 3, tmp_path) / "optimizer_rank2.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    load_as(0, 3, tmp_path)  # as many ranks as before: its own file has it all
    for rank, world_size in ((2, 3), (0, 1), (1, 2)):
        with pytest.raises(UserError, match="damaged: optimizer_rank2"):
            load_as(rank, world_size, tmp_path)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    (tmp_path / "step_000009" / "meta.json").unlink()  # damaged: the run resumed from step 3
    for name in ("step_notes", "step_0000002"):
        (tmp_path / name).write_text("not a checkpoint")
    for step, clock in ((1, 99), (2, 50), (3, 10)):  # checkpoints are in order of their steps, whatever the clock was
        os.utime(tmp_path / f"step_00000{step}", (clock, clock))
    save(tmp_path, 4, keep_last=2)
    assert names_in(tmp_path) == ["step_0000002", "step_000003", "step_000004", "step_000009", "step_notes"]


def test_a_run_is_moved_to_one_folder_that_a_run_without_checkpoints_does_not_replace(tmp_path):
    directory, old = tmp_path / "d4", tmp_path / "d4.old"
    save(directory, 20)
    save(directory, 10)
    assert cm.set_aside(directory, after=10) == old and cm.list_steps(directory) == [10] and cm.list_steps(old) == [20]
    for step in (10, 30):
        (directory / "metrics.jsonl").touch()
        assert cm.set_aside(directory) == old and names_in(directory) == []
        assert names_in(old) == ["metrics.jsonl", f"step_0000{step}"]
        save(directory, 30)
    cm.set_aside(directory)
    (directory / "metrics.jsonl").touch()
    assert cm.set_aside(directory) is None and cm.list_steps(old) == [30]


def test_the_newest_tag_is_the_default(base_dir):
    with pytest.raises(UserError, match="not a valid folder name"):
        cm.checkpoint_dir("base", "../d4")
    for tag, step in (("d4", 10), ("cut", 5), ("d12", 3), ("d4", 20), ("d8", 1)):
        folder = save(cm.checkpoint_dir("base", tag), step)
    (folder.parent.parent / "cut" / "step_000005" / "meta.json").write_text("{")
    assert cm.find_tags("base") == ["d8", "d4", "d12", "cut"], "one damaged run does not affect the others"
    for arguments, found in (((), ("d8", 1)), (("d4",), ("d4", 20)), (("d4", 10), ("d4", 10))):
        assert cm.resolve_checkpoint("base", *arguments) == (base_dir / "base_checkpoints" / found[0], found[1])


@pytest.mark.parametrize("change, message", [({"n_moons": 3}, "n_moons"), ({"n_embd": 128}, "size mismatch")])
def test_a_config_with_unknown_fields_or_other_weights_is_refused(change, message):
    model = tiny_gpt()
    with pytest.raises(UserError, match=message):
        cm.build_model(model.state_dict(), {**dataclasses.asdict(model.config), **change}, CPU)


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


def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path, run_ranks, monkeypatch):
    write = cm._write_tensors

    def fail(path, state):
        if path.name == "optimizer_rank2.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", "part")
        return write(path, state)

    def work(compute):
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, 2, some_state(), OPTIMIZER, {}, BYTES, compute)

    monkeypatch.setattr(cm, "_write_tensors", fail)
    run_ranks(3, work)
    assert names_in(tmp_path) == []
