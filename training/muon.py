"""Muon: momentum whose update is made orthogonal, for weight matrices.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. torch.optim.Muon orthogonalises one matrix at a time, in
bfloat16. Here matrices of one shape go through it as one batch, shared out to the processes, and on a CPU in float32,
which without bfloat16 matrix units is the faster of the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

QUINTIC = (3.4445, -4.7750, 2.0315)  # few steps bring singular values near 1, and leave them between 0.7 and 1.2
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Descends along the orthogonalised Nesterov momentum; weight decay is decoupled."""

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = _share(torch.stack(self._momenta(parameters, group["momentum"])))
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(parameters, list(updates.unbind()), alpha=size)

    def _momenta(self, parameters: list[Tensor], decay: float) -> tuple[Tensor, ...]:
        """The gradients moved towards their running means, which take them in first."""
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - decay)
        return torch._foreach_lerp(gradients, means, decay)


def _share(matrices: Tensor) -> Tensor:
    """The matrices orthogonalised; of several processes each does its part and gets the others'."""
    if not distributed.is_initialized():
        return orthogonalise(matrices)
    own = slice(distributed.get_rank(), None, distributed.get_world_size())
    updates = torch.zeros_like(matrices)
    if len(matrices[own]):
        updates[own] = orthogonalise(matrices[own])
    distributed.all_reduce(updates)
    return updates


def orthogonalise(matrices: Tensor) -> Tensor:
    """The matrices (n, rows, columns) with every singular value brought near 1."""
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
