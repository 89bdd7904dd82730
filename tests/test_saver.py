"""Saving: whole or absent, on every rank or on none, while training goes on."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from test_checkpoint_manager import CPU, OPTIMIZER, assert_same, save, some_state, truncate

from nanochat import common
from nanochat import saver as saving
from nanochat.checkpoint_manager import find_last_step, list_steps, load_checkpoint, verify
from nanochat.common import Compute, UserError, Watch
from nanochat.saver import Saver, save_checkpoint


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, seed=0)
    save(tmp_path, 3, seed=1)
    assert_same(load_checkpoint(tmp_path, 3, CPU)[0], some_state(1))
    assert names_in(tmp_path) == ["step_000003"]


def test_keep_last_keeps_what_was_saved_last(tmp_path):
    save(tmp_path, 900)  # of an earlier, longer run under the same tag
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=2)
    assert list_steps(tmp_path) == [2, 3]


def test_keep_last_counts_whole_ones_only(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    truncate(tmp_path / "step_000005" / "model.safetensors")
    (tmp_path / "step_000004" / "meta.json").unlink()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    save(tmp_path, 6, keep_last=2)
    assert names_in(tmp_path) == ["notes.txt", "step_000003", "step_000004", "step_000005", "step_000006"]
    save(tmp_path, 7, keep_last=2)
    assert list_steps(tmp_path) == [6, 7]


def test_keep_last_never_removes_what_it_has_just_saved(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(saving.time, "time", lambda: now + 9999)  # a clock that was wrong once
    save(tmp_path, 1)
    monkeypatch.undo()
    save(tmp_path, 2, keep_last=1)
    assert list_steps(tmp_path) == [2]


# -----------------------------------------------------------------------------
# Complete or absent


@pytest.mark.parametrize("moment", ["_write_tensors", "_write_meta", "_publish", "_flush"])
def test_a_crash_at_any_moment_leaves_the_checkpoints_before_it(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)
    real = getattr(saving, moment)

    def crash(*args):
        if moment != "_publish":
            real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, moment, crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names_in(tmp_path) == ["step_000001"]
    assert find_last_step(tmp_path) == 1


def test_what_a_killed_process_left_is_never_seen_and_is_cleared_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / ".step_000002.0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of one")
    assert list_steps(tmp_path) == [1] and find_last_step(tmp_path) == 1
    save(tmp_path, 2)
    assert names_in(tmp_path) == ["step_000001", "step_000002"]


def test_a_file_that_outgrows_its_limit_is_an_oserror_and_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            save_checkpoint(tmp_path, 2, {"w": torch.zeros(100_000)}, None, {}, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG and "model.safetensors" in raised.value.filename
    assert names_in(tmp_path) == ["step_000001"]


def test_a_full_disk_keeps_its_errno(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.os, "fsync", full)
    with pytest.raises(OSError) as raised:
        save(tmp_path / "d2", 2)
    assert raised.value.errno == errno.ENOSPC and "model.safetensors" in raised.value.filename
    assert names_in(tmp_path / "d2") == []


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
        with pytest.raises(PermissionError):
            Saver(tmp_path, CPU)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)
    assert list_steps(tmp_path) == [1]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    def flip(path):
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(saving, "_flush", flip)
    with pytest.raises(OSError, match="reads back changed"):
        save(tmp_path, 1)
    assert list_steps(tmp_path) == []


# -----------------------------------------------------------------------------
# Many ranks


def test_every_rank_adds_its_file_and_its_place_in_the_data(tmp_path, run_ranks, monkeypatch):
    import nanochat.lanes

    monkeypatch.setattr(nanochat.lanes, "merge_states", lambda states: {"merged": states})

    def work(compute):
        meta = {"loader_state": {"lane": compute.rank}, "lr": 0.1}
        return save_checkpoint(tmp_path, 4, {"w": torch.tensor(compute.rank)}, {"s": torch.tensor(compute.rank)}, meta, compute)

    folder = run_ranks(3, work)[2]
    meta = verify(tmp_path, 4)
    assert names_in(folder) == ["meta.json", "model.safetensors"] + [f"optimizer_rank{rank}.safetensors" for rank in range(3)]
    assert sorted(meta["files"]) == names_in(folder)[1:] and meta["world_size"] == 3 and meta["lr"] == 0.1
    assert meta["loader_state"] == {"merged": [{"lane": 0}, {"lane": 1}, {"lane": 2}]}
    assert load_checkpoint(tmp_path, 4, CPU)[0] == {"w": torch.tensor(0)}


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "part"), RuntimeError("something odd")])
def test_a_failure_on_one_rank_is_one_on_all_and_leaves_nothing(tmp_path, run_ranks, monkeypatch, failing, error):
    save(tmp_path, 1)
    real = saving._write_tensors

    def write(path, state):
        if path.name == f"optimizer_rank{failing}.safetensors":
            raise error
        return real(path, state)

    monkeypatch.setattr(saving, "_write_tensors", write)

    def work(compute):
        with pytest.raises(Exception) as raised:
            save_checkpoint(tmp_path, 2, some_state(), OPTIMIZER, {}, compute)
        return raised.value

    for rank, seen in enumerate(run_ranks(3, work)):
        if rank == failing:
            assert seen is error
        else:
            assert isinstance(seen, OSError) and f"on rank {failing}: " in str(seen)
            assert getattr(error, "strerror", "something odd") in str(seen)
            assert seen.errno == getattr(error, "errno", errno.EIO)
    assert names_in(tmp_path) == ["step_000001"]


# -----------------------------------------------------------------------------
# In the background


@pytest.fixture
def held_back(monkeypatch):
    """Saves do not begin to write before this event is set."""
    event, real = threading.Event(), saving._write_tensors

    def write(path, state):
        assert event.wait(60)
        return real(path, state)

    monkeypatch.setattr(saving, "_write_tensors", write)
    return event


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path, held_back):
    saver = Saver(tmp_path, CPU)
    model, optimizer = some_state(), {name: tensor.clone() for name, tensor in OPTIMIZER.items()}
    saver.save(3, model, optimizer, {})
    for tensor in (*model.values(), *optimizer.values()):
        tensor.zero_()  # training goes on
    assert list_steps(tmp_path) == []
    held_back.set()
    saver.close()
    assert_same(load_checkpoint(tmp_path, 3, CPU, OPTIMIZER)[0], some_state())
    assert_same(load_checkpoint(tmp_path, 3, CPU, OPTIMIZER)[1], OPTIMIZER)


def test_a_save_waits_for_the_one_before_it_and_shows_that_it_lives(tmp_path, held_back, capsys):
    saver = Saver(tmp_path, CPU)
    saver.save(1, some_state(), None, {})
    threading.Timer(1.5, held_back.set).start()
    beats = CPU.pulse.beats
    saver.save(2, some_state(), None, {})
    assert 1 in list_steps(tmp_path) and CPU.pulse.beats > beats
    saver.close()
    assert capsys.readouterr().out == f"saved step 1 in {tmp_path}\nsaved step 2 in {tmp_path}\n"


def test_a_save_that_fails_is_told_at_once_and_raised_at_the_end_only(tmp_path, monkeypatch, capsys):
    saver = Saver(tmp_path, CPU)

    def full(path, state):
        raise OSError(errno.ENOSPC, "No space left on device", "disk")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_write_tensors", full)
        saver.save(1, some_state(), None, {})
        saver.thread.join()
    told = "error: step 1 was not saved: [Errno 28] No space left on device: 'disk'; training goes on, the checkpoints before it stand"
    assert capsys.readouterr().out == told + "\n"
    with pytest.raises(OSError, match="No space left"):
        saver.wait()
    saver.save(2, some_state(), None, {})
    saver.wait()  # this one is saved
    monkeypatch.setattr(saving, "_write_tensors", full)
    saver.save(3, some_state(), None, {})
    with pytest.raises(OSError, match="No space left"):
        saver.close()
    assert list_steps(tmp_path) == [2]
    Saver(tmp_path, CPU, patience=1).close()  # the folder is free all the same


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_a_save_whose_words_nobody_reads_is_a_save(tmp_path, monkeypatch, error):
    def gone(*args):
        raise error

    monkeypatch.setattr(saving, "print0", gone)
    uncaught = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    saver = Saver(tmp_path, CPU)
    saver.save(1, some_state(), None, {})
    saver.close()
    assert list_steps(tmp_path) == [1] and not uncaught


def test_a_rank_that_fails_finishes_its_save_which_is_no_hang(tmp_path, held_back, monkeypatch, capfd):
    compute, seen = Compute(torch.device("cpu"), torch.float32), []
    watch = Watch(torch.distributed.HashStore(), compute.pulse, rank=0, world_size=1)
    watch.start()
    compute.pulse.armed = True
    saver = Saver(tmp_path, compute)
    saver.save(1, some_state(), None, {})
    threading.Timer(1, held_back.set).start()
    monkeypatch.setattr(common, "_leave", lambda text: seen.append((text, list_steps(tmp_path), compute.pulse.armed)))
    try:
        common._fail_among_ranks(UserError("own"), "error: own")
    finally:
        watch.over.set()
        saver.close()
    assert seen == [("error: own", [1], False)]
    assert capfd.readouterr().err == "rank 0 has failed and ends when its checkpoint is saved: error: own\n"


@pytest.mark.parametrize("error", [NotImplementedError("flock"), OSError(errno.ENOLCK, "No locks available")])
def test_where_no_file_can_be_locked_saving_goes_on_without(tmp_path, monkeypatch, capsys, error):
    def acquire(self, timeout):
        raise error

    monkeypatch.setattr(saving.FileLock, "acquire", acquire)
    saver = Saver(tmp_path, CPU)
    saver.save(1, some_state(), None, {})
    saver.close()
    assert list_steps(tmp_path) == [1]
    assert capsys.readouterr().out.startswith(f"no file can be locked in {tmp_path}: ")


def start(code, *arguments, **variables):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


HOLDER = """
import sys, time
from pathlib import Path
from test_checkpoint_manager import CPU, some_state
from nanochat import saver as saving

