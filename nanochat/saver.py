"""Saving checkpoints: the one function that writes them, and a Saver that lets training go on meanwhile.

The one idea to know: every rank writes, flushes and reads back its own part in a hidden folder beside the
checkpoints, then tells the others its size and SHA-256, or what went wrong. Only when all parts are there does
the main rank add meta.json and publish the folder by one rename. How it is read is in checkpoint_manager.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

import torch
from filelock import FileLock, Timeout

from nanochat.checkpoint_manager import State, file_digest, meta_digest, newest_first, step_folder, verify
from nanochat.common import MEETING, Compute, UserError, print0

DTYPES = {  # as a safetensors file names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Saver:
    """Saves in the background, one checkpoint at a time, into a folder that no other run may write to meanwhile.

    >>> saver = Saver(directory, compute, keep_last=3)
    >>> saver.save(step, model.state_dict(), optimizer.state_dict(), meta)  # training may go on at once
    >>> saver.close()  # the last one is on the disk, or its error is raised

    Every rank calls all of these. UserError when another run still holds the folder after `patience` seconds,
    which a run that is being ended needs to let go of it.
    """

    def __init__(self, directory: Path, compute: Compute, keep_last: int = -1, patience: float = 60):
        self.directory, self.compute, self.keep_last = directory, compute, keep_last
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.lock = FileLock(directory / ".lock")  # the system takes it from a process that ends, however it ends
        compute.on_main(lambda: self._take_lock(patience))
        # The thread meets the other ranks' threads while the main threads meet for the gradients: not in one group.
        self.group = None
        if compute.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=MEETING))

    def _take_lock(self, patience: float) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=patience)
        except Timeout:
            raise UserError(
                f"another run is training into {self.directory}; end it, or give this one another --model-tag. "
                f"If there is no such run any more, delete {self.lock.lock_file}"
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
            print0(f"no file can be locked in {self.directory}: see to it that no other run trains into it")

    def save(self, step: int, model_state: State, optimizer_state: State | None, meta: dict) -> None:
        """Copy all tensors to host memory and save them from there (see `save_checkpoint`). `meta` is not copied.

        Waits for the save before this one. When a save fails, the main rank says so and training goes on.
        """
        self._join()
        model_state = _copy_to_host(model_state) if self.compute.is_main else {}
        optimizer_state = optimizer_state and _copy_to_host(optimizer_state)
        # Not a daemon: a process that ends early, because of an error perhaps, still finishes the save.
        # By its name `run_script` knows what to wait for.
        self.thread = threading.Thread(target=self._save, name="save", args=(step, model_state, optimizer_state, meta))
        self.thread.start()

    def _save(self, step: int, *what) -> None:
        self.error = None
        try:
            save_checkpoint(self.directory, step, *what, self.compute, self.keep_last, self.group)
            outcome = f"saved step {step} in {self.directory}"
        except Exception as error:
            self.error = error
            outcome = f"error: step {step} was not saved: {error}; training goes on, the checkpoints before it stand"
        with suppress(OSError, ValueError):  # the main thread learns by itself that nobody reads our output any more
            print0(outcome)

    def _join(self) -> None:
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(timeout=1)
            self.compute.heartbeat()

    def wait(self) -> None:
        """Wait for the save that is in flight; raises the error of the last save, if it had one."""
        self._join()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """`wait`, then leave the folder to other runs."""
        try:
            self.wait()
        finally:
            self.lock.release()


def _copy_to_host(state: State) -> State:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


# -----------------------------------------------------------------------------
# One checkpoint


def save_checkpoint(
    directory: Path,
    step: int,
    model_state: State,
    optimizer_state: State | None,
    meta: dict,
    compute: Compute,
    keep_last: int = -1,
    group=None,
) -> Path:
    """Write one checkpoint and return its folder. Every rank calls this, each with its own part of the optimizer state.

    `model_state` and `meta` (what JSON can hold) are the main rank's, but for `meta["loader_state"]`: those of all
    ranks are merged. Step, time, world size and the list of files are added. `keep_last` removes all but that
    many of the whole checkpoints saved last (-1: keeps all). The ranks meet in the process group `group` (None: the default one).

    Raises OSError on every rank when the disk of any is full or may not be written; then nothing is left behind
    and older checkpoints stand. No two runs may write into one directory at a time, which `Saver` sees to.
    """
    from nanochat.lanes import merge_states

    target = step_folder(directory, step)

    def prepare() -> Path | None:
        if compute.is_main:
            for leftover in directory.glob(".step_*"):  # of a process that died while saving
                shutil.rmtree(leftover, ignore_errors=True)
            aside = _hidden(target)
            aside.mkdir(parents=True)
            return aside

    def write() -> tuple[dict, dict | None]:
        parts = {"model.safetensors": model_state} if compute.is_main else {}
        if optimizer_state is not None:
            parts[f"optimizer_rank{compute.rank}.safetensors"] = optimizer_state
        files = {}
        for name, state in parts.items():
            files[name] = _write_tensors(aside / name, state)
        return files, meta.get("loader_state")

    def publish() -> None:
        if compute.is_main:
            added = {"step": step, "saved_at": time.time(), "world_size": compute.world_size, "files": {}}
            for files, _ in written:
                added["files"].update(files)
            loader_states = [state for _, state in written]
            if loader_states[0] is not None:
                added["loader_state"] = merge_states(loader_states)
            _write_meta(aside, {**meta, **added})
            _publish(aside, target)
            if keep_last > 0:
                _remove_old(directory, keep_last, step)

    aside = _on_every_rank(prepare, compute, group)[0]
    try:
        written = _on_every_rank(write, compute, group)
        _on_every_rank(publish, compute, group)
    except BaseException:
        if compute.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _on_every_rank(work: Callable[[], Any], compute: Compute, group) -> list:
    """What `work` gives on each rank, in order. Where it fails on any, every rank raises: its own error, or an OSError."""
    result = error = told = None
    try:
        result = work()
    except Exception as caught:
        # Told in words that pickle can carry, whatever the error was.
        number, words = getattr(caught, "errno", None) or errno.EIO, getattr(caught, "strerror", None) or repr(caught)
        error, told = caught, OSError(number, f"on rank {compute.rank}: {words}", getattr(caught, "filename", None))
    outcomes = compute.gather((result, told), group)
    for error in [error] + [told for _, told in outcomes]:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def _write_tensors(path: Path, state: State) -> dict:
    """Write a safetensors file, flush it to the disk and read it back; its {"size", "sha256"}.

    The library's own `save_file` holds Python's lock meanwhile, and training would wait for seconds. The file is:
    the length of the header in 8 bytes, the header (JSON, filled up to a multiple of 8), the bytes of all tensors.
    """
    # Wide numbers first, so that all of them begin at a multiple of their size.
    tensors = sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    sha = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for part in (len(head).to_bytes(8, "little"), head, *(tensor for _, tensor in tensors)):
                if isinstance(part, torch.Tensor):
                    part = part.detach().cpu().reshape(-1).view(torch.uint8).numpy()
                file.write(part)
                sha.update(part)
        _flush(path)
    except OSError as error:  # these know no name
        raise OSError(error.errno, error.strerror, str(path)) from error
    if file_digest(path) != sha.hexdigest():
        raise OSError(errno.EIO, "what was written reads back changed; this disk cannot be trusted", str(path))
    return {"size": 8 + len(head) + end, "sha256": sha.hexdigest()}


def _write_meta(folder: Path, meta: dict) -> None:
    meta["sha256"] = meta_digest(meta)
    path = folder / "meta.json"
    path.write_text(json.dumps(meta), encoding="utf-8")
    _flush(path)


def _publish(aside: Path, target: Path) -> None:
    _flush(aside)
    replaced = _hidden(target)
    if target.exists():  # an earlier run with this tag saved the same step
        target.rename(replaced)
    aside.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_old(directory: Path, keep_last: int, just_saved: int) -> None:
    """Remove the checkpoints older than the newest `keep_last` whole ones, of which `just_saved` is the first."""
    whole = 0
    for step in sorted(newest_first(directory), key=lambda step: step != just_saved):
        with suppress(UserError, OSError):  # a damaged one does not count, and one that is gone by now is well gone
            if whole < keep_last:
                verify(directory, step, sizes_only=True)
                whole += 1
            elif step_folder(directory, step).is_dir():
                _remove(step_folder(directory, step))


def _remove(folder: Path) -> None:
    """Delete a checkpoint, out of sight first so that half of one is never seen."""
    hidden = _hidden(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # what stays is removed by the next save


def _hidden(folder: Path) -> Path:
    """A new name beside `folder`: a rank that outlives its run must not find the next run's folder under its own."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
