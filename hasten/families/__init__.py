"""Every family, by transformers' `model_type`."""

from hasten.families import bert, gpt2, gpt_neox, llama
from hasten.families.family import Family, Kind, Seam

FAMILIES: dict[str, Family] = {**llama.FAMILIES, **gpt2.FAMILIES, **gpt_neox.FAMILIES, **bert.FAMILIES}

__all__ = ["FAMILIES", "Family", "Kind", "Seam"]
