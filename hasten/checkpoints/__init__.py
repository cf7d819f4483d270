"""Checkpoints as they lie on disk: Sources of named tensors, and models filled from them."""

from hasten.checkpoints.fill import Filling
from hasten.checkpoints.folder import open_checkpoint
from hasten.checkpoints.shares import Reader
from hasten.checkpoints.source import Entry, Source, StateDict
from hasten.checkpoints.translate import Plan

__all__ = ["Entry", "Filling", "Plan", "Reader", "Source", "StateDict", "open_checkpoint"]
