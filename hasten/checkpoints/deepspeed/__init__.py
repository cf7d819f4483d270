"""Checkpoints that DeepSpeed's training engine writes."""
