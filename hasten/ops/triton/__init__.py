"""Triton implementations: importing this package registers every one of them with its op."""

from hasten.ops.triton import act, attend_pages, norm, rope, write_pages

__all__ = ["act", "attend_pages", "norm", "rope", "write_pages"]
