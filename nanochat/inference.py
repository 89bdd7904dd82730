"""Products for inference: the weights of a GPT in the compute dtype and, on a CPU with AVX, in oneDNN's layout.

So a product of few rows takes a CPU a half to a quarter of the time (dev/LOG.md, 11), and a GPU casts no weight at every token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, Attention, Linear

MIN_WEIGHTS = 2**16  # smaller matrices gain nothing on a CPU


@torch.inference_mode(False)
@torch.no_grad()
def prepare(model) -> None:
    """Give the layers of a GPT their products, with the present weights; of other models nothing is known."""
    if not isinstance(model, GPT):
        return
    dtype = model.transformer.wte.weight.dtype
    smallest = MIN_WEIGHTS if model.get_device().type == "cpu" else 0
    linears = ()
    for module in model.modules():
        if isinstance(module, Attention):
            linears = module.c_q, module.c_k, module.c_v  # the next modules, which need no product of their own
        elif isinstance(module, Linear) and module not in linears and module.weight.numel() >= smallest:
            linears = (module,)
        else:
            continue
        if module.product is None or module.product.dtype != dtype:
            module.product = Product(dtype, *linears)
        if not module.product.is_current:
            module.product.update()


class Product:
    """x -> x W' for x of one dtype, where W are the weights of one or several layers, below one another."""

    def __init__(self, dtype: torch.dtype, *linears: Linear):
        self.dtype, self.weights = dtype, [linear.weight for linear in linears]
        self.copy = self.versions = None
        has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        self.packed = has_avx and self.weights[0].device.type == "cpu" and dtype == torch.float32

    def __deepcopy__(self, memo):
        return None  # a copied model gets its own

    @property
    def is_current(self) -> bool:
        # A compiled decoding step relies on `prepare`
        return torch.compiler.is_compiling() or self.versions == [weight._version for weight in self.weights]

    def update(self) -> None:
        """Copy the weights, on a GPU always to the same address, which its graphs know."""
        weight = (self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)).to(self.dtype)
        if self.packed:
            self.copy = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # for about 16 rows
        elif self.copy is None:
            self.copy = weight
        elif self.copy is not weight:
            self.copy.copy_(weight)
        self.versions = [weight._version for weight in self.weights]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            return F.linear(x, self.copy)
        if x.numel() == x.size(-1):  # oneDNN rounds a single row in another way where the weight has more than 1024 columns
            return self(x.view(1, -1).expand(2, -1))[:1].view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, self.copy, None, "none", [], "")
