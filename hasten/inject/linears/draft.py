"""A plan in the making: what a source says about modules, as cuts of their parameters and seams."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from hasten.inject.linears.matrices import layout, outputs
from hasten.inject.linears.plan import Count, Cut, Kind, Plan, Seam


@dataclass
class Draft:
    """What is to be divided in `model`, and what stands against it.

    packed: by path, in how many equal runs a linear's outputs may lie, where nobody has said; `choice` decides.
    """

    model: nn.Module
    source: str
    size: int
    problems: list[str] = field(default_factory=list)
    packed: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    _cuts: dict[str, Cut] = field(default_factory=dict)
    _seams: dict[str, Seam] = field(default_factory=dict)
    _counted: dict[str, str] = field(default_factory=dict)  # the attribute of a linear that counts what is divided

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._users = Counter(id(p) for p in self.parameters.values())

    def columns(self, path: str, parts: int = 1, gathered: bool = False) -> None:
        """Every rank computes a part of a linear's outputs; `gathered`: which are put together behind it.

        A linear whose outputs everybody has in the end may stay whole, and does where its outputs cannot be divided
        equally, or its matrix is another module's too.
        """
        module = self.modules[path]
        found = layout(module)
        if found is None:
            self._no_linear(path)
            return
        weight = self.parameters[f"{path}.weight"]
        shared = self._users[id(weight)] > 1
        if gathered and (shared or outputs(module) % (parts * self.size)):
            self.whole.append(path)
            return
        self.tensor(f"{path}.weight", found.outputs, parts)
        self._counted[path] = found.counts[0]
        if getattr(module, "bias", None) is not None:
            self.tensor(f"{path}.bias", 0, parts)
        if gathered:
            self.seam(path, "gather")

    def rows(self, path: str, kind: Kind | None = "rows") -> None:
        """Every rank takes a part of a linear's inputs; None: what becomes of the products is another module's."""
        found = layout(self.modules[path])
        if found is None:
            self._no_linear(path)
            return
        self.tensor(f"{path}.weight", found.inputs)
        self._counted[path] = found.counts[1]
        if kind is not None:
            self.seam(path, kind)

    def tensor(self, name: str, axis: int, parts: int = 1) -> None:
        tensor = self.parameters[name]
        if self._users[id(tensor)] > 1:
            names = [n for n, p in self.parameters.items() if p is tensor and n != name]
            self.problems.append(f"{name} is {', '.join(names)} too, and would be cut for one of them only")
        self._cuts[name] = Cut(name, axis % tensor.ndim, parts)

    def seam(self, path: str, kind: Kind) -> None:
        if "forward" in vars(self.modules[path]):
            self.problems.append(
                f"the forward of {path} has been replaced (by accelerate's hooks or by hand): remove the replacement"
            )
        self._seams[path] = Seam(path, kind)

    def drop(self, paths: list[str]) -> None:
        """Leave linears whole after all."""
        for path in paths:
            self._seams.pop(path, None)
            self._counted.pop(path, None)
            self._cuts = {n: c for n, c in self._cuts.items() if n.rpartition(".")[0] != path}
        self.whole += paths

    def plan(self) -> Plan:
        counts = [self._count(path, name) for path, name in self._counted.items()]
        return Plan(
            self.source,
            self.size,
            tuple(self._cuts.values()),
            tuple(self._seams.values()),
            tuple(counts),
            tuple(self.whole),
        )

    def _count(self, path: str, name: str) -> Count:
        whole = getattr(self.modules[path], name)
        return Count(type(self.modules[path]).__name__, name, (path,), whole, whole // self.size)

    def _no_linear(self, path: str) -> None:
        self.problems.append(f"{path} is a {type(self.modules[path]).__name__}, of whose matrix no layout is known")
