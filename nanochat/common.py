"""What every other file stands on: where we run, where files go, how we fail.

Nothing here imports a sibling, and torch is imported only inside functions, so that
`python -m scripts.X --help` answers at once. This is the only file that reads the
environment; everything else receives its device, rank and dtype as arguments.

Many ranks fail as one: a rank that raises leaves its error where torchrun finds it, and a
`Watch` in every rank ends those that are frozen or hang. torchrun then ends the others and
shows that error last.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    import torch


class UserError(ValueError):
    """A mistake that a person can mend. Its message says what happened and what to do next."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`, turning a mistake of the user's into one line and exit code 1."""
    try:
        main()
    except BrokenPipeError:  # whoever read our output has left: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = _users_mistake(error)
        if ranks()[2] > 1:
            _fail_among_ranks(error, line)
        if line is None:
            raise
        sys.exit(line)


def _users_mistake(error: Exception) -> str | None:
    """The one line to show for what a person can mend, None for what is a fault of the program."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        where = f": {error.filename}" if error.filename else ""
        return (
            f"error: {error.strerror}{where}. Free some space or point NANOCHAT_BASE_DIR "
            f"(now {base_dir_path()}) at a folder that can be written, then run this again."
        )
    return None


def _fail_among_ranks(error: Exception, line: str | None) -> None:
    """End this rank by `error` so that torchrun shows the error of the rank that failed first."""
    rank, threads = ranks()[0], threading.enumerate()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on torchrun may end us at any moment
    for thread in threads:
        if hasattr(thread, "pulse"):  # it belongs to the watch, which must not take what follows for a hang
            thread.pulse.armed = False
    if _is_loss_of_contact(error):
        # The error of the rank we lost is the one to show. If torchrun knows of none, it was ours after all.
        _tell(f"rank {rank} lost contact with another rank; its error is shown by torchrun")
        time.sleep(15)
    text = line or "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    _record_error(text)
    for thread in threads:
        if thread.name == "save":  # a checkpoint in flight may finish, however slow the disk
            _tell(f"rank {rank} has failed and ends when its checkpoint is saved: {text.splitlines()[-1]}")
            thread.join()
    if line and rank > 0:
        time.sleep(2)  # a mistake of all ranks is told by rank 0 alone, upon which torchrun ends us
        text = f"rank {rank}: {line}"
    _leave(text)


def _is_loss_of_contact(error: Exception) -> bool:
    """Whether a collective failed, as it does when another rank is gone."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "NCCL" in str(error)


def _record_error(text: str, file: str | None = None) -> None:
    """Leave `text` where torchrun looks for the error of this rank, or of the one whose `file` is given."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE") if file is None else file
    if file and not os.path.exists(file):  # the first error is the cause of those after it
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = {"message": {"message": text.splitlines()[-1], "extraInfo": extra}}
        try:
            Path(file).write_text(json.dumps(content), encoding="utf-8")
        except OSError:  # the disk is full, perhaps; torchrun would fail by half a file
            with suppress(OSError):
                os.unlink(file)


def _tell(text: str) -> None:
    """Print to stderr, if anybody still reads it."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _leave(text: str) -> None:
    """End this process at once, from any thread, waiting neither for other threads nor for other ranks."""
    try:
        _tell(text)
        _record_error(text)
        sys.stdout.flush()
    finally:
        os._exit(1)


# -----------------------------------------------------------------------------
# Folders and addresses


def base_dir_path() -> Path:
    """Where all artifacts live: `$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")


def get_base_dir() -> Path:
    """The base folder, made if it is not there yet."""
    path = base_dir_path()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic(path: str | os.PathLike):
    """Yield a temporary path beside `path` for a file or folder; what was written there replaces `path` as a whole.

    It is flushed to the disk and renamed only when the block ends without an exception, else it is removed.

    >>> with atomic("a.txt") as tmp:
    ...     tmp.write_text("complete or absent")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    replaced = tmp.with_name(f"{tmp.name}.replaced")
    try:
        yield tmp
        for written in [*tmp.rglob("*"), tmp] if tmp.is_dir() else [tmp]:
            _flush(written)
        if path.is_dir():  # a folder that is not empty cannot be replaced by one rename
            path.rename(replaced)
        tmp.replace(path)
        _flush(path.parent)
    finally:
        for leftover in (tmp, replaced):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hub_endpoint() -> str:
    """Address of the data hub without a trailing slash: `HF_ENDPOINT` where it is set."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def file_url(public_url: str) -> str:
    """Where to fetch a file that does not live on the hub.

    `$NANOCHAT_FILES_URL/NAME` replaces the public address where that variable is set:
    with `NANOCHAT_FILES_URL=http://mirror`, `https://a.b/c/words.txt` -> `http://mirror/words.txt`.
    """
    mirror = os.environ.get("NANOCHAT_FILES_URL")
    return f"{mirror.rstrip('/')}/{public_url.rsplit('/', 1)[-1]}" if mirror else public_url


# -----------------------------------------------------------------------------
# Compute: the device and our place among the ranks


def ranks() -> tuple[int, int, int]:
    """(rank, local_rank, world_size) as torchrun set them; (0, 0, 1) without torchrun."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


