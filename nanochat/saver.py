"""Saves checkpoints in a background thread while training continues, and locks the folder of a run."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from nanochat.checkpoint_manager import State, save_checkpoint
from nanochat.common import COLLECTIVE_TIMEOUT, Compute, UserError, print0


class Saver:
    """Saves one checkpoint at a time into a folder that no other run may write to meanwhile.

    >>> saver = Saver(directory, compute, keep_last=3)
    >>> saver.save(step, model.state_dict(), optimizer.state_dict(), meta, tokenizer)  # training may continue at once
    >>> saver.close()  # the last one is on the disk, or its error is raised

    Every rank calls all of these. A run that is being stopped has `timeout` seconds to release the folder.
    """

    def __init__(self, directory: Path, compute: Compute, keep_last: int = -1, timeout: float = 60):
        self.directory, self.compute, self.keep_last = directory, compute, keep_last
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        # Beside the folder, which appears with the first thing in it; the system releases it when the process ends in any way
        self.lock = FileLock(directory.with_name(f".{directory.name}.lock"))
        compute.on_main(lambda: self._acquire_lock(timeout))
        # The thread's collectives need a group of their own, since the main thread uses the default one meanwhile
        self.group = None
        if compute.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT))

    def _acquire_lock(self, timeout: float) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=timeout)
        except Timeout:
            hint = f"stop it, or give this one another --model-tag. If there is no such run, delete {self.lock.lock_file}"
            raise UserError(f"another run is training into {self.directory}; {hint}") from None
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"cannot train into {self.directory}: {error}; use another --model-tag") from error
        with suppress(OSError):  # a run that fails before its first step leaves no empty folder
            self.directory.rmdir()

    def save(self, step: int, model_state: State, optimizer_state: State | None, meta: dict, tokenizer) -> None:
        """Copy all tensors to host memory and save them from there (see `save_checkpoint`). `meta` is not copied.

        Waits for the previous save. If a save fails, the main rank prints the error and training continues.
        """
        self._join()
        model_state = _copy_to_host(model_state) if self.compute.is_main else {}
        optimizer_state = optimizer_state and _copy_to_host(optimizer_state)
        arguments = step, model_state, optimizer_state, meta, tokenizer
        # Not a daemon: a process that exits early, for example because of an error, still finishes the save
        self.thread = threading.Thread(target=self._save, args=arguments)
        self.thread.start()

    def _save(self, step: int, *arguments) -> None:
        self.error = None
        try:
            save_checkpoint(self.directory, step, *arguments, self.compute, self.keep_last, self.group)
            message = f"saved step {step} in {self.directory}"
        except Exception as error:
            self.error = error
            message = f"error: step {step} was not saved: {error}; training continues, earlier checkpoints are intact"
        with suppress(OSError, ValueError):  # stdout may be closed
            print0(message)

    def _join(self) -> None:
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(timeout=1)
            self.compute.heartbeat()

    def wait(self) -> None:
        """Wait for the save in flight; raises the error of the last save, if it failed."""
        self._join()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """`wait`, then release the folder."""
        try:
            self.wait()
        finally:
            self.lock.release()


def _copy_to_host(state: State) -> State:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
