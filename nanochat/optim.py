"""MuonAdamW: Muon for the matrices inside the Transformer, AdamW for everything else.

Muon's idea: replace a matrix's averaged gradient U S V^T by (roughly) U V^T, so that every
direction it has learnt something about moves equally far. The update of one stack of
equally shaped matrices is `muon_update`, a page of its own below.

Each group names its parameters, so the state can be saved as a flat dict of tensors,
`"lm_head.weight.exp_avg"` and so on, that does not depend on the order of groups.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.optim.adamw import adamw

# Polynomials of five steps towards the polar factor: a x + b x^3 + c x^5 on the singular values, best for
# values in [1e-3, 1] (Polar Express, arXiv:2505.16932, algorithm 1 and its list of coefficients).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G: torch.Tensor) -> torch.Tensor:
    """Approximate polar factors of a stack of matrices: (n, rows, cols), U S V^T -> about U V^T.

    Singular values that are not tiny end between about 0.7 and 1.2. bfloat16 on CUDA.
    """
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = X.size(-2) > X.size(-1)
    if tall:  # the products below are of the smaller side
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)  # all singular values below 1, with room for rounding
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


def muon_update(grad, momentum_buffer, second_moment, momentum: float, beta2: float) -> torch.Tensor:
    """The direction in which a stack of matrices (n, rows, cols) moves; the buffers are updated in place.

    1. Nesterov momentum (arXiv:2502.16982 and Jordan et al., "Muon", 2024).
    2. Row equilibration: every row gets norm 1, so that the iteration begins well conditioned.
    3. Polar factor, renormalised so that its Frobenius norm is sqrt(min(rows, cols)), that of an exact one.
    4. NorMuon (arXiv:2510.05491): divide by the root of a running mean of squares, one number per line along
       the longer side, then restore the norm, so that no neuron moves much more than others.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    G = grad.lerp(momentum_buffer, momentum)
    G = G / G.norm(dim=-1, keepdim=True).clamp(min=1e-10)
    X = polar_express(G)
    frobenius = min(X.shape[-2:]) ** 0.5
    X = X * (frobenius / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    across = -1 if second_moment.size(-1) == 1 else -2
    second_moment.lerp_(X.square().mean(dim=across, keepdim=True), 1 - beta2)
    X = X * second_moment.clamp(min=1e-10).rsqrt()
    return X * (frobenius / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


class MuonAdamW:
    """Optimizer over named groups: `{"kind": "muon" | "adamw", "params": [(name, parameter)], "lr": ...}`.

    "adamw" groups also hold betas, eps and weight_decay; "muon" groups hold momentum, beta2 and
    weight_decay, and only 2-D parameters. Rates may be changed in `param_groups` between steps
    (`initial_lr` and `initial_weight_decay` keep what was given).
    State: AdamW two tensors per parameter; Muon one, and one number per line.
    """

    def __init__(self, param_groups: list[dict]):
        self.param_groups = [dict(group, initial_lr=group["lr"], initial_weight_decay=group["weight_decay"]) for group in param_groups]
        self.state: dict[str, torch.Tensor] = {}  # "{parameter}.{what}", for Muon views of the stacks below
        self._stacks: list[tuple[dict, list[torch.Tensor], torch.Tensor, torch.Tensor]] = []
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for name, p in group["params"]:
                    self.state[f"{name}.exp_avg"] = torch.zeros_like(p)
                    self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(p)
                    self.state[f"{name}.step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            elif group["kind"] == "muon":
                self._make_stacks(group)
            else:
                raise ValueError(f"group kind {group['kind']!r} is neither 'muon' nor 'adamw'")

    def _make_stacks(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for name, p in group["params"]:
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices only, but {name} has shape {tuple(p.shape)}")
            by_shape[p.shape].append((name, p))
        for (rows, cols), named in by_shape.items():
            like = named[0][1]
            momentum = torch.zeros(len(named), rows, cols, device=like.device, dtype=like.dtype)
            lines = (rows, 1) if rows >= cols else (1, cols)
            second = torch.zeros(len(named), *lines, device=like.device, dtype=like.dtype)
            for i, (name, _) in enumerate(named):
                self.state[f"{name}.momentum"] = momentum[i]
                self.state[f"{name}.second_moment"] = second[i]
            self._stacks.append((group, [p for _, p in named], momentum, second))

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients that stand in `.grad`; a parameter without one is left alone."""
        for group in self.param_groups:
            if group["kind"] == "adamw":
                self._step_adamw(group)
        for group, params, momentum, second in self._stacks:
            if params[0].grad is None:
                continue
            update = muon_update(torch.stack([p.grad for p in params]), momentum, second, group["momentum"], group["beta2"])
            rows, cols = update.shape[-2:]
            lr = group["lr"] * max(1, rows / cols) ** 0.5  # a tall matrix's outputs would otherwise move less
            for p, u in zip(params, update):
                decay = (u * p >= 0) * p  # cautious: only where decay and update agree (arXiv:2510.12402)
                p.sub_(lr * (u + group["weight_decay"] * decay))

    def _step_adamw(self, group: dict) -> None:
        named = [(name, p) for name, p in group["params"] if p.grad is not None]
        if not named:
            return
        adamw(
            [p for _, p in named],
            [p.grad for _, p in named],
            [self.state[f"{name}.exp_avg"] for name, _ in named],
            [self.state[f"{name}.exp_avg_sq"] for name, _ in named],
            [],
            [self.state[f"{name}.step"] for name, _ in named],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for _, p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All state as a flat dict of tensors (not copies)."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a saved state in. Raises ValueError where names or shapes are not this model's."""
        if state.keys() != self.state.keys():
            odd = sorted(state.keys() ^ self.state.keys())
            raise ValueError(f"the optimizer state is of another model: {len(odd)} names differ, the first is {odd[0]}")
        for name, tensor in self.state.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"optimizer state {name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(state[name])
