"""What every other file builds on: the device and our place among the ranks, folders, errors.

This is the only file that reads the environment. torch is imported inside functions only, so that
`python -m scripts.X --help` answers at once.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import re
import secrets
import shutil
import signal
import sys
import time
import timeit
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = 3600.0  # seconds that a collective may wait: ranks compile and load at different speeds
HANG_TIMEOUT = 1800.0  # seconds without a heartbeat after which a training rank exits; NANOCHAT_HANG_TIMEOUT overrides
NO_MEMORY = "allocate memory|out of memory|Storage size calculation overflowed"  # in PyTorch's errors
SPIN_COUNT = "5000"  # of OpenMP's waiting threads, which then sleep: spinning slows a busy machine (dev/LOG.md, 11)
# A terminal obeys control characters, so those that a model or a file contains are shown: ESC as \x1b
CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class UserError(ValueError):
    """A mistake that the user can correct. Its message says what happened and what to do."""


class Unreachable(UserError):
    """Data that cannot be had now: a hub that does not answer, a file that is missing."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a user's mistake is shown as one line, with exit code 1."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is loaded
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot encode a character
    try:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            _run_under_torchrun(main)
        else:
            main()
    except BrokenPipeError:  # the reader of our output has closed it: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = str(error)
        compiler_cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "torchinductor_"  # the latter is PyTorch's default
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, message):
            message = f"not enough memory ({message[:193]}); use a smaller --depth, --max-seq-len or --device-batch-size"
        elif isinstance(error, OSError) and compiler_cache in str(error.filename):
            message += "; set TORCHINDUCTOR_CACHE_DIR to a folder in which PyTorch can keep its cache"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            message += f"; free some space, or set NANOCHAT_BASE_DIR (now {base_dir_path()}) to a writable folder"
        elif not isinstance(error, UserError):
            raise
        line, rank = f"error: {message}", ranks()[0]
        if rank > 0:
            time.sleep(2)  # an error of all ranks is printed by rank 0 only, since torchrun then ends the others
            line = f"rank {rank}: {line}"
        sys.exit(line.translate(CONTROLS))


