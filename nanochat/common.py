"""What every other file stands on: where we run, where files go, how we fail.

Nothing here imports a sibling, and torch is imported only inside functions, so that
`python -m scripts.X --help` answers at once. This is the only file that reads the
environment; everything else receives its device, rank and dtype as arguments.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    import torch


class UserError(ValueError):
    """A mistake that a person can mend. Its message says what happened and what to do next."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`, turning a mistake of the user's into one line and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever read our output has left: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f": {error.filename}" if error.filename else ""
        sys.exit(
            f"error: {error.strerror}{where}. Free some space or point NANOCHAT_BASE_DIR "
            f"(now {base_dir_path()}) at a folder that can be written, then run this again."
        )
    except KeyboardInterrupt:
        sys.exit(130)


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
    return tuple(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


@dataclass(frozen=True)
class Compute:
    """Where this process runs. Passed down explicitly; made once by `compute_init`."""

    device: torch.device
    dtype: torch.dtype  # what matrix products run in
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all ranks, on every rank."""
        if self.world_size == 1:
            return x
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x)
        return x

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of `x` over all ranks, on every rank."""
        return self.sum(x) / self.world_size

    def barrier(self) -> None:
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()


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
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device(device_type)
    if world_size > 1:
        import torch.distributed as dist

        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return Compute(device, compute_dtype(device_type), rank, local_rank, world_size)


def compute_cleanup(compute: Compute) -> None:
    if compute.world_size > 1:
        import torch.distributed as dist

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
