"""A tower with its weights: embed, run the blocks in a context, normalise, and make logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hasten import ops
from hasten.model.block import block
from hasten.model.context import Context
from hasten.model.embed import embed_frames, embed_tokens
from hasten.model.layer import layer
from hasten.model.relay import Watch, relayed
from hasten.model.stack import Stack, stack
from hasten.ops import Matrix, NormLayer
from hasten.ops.table import forced
from hasten.parallel import ALONE, Group, Place
from hasten.spec import Frames, Patches, Tokens, Tower


class Transformer:
    """`weights` are canonical (hasten.weights.params). `backends` forces the op backend of single blocks.

    At a place among others tower and weights are this rank's shares (hasten.weights.local, shard, part), and all ranks
    make the same calls. Tables of tokens are divided where they have fewer rows than the vocabulary. `blocks` gives the
    hidden states behind the last stage's blocks to every stage.
    """

    def __init__(
        self,
        tower: Tower,
        weights: Mapping[str, Tensor],
        backends: Mapping[int, str] | None = None,
        place: Place = ALONE,
    ) -> None:
        self.tower, self.weights, self.backends, self.place = tower, weights, dict(backends or {}), place
        self.layers = tuple(layer(b, weights, i, place.over) for i, b in enumerate(tower.blocks))
        self._stack = Stack(self.layers)

    @property
    def buckets(self) -> Tensor | None:
        return self.weights.get("buckets")

    def embed(
        self, x: Tensor, positions: Tensor | None = None, types: Tensor | None = None, scaled: bool = False
    ) -> Tensor:
        """Token ids (...) or vectors (..., width), or a spectrogram, to hidden states; an image's are ready.

        Stages without the embedding give something of the same shape and dtype.
        """
        if not self.place.first:
            return self._unembedded(x)
        match self.tower.embed:
            case Tokens() as e:
                assert positions is not None, "tokens have positions"
                over = self._over(self.weights["tokens"], e.vocab)
                return embed_tokens(e, self.weights, x, positions, types, scaled=scaled, over=over)
            case Patches():
                return x
            case Frames() as e:
                return embed_frames(e, self.weights, x)

    @property
    def like(self) -> Tensor:
        """One of the weights: of their dtype, where they are."""
        return next(iter(self.weights.values()))

    def _unembedded(self, x: Tensor) -> Tensor:
        match self.tower.embed:
            case Tokens():
                shape = x.shape[:-1] if x.is_floating_point() else x.shape
                dtype = x.dtype if x.is_floating_point() else self.like.dtype
                return x.new_empty(*shape, self.tower.width, dtype=dtype)
            case Patches():
                return x
            case Frames():
                frames = (x.shape[-1] + 1) // 2  # the second convolution's stride
                return x.new_empty(len(x), frames, self.tower.width, dtype=self.like.dtype)

    def blocks(self, x: Tensor, ctx: Context, watch: Watch | None = None, *, rows: Tensor | None = None) -> Tensor:
        """Hidden states through every block; `watch(i, x)` sees what goes into block i.

        rows, int64 (rows,): which of x (tokens, width) are asked for; the last block then makes no others.
        """
        chain = self.place.chain
        if chain is None:
            return self.through(x, ctx, watch, rows)
        x = relayed(self.through, chain, x, ctx, watch)
        return x if rows is None else x.index_select(0, rows)

    def through(self, x: Tensor, ctx: Context, watch: Watch | None = None, rows: Tensor | None = None) -> Tensor:
        """Hidden states through the blocks that are here; rows as in `blocks`."""
        if watch is None and not self.backends and forced() is None:
            return stack(x, self._stack, ctx, rows)
        last = len(self.layers) - 1
        for i in range(len(self.layers)):
            if watch is not None:
                watch(i, x)
            x = self.block(i, x, ctx, rows if i == last else None)
        return x

    def block(self, i: int, x: Tensor, ctx: Context, rows: Tensor | None = None) -> Tensor:
        """Block i alone."""
        if i not in self.backends:
            return block(self.layers[i], i, x, ctx, rows)
        with ops.use(self.backends[i]):
            return block(self.layers[i], i, x, ctx, rows)

    def finish(self, x: Tensor) -> Tensor:
        """What follows the last block: the final norm, and a narrow embedding's projection back."""
        n, e = self.final_norm, self.tower.embed
        x = x if n is None else ops.norm(x, n)
        if isinstance(e, Tokens) and e.projection and e.projection.back:
            x = ops.linear(x, Matrix(self.weights["project_out.weight"]))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """(..., width) finished hidden states to (..., vocabulary)."""
        return self._head(x, None)

    def predict(self, x: Tensor) -> Tensor:
        """Hidden states (..., width) behind the last block to logits (..., vocabulary), in one region if it can."""
        e = self.tower.embed
        if isinstance(e, Tokens) and e.projection and e.projection.back:
            return self.logits(self.finish(x))
        return self._head(x, self.final_norm)

    @property
    def final_norm(self) -> NormLayer | None:
        n = self.tower.final_norm
        if n is None:
            return None
        return NormLayer(n, self.weights["final_norm.weight"], self.weights.get("final_norm.bias"))

    def _head(self, x: Tensor, before: NormLayer | None) -> Tensor:
        h, e = self.tower.head, self.tower.embed
        assert h is not None and isinstance(e, Tokens), "this tower has no head"
        m = Matrix(self.weights["tokens" if h.tied else "head.weight"], self.weights.get("head.bias"))
        y, over = ops.head(x, before, m, h), self._over(m.weight, e.vocab)
        return y if over is None else over.all_gather(y)[..., : e.vocab].contiguous()

    def _over(self, table: Tensor, vocab: int) -> Group | None:
        """The ranks among which a table of the vocabulary is divided."""
        return self.place.over if len(table) < vocab else None
