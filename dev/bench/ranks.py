"""The bandwidth between ranks, for the collectives that training uses.

    torchrun --nproc-per-node=8 -m dev.bench.ranks      # on several nodes: on each, as training is started
    torchrun --nproc-per-node=2 -m dev.bench.ranks -- --device-type cpu --megabytes 1

"Bus bandwidth" as nccl-tests defines it (doc/PERFORMANCE.md): the bytes that each rank sends, divided by the time. It does
not depend on the number of ranks, so it can be compared with that of the hardware.
"""

from __future__ import annotations

from dev.bench.gpu import seconds_of
from nanochat import flags
from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_script


def slowest(work, repeats: int, compute) -> float:
    """Seconds per call of `work` on the slowest rank; all ranks start together."""
    compute.gather(None)
    return max(compute.gather(seconds_of(work, repeats)))


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--device-type", default="", help="cuda or cpu (empty: cuda if available)")
    parser.add_argument("--megabytes", type=flags.COUNT, nargs="+", default=[1, 4, 16, 64, 256], help="sizes of the message")
    args = parser.parse_args(argv)

    import torch
    import torch.distributed as dist

    from nanochat.optim import all_gather, reduce_scatter

    compute = compute_init(args.device_type)
    n = compute.world_size
    if n == 1:
        raise UserError("there is only one rank; start this with torchrun --nproc-per-node=N -m dev.bench.ranks")
    sent = {"reduce-scatter": (n - 1) / n, "all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n}  # share of the message, per rank
    print0(f"bus bandwidth in GB/s among {n} ranks ({compute.device.type})")
    print0(f"{'MB':>6s}" + "".join(f"{name:>16s}" for name in sent))
    for megabytes in args.megabytes:
        shard = torch.zeros(megabytes * 2**20 // 4 // n, device=compute.device)
        whole = torch.zeros(shard.numel() * n, device=compute.device)
        collectives = {
            "reduce-scatter": lambda: reduce_scatter(shard, whole)(),
            "all-gather": lambda: all_gather(whole, shard)(),
            "all-reduce": lambda: dist.all_reduce(whole),
        }
        row = f"{megabytes:6d}"
        for name, collective in collectives.items():
            slowest(collective, 2, compute)  # the first call connects the ranks
            repeats = min(100, max(3, int(0.5 / slowest(collective, 1, compute))))
            row += f"{whole.numel() * 4 * sent[name] / slowest(collective, repeats, compute) / 1e9:16.2f}"
        print0(row)
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
