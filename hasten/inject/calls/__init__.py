"""What a backbone's call means, by kind of seam: arguments into a context, results out of the last hidden state."""

from hasten.inject.calls.call import Call
from hasten.inject.calls.decoder import DECODER
from hasten.inject.calls.encoder import ENCODER
from hasten.inject.calls.image import IMAGE
from hasten.inject.calls.megatron import MEGATRON
from hasten.inject.calls.seq2seq import AUDIO, SEQ2SEQ_DECODER, SEQ2SEQ_ENCODER

CALLS: dict[str, Call] = {
    "decoder": DECODER,
    "encoder": ENCODER,
    "megatron": MEGATRON,
    "seq2seq-encoder": SEQ2SEQ_ENCODER,
    "seq2seq-decoder": SEQ2SEQ_DECODER,
    "audio": AUDIO,
    "image": IMAGE,
}

__all__ = ["CALLS", "Call"]
