"""Encoders under Hasten give what transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import transformers as T
from transformers import PreTrainedModel

from hasten.errors import ConfigError
from hasten.inject.attach import attach
from tests.families.parity import padded, same, tokens, twins
from tests.tiny import TINY, build
from tests.tiny.encoders import BASE

NARROW = {**BASE, "embedding_size": 20}
ENCODERS = [n for n, t in TINY.items() if t.kind == "encoder"]
every = pytest.mark.parametrize("name", ENCODERS)


@every
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_outputs_and_hidden_states_of_a_batch(name: str, side: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids, mask = padded(name, side) if side != "none" else (tokens(name, (2, 9)), None)
        arguments = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": TINY[name].states}
        where = None if mask is None else mask.bool()
        a, b = dict(ours(**arguments)), dict(theirs(**arguments))
        if where is not None:  # what is pooled from a token of padding means nothing
            for pooled in ("pooler_output", "text_embeds"):
                a.pop(pooled, None)
                b.pop(pooled, None)
        same(a, b, where)


@every
def test_one_token_token_types_and_padding_ids(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = tokens(name, (1, 1))
        same(ours(ids), theirs(ids))
        ids = tokens(name, (2, 7))
        if theirs.config.pad_token_id is not None:
            ids[1, 5:] = theirs.config.pad_token_id
        arguments = {"input_ids": ids}
        if getattr(theirs.config, "type_vocab_size", 0) > 1:
            arguments["token_type_ids"] = torch.randint(0, 2, ids.shape)
        same(ours(**arguments), theirs(**arguments))


@every
def test_a_tuple_where_one_is_wanted(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = tokens(name, (2, 5))
        for arguments in ({}, {"output_hidden_states": TINY[name].states}):
            a, b = (model(ids, return_dict=False, **arguments) for model in (ours, theirs))
            assert [type(x) for x in a] == [type(y) for y in b]  # None keeps a place where there is one
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, atol=3e-5, rtol=3e-5)


@every
def test_positions_and_vectors_given_by_hand(name: str) -> None:
    with twins(name) as (theirs, ours, backbones):
        ids = tokens(name, (2, 6))
        known = backbones[0].signature.parameters
        positions = torch.tensor([[5, 3, 2, 8, 6, 4]])  # none of them a row of padding
        arguments = {"position_ids": positions} if "position_ids" in known else {}
        same(ours(ids, **arguments), theirs(ids, **arguments))
        if "inputs_embeds" in known:
            vectors = torch.randn(2, 5, theirs.get_input_embeddings().weight.shape[1])
            same(ours(inputs_embeds=vectors), theirs(inputs_embeds=vectors))


@pytest.mark.parametrize("name", ["clip_text_model", "clip_text_model-2", "clip_text_model-projected"])
def test_texts_are_pooled_at_their_first_end(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = torch.randint(3, 39, (4, 9))
        ids[0, 4], ids[1, 2], ids[1, 7], ids[2, 8] = 40, 40, 40, 40  # the last row has none
        same(ours(ids), theirs(ids))


def test_albert_shares_one_blocks_memory_among_all_layers() -> None:
    with twins("albert") as (theirs, ours, backbones):
        w = backbones[0].transformer.weights
        for slot in ("qkv.weight", "qkv.bias", "out.weight", "up.weight", "down.weight", "mlp_norm.weight"):
            assert len({w[f"blocks.{i}.{slot}"].data_ptr() for i in range(3)}) == 1
        layer = ours.albert.encoder.albert_layer_groups[0].albert_layers[0]
        assert layer.attention.key.weight.untyped_storage().data_ptr() == w["blocks.0.qkv.weight"].data_ptr()
        layer.ffn.weight.mul_(2)  # the live weight is the one in use
        theirs.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn.weight.mul_(2)
        ids = tokens("albert", (2, 5))
        same(ours(ids), theirs(ids))
        backbones[0].remove()
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        assert len(own) == len(list(layer.parameters())), "after revert every parameter has memory of its own"


def test_albert_survives_a_change_of_dtype_and_a_loaded_state() -> None:
    with twins("albert-pooled") as (theirs, ours, backbones):
        state = {k: v * 0.5 if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
        ids = tokens("albert-pooled", (2, 5))
        for model in (theirs, ours):
            model.double()
            model.load_state_dict(state)
        same(ours(ids), theirs(ids))
        w = backbones[0].transformer.weights
        assert w["blocks.0.qkv.weight"].data_ptr() == w["blocks.2.qkv.weight"].data_ptr()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: T.AlbertModel(T.AlbertConfig(**NARROW, num_hidden_groups=2)), "num_hidden_groups=2"),
        (lambda: T.AlbertModel(T.AlbertConfig(**NARROW, inner_group_num=2)), "inner_group_num=2"),
        (lambda: T.ErnieModel(T.ErnieConfig(**BASE, use_task_id=True)), "use_task_id=True"),
        (lambda: T.MPNetModel(T.MPNetConfig(**BASE, relative_attention_num_buckets=64)), "buckets=64"),
        (lambda: T.BertModel(T.BertConfig(**BASE, is_decoder=True)), "is_decoder=True"),
        (lambda: T.DistilBertModel(T.DistilBertConfig(dim=8, n_heads=2, n_layers=1, activation="mish")), "mish"),
    ],
    ids=["albert groups", "albert inner groups", "ernie tasks", "mpnet buckets", "bert decoder", "activation"],
)
def test_what_has_no_description_is_refused_by_name(model: Callable[[], PreTrainedModel], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        attach(model())


def test_a_mask_with_three_axes_goes_to_the_model_itself() -> None:
    model = build(TINY["bert"])
    ids, mask = tokens("bert", (2, 5)), torch.ones(2, 5, 5)
    (b,) = attach(model)
    b.install()
    with suppress(ValueError, RuntimeError):  # transformers 5 does not take it
        model(ids, attention_mask=mask)
    assert b.detours == {"attention_mask has three axes": 1}