def cores_per_rank() -> int:
    """How many cores of this machine fall to each of the ranks on it, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def restarts() -> int:
    """How often this job was started again: by torchrun for a failure on this very node, or by Slurm (`--requeue`)."""
    return sum(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def job_name() -> str:
    """What torchrun and Slurm call this job, the same after a restart."""
    return "/".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"))


class Pulse:
    """Signs of life of this rank, which the other ranks watch."""

    def __init__(self):
        self.beats = 0  # grows with all that this rank gets done
        self.meetings = 0  # how often it has gone to meet the other ranks; who lags behind is who the others wait for
        self.armed = False  # whether a long time without a beat means that something hangs
        self.patience = 0.0  # seconds without a beat that are no hang yet, if more than PATIENCE: steps may be slow
        self.done = False  # it has come to its end and may vanish


@dataclass(frozen=True)
class Compute:
    """Where this process runs. Passed down explicitly; made once by `compute_init`."""

    device: torch.device
    dtype: torch.dtype  # what matrix products run in
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, n: int) -> range:
        """Which of n things that are dealt to the ranks in turn are this rank's: of 7 on rank 1 of 3, 1 and 4."""
        return range(self.rank, n, self.world_size)

    def heartbeat(self) -> None:
        """Tell that something got done. Long work calls this every few seconds."""
        self.pulse.beats += 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all ranks, on every rank."""
        if self.world_size == 1:
            return x
        import torch.distributed as dist

        x = x.clone()
        with self._meeting():
            dist.all_reduce(x)
        return x

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of `x` over all ranks, on every rank."""
        return self.sum(x) / self.world_size

    def gather(self, value, group=None) -> list:
        """Every rank's `value` (what pickle can hold), in order of rank, on every rank.

        A process group other than the default one is for other threads, whose meetings are not counted.
        """
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size
        with self._meeting() if group is None else nullcontext():
            dist.all_gather_object(values, value, group=group)
        return values

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on the main rank, on every rank; its UserError or OSError is raised on every rank.

        For what only one rank may do (write a folder) or must decide (which checkpoint is the newest).
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except (UserError, OSError) as error:
                failure = error
        result, failure = self.gather((result, failure))[0]
        if failure is not None:
            raise failure
        return result

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the main rank, which fetches what it needs, then on the others, which find it there.

        A UserError or OSError on any rank is raised on every rank.
        """
        result, failure = None, None
        for my_turn in (self.is_main, not self.is_main):
            if my_turn:
                try:
                    result = work()
                except (UserError, OSError) as error:
                    failure = error
            failures = [there for there in self.gather(failure) if there is not None]
            if failures:
                raise failures[0]
        return result

    def barrier(self) -> None:
        self.gather(None)

    @contextmanager
    def _meeting(self):
        self.pulse.meetings += 1
        yield
        self.heartbeat()


def compute_dtype(device_type: str) -> torch.dtype:
    """bfloat16 on CUDA from sm80 on, float32 elsewhere; `NANOCHAT_DTYPE` overrides."""
    import torch

    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    wanted = os.environ.get("NANOCHAT_DTYPE")
    if wanted:
        if wanted not in names:
            raise UserError(f"NANOCHAT_DTYPE={wanted!r} is not known; use one of {', '.join(names)}")
        return names[wanted]
    if device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float32


def compute_init(device_type: str = "") -> Compute:
    """Choose the device (cuda, then mps, then cpu, unless named) and join the other ranks, if any."""
    import torch

    if device_type not in ("", "cuda", "mps", "cpu"):
        raise UserError(f"--device-type {device_type!r} is not known; use cuda, mps or cpu")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device_type = device_type or next(name for name, there in available.items() if there)
    if not available[device_type]:
        raise UserError(f"--device-type {device_type} was asked for, but PyTorch {torch.__version__} finds none here")
    rank, local_rank, world_size = ranks()
    torch.manual_seed(42)
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
                f"start as many ranks, with torchrun --nproc-per-node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device(device_type)
        _keep_freed_memory()
    compute = Compute(device, compute_dtype(device_type), rank, local_rank, world_size)
    if world_size > 1:
        _join_ranks(compute)
    return compute


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of giving it back to the system, where there is glibc.

    By default a block of megabytes, which is what a tensor is, is given back and taken anew for every
    operation, and each of its pages is then cleared by the system first. That can take longer than the
    operation itself (dev/LOG.md, 11).
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def share_cores() -> None:
    """For a server on a CPU, before torch is loaded: compute threads that wait for one another go to sleep sooner.

    By default they spin, and beside one busy process, such as a browser on the same laptop, each wait then takes
    as long as that process is let run: a few tokens a second remain (dev/LOG.md, 11).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _join_ranks(compute: Compute) -> None:
    import torch
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (address and port):
        raise UserError(f"WORLD_SIZE is {compute.world_size} but MASTER_ADDR is not set; start the ranks with torchrun")
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    if compute.device.type == "cpu" and several and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(cores_per_rank())  # this 1 is what torchrun sets where nothing is set

    # torchrun's own store is there before the ranks are: without it torchrun has been killed, and nobody would end us.
    reach = PATIENCE if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else JOINING
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=reach)))
    start = _agree_on_start(store, compute.rank, compute.world_size)
    watch_store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=PATIENCE))
    Watch(dist.PrefixStore(f"{start}/watch", watch_store), compute.pulse, compute.rank, compute.world_size).start()
    store.set_timeout(timedelta(seconds=MEETING))
    # Tensors on the GPU go by NCCL; objects and what is on the CPU go by gloo.
    backend = "cpu:gloo,cuda:nccl" if compute.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"{start}/group", store),
        rank=compute.rank,
        world_size=compute.world_size,
        timeout=timedelta(seconds=MEETING),
    )
    _check_base_dir_is_shared(compute, start)


