"""Processes that compute together: who they are, and what they say to each other."""

from hasten.parallel.group import Chain, Coming, Group, Processes, exchanged
from hasten.parallel.joint import Alone, Joint
from hasten.parallel.place import ALONE, Place

__all__ = ["ALONE", "Alone", "Chain", "Coming", "Group", "Joint", "Place", "Processes", "exchanged"]
