"""Native generation: one engine for batches, streams and single completions, over paged keys and values."""

from hasten.runtime.generator import Generator
from hasten.runtime.request import Event, Generation, Request, Sampling

__all__ = ["Event", "Generation", "Generator", "Request", "Sampling"]