def _agree_on_start(store, rank: int, world_size: int) -> str:
    """A name for this start of the job, the same on all its ranks and on no other start.

    torchrun starts ranks again with the store that the former ones wrote to, and counts restarts on each
    node apart, so what is found there may come from the dead. Rank 0 answers every greeting, also of the dead,
    until every rank has shown that it heard.
    """
    mine = secrets.token_hex(8)
    store.set(f"hello/{rank}", mine)
    if rank > 0:
        store.wait([f"welcome/{mine}"], timedelta(seconds=JOINING))
        start = store.get(f"welcome/{mine}").decode()
        store.set(f"{start}/joined/{rank}", "")
        return start
    missing, end = set(range(1, world_size)), time.monotonic() + JOINING
    while missing:
        if time.monotonic() > end:
            names = ", ".join(map(str, sorted(missing)))
            raise UserError(f"after {JOINING:.0f} s these of {world_size} ranks have not started: {names}; see their output")
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"{mine}/joined/{other}"])}
        time.sleep(0.05)
    return mine


def _check_base_dir_is_shared(compute: Compute, start: str) -> None:
    """A file that rank 0 makes in the base folder must show up on all nodes; network folders take seconds."""
    file = base_dir_path() / f".shared-{start}"
    try:
        compute.on_main(lambda: get_base_dir() and file.touch())
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES):  # to evaluate, a folder that can only be read will do
            return
        raise
    try:
        seen = any(file.exists() or time.sleep(0.5) for _ in range(20))
        blind = sorted({host for host in compute.gather(None if seen else socket.gethostname()) if host})
    finally:
        if compute.is_main:
            file.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{', '.join(blind)} cannot see what rank 0 writes to its base folder: NANOCHAT_BASE_DIR "
            f"(here {base_dir_path()}) must be one folder that all nodes share"
        )


def compute_cleanup(compute: Compute) -> None:
    """Leave the other ranks, once all of them have come to their end."""
    if compute.world_size > 1:
        import torch.distributed as dist

        compute.pulse.done = True
        compute.barrier()
        dist.destroy_process_group()


def print0(*args, **kwargs) -> None:
    """Print on the main rank only."""
    if ranks()[0] == 0:
        print(*args, **kwargs, flush=True)


def wandb_run(project: str, run: str, config: dict):
    """A Weights & Biases run on the main rank when `--run` names one, else None."""
    if run == "dummy" or ranks()[0] != 0:
        return None
    import wandb

    return wandb.init(project=project, name=run, config=config)


# -----------------------------------------------------------------------------
# The watch over the ranks

PERIOD = 2.0  # seconds between two looks at the other ranks
PATIENCE = 20.0  # seconds without a sign of life until something is done about it
GRACE = 10.0  # seconds more for the rank whose turn it is, and for torchrun, until the others act too
JOINING = 300.0  # seconds for all ranks to start; a cold network folder makes imports slow
MEETING = 7200.0  # seconds that a collective may wait: ranks compile and read at different speeds, and the watch finds hangs


