"""Checkpoints of Megatron-LM and Megatron-Core: the files of all ranks as one Source of whole tensors."""
