"""Checkpoints: verified when loaded, fitted to any number of ranks, found again by stage, tag and step.

The one idea to know: a checkpoint is a folder, and its meta.json lists every other file with
size and SHA-256 (and carries a checksum of itself). saver.py publishes it by one rename, so a
folder that bears a step's name is complete, and whatever has happened to it since is noticed
before a number of it is used.

    BASE_DIR/base_checkpoints/d20/step_005000/model.safetensors
                                              optimizer_rank0.safetensors ...
                                              meta.json

Nothing here executes what it reads: safetensors and JSON are data, and the reference's own
layout (`model_005000.pt`, `meta_005000.json`) goes through torch's weights-only reader.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import pickle
import re
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


def _reference_path(directory: Path, step: int) -> Path:
    """The weights of a step in the reference's layout."""
    return directory / f"model_{step:06d}.pt"


# -----------------------------------------------------------------------------
# Verifying


def verify(directory: Path, step: int, names: list[str] | None = None, sizes_only: bool = False) -> dict:
    """The meta of a checkpoint whose files `names` (None: all) are as they were saved, else UserError.

    `sizes_only` looks at meta.json and at the sizes of the others, but does not read them.
    """
    folder = step_folder(directory, step)
    if not folder.is_dir():
        raise UserError(f"no checkpoint of step {step} in {directory}; there are steps {list_steps(directory)}")
    damaged = f"checkpoint {folder} is damaged"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{damaged}: meta.json cannot be read ({error})") from error
    if not isinstance(meta, dict) or meta.get("sha256") != meta_digest(meta):
        raise UserError(f"{damaged}: meta.json is not as it was saved")
    if meta["step"] != step:
        raise UserError(f"{damaged}: what it holds was saved as step {meta['step']}")
    for name in meta["files"] if names is None else names:
        path, saved = folder / name, meta["files"][name]
        try:
            size = path.stat().st_size
            same = size == saved["size"] and (sizes_only or file_digest(path) == saved["sha256"])
        except OSError as error:
            raise UserError(f"{damaged}: {name} cannot be read ({error.strerror})") from error
        if size != saved["size"]:
            raise UserError(f"{damaged}: {name} has {size} bytes, not {saved['size']}")
        if not same:
            raise UserError(f"{damaged}: the checksum of {name} is not the one saved")
    return meta


def file_digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def meta_digest(meta: dict) -> str:
    """Checksum of the content of meta.json, its own "sha256" left out."""
    # Through JSON and back first: what it changes (tuples, integer keys) must not change the checksum.
    content = {key: value for key, value in json.loads(json.dumps(meta)).items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------
# Loading


def load_checkpoint(
    directory: Path, step: int, compute: Compute, wanted: State | None = None
) -> tuple[State, State | None, dict]:
    """(model state on the device, optimizer state on the host or None, meta) of one step, verified.

    `wanted` is the state of this rank's optimizer: names and shapes say what is to be found and comes
    back, whatever the number of ranks that saved it. `meta` is what was saved, and "model_tag" the
    name of the folder it lies in now. UserError, in one line, when there is no such step, when
    anything that is read is damaged, or when the optimizer state is not all there.
    """
    if not step_folder(directory, step).is_dir() and _reference_path(directory, step).exists():
        return _load_reference(directory, step, compute, wanted is not None)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    meta = verify(directory, step, ["model.safetensors"])
    try:
        model_state = load_file(step_folder(directory, step) / "model.safetensors", device=str(compute.device))
        optimizer_state = None if wanted is None else _load_optimizer(directory, step, meta, wanted, compute.rank)
    except (OSError, SafetensorError) as error:
        verify(directory, step)  # it tells best what is wrong
        raise UserError(f"checkpoint {step_folder(directory, step)} cannot be read ({error})") from error
    return model_state, optimizer_state, {**meta, "model_tag": directory.name}


def _load_optimizer(directory: Path, step: int, meta: dict, wanted: State, rank: int) -> State:
    """What `wanted` names, filled with the saved numbers, whichever ranks' files they are in.

    A key is "lm_head.weight.exp_avg", or "lm_head.weight.exp_avg[100:200]" for those elements of the
    flattened tensor, of which `wanted` has one range at most. Only files with something wanted are read,
    and this rank's own first: where as many ranks have saved, it is all there.
    """
    from safetensors import safe_open

    folder, own = step_folder(directory, step), f"optimizer_rank{rank}.safetensors"
    files = sorted((name for name in meta["files"] if name.startswith("optimizer_")), key=lambda name: name != own)
    if not files:
        raise UserError(f"checkpoint {folder} was saved without an optimizer state")
    state = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in wanted.items()}
    missing = {key: tensor.numel() for key, tensor in state.items()}
    places = {}  # name of a tensor -> (key, first element, end)
    for key, tensor in state.items():
        name, start, end = _range_of(key, tensor.shape)
        places[name] = key, start, end
    taken = set()  # several ranks may have saved the same
    for file_name in files:
        if not any(missing.values()):
            break
        with safe_open(folder / file_name, "pt") as file:
            pieces = []
            for theirs in file.keys():
                shape = file.get_slice(theirs).get_shape()
                name, first, last = _range_of(theirs, shape)
                key, start, end = places.get(name, (None, 0, 0))
                a, b = max(start, first), min(end, last)
                reshaped = theirs == key and shape != list(state[key].shape)
                if a < b and theirs not in taken and not reshaped:
                    pieces.append((theirs, slice(a - first, b - first), key, slice(a - start, b - start)))
            if pieces:
                verify(directory, step, [file_name])
            for theirs, there, key, here in pieces:
                state[key].view(-1)[here] = file.get_tensor(theirs).view(-1)[there]
                missing[key] -= here.stop - here.start
                taken.add(theirs)
    lacking = [key for key, count in missing.items() if count != 0]
    if lacking:
        verify(directory, step)  # rather damaged than another
        raise UserError(f"the optimizer state in {folder} is of another model: {lacking[0]} is not there, or not whole")
    return state