class Watch:
    """Ends the ranks when one of them is frozen, when all wait for ever, or when torchrun is gone.

    The ranks show their pulse to one another in torchrun's store. A rank whose process stands still is killed
    by a neighbour on its machine, or else given up by all. Where all processes live but nothing gets done, those
    that have gone to the fewest meetings are the ones that the others wait for: they show where they are and
    leave. Patience is counted in looks, not by the clock, so that a job may be suspended as a whole and continued.
    """

    def __init__(self, store, pulse: Pulse, rank: int, world_size: int):
        self.store, self.pulse, self.rank = store, pulse, rank
        self.keys = [str(other) for other in range(world_size)]
        self.sign = {"tick": 0, "pid": os.getpid(), "host": socket.gethostname()}
        self.sign["error_file"] = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        self.launcher = os.getppid()
        self.news = queue.Queue()  # the signs of all ranks, [] where the store fails
        self.over = threading.Event()
        self.ticks = [0] * world_size
        self.still = [0] * world_size  # for how many looks each rank has not ticked
        self.beats = 0
        self.idle = self.longest_idle = 0  # for how many looks nobody got anything done
        self.killed = set()

    def start(self) -> None:
        self._show()  # reading waits for those who have never shown a sign
        # The store may also answer never, so who talks to it is not who listens.
        talk = threading.Thread(target=self._talk, daemon=True)
        talk.pulse = self.pulse  # a rank that fails finds it here
        talk.start()
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(lambda: (self.over.set(), talk.join(5)))  # Python must not end inside a call of the store

    def _show(self) -> None:
        self.sign |= {"tick": self.sign["tick"] + 1, **vars(self.pulse)}
        self.store.set(str(self.rank), json.dumps(self.sign))

    def _talk(self) -> None:
        while not self.over.wait(PERIOD):
            try:
                self._show()
                self.news.put([json.loads(sign) for sign in self.store.multi_get(self.keys)])
            except RuntimeError:
                self.news.put([])

    def _listen(self) -> None:
        silence = 0  # one call that fails says little
        while not self.over.is_set():
            try:
                signs = self.news.get(timeout=PERIOD)
            except queue.Empty:
                signs = []
            silence = 0 if signs else silence + 1
            lost = silence * PERIOD >= PATIENCE or os.getppid() != self.launcher
            if lost and not self.pulse.done:
                _leave(f"error: rank {self.rank} stops, because torchrun, which started it, is gone or does not answer")
            if signs:
                self._look(signs)

    def _look(self, signs: list[dict]) -> None:
        ticks = [sign["tick"] for sign in signs]
        self.still = [still + 1 if new == old else 0 for still, new, old in zip(self.still, ticks, self.ticks)]
        self.ticks = ticks
        running = [rank for rank, sign in enumerate(signs) if not sign["done"]]
        frozen = [rank for rank in running if self.still[rank] * PERIOD >= PATIENCE]
        if frozen:
            self._end_frozen(frozen[0], signs, [rank for rank in running if rank not in frozen])

        beats, before = sum(sign["beats"] for sign in signs), self.beats
        self.beats = beats
        answering = all(self.still[rank] <= 2 for rank in running)
        if running and beats == before and answering and all(signs[rank]["armed"] for rank in running):
            self.idle += 1
        else:
            self.longest_idle = max(self.longest_idle, self.idle)
            self.idle = 0
        fewest = min((signs[rank]["meetings"] for rank in running), default=0)
        late = [rank for rank in running if signs[rank]["meetings"] == fewest]
        patience = max(PATIENCE, 3 * self.longest_idle * PERIOD, *(sign["patience"] for sign in signs))
        if self.idle * PERIOD >= patience + (0 if self.rank in late else GRACE):
            self._end_hang(late)

    def _end_frozen(self, rank: int, signs: list[dict], live: list[int]) -> None:
        sign, seconds = signs[rank], self.still[rank] * PERIOD
        line = (
            f"error: rank {rank} (pid {sign['pid']} on {sign['host']}) has not answered for {seconds:.0f} s; "
            "its process is frozen or dead, or its machine is gone"
        )
        neighbours = [other for other in live if signs[other]["host"] == sign["host"]]
        ours = self.rank in (neighbours or live)[:1]
        if seconds >= PATIENCE + GRACE or (ours and not neighbours):
            _leave(line)
        # Machines may bear the same name, but torchrun's folder for this rank is on one only.
        if ours and rank not in self.killed and os.path.exists(os.path.dirname(sign["error_file"])):
            self.killed.add(rank)
            _tell(line)
            _record_error(line, sign["error_file"])
            with suppress(OSError):
                os.kill(sign["pid"], signal.SIGKILL)

    def _end_hang(self, late: list[int]) -> None:
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        where, seconds = stack[-1], self.idle * PERIOD
        what = "hangs" if self.rank in late else f"waits in vain for rank {late[0]}"
        _leave(
            "".join(traceback.format_list(stack))
            + f"error: rank {self.rank} {what}: nothing got done for {seconds:.0f} s; "
            f"it is at {where.filename}:{where.lineno} in {where.name}"
        )
