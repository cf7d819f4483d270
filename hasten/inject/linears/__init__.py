"""Models that no family describes, divided among ranks linear by linear: a plan, found exact before it is kept."""

from hasten.inject.linears.choice import alike
from hasten.inject.linears.source import Found, Names, find
from hasten.inject.linears.takeover import Linears

__all__ = ["Found", "Linears", "Names", "alike", "find"]
