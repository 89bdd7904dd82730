"""Saving in the background: what is saved, errors, the lock of a run's folder."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import torch
from test_checkpoint_manager import OPTIMIZER, assert_same, names_in, some_state
from tiny import BYTES, CPU

from nanochat import checkpoint_manager as cm
from nanochat.checkpoint_manager import list_steps, load_checkpoint, load_optimizer, verify
from nanochat.common import UserError
from nanochat.saver import Saver


def test_a_save_has_the_state_at_its_call_and_only_the_next_save_waits_for_it(tmp_path, monkeypatch, capsys):
    unblocked, write = threading.Event(), cm._write_tensors
    monkeypatch.setattr(cm, "_write_tensors", lambda *arguments: unblocked.wait(60) and write(*arguments))
    saver = Saver(tmp_path, CPU)
    model, optimizer = some_state(), {name: tensor.clone() for name, tensor in OPTIMIZER.items()}
    saver.save(1, model, optimizer, {}, BYTES)
    for tensor in (*model.values(), *optimizer.values()):
        tensor.zero_()  # training continues
    assert list_steps(tmp_path) == []
    threading.Timer(0.5, unblocked.set).start()
    saver.save(2, model, None, {}, BYTES)
    assert 1 in list_steps(tmp_path)
    saver.close()
    assert_same(load_checkpoint(tmp_path, 1, CPU)[0], some_state())
    assert_same(load_optimizer(tmp_path, 1, OPTIMIZER, rank=0), OPTIMIZER)
    assert capsys.readouterr().out == f"saved step 1 in {tmp_path}\nsaved step 2 in {tmp_path}\n"


def test_a_failed_save_is_printed_at_once_and_raised_at_the_end_only(tmp_path, capsys):
    """A full disk, for which a limit of the size of files stands in."""
    saver = Saver(tmp_path, CPU)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        saver.save(1, {"w": torch.zeros(100_000)}, None, {}, BYTES)
        saver.thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out = capsys.readouterr().out
    assert out.startswith("error: step 1 was not saved: cannot write ") and "File too large" in out and out.count("\n") == 1
    with pytest.raises(UserError, match="File too large"):
        saver.wait()
    assert names_in(tmp_path) == []
    saver.save(2, some_state(), None, {}, BYTES)
    saver.close()
    assert list_steps(tmp_path) == [2]
    Saver(tmp_path, CPU, timeout=1).close()  # the folder was released


HOLDER = """
import sys, time
from pathlib import Path
from test_checkpoint_manager import BYTES, CPU, some_state
from nanochat import checkpoint_manager as cm
from nanochat.saver import Saver

if sys.argv[2] == "saving":
    real = cm._write_tensors
    cm._write_tensors = lambda path, state: [real(path, state), print("in the middle", flush=True), time.sleep(600)]
Saver(Path(sys.argv[1]), CPU).save(1, some_state(), None, {}, BYTES)
"""


def start_holder(folder, case):
    """A process that locks the folder and saves, with the imports of this one; it ends at once or hangs while saving."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(folder), case]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_one_run_at_a_time_and_a_killed_one_releases_the_folder(tmp_path):
    with start_holder(tmp_path, "saving") as holder:
        killer = threading.Timer(0.5, holder.kill)
        try:
            assert holder.stdout.readline() == "in the middle\n"
            with pytest.raises(UserError, match=f"another run is training into {tmp_path}; .*delete .*/.{tmp_path.name}.lock"):
                Saver(tmp_path, CPU, timeout=0.2)
        finally:
            killer.start()
        saver = Saver(tmp_path, CPU)  # waits for the run that is being killed
    assert len([name for name in names_in(tmp_path) if name.startswith(".step_000001")]) == 1
    saver.save(2, some_state(), None, {}, BYTES)
    saver.close()
    assert names_in(tmp_path) == ["step_000002"]


def test_a_process_that_ends_finishes_its_save(tmp_path):
    with start_holder(tmp_path, "ending") as holder:
        assert holder.wait(60) == 0
    verify(tmp_path, 1)