def _range_of(key: str, shape) -> tuple[str, int, int]:
    """(name, first element, end): "w.step[3:5]" -> ("w.step", 3, 5), and "w.step" of shape (2, 3) -> ("w.step", 0, 6)."""
    match = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", key)
    return (match[1], int(match[2]), int(match[3])) if match else (key, 0, math.prod(shape))


def _load_reference(directory: Path, step: int, compute: Compute, load_optimizer: bool) -> tuple[State, None, dict]:
    """A model in the reference's layout. Its optimizer state belongs to another program and stays unread."""
    path = _reference_path(directory, step)
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
    """When a checkpoint was saved: seconds since the epoch; 0 when it is gone by now."""
    folder = step_folder(directory, step)
    try:
        return float(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["saved_at"])
    except (OSError, ValueError, TypeError, KeyError):  # the reference's layout, or damaged
        path = folder if folder.is_dir() else _reference_path(directory, step)
        return path.stat().st_mtime if path.exists() else 0.0


def newest_first(directory: Path) -> list[int]:
    """The steps saved in a folder, the one saved last first."""
    # By time, not by number: a new run under an old tag may be shorter than the one before it.
    return sorted(list_steps(directory), key=lambda step: (_saved_at(directory, step), step), reverse=True)


def find_last_step(directory: Path, weights_only: bool = False, since: float | None = None) -> int:
    """The step saved last of those that are whole; says so when it passes over damaged ones.

    `weights_only` asks no more than that the weights are whole; `since` (as `time.time()` gives it) that it
    was saved after that. UserError when there is none.
    """
    names = ["model.safetensors"] if weights_only else None
    for step in newest_first(directory):
        if since is not None and _saved_at(directory, step) <= since:
            break
        if not step_folder(directory, step).is_dir() and _reference_path(directory, step).exists():
            return step  # there is nothing to verify it against
        try:
            verify(directory, step, names)
            return step
        except UserError as error:
            print0(f"passing over step {step}: {error}")
    raise UserError(f"no whole checkpoint in {directory}")


def find_tags(stage: str) -> list[str]:
    """Tags of a stage that have a checkpoint, the one saved last first."""
    root = base_dir_path() / STAGES[stage][0]
    steps = {path: list_steps(path) for path in root.iterdir()} if root.is_dir() else {}
    newest = {path.name: max(_saved_at(path, step) for step in steps[path]) for path in steps if steps[path]}
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

    # Decided by one rank: another run may be saving meanwhile.
    directory, step = compute.on_main(lambda: resolve_checkpoint(stage, model_tag, step))
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
