"""Checkpoints: written by all ranks together, verified when loaded, for any number of ranks, found by stage, tag and step.

A checkpoint is a folder that appears by one rename, so it is complete or absent. Its meta.json has the size and SHA-256
of every other file and a checksum of itself, so damage is noticed before anything is used. Nothing here executes what it
reads: safetensors and JSON are data. saver.py writes checkpoints in the background.

    BASE_DIR/base_checkpoints/d20/step_005000/model.safetensors
                                              optimizer_rank0.safetensors ...
                                              vocabulary.json
                                              meta.json
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanochat.common import Compute, UserError, atomic, base_dir_path, flush_to_disk, print0
from nanochat.tokenizer import VOCABULARY_FILE, RustBPETokenizer

STAGES = {  # stage -> (folder, the script that trains it)
    "base": ("base_checkpoints", "base_train"),
    "mid": ("mid_checkpoints", "mid_train"),
    "sft": ("chatsft_checkpoints", "chat_sft"),
    "rl": ("chatrl_checkpoints", "chat_rl"),
}
MODEL_FILES = ["model.safetensors", VOCABULARY_FILE]
TABLES = ("files", "model_config", "user_config", "loop_state", "rng_state")  # in meta.json
State = dict[str, torch.Tensor]


def checkpoint_dir(stage: str, tag: str) -> Path:
    """The folder that holds the checkpoints of one run of a stage ("base", "mid", "sft" or "rl")."""
    if Path(tag).name != tag or tag in ("", ".", ".."):
        raise UserError(f"--model-tag {tag!r} is not a valid folder name")
    return base_dir_path() / STAGES[stage][0] / tag


def step_folder(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


# -----------------------------------------------------------------------------
# Writing


def save_checkpoint(
    directory: Path, step: int, model_state: State, optimizer_state: State | None, meta: dict, tokenizer: RustBPETokenizer,
    compute: Compute, keep_last: int = -1, group=None,
) -> Path:  # fmt: skip
    """Write one checkpoint and return its folder. Every rank calls this, each with its shard of the optimizer state.

    `model_state`, `meta` (what JSON can hold) and the tokenizer are the main rank's. Of the checkpoints up to this step the
    last `keep_last` are kept (-1: all). `group` is the process group to synchronise in. `Saver` keeps other runs out.

    Raises the error of any rank on all of them; then nothing is left behind and older checkpoints stand.
    """
    target = step_folder(directory, step)

    def prepare() -> Path:
        for leftover in directory.glob(".step_*"):  # of a process that was killed while saving
            shutil.rmtree(leftover, ignore_errors=True)
        tmp = _hidden(target)
        tmp.mkdir(parents=True)
        return tmp

    def write() -> dict:
        files = {}
        if compute.is_main:
            files["model.safetensors"] = _write_tensors(tmp / "model.safetensors", model_state)
            tokenizer.save(tmp)
            files[VOCABULARY_FILE] = _describe(tmp / VOCABULARY_FILE)
        if optimizer_state is not None:
            name = f"optimizer_rank{compute.rank}.safetensors"
            files[name] = _write_tensors(tmp / name, optimizer_state)
        return files

    def publish() -> None:
        files = {name: description for of_rank in written for name, description in of_rank.items()}
        added = {"step": step, "saved_at": time.time(), "world_size": compute.world_size, "files": files}
        _write_meta(tmp, {**meta, **added})
        if target.exists():  # damaged, or saved by a run that resumed from an earlier step
            _remove(target)
        tmp.rename(target)
        flush_to_disk(directory)
        if keep_last > 0:
            for old in [old for old in list_steps(directory) if old <= step][:-keep_last]:
                _remove(step_folder(directory, old))

    tmp = compute.on_main(prepare, group)
    try:
        written = compute.on_every_rank(write, group)
        compute.on_main(publish, group)
    except BaseException:
        if compute.is_main:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    return target


def update_meta(directory: Path, step: int, **values) -> None:
    """Replace values in the meta.json of a checkpoint, such as a score that was measured after it was saved."""
    _write_meta(step_folder(directory, step), {**verify(directory, step, names=[]), **values})


def set_aside(directory: Path, after: int | None = None) -> Path | None:
    """Move a run to TAG.old, whose former content is deleted; one without checkpoints is not worth that.

    With `after`, move only the checkpoints of later steps, and leave what else is in TAG.old. Returns TAG.old if any moved.
    """
    old = directory.with_name(f"{directory.name}.old")
    paths = [step_folder(directory, step) for step in list_steps(directory) if after is None or step > after]
    if not paths:
        return None
    replaced = [old / path.name for path in paths]
    if after is None:
        paths, replaced = list(directory.iterdir()), [old]
    for path in filter(Path.exists, replaced):
        _remove(path)
    old.mkdir(exist_ok=True)
    for path in paths:
        path.rename(old / path.name)
    return old


def _write_tensors(path: Path, state: State) -> dict:
    """Write a safetensors file and flush it to the disk; returns its description."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, path)
    except SafetensorError as error:  # a full disk, for example
        raise UserError(f"cannot write {path}: {error}") from error
    flush_to_disk(path)
    return _describe(path)


