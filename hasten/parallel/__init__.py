"""Processes that compute together: who they are, and what they say to each other."""

from hasten.parallel.group import Group, Processes
from hasten.parallel.place import ALONE, Place

__all__ = ["ALONE", "Group", "Place", "Processes"]
