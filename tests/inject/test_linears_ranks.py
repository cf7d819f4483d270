"""Models that no family describes, held by several processes: they answer as they do whole, and come back so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hasten
from hasten.errors import ConfigError, UnsupportedModel
from hasten.inject.linears.divided import Meeting
from tests.inject.strangers import DECLARED, MODELS, NAMES, Block, declared, own
from tests.parallel import ranks
from tests.tiny import TINY, build

IDS = torch.tensor([[0, 0, 5, 6, 7, 30], [9, 8, 40, 4, 33, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
GREEDY: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


DRAWN: Any = GREEDY | {"do_sample": True}


def given(model: Any) -> dict[str, Tensor]:
    if hasattr(model, "config"):
        return {"input_ids": IDS, "attention_mask": MASK}
    return model.dummy_inputs if hasattr(model, "dummy_inputs") else {"ids": IDS}


def first(output: Any) -> Tensor:
    return output["logits"] if hasattr(output, "keys") else output


def equal(state: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return state.keys() == want.keys() and all(torch.equal(state[n], want[n]) for n in want)


def lost(engine: Any, theirs: Any) -> float:
    with torch.no_grad():
        want = first(theirs(**given(theirs)))
        return float((first(engine(**given(theirs))) - want).abs().max() / want.abs().max())


def served(name: str, size: int, policy: Any) -> list[str]:
    """What is wrong with a divided model."""
    model, theirs = MODELS[name](), MODELS[name]()
    kept, mode = theirs.state_dict(), model.training
    engine = hasten.init_inference(model, mp_size=size, injection_policy=policy)
    theirs.eval()
    wrong = [] if (off := lost(engine, theirs)) < 3e-5 else [f"loses {off}"]
    if hasattr(theirs, "generate"):
        wanted = theirs.generate(IDS, attention_mask=MASK, **GREEDY)
        wrong += [] if torch.equal(engine.generate(IDS, attention_mask=MASK, **GREEDY), wanted) else ["greedy"]
        torch.manual_seed(dist.get_rank())
        sampled: Any = engine.generate(IDS, attention_mask=MASK, **DRAWN)
        wrong += [] if len({str(t) for t in gathered(sampled)}) == 1 else ["sampled"]
    wrong += [] if equal(model.state_dict(), kept) else ["state"]
    part = next(n for n, m in model.named_modules() if type(vars(m).get("forward", m.forward).__self__) is Meeting)
    inner = model.get_submodule(part.rpartition(".")[0]).state_dict()
    wrong += [] if all(torch.equal(t, kept[f"{part.rpartition('.')[0]}.{n}"]) for n, t in inner.items()) else ["part"]
    here, whole = (sum(p.numel() for p in m.parameters()) for m in (model, theirs))
    wrong += [] if here < 0.8 * whole else [f"holds {here} of {whole}"]
    wrong += [] if lost(copy.deepcopy(model), theirs) < 3e-5 else ["copy"]
    fresh = {n: t * 0.9 if t.is_floating_point() else t for n, t in kept.items()}
    theirs.load_state_dict(fresh)
    model.load_state_dict(fresh)
    wrong += [] if lost(engine, theirs) < 3e-5 else ["loaded"]
    model.load_state_dict(kept)
    said = str(engine.explain())
    wrong += [] if "linears only" in said and f"on rank {dist.get_rank()} of {size}" in said else [said]
    back = engine.revert()
    wrong += [] if back is model and equal(model.state_dict(), kept) and model.training == mode else ["revert"]
    wrong += [n for n, m in model.named_modules() if "forward" in vars(m) or m._state_dict_hooks]
    return wrong


def gathered(value: Any) -> list[Any]:
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, value.tolist())
    return heard


OWN = ["own", "own fused", "own in training"]
CASES = [*((n, 2, {}) for n in [*DECLARED, *OWN, "own odd", "reader"]), *((n, 2, NAMES) for n in OWN)]
CASES += [("own fused", 4, {}), ("reader", 4, {})]


@pytest.mark.parametrize(("name", "size", "policy"), CASES, ids=lambda v: "names" if v == NAMES else str(v or "found"))
def test_a_divided_stranger(name: str, size: int, policy: Any) -> None:
    assert ranks.run(size, served, name, size, policy) == [[]] * size


def in_half(dtype: torch.dtype) -> list[str]:
    """A model that is cast: compared with the whole one in that dtype."""
    wrong: list[str] = []
    wide = {"moe_intermediate_size": 32}
    for name, make in (
        ("apertus", MODELS["apertus"]),
        ("own", own),
        ("glm4_moe", lambda: declared("glm4_moe", **wide)),
    ):
        model, theirs = make(), make().to(dtype)
        kept = copy.deepcopy(model.state_dict())
        engine = hasten.init_inference(model, mp_size=2, dtype=dtype, keep_originals=True)
        off, allowed = lost(engine, theirs), 8 * torch.finfo(dtype).eps
        wrong += [] if off < allowed else [f"{name} loses {off}"]
        wrong += [] if {p.dtype for p in model.parameters()} == {dtype} else [f"{name} dtype"]
        wrong += [] if equal(engine.revert().state_dict(), kept) else [f"{name} revert"]
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_divided_stranger_in_half_precision(dtype: torch.dtype) -> None:
    assert ranks.run(2, in_half, dtype) == [[], []]


def refused() -> list[str]:
    """Each is an error on every rank, and the model is as it was."""
    wrong: list[str] = []

    def error(make: Any, says: str, kind: type[Exception], spoil: Any = None, **how: Any) -> None:
        model = make()
        if spoil is not None:
            spoil(model)
        kept, before = copy.deepcopy(model.state_dict()), [dict(vars(m)) for m in model.modules()]
        try:
            hasten.init_inference(model, mp_size=2, **how)
        except kind as e:
            wrong.extend([] if says in str(e) else [str(e)])
        else:
            wrong.append(f"{says}: served")
        same = all({**vars(m)} == b for m, b in zip(model.modules(), before, strict=True))
        wrong.extend([] if equal(model.state_dict(), kept) and same else [f"{says}: changed"])

    def unlike(model: Any) -> None:
        model.blocks[1].up.weight.data[0, 0] += dist.get_rank()

    error(own, "of its input, it has shape", UnsupportedModel, injection_policy={Block: ("attention.query", "down")})
    error(lambda: own(heads=3, kv_heads=3), "it can among 1)", UnsupportedModel, injection_policy=NAMES)
    half = {
        "dtype": torch.bfloat16,
        "keep_originals": True,
    }  # torch's product of experts takes no 12 numbers of 2 bytes
    error(MODELS["glm4_moe"], "on rank 0, 1: it stops with RuntimeError", UnsupportedModel, **half)
    error(own, "no backbone is fused", ConfigError, certify=True)
    error(own, "ep_size=2 leaves experts whole", ConfigError, ep_size=2)
    error(own, "of 2 loaded another model than rank 0", Exception, spoil=unlike)
    return wrong


def test_refusals_leave_every_rank_as_it_was() -> None:
    assert ranks.run(2, refused) == [[], []]


def misled() -> list[str]:
    """A sum that is wrong on the ranks alone, where no rehearsal sees it: the trial says where, and all is undone."""
    theirs, model = Meeting._summed, own()
    kept, before = copy.deepcopy(model.state_dict()), [dict(vars(m)) for m in model.modules()]
    Meeting._summed = lambda self, x: theirs(self, x) * (1.002 if "down" in names[self.module] else 1.0)  # type: ignore[method-assign]
    names = {m: n for n, m in model.named_modules()}
    try:
        hasten.init_inference(model, mp_size=2)
    except UnsupportedModel as error:
        said = [] if "on rank 0, 1: blocks.0.down: it differs by 0.002" in str(error) else [str(error)]
    else:
        said = ["served"]
    finally:
        Meeting._summed = theirs  # type: ignore[method-assign]
    same = all({**vars(m)} == b for m, b in zip(model.modules(), before, strict=True))
    return [*said, *([] if equal(model.state_dict(), kept) and same else ["changed"])]


def test_ranks_that_answer_otherwise_than_the_whole_model_are_undone() -> None:
    assert ranks.run(2, misled) == [[], []]


def stored(folder: Path) -> list[str]:
    """Written as ranks share it, and read by a model of other values."""
    model, theirs = own(), own()
    engine = hasten.init_inference(model, mp_size=2, save_mp_checkpoint_path=str(folder / "split"))
    fresh = own()
    for p in fresh.parameters():
        nn.init.zeros_(p)
    again = hasten.init_inference(fresh, mp_size=2, checkpoint=str(folder / "split"))
    off = [lost(e, theirs) for e in (engine, again)]
    return [f"loses {x}" for x in off if x > 3e-5]


def test_a_divided_stranger_is_stored_and_read_again(tmp_path: Path) -> None:
    assert ranks.run(2, stored, tmp_path) == [[], []]
    assert len([*(tmp_path / "split").glob("*tp*")]) >= 2


def unfused() -> list[float]:
    """Without fusion a model of a family is divided by its linears too, and so is one whose config a family refuses."""
    off: list[float] = []
    cases: Any = (("llama", {}, {"kernel_inject": False}), ("llama", {"qk_layernorm": True}, {}))
    for name, field, how in cases:
        model, theirs = build(TINY[name]), build(TINY[name])
        for n, v in field.items():
            setattr(model.config, n, v)
        engine = hasten.init_inference(model, mp_size=2, **how)
        assert engine.linears is not None and not engine.backbones
        assert [n for n in engine.notes if "qk_layernorm" in n] or not field
        off.append(lost(engine, theirs))
    return off


def test_a_family_that_is_not_fused_is_divided_by_its_linears() -> None:
    assert all(x < 3e-5 for off in ranks.run(2, unfused) for x in off)
