"""Checkpoints: saved whole or not at all, verified when loaded, found again by stage, tag and step.

The one idea to know: a checkpoint is a folder, and its meta.json lists every other file with
size and SHA-256 (and carries a checksum of itself). All is written into a hidden folder beside,
flushed, read back, and published by one rename; so a folder that bears a step's name is
complete, and whatever has happened to it since is noticed before a number of it is used.

    BASE_DIR/base_checkpoints/d20/step_005000/model.safetensors
                                              optimizer_rank0.safetensors ...
                                              meta.json

Nothing here executes what it reads: safetensors and JSON are data, and the reference's own
layout (`model_005000.pt`, `meta_005000.json`) goes through torch's weights-only reader.
Resharding an optimizer for another number of ranks is not done here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import torch

from nanochat.common import Compute, UserError, base_dir_path, print0

STAGES = {  # stage -> (folder, the script that makes it)
    "base": ("base_checkpoints", "base_train"),
    "mid": ("mid_checkpoints", "mid_train"),
    "sft": ("chatsft_checkpoints", "chat_sft"),
    "rl": ("chatrl_checkpoints", "chat_rl"),
}
State = dict[str, torch.Tensor]


def checkpoint_dir(stage: str, tag: str) -> Path:
    """The folder that holds the checkpoints of one run of a stage ("base", "mid", "sft" or "rl")."""
    if Path(tag).name != tag:
        raise UserError(f"model tag {tag!r} cannot be the name of a folder")
    return base_dir_path() / STAGES[stage][0] / tag


def step_folder(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


# -----------------------------------------------------------------------------
# Saving


def save_checkpoint(
    directory: Path,
    step: int,
    model_state: State,
    optimizer_state: State | None,
    meta: dict,
    compute: Compute,
    keep_last: int | None = None,
) -> Path:
    """Write one checkpoint and return its folder. Every rank calls this, each with its optimizer shard.

    `meta` is what JSON can hold; step, time, world size and the list of files are added to it.
    `keep_last` removes all but that many of the checkpoints saved last. Raises OSError when the
    disk is full or may not be written; then nothing is left behind and older checkpoints stand.
    """
    target = step_folder(directory, step)
    aside = directory / f".{target.name}.partial"
    if compute.is_main:
        for leftover in directory.glob(".step_*"):  # of a process that died while saving
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    compute.barrier()
    try:
        if optimizer_state is not None:
            _write_tensors(aside / f"optimizer_rank{compute.rank}.safetensors", optimizer_state)
        compute.barrier()
        if compute.is_main:
            _write_tensors(aside / "model.safetensors", model_state)
            _write_meta(aside, {**meta, "step": step, "saved_at": time.time(), "world_size": compute.world_size})
            _publish(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if compute.is_main and keep_last is not None:
        for old in _newest_first(directory)[max(keep_last, 1) :]:
            if step_folder(directory, old).is_dir():
                _remove(step_folder(directory, old))
    compute.barrier()
    return target


def _write_tensors(path: Path, state: State) -> None:
    """Write a safetensors file, flush it to the disk, and compare what can be read back, bit for bit."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        save_file(state, path)
    except SafetensorError as error:  # it hides the system's own error in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    _flush(path)
    with open(path, "rb") as file:  # 8 bytes: the length of a JSON header; the header; all tensors' bytes
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data_start = file.tell()
        for name, tensor in state.items():
            start, end = header[name]["data_offsets"]
            file.seek(data_start + start)
            # As bytes, because NaN differs from itself; read, not mapped, to hold one tensor at a time.
            if file.read(end - start) != tensor.reshape(-1).view(torch.uint8).numpy().tobytes():
                raise OSError(f"{path}: tensor {name} reads back changed; this disk cannot be trusted")


def _write_meta(folder: Path, meta: dict) -> None:
    files = sorted(folder.iterdir())
    meta["files"] = {path.name: {"size": path.stat().st_size, "sha256": _digest(path)} for path in files}
    meta["sha256"] = _meta_digest(meta)
    path = folder / "meta.json"
    path.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    _flush(path)


