"""ELECTRA, generator and discriminator: BERT whose embedding may be narrower than its blocks (arXiv 2003.10555)."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.bert import BERT, bert
from hasten.families.family import Family, Seam, one
from hasten.spec import Projection, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

ELECTRA = Dialect("electra", BERT.block, {**BERT.slots, "project_in": "embeddings_project"})


def electra(c: Config) -> Tower:
    t, narrow = bert(c), c.take("embedding_size")
    assert isinstance(t.embed, Tokens)
    wider = None if narrow == t.width else Projection(bias=True, after="norm", back=False)
    return replace(t, embed=replace(t.embed, width=narrow, projection=wider))


FAMILIES: dict[str, Family] = {"electra": one(electra, ELECTRA, seam=Seam("encoder"), classes="ELECTRA")}
