"""Vision transformers under Hasten give what transformers gives, and so do the models of images and texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

from hasten.errors import RequestError
from hasten.inject.attach import attach
from tests.families.parity import same, tokens, twins
from tests.tiny import TINY, build
from tests.tiny.images import BASE, clip, siglip

IMAGES = [n for n, t in TINY.items() if t.kind == "image"]
PAIRS = ["clip", "siglip", "chinese_clip"]
every = pytest.mark.parametrize("name", IMAGES)
pairs = pytest.mark.parametrize("name", PAIRS)
only = pytest.mark.parametrize("name", [n for n in IMAGES if n not in PAIRS])


@every
def test_outputs_and_hidden_states(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        arguments = {**TINY[name].own(), "output_hidden_states": TINY[name].states}
        same(ours(**arguments), theirs(**arguments))


@only
def test_one_image_and_one_that_is_not_contiguous(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        pixels = TINY[name].own()["pixel_values"]
        same(ours(pixels[:1]), theirs(pixels[:1]))
        turned = pixels.transpose(2, 3)
        assert not turned.is_contiguous()
        same(ours(turned), theirs(turned))


@every
def test_a_tuple_where_one_is_wanted(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        for states in {False, TINY[name].states}:
            arguments = {**TINY[name].own(), "return_dict": False, "output_hidden_states": states}
            a, b = ours(**arguments), theirs(**arguments)
            assert [type(x) for x in a] == [type(y) for y in b]
            for x, y in zip(_tensors(a), _tensors(b), strict=True):
                torch.testing.assert_close(x, y, atol=3e-5, rtol=3e-5)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple) else []


STRETCHED = ["vit", "vit-classes", "vit_msn", "ijepa", "deit", "clip_vision_model", "siglip_vision_model"]


@pytest.mark.parametrize("name", STRETCHED)
def test_positions_stretch_to_other_sizes(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        arguments = {"pixel_values": torch.randn(2, 2, 20, 8), "interpolate_pos_encoding": True}
        same(ours(**arguments), theirs(**arguments))


@pytest.mark.parametrize("name", ["beit", "beit-both", "dinov2", "dinov2_with_registers"])
def test_these_take_other_sizes_without_being_asked(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        pixels = torch.randn(2, 2, 24, 16)
        same(ours(pixels), theirs(pixels))


@pytest.mark.parametrize("name", ["beit", "beit-shared", "beit-both"])
def test_beit_serves_the_flag_that_changes_nothing_for_it(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        arguments = {**TINY[name].own(), "interpolate_pos_encoding": True}
        same(ours(**arguments), theirs(**arguments))


def test_biases_by_distance_are_not_a_no_op() -> None:
    with twins("beit") as (_, ours, _):
        arguments = TINY["beit"].own()
        before = ours(**arguments)[0]
        for name, p in ours.named_parameters():
            if "relative_position_bias_table" in name:
                p.mul_(30)
        assert (ours(**arguments)[0] - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["vit-masked", "beit-shared"])
def test_masked_patches(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
        arguments = {**TINY[name].own(), "bool_masked_pos": mask}
        same(ours(**arguments), theirs(**arguments))


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_pixels_of_another_dtype_are_cast(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        pixels = TINY[name].own()["pixel_values"].double()
        same(ours(pixels), theirs(pixels))


@pairs
def test_texts_and_images_of_unequal_number(name: str) -> None:
    with twins(name) as (theirs, ours, backbones):
        assert sorted(b.seam.kind for b in backbones) == ["encoder", "image"]
        arguments = {**TINY[name].own(), "return_loss": False}
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        arguments["attention_mask"][1, 4:] = 0
        same(ours(**arguments), theirs(**arguments))


@pairs
def test_features_of_texts_and_of_images(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = tokens(name, (3, 6))
        ids[1, 3] = 40
        if name == "chinese_clip":  # transformers 4 fails here by itself: its text tower has no pooler
            same(ours.text_model(ids), theirs.text_model(ids))
        else:
            _same_features(ours.get_text_features(ids), theirs.get_text_features(ids))
        pixels = torch.randn(2, 2, 12, 12)
        _same_features(ours.get_image_features(pixels), theirs.get_image_features(pixels))


def _same_features(ours: Any, theirs: Any) -> None:
    """transformers 4 gives the features themselves, 5 an output around them."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)
    else:
        same(ours, theirs)


@pytest.mark.parametrize("name", ["siglip-classes", "siglip_vision_model"])
def test_states_that_transformers_records_by_itself(name: str) -> None:
    theirs, ours = build(TINY[name]), build(TINY[name])
    for b in attach(ours):
        b.install()
    with torch.no_grad():
        arguments = {**TINY[name].own(), "output_hidden_states": True}
        same(ours(**arguments), theirs(**arguments))


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.ViTModel(T.ViTConfig(**BASE), add_pooling_layer=False),
        lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**BASE, vision_use_head=False)),
        lambda: T.CLIPTextModel(clip().text_config),
        lambda: T.SiglipTextModel(siglip().text_config),
    ],
    ids=["no pooler", "no head", "CLIP text of a pair", "SigLIP text of a pair"],
)
def test_a_tower_without_its_pooler_or_its_pair(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    inputs = torch.randn(2, 2, 12, 12) if model.main_input_name == "pixel_values" else torch.randint(3, 64, (2, 5))
    with torch.no_grad():
        want = model(inputs)
        (b,) = attach(model)
        b.install()
        same(model(inputs), want)
    assert b.calls == 1


@pytest.mark.parametrize("name", ["vit", "clip_vision_model", "beit"])
def test_bad_pixels_are_refused_clearly(name: str) -> None:
    model = build(TINY[name])
    for b in attach(model):
        b.install()
    with pytest.raises(RequestError, match=r"pixel_values must be floating point .*\(2, 12, 12\)"):
        model(torch.randn(2, 12, 12))
    with pytest.raises(RequestError, match="uint8"):
        model(torch.zeros(1, 2, 12, 12, dtype=torch.uint8))


def test_gradients_of_pixels_are_the_models_own() -> None:
    model = build(TINY["vit"])
    (b,) = attach(model)
    b.install()
    pixels = TINY["vit"].own()["pixel_values"].requires_grad_()
    model(pixels)[0].sum().backward()
    assert b.detours == {"gradients of pixel_values": 1}
    assert pixels.grad is not None