def _publish(aside: Path, target: Path) -> None:
    _flush(aside)
    if target.exists():  # an earlier run with this tag saved the same step
        _remove(target)
    aside.rename(target)
    _flush(target.parent)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, out of sight first so that half of one is never seen."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _meta_digest(meta: dict) -> str:
    """Checksum of the content of meta.json, its own "sha256" left out."""
    # Through JSON and back first: what it changes (tuples, integer keys) must not change the checksum.
    content = {key: value for key, value in json.loads(json.dumps(meta)).items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------
# Loading


def load_checkpoint(
    directory: Path, step: int, compute: Compute, load_optimizer: bool = False
) -> tuple[State, State | None, dict]:
    """(model state, this rank's optimizer state or None, meta) of one step, verified and on the device.

    `meta` is what was saved, and "model_tag" the name of the folder it lies in now.
    UserError, in one line, when there is no such step, when anything in it is damaged, or when the
    optimizer state is wanted and there is none that fits this rank.
    """
    folder = step_folder(directory, step)
    if not folder.is_dir():
        if (directory / f"model_{step:06d}.pt").exists():
            return _load_reference(directory, step, compute, load_optimizer)
        raise UserError(f"no checkpoint of step {step} in {directory}; there are steps {list_steps(directory)}")
    from safetensors.torch import load_file

    shard = f"optimizer_rank{compute.rank}.safetensors"
    meta = _verify(folder, ["model.safetensors"] + [shard] * load_optimizer)
    if load_optimizer and meta["world_size"] != compute.world_size:
        raise UserError(f"{folder} was saved by {meta['world_size']} rank(s); resume it with as many")
    model_state = load_file(folder / "model.safetensors", device=str(compute.device))
    optimizer_state = load_file(folder / shard, device=str(compute.device)) if load_optimizer else None
    return model_state, optimizer_state, {**meta, "model_tag": directory.name}


def _verify(folder: Path, names: list[str] | None = None) -> dict:
    """The meta of a checkpoint whose files `names` (None: all) are as they were saved, else UserError."""
    damaged = f"checkpoint {folder} is damaged"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{damaged}: meta.json cannot be read ({error})") from error
    if not isinstance(meta, dict) or meta.get("sha256") != _meta_digest(meta):
        raise UserError(f"{damaged}: meta.json is not as it was saved")
    if step_folder(folder.parent, meta["step"]) != folder:
        raise UserError(f"{damaged}: what it holds was saved as step {meta['step']}")
    for name in meta["files"] if names is None else names:
        path, saved = folder / name, meta["files"].get(name)
        if saved is None:
            raise UserError(f"checkpoint {folder} was saved without {name}; it has {', '.join(meta['files'])}")
        if not path.exists():
            raise UserError(f"{damaged}: {name} is missing")
        if path.stat().st_size != saved["size"]:
            raise UserError(f"{damaged}: {name} has {path.stat().st_size} bytes, not {saved['size']}")
        if _digest(path) != saved["sha256"]:
            raise UserError(f"{damaged}: the checksum of {name} is not the one saved")
    return meta


def _load_reference(directory: Path, step: int, compute: Compute, load_optimizer: bool) -> tuple[State, None, dict]:
    """A model in the reference's layout. Its optimizer state belongs to another program and stays unread."""
    path = directory / f"model_{step:06d}.pt"
    if load_optimizer:
        raise UserError(f"{path} can be used for its weights only: start a new stage from it, do not resume it")
    try:
        state = torch.load(path, map_location=compute.device, weights_only=True)
        meta = json.loads((directory / f"meta_{step:06d}.json").read_text(encoding="utf-8"))
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        config = meta["model_config"]
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} was refused: it is damaged, or holds something other than weights") from error
    except (RuntimeError, EOFError, ValueError, FileNotFoundError, KeyError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} or its meta file is damaged ({reason})") from error
    if "smear_lambda" not in state:  # models from before smear had full context, another rotary base, plain q and k
        config = {"window_pattern": "L", "rotary_base": 10000.0, "qk_scale": 1.0, **config}
    return state, None, {**meta, "model_config": config, "model_tag": directory.name}


# -----------------------------------------------------------------------------
# Finding


