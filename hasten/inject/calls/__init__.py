"""What a backbone's call means, by kind of seam: its arguments into a context, its result out of the last hidden state."""

from hasten.inject.calls.call import Call
from hasten.inject.calls.decoder import DECODER
from hasten.inject.calls.encoder import ENCODER

CALLS: dict[str, Call] = {"decoder": DECODER, "encoder": ENCODER}

__all__ = ["CALLS", "Call"]