if sys.argv[2] == "saving":
    real = saving._write_tensors
    saving._write_tensors = lambda path, state: [real(path, state), print("in the middle", flush=True), time.sleep(600)]
saver = saving.Saver(Path(sys.argv[1]), CPU)
saver.save(1, some_state(), None, {})
if sys.argv[2] == "ending":
    sys.exit("the run ends early")
time.sleep(600)
"""


def test_one_run_at_a_time_and_none_is_in_the_way_once_it_is_dead(tmp_path):
    holder = start(HOLDER, tmp_path, "saving", PYTHONPATH=os.pathsep.join(sys.path))
    try:
        assert holder.stdout.readline() == "in the middle\n"
        with pytest.raises(UserError, match=f"another run is training into {tmp_path}; .*--model-tag.*delete {tmp_path}/.lock"):
            Saver(tmp_path, CPU, patience=0.2)
        threading.Timer(0.5, holder.send_signal, (signal.SIGKILL,)).start()
        saver = Saver(tmp_path, CPU)  # waits for the run that is dying
    finally:
        holder.kill()
        holder.communicate()
    assert len([name for name in names_in(tmp_path) if name.startswith(".step_000001")]) == 1
    saver.save(2, some_state(), None, {})
    saver.close()
    assert names_in(tmp_path) == [".lock", "step_000002"]


def test_a_process_that_ends_early_finishes_its_save(tmp_path):
    holder = start(HOLDER, tmp_path, "ending", PYTHONPATH=os.pathsep.join(sys.path))
    holder.communicate(timeout=60)
    assert holder.returncode == 1
    verify(tmp_path, 1)


RANK = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from nanochat import saver as saving
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import Compute

dist.init_process_group("gloo")
rank, directory = dist.get_rank(), Path(sys.argv[1])
compute = Compute(torch.device("cpu"), torch.float32, rank, rank, 2)
saver = saving.Saver(directory, compute, keep_last=1)
mine = torch.full((1000,), 0.0)
for step in (1, 2, 3):
    mine.fill_(10 * step + rank)
    saver.save(step, {"w": mine}, {f"w.exp_avg[{1000 * rank}:{1000 * (rank + 1)}]": mine}, {"loader_state": None})
    for _ in range(50):  # as in training, the main threads meet while the others save
        mine.zero_()
        assert compute.sum(torch.ones(100)).tolist() == [2.0] * 100
saver.wait()
state = load_checkpoint(directory, 3, compute, {"w.exp_avg[500:1500]": torch.zeros(1000)})
assert state[0]["w"].tolist() == [30.0] * 1000
assert state[1]["w.exp_avg[500:1500]"].tolist() == [30.0] * 500 + [31.0] * 500

real = saving._write_tensors
def full(path, state):
    if rank == 1:
        raise OSError(28, "No space left on device", path.name)
    return real(path, state)
saving._write_tensors = full
saver.save(4, {"w": mine}, {"w.exp_avg": mine}, {})
try:
    saver.close()
except OSError as error:
    print("raised:", error)
dist.destroy_process_group()
"""


def test_two_processes_save_together_while_they_train(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [start(RANK, tmp_path, RANK=str(rank), **place) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "saved step 3" in outputs[0] and "error: step 4 was not saved: [Errno 28] on rank 1: No space left" in outputs[0]
    assert "raised: [Errno 28] on rank 1: No space left on device: 'optimizer_rank1.safetensors'" in outputs[0]
    assert "raised: [Errno 28] No space left on device" in outputs[1] and "saved" not in outputs[1]
    assert names_in(tmp_path) == [".lock", "step_000003"]  # keep_last
