"""MuonAdamW: Muon for the matrices inside the Transformer, AdamW for everything else, on one rank or many.

Muon replaces a matrix's averaged gradient U S V^T by (roughly) U V^T, so that all directions in it move equally far.
`muon_update` does this for a stack of equally shaped matrices.

Several ranks share the work (ZeRO-2, arXiv:1910.02054). Parameters are grouped in buckets, and a bucket is one flat
buffer of `world_size` equal chunks, one for each rank. A step is: reduce-scatter the gradients, so that each rank has
the sum for its own chunk; update those parameters; all-gather the result. All reduce-scatters start at once and the
all-gathers are awaited last, so communication overlaps with the updates. Muon needs whole matrices, which are assigned
so that chunks are as equal as possible; other parameters are cut anywhere. So world sizes need not divide anything.

A rank keeps the optimizer state of its chunk and sends as much as an all-reduce of the gradients would.

Each group names its parameters, so the state can be saved as a flat dict of tensors: `"lm_head.weight.exp_avg"`,
or `"lm_head.weight.exp_avg[0:4096]"` for the part of the flattened tensor that this rank keeps.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Callable, Iterator, NamedTuple

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

BUCKET = 2**27  # maximum of parameters per buffer (unless one alone is larger), which bounds a step's extra memory
ALIGNMENT = 64  # chunks start at multiples of this many parameters, which communication kernels prefer

# Polynomials of five steps towards the polar factor: a x + b x^3 + c x^5 on the singular values, best for
# values in [1e-3, 1] (Polar Express, arXiv:2505.16932, algorithm 1 and its list of coefficients).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Approximate polar factors of a stack of matrices: (n, rows, cols), U S V^T -> about U V^T, computed in `dtype`.

    Singular values that are not tiny end between about 0.7 and 1.2, also in bfloat16.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:  # the products below are of the smaller side
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)  # all singular values below 1, with room for rounding
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


def muon_update(grad, momentum_buffer, second_moment, momentum: float, beta2: float, dtype=torch.float32) -> torch.Tensor:
    """The update direction of a stack of matrices (n, rows, cols); the buffers are updated in place.

    1. Nesterov momentum (arXiv:2502.16982 and Jordan et al., "Muon", 2024).
    2. Row equilibration: every row gets norm 1, so that the iteration starts well conditioned.
    3. Polar factor, renormalised so that its Frobenius norm is sqrt(min(rows, cols)), that of an exact one.
    4. NorMuon (arXiv:2510.05491): divide by the root of a running mean of squares, one number per line along the longer
       side, then restore the norm, so that no neuron moves much more than others.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    G = grad.lerp(momentum_buffer, momentum)
    G = G / G.norm(dim=-1, keepdim=True).clamp(min=1e-10)
    X = polar_express(G, dtype)
    frobenius = min(X.shape[-2:]) ** 0.5
    X = X * (frobenius / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    across = -1 if second_moment.size(-1) == 1 else -2
    second_moment.lerp_(X.square().mean(dim=across, keepdim=True), 1 - beta2)
    X = X * second_moment.clamp(min=1e-10).rsqrt()
    return X * (frobenius / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


# -----------------------------------------------------------------------------
# Several ranks


def reduce_scatter(mine: torch.Tensor, flat: torch.Tensor) -> Callable[[], object]:
    """Start to sum `flat` (world_size * n,) over the ranks, this rank's chunk into `mine` (n,); returns a function that waits.

    On a CPU chunks are exchanged and then added in the order of the ranks: three times as fast as gloo's own, and equal
    to the sum of one rank that accumulates the same gradients in that order.
    """
    if flat.is_cuda:
        # torch 2.13 gives it a new name and warns about the old one, which torch 2.11 has.
        start = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return start(mine, flat, async_op=True).wait
    parts = torch.empty_like(flat)
    work = dist.all_to_all_single(parts, flat, async_op=True)

    def add() -> None:
        work.wait()
        first, *others = parts.split(mine.numel())
        mine.copy_(first)
        for part in others:
            mine.add_(part)

    return add


def all_gather(flat: torch.Tensor, mine: torch.Tensor) -> Callable[[], object]:
    """Start to gather every rank's `mine` (n,) in `flat` (world_size * n,); returns a function that waits for it."""
    if flat.is_cuda:
        start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return start(flat, mine, async_op=True).wait
    chunks = flat.split(mine.numel())
    chunks[dist.get_rank()].copy_(mine)
    works = [dist.broadcast(chunk, rank, async_op=True) for rank, chunk in enumerate(chunks)]  # gloo's own is slower
    return lambda: [work.wait() for work in works]


class Shard(NamedTuple):
    """A parameter, or the part of one, that a rank owns."""

    name: str
    part: str  # "" for all of it, else which elements of the flattened parameter: "[a:b]"
    values: torch.Tensor  # a view of the parameter's memory
    place: slice  # in the rank's chunk


class Bucket:
    """Parameters of one group and dtype that are communicated together.

    The flat buffer holds each parameter at `starts[i]`; rank r owns the elements from r * chunk to (r + 1) * chunk.
    """

    def __init__(self, group: dict, named: list[tuple[str, torch.Tensor]], rank: int, world_size: int):
        self.group, self.named, self.world_size = group, named, world_size
        sizes = [p.numel() for _, p in named]
        if group["kind"] == "muon":
            assert all(p.ndim == 2 for _, p in named), "Muon takes matrices only"
            self.starts, self.chunk = _assign_whole(sizes, world_size)
        else:
            self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
            self.chunk = -(-sum(sizes) // (world_size * ALIGNMENT)) * ALIGNMENT
        self.own = list(self._shards(rank * self.chunk))
        self.stacks = []  # Muon: (indices into `own`, momentum, second moment) for each shape

    def _shards(self, begin: int) -> Iterator[Shard]:
        """The shards of the parameters in the chunk that starts at `begin`."""
        for (name, p), start in zip(self.named, self.starts):
            a, b = max(begin - start, 0), min(begin + self.chunk - start, p.numel())
            if b - a == p.numel():
                yield Shard(name, "", p.detach(), slice(start - begin, start - begin + b))
            elif a < b:
                yield Shard(name, f"[{a}:{b}]", p.detach().view(-1)[a:b], slice(start + a - begin, start + b - begin))

    def scatter(self) -> None:
        """Start to sum the gradients, each chunk on the rank that owns it. A gradient that is None counts as zero."""
        if self.world_size == 1:
            return
        like = self.named[0][1]
        self.flat = torch.empty(self.world_size * self.chunk, dtype=like.dtype, device=like.device)
        for (_, p), start in zip(self.named, self.starts):
            target = self.flat[start : start + p.numel()]
            target.zero_() if p.grad is None else target.copy_(p.grad.flatten())
            p.grad = None  # frees its memory for the next bucket
        self.mine = torch.empty(self.chunk, dtype=like.dtype, device=like.device)
        self.wait = reduce_scatter(self.mine, self.flat)

    def gradients(self) -> list[torch.Tensor | None]:
        """The gradients of `own`, summed over the ranks; None for a parameter that has none."""
        if self.world_size == 1:
            return [p.grad for _, p in self.named]
        self.wait()
        return [self.mine[shard.place].view_as(shard.values) for shard in self.own]

    def gather(self) -> None:
        """Start to send this rank's updated parameters to all others."""
        if self.world_size == 1:
            return
        for shard in self.own:
            self.mine[shard.place].copy_(shard.values.view(-1))
        self.wait = all_gather(self.flat, self.mine)

    def finish(self) -> None:
        """Copy the parameters that the other ranks have updated."""
        if self.world_size == 1:
            return
        self.wait()
        for (_, p), start in zip(self.named, self.starts):
            p.copy_(self.flat[start : start + p.numel()].view_as(p))
        del self.flat, self.mine, self.wait


def _assign_whole(sizes: list[int], world_size: int) -> tuple[list[int], int]:
    """(starts, chunk) with every parameter inside one chunk: the largest first, each to the emptiest chunk."""
    loads, places = [0] * world_size, {}
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = loads.index(min(loads))
        places[i] = rank, loads[rank]
        loads[rank] += sizes[i]
    chunk = max(loads)
    return [places[i][0] * chunk + places[i][1] for i in range(len(sizes))], chunk


class MuonAdamW:
    """Optimizer over named groups: `{"kind": "muon" | "adamw", "params": [(name, parameter)], "lr": ...}`.

    "adamw" groups also hold betas, eps and weight_decay; "muon" groups hold momentum, beta2, weight_decay, the dtype of
    `polar_express` (default float32), and only 2-D parameters. Rates may be changed in `param_groups` between steps
    (`initial_lr` and `initial_weight_decay` keep what was given). Every rank calls `step`. Gradients are summed over the
    ranks of the default process group, if there is one, so losses must be divided by the number of targets on all ranks.
    """

    def __init__(self, param_groups: list[dict]):
        # As in PyTorch's optimizers: "params" holds the parameters, "param_names" their names
        self.param_groups = [
            {**group, "params": [p for _, p in group["params"]], "param_names": [name for name, _ in group["params"]],
             "initial_lr": group["lr"], "initial_weight_decay": group["weight_decay"]}
            for group in param_groups
        ]  # fmt: skip
        self.state: dict[str, torch.Tensor] = {}  # see the top of the file; for Muon views of the stacks below
        self.buckets: list[Bucket] = []
        many = dist.is_available() and dist.is_initialized()
        place = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        # Muon first: its updates take longest, and the other gradients are communicated meanwhile
        for group in sorted(self.param_groups, key=lambda group: group["kind"] != "muon"):
            for named in _buckets(list(zip(group["param_names"], group["params"]))):
                bucket = Bucket(group, named, *place)
                self.buckets.append(bucket)
                self._make_stacks(bucket) if group["kind"] == "muon" else self._make_moments(bucket)

    def _make_moments(self, bucket: Bucket) -> None:
        for name, part, values, _ in bucket.own:
            self.state[f"{name}.exp_avg{part}"] = torch.zeros_like(values)
            self.state[f"{name}.exp_avg_sq{part}"] = torch.zeros_like(values)
            self.state[f"{name}.step"] = torch.zeros((), dtype=torch.float32, device=values.device)

    def _make_stacks(self, bucket: Bucket) -> None:
        by_shape = defaultdict(list)
        for i, shard in enumerate(bucket.own):
            by_shape[shard.values.shape].append(i)
        for (rows, cols), members in by_shape.items():
            like, lines = bucket.own[members[0]].values, (rows, 1) if rows >= cols else (1, cols)
            momentum, second = like.new_zeros(len(members), rows, cols), like.new_zeros(len(members), *lines)
            for k, i in enumerate(members):
                self.state[f"{bucket.own[i].name}.momentum"] = momentum[k]
                self.state[f"{bucket.own[i].name}.second_moment"] = second[k]
            bucket.stacks.append((members, momentum, second))

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients in `.grad`; on one rank, a parameter without one stays unchanged."""
        for bucket in self.buckets:
            bucket.scatter()
        for bucket in self.buckets:
            self._step_muon(bucket) if bucket.group["kind"] == "muon" else self._step_adamw(bucket)
            bucket.gather()
        for bucket in self.buckets:
            bucket.finish()

    def _step_muon(self, bucket: Bucket) -> None:
        grads, group = bucket.gradients(), bucket.group
        for members, momentum, second in bucket.stacks:
            if grads[members[0]] is None:
                continue
            gradients = torch.stack([grads[i] for i in members])
            update = muon_update(gradients, momentum, second, group["momentum"], group["beta2"], group.get("dtype", torch.float32))
            rows, cols = update.shape[-2:]
            lr = group["lr"] * max(1, rows / cols) ** 0.5  # a tall matrix's outputs would otherwise move less
            for i, u in zip(members, update):
                p = bucket.own[i].values
                decay = (u * p >= 0) * p  # cautious: only where decay and update agree (arXiv:2510.12402)
                p.sub_(lr * (u + group["weight_decay"] * decay))

    def _step_adamw(self, bucket: Bucket) -> None:
        group = bucket.group
        present = [(shard, grad) for shard, grad in zip(bucket.own, bucket.gradients()) if grad is not None]
        if not present:
            return
        beta1, beta2 = group["betas"]
        adamw(
            [shard.values for shard, _ in present],
            [grad for _, grad in present],
            [self.state[f"{shard.name}.exp_avg{shard.part}"] for shard, _ in present],
            [self.state[f"{shard.name}.exp_avg_sq{shard.part}"] for shard, _ in present],
            [],
            [self.state[f"{shard.name}.step"] for shard, _ in present],
            fused=True, amsgrad=False, maximize=False,
            lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's state as a flat dict of tensors (not copies)."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a saved state in. Raises ValueError where names or shapes are not those of `state_dict()`."""
        saved, own = ({(name, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (state, self.state))
        if saved != own:
            name, shape = min(saved ^ own)
            raise ValueError(f"the optimizer state is of another model: only one of them has {name} of shape {shape}")
        for name, tensor in self.state.items():
            tensor.copy_(state[name])


def _buckets(named: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    """Runs of parameters of one dtype, of at most BUCKET elements together."""
    buckets, size = [], 0
    for name, p in named:
        if not buckets or size + p.numel() > BUCKET or p.dtype != buckets[-1][0][1].dtype:
            buckets, size = [*buckets, []], 0
        buckets[-1].append((name, p))
        size += p.numel()
    return buckets
