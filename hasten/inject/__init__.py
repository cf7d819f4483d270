"""Puts a fused transformer into a live model, and takes it out again."""