def _write_meta(folder: Path, meta: dict) -> None:
    with atomic(folder / "meta.json") as tmp:
        tmp.write_text(json.dumps({**meta, "sha256": meta_digest(meta)}), encoding="utf-8")


def _remove(folder: Path) -> None:
    """Delete a folder, after hiding it, so that an incomplete one is never seen."""
    hidden = _hidden(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # the next save removes what remains


def _hidden(folder: Path) -> Path:
    """A new name beside `folder`, so that two runs never share a temporary folder."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


# -----------------------------------------------------------------------------
# Verifying


def verify(directory: Path, step: int, names: list[str] | None = None) -> dict:
    """The meta of a checkpoint whose files `names` (None: all) are complete; UserError if they are not, or there is none."""
    folder = step_folder(directory, step)
    if not folder.is_dir():
        raise UserError(f"no checkpoint of step {step} in {directory}; there are steps {list_steps(directory)}")
    name = "meta.json"
    try:
        meta = json.loads((folder / name).read_text(encoding="utf-8"))
        if meta["sha256"] != meta_digest(meta) or meta["step"] != step:
            raise ValueError("its content does not match its checksum or its step")
        if not 0 <= meta["saved_at"] < math.inf or any(type(meta.get(key, {})) is not dict for key in TABLES):
            raise ValueError("it has values of other kinds than a meta.json has")
        for name in meta["files"] if names is None else names:
            path, saved = folder / Path(name).name, meta["files"][name]
            if path.stat().st_size != saved["size"] or _describe(path) != saved:
                raise ValueError("its content does not match its checksum")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # not a meta.json of ours
        raise UserError(f"checkpoint {folder} is damaged: {name}: {error}") from error
    return meta


def _describe(path: Path) -> dict:
    """{"size", "sha256"} of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return {"size": path.stat().st_size, "sha256": sha.hexdigest()}


def meta_digest(meta: dict) -> str:
    """Checksum of the content of meta.json without its own "sha256"."""
    # Through JSON and back first, since that turns tuples into lists and integer keys into strings
    content = {key: value for key, value in json.loads(json.dumps(meta)).items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------
# Loading


def load_checkpoint(directory: Path, step: int, compute: Compute) -> tuple[State, dict]:
    """(model state on the device, meta) of one step, verified. "model_tag" is the name of the present folder."""
    meta = verify(directory, step, MODEL_FILES)
    state = load_file(step_folder(directory, step) / "model.safetensors", device=str(compute.device))
    return state, {**meta, "model_tag": directory.name}


def load_optimizer(directory: Path, step: int, like: State, rank: int) -> State:
    """The saved optimizer state, on the host, for the names and shapes of `like`, whatever number of ranks saved it.

    A key is "lm_head.weight.exp_avg", or "lm_head.weight.exp_avg[100:200]" for these elements of the flattened tensor, of
    which `like` has one range at most. The files of all ranks are read until `like` is complete, this rank's own first:
    with an unchanged world size it holds everything. Raises UserError if a file is damaged or something is missing.
    """
    folder, own = step_folder(directory, step), f"optimizer_rank{rank}.safetensors"
    files = [name for name in verify(directory, step, names=[])["files"] if name.startswith("optimizer_")]
    if not files:
        raise UserError(f"checkpoint {folder} was saved without an optimizer state")
    state, missing, needed = {}, {}, {}
    for key, tensor in like.items():
        name, start, end = _range_of(key, tensor.shape)
        state[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        missing[key] = end - start  # elements that are still to be loaded
        needed[name] = key, start, end

    loaded = set()  # several ranks may have saved the same tensor
    for file_name in sorted(files, key=lambda name: name != own):
        if not any(missing.values()):
            break
        verify(directory, step, [file_name])
        with safe_open(folder / file_name, "pt") as file:
            for saved_key in set(file.keys()) - loaded:
                name, first, last = _range_of(saved_key, file.get_slice(saved_key).get_shape())
                key, start, end = needed.get(name, (None, 0, 0))
                a, b = max(start, first), min(end, last)  # the elements that are both saved here and needed
                if a < b:
                    saved = file.get_tensor(saved_key).view(-1)
                    state[key].view(-1)[a - start : b - start] = saved[a - first : b - first]
                    missing[key] -= b - a
                    loaded.add(saved_key)
    for key, count in missing.items():
        if count != 0:
            raise UserError(f"the optimizer state in {folder} is of another model: {key} is missing or incomplete")
    return state


def _range_of(key: str, shape) -> tuple[str, int, int]:
    """(name, first element, end): "w.step[3:5]" -> ("w.step", 3, 5), and "w.step" of shape (2, 3) -> ("w.step", 0, 6)."""
    match = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", key)
    if match is None:
        return key, 0, math.prod(shape)
    return match[1], int(match[2]), int(match[3])


# -----------------------------------------------------------------------------
# Finding


def list_steps(directory: Path) -> list[int]:
    """The steps saved in a folder, ascending; [] if there are none."""
    numbers = [path.name.removeprefix("step_") for path in directory.glob("step_*")]
    return sorted(int(number) for number in numbers if number.isdigit() and f"{int(number):06d}" == number)


def find_last_step(directory: Path, names: list[str] | None = None) -> int:
    """The highest step whose files `names` (None: all) are complete; a damaged one is reported. UserError if there is none."""
    for step in reversed(list_steps(directory)):
        try:
            empty_model(verify(directory, step, names).get("model_config", {}))
            return step
        except UserError as error:
            print0(f"skipping step {step}: {error}")
    raise UserError(f"no complete checkpoint in {directory}")


def find_tags(stage: str) -> list[str]:
    """Tags of a stage that have a checkpoint, the most recently saved one first."""

    def saved_at(run: Path) -> float:
        for step in reversed(list_steps(run)):
            with suppress(UserError):
                return verify(run, step, names=[])["saved_at"]
        return 0.0  # none can be read

    runs = filter(list_steps, (base_dir_path() / STAGES[stage][0]).glob("*"))
    return [run.name for run in sorted(runs, key=saved_at, reverse=True)]


def resolve_checkpoint(stage: str, tag: str | None = None, step: int | None = None) -> tuple[Path, int]:
    """(folder, step) of a checkpoint: by default the last step of the most recently saved tag."""
    tags = find_tags(stage)
    if not tags:
        folder, script = STAGES[stage]
        raise UserError(f"no {stage} checkpoint in {base_dir_path() / folder} yet; run `python -m scripts.{script}` first")
    if tag is not None and tag not in tags:
        raise UserError(f"no {stage} checkpoint has the tag {tag!r}; there are {', '.join(tags)}")
    directory = checkpoint_dir(stage, tag or tags[0])
    return directory, find_last_step(directory, MODEL_FILES) if step is None else step


def load_model(stage: str, compute: Compute, model_tag: str | None = None, step: int | None = None):
    """(model in eval mode on the device, its tokenizer, meta) of a stage's checkpoint; see `resolve_checkpoint`."""
    # One rank decides, since another run may be saving meanwhile
    directory, step = compute.on_main(lambda: resolve_checkpoint(stage, model_tag, step))
    state, meta = load_checkpoint(directory, step, compute)
    model = build_model(state, meta.get("model_config"), compute)
    return model.eval(), RustBPETokenizer.from_directory(step_folder(directory, step)), meta


def build_model(state: State, config: dict, compute: Compute):
    """The GPT of a config, on the device, with the weights of `state`; extras that an older model lacks get neutral values."""
    from nanochat.gpt import add_missing_weights

    model = empty_model(config)
    try:
        empty_model(config).load_state_dict(state, strict=False, assign=True)  # finds other shapes and allocates nothing
        model.to_empty(device=compute.device)
        model.set_compute_dtype(compute.dtype)
        model.load_state_dict(add_missing_weights(state, model))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:  # missing weights, or weights of other shapes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint is not of a model that this code knows: {reason}") from error
    return model


def empty_model(config: dict):
    """The GPT of a "model_config" on the meta device. UserError if there is no such model: a file can hold anything."""
    from nanochat.gpt import GPT, GPTConfig

    try:
        config = GPTConfig(**config)
        for name, default in vars(GPTConfig()).items():
            value = getattr(config, name)
            size = len(value) if isinstance(value, str) else value
            least = {"plain": 0, "document_start": -1}.get(name, 1e-6)
            if type(value) is not type(default) or not least <= size <= (1000 if name == "n_layer" else 2**21):
                raise TypeError(f"its {name} cannot be {value!r:.50}")
    except TypeError as error:
        raise UserError(f"the checkpoint is not of a model that this code knows: {error!s:.200}") from error
    with torch.device("meta"):
        return GPT(config)
