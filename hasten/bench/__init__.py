"""Measurements side by side: the same work by several engines, in turns, in one run."""