def list_steps(directory: Path) -> list[int]:
    """The steps saved in a folder, in either layout, ascending; [] where there is none."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    found = [re.fullmatch(r"step_(\d+)|model_(\d+)\.pt", name) for name in names]
    return sorted({int(match[1] or match[2]) for match in found if match})


def _saved_at(directory: Path, step: int) -> float:
    """When a checkpoint was saved: seconds since the epoch."""
    folder = step_folder(directory, step)
    try:
        return float(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["saved_at"])
    except (OSError, ValueError, TypeError, KeyError):  # the reference's layout, or damaged
        return (folder if folder.is_dir() else directory / f"model_{step:06d}.pt").stat().st_mtime


def _newest_first(directory: Path) -> list[int]:
    # By time, not by number: a new run under an old tag may be shorter than the one before it.
    return sorted(list_steps(directory), key=lambda step: (_saved_at(directory, step), step), reverse=True)


def find_last_step(directory: Path, weights_only: bool = False) -> int:
    """The step saved last of those that are whole; says so when it passes over damaged ones.

    `weights_only` asks no more than that the weights are whole. UserError when there is none.
    """
    names = ["model.safetensors"] if weights_only else None
    for step in _newest_first(directory):
        if not step_folder(directory, step).is_dir():
            return step  # the reference's layout has nothing to verify against
        try:
            _verify(step_folder(directory, step), names)
            return step
        except UserError as error:
            print0(f"passing over step {step}: {error}")
    raise UserError(f"no whole checkpoint in {directory}")


def find_tags(stage: str) -> list[str]:
    """Tags of a stage that have a checkpoint, the one saved last first."""
    root = base_dir_path() / STAGES[stage][0]
    folders = [path for path in root.iterdir() if list_steps(path)] if root.is_dir() else []
    newest = {path.name: max(_saved_at(path, step) for step in list_steps(path)) for path in folders}
    return sorted(newest, key=newest.get, reverse=True)


def resolve_checkpoint(stage: str, tag: str | None = None, step: int | None = None) -> tuple[Path, int]:
    """(folder, step) of the checkpoint meant: by default the last of the tag that was saved last."""
    tags = find_tags(stage)
    if not tags:
        folder, script = STAGES[stage]
        root = base_dir_path() / folder
        raise UserError(f"no {stage} checkpoint in {root} yet; run `python -m scripts.{script}` first")
    if tag is not None and tag not in tags:
        raise UserError(f"no {stage} checkpoint is tagged {tag!r}; there are {', '.join(tags)}")
    directory = checkpoint_dir(stage, tag or tags[0])
    return directory, find_last_step(directory, weights_only=True) if step is None else step


def load_model(stage: str, compute: Compute, model_tag: str | None = None, step: int | None = None):
    """(model in eval mode on the device, tokenizer, meta) of a stage's checkpoint; see `resolve_checkpoint`."""
    from nanochat.tokenizer import get_tokenizer

    directory, step = resolve_checkpoint(stage, model_tag, step)
    state, _, meta = load_checkpoint(directory, step, compute)
    model = build_model(state, meta["model_config"], compute)
    tokenizer = get_tokenizer()
    theirs = meta.get("tokenizer", tokenizer.fingerprint())  # the reference's layout does not tell
    if (model.config.vocab_size, theirs) != (tokenizer.get_vocab_size(), tokenizer.fingerprint()):
        raise UserError(
            f"model {directory.name} (step {step}) was trained with another tokenizer ({model.config.vocab_size} tokens) than "
            f"the one here now ({tokenizer.get_vocab_size()} tokens); put that one back or train the model again"
        )
    return model.eval(), tokenizer, meta


def build_model(state: State, config: dict, compute: Compute):
    """The GPT that `config` describes, on the device, with the weights of `state` (older ones completed)."""
    from dataclasses import fields

    from nanochat.gpt import GPT, GPTConfig, add_missing_weights

    unknown = set(config) - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise UserError(f"the checkpoint's config has {sorted(unknown)}, unknown to this version; update the code")
    config = GPTConfig(**config)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=compute.device)
    model.set_compute_dtype(compute.dtype)
    try:
        model.load_state_dict(add_missing_weights(state, config))
    except RuntimeError as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's weights do not fit its config: {message}") from error
    return model


# -----------------------------------------------------------------------------
# Random generators, for a resume that is exact


def rng_state() -> dict[str, str]:
    """The state of torch's generators as text that JSON can hold."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(states: dict[str, str]) -> None:
    """Undo: put torch's generators where `rng_state` found them. A device that is not here is left out."""

    def decode(text):
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(decode(states["cpu"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(decode(states["cuda"]))