def _run_under_torchrun(main: Callable[[], None]) -> None:
    """Record an error where torchrun looks for it, so that its report shows the rank that failed first."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # if torchrun is killed, its ranks stop, too
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import record

    def run():
        try:
            main()
        except Exception as error:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on torchrun may end this process at any time
            if isinstance(error, DistError) or re.search("gloo/transport|NCCL", str(error)):
                time.sleep(15)  # another rank is gone; let torchrun see that rank's error first
            raise

    record(run)()


# -----------------------------------------------------------------------------
# Folders and addresses


def base_dir_path() -> Path:
    """Where all artifacts live: `$NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`. UserError if that cannot be a folder."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")
    try:
        if not str(path).isprintable():
            raise ValueError("it has characters that cannot be printed")
        path = path.expanduser()
        with suppress(FileNotFoundError):
            (path / ("x" * 250)).lstat()  # fails if the path is a file, lies below one, or has no room for the names in it
        return path
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~name` of no user
        reason = getattr(error, "strerror", error)
        raise UserError(f"NANOCHAT_BASE_DIR={str(path)[:200]!r} cannot be used ({reason}); set it to a writable folder") from error


def get_base_dir() -> Path:
    """The base folder, created if needed."""
    path = base_dir_path()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path} ({error.strerror}); set NANOCHAT_BASE_DIR to a writable folder") from error
    return path


@contextmanager
def atomic(path: str | os.PathLike):
    """Yield a temporary path beside `path`, for a new folder or a file, that is renamed to `path` at the end of the block.

    >>> with atomic("a.txt") as tmp:
    ...     tmp.write_text("complete or absent")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield tmp
        for written in [*tmp.rglob("*"), tmp]:
            flush_to_disk(written)
        tmp.replace(path)
        flush_to_disk(path.parent)
    finally:
        if tmp.is_dir():
            shutil.rmtree(tmp, ignore_errors=True)
        else:
            tmp.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hub_endpoint() -> str:
    """Address of the data hub without a trailing slash; `HF_ENDPOINT` overrides it."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def file_url(public_url: str) -> str:
    """The address of a file that is not on the hub: `$NANOCHAT_FILES_URL/NAME` where that is set, else `public_url`."""
    mirror = os.environ.get("NANOCHAT_FILES_URL")
    return f"{mirror.rstrip('/')}/{public_url.rsplit('/', 1)[-1]}" if mirror else public_url


# -----------------------------------------------------------------------------
# Compute: the device and our place among the ranks


def ranks() -> tuple[int, int, int]:
    """(rank, local_rank, world_size) as torchrun set them; (0, 0, 1) without torchrun."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


def cores_per_rank() -> int:
    """This machine's cores per rank on it, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def restarts() -> int:
    """How often this job was restarted: by torchrun after a failure on this node, or by Slurm (`--requeue`)."""
    return sum(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


@dataclass(frozen=True)
class Compute:
    """Where this process runs. Created once by `compute_init` and passed down explicitly."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, n: int) -> range:
        """This rank's share of n items that are assigned to the ranks in turn: of 7 on rank 1 of 3, items 1 and 4."""
        return range(self.rank, n, self.world_size)

    def heartbeat(self) -> None:
        """Start or restart the timer after which a rank that hangs prints its stacks and exits, so that torchrun ends the job."""
        if self.world_size > 1:
            timeout = os.environ.get("NANOCHAT_HANG_TIMEOUT", HANG_TIMEOUT)
            try:
                faulthandler.dump_traceback_later(float(timeout), exit=True)
            except (ValueError, OverflowError) as error:
                raise UserError(f"NANOCHAT_HANG_TIMEOUT={timeout} is not a number of seconds above 0") from error

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all ranks, on every rank."""
        if self.world_size == 1:
            return x
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x)
        return x

    def gather(self, value, group=None) -> list:
        """Every rank's `value`, of any picklable type, on every rank. A second thread needs a process `group` of its own."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def on_every_rank(self, work: Callable[[], Any], group=None) -> list:
        """The results of `work` on all ranks. An error on any rank is raised on every rank: a UserError or an OSError."""
        result = error = shared = None
        try:
            result = work()
        except Exception as caught:
            error = shared = caught
            if not isinstance(caught, UserError):  # others may not be pickled
                number = getattr(caught, "errno", None) or errno.EIO
                shared = OSError(number, f"on rank {self.rank}: {type(caught).__name__}: {caught}")
        outcomes = self.gather((result, shared), group)
        for failure in [error] + [failure for _, failure in outcomes]:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]

    def on_main(self, work: Callable[[], Any], group=None) -> Any:
        """The result of `work` on the main rank, on every rank, for what only one rank may do or decide; or its error."""
        return self.on_every_rank(lambda: work() if self.is_main else None, group)[0]

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Call `work` on the main rank, which downloads what it needs, then on the others, which find it on disk."""
        results = []  # of this rank, since a data set is too large to be sent
        for my_turn in (self.is_main, not self.is_main):
            self.on_every_rank(lambda: results.append(work()) if my_turn else None)
        return results[0]


def compute_dtype(device_type: str, training: bool = False) -> torch.dtype:
    """bfloat16 on CUDA from sm80 on, and for training on a CPU that is fast at it; else float32. `NANOCHAT_DTYPE` overrides."""
    import torch

    if name := os.environ.get("NANOCHAT_DTYPE"):
        if name not in ("bfloat16", "float16", "float32"):
            raise UserError(f"NANOCHAT_DTYPE={name!r} is not supported; use bfloat16, float16 or float32")
        return getattr(torch, name)
    if device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.bfloat16 if training and device_type == "cpu" and fast_bfloat16() else torch.float32


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones (with AMX, 4 to 8 times)."""
    import torch

    single = torch.ones(512, 512)
    half = single.bfloat16()
    times = [[timeit.timeit(lambda: x @ x, number=1) for x in (single, half)] for _ in range(10)]
    single_time, half_time = map(min, zip(*times))
    return half_time < single_time / 1.5


def compute_init(device_type: str = "", training: bool = False) -> Compute:
    """Choose the device (cuda, then mps, then cpu, unless named) and join the other ranks, if any."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name in present if present[name]]
    device_type = device_type or available[0]
    if device_type not in available:
        raise UserError(f"there is no device {device_type!r} here; use --device-type {' or '.join(available)}")
    rank, local_rank, world_size = ranks()
    torch.manual_seed(42)
    device = torch.device(device_type)
    if device_type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"local rank {local_rank} has no GPU: there are {count}; use torchrun --nproc-per-node={count}")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan every new length of a prompt for 0.4 s
        device = torch.device("cuda", local_rank)
    compute = Compute(device, compute_dtype(device_type, training), rank, local_rank, world_size)
    if world_size > 1:
        _join_ranks(compute)
        compute = replace(compute, dtype=compute.on_main(lambda: compute.dtype))  # speed is measured: all ranks alike
    return compute


def _join_ranks(compute: Compute) -> None:
    import torch
    import torch.distributed as dist

    if not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError(f"WORLD_SIZE is {compute.world_size} but MASTER_ADDR is not set; start the ranks with torchrun")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if compute.device.type == "cpu" and ranks_here > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(cores_per_rank())  # torchrun sets OMP_NUM_THREADS to 1 if it is not set
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(_agree_on_name(store, rank, world_size), store)
    # GPU tensors use NCCL; objects and CPU tensors use gloo
    backend = "cpu:gloo,cuda:nccl" if compute.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if ranks_here < world_size:
        _check_base_dir_is_shared(compute)


def _agree_on_name(store, rank: int, world_size: int) -> str:
    """A name for this start of the job, the same on all of its ranks and different from that of any other start.

    torchrun restarts ranks with the same store, in which gloo would find the addresses of dead ranks, and restarts are
    counted per node. So every rank announces a random key, and rank 0 answers each key until all ranks have its answer.
    """
    key = secrets.token_hex(8)
    store.set(f"key/{rank}", key)
    if rank > 0:
        name = store.get(f"name/{key}").decode()  # waits for it
        store.set(f"{name}/{rank}", "")
        return name
    missing, deadline = set(range(1, world_size)), time.monotonic() + COLLECTIVE_TIMEOUT
    while missing:
        for other in missing:
            if store.check([f"key/{other}"]):
                store.set(f"name/{store.get(f'key/{other}').decode()}", key)
        missing = {other for other in missing if not store.check([f"{key}/{other}"])}
        if time.monotonic() > deadline:
            raise UserError(f"ranks {sorted(missing)} of {world_size} have not started; see their output")
        time.sleep(0.05)
    return key


def _check_base_dir_is_shared(compute: Compute) -> None:
    """Raise UserError unless a file that rank 0 creates in the base folder appears on all nodes."""
    file = base_dir_path() / f".shared-{compute.gather(secrets.token_hex(8))[0]}"
    if not compute.on_main(lambda: os.access(get_base_dir(), os.W_OK)):
        return  # a read-only folder is enough for evaluation
    compute.on_main(file.touch)
    seen = any(file.exists() or time.sleep(0.5) for _ in range(20))  # network file systems take seconds
    all_see_it = all(compute.gather(seen))
    compute.on_main(file.unlink)
    if not all_see_it:
        raise UserError(f"NANOCHAT_BASE_DIR (here {base_dir_path()}) must be one folder that all nodes share, and is not")


def compute_cleanup(compute: Compute) -> None:
    """Leave the process group after all ranks have finished."""
    if compute.world_size > 1:
        import torch.distributed as dist

        faulthandler.cancel_dump_traceback_later()
        compute.gather(None)  # wait for all
        dist.destroy_process_group()


def print0(*args, **kwargs) -> None:
    """Print on the main rank only, with control characters shown."""
    if ranks()[0] == 0:
        print(*(str(arg).translate(CONTROLS) for arg in args), **kwargs, flush=True)


def raise_file_limit() -> int:
    """Allow this process as many open files as the system permits; returns how many connections to keep."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    with suppress(ValueError, OSError):  # macOS may refuse
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    # The other half is for files, and for connections that arrive within a second
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def check_wandb(run: str) -> None:
    """Raise UserError if `--run` names a wandb run and there is no login. Called before anything is built."""
    if run == "dummy" or ranks()[0] != 0:
        return
    import wandb

    try:
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False):
            return
        reason = ""
    except (wandb.Error, ValueError) as error:  # ValueError: of its settings
        reason = f" ({' '.join(str(error).split())})"
    raise UserError(f"--run={run} needs a login to wandb{reason}: run `wandb login`, set WANDB_MODE=offline, or omit --run")


def wandb_run(project: str, run: str, config: dict, id: str | None = None):
    """A Weights & Biases run on the main rank if `--run` names one, else None. Pass a saved run's `.id` to continue it."""
    if run == "dummy" or ranks()[0] != 0:
        return None
    import wandb

    try:
        return wandb.init(project=project, name=run, config=config, id=id, resume="allow" if id else None)
    except wandb.Error as error:
        raise UserError(f"wandb could not start: {error}; set WANDB_MODE=offline, or omit --run") from error
