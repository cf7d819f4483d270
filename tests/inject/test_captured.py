"""Calls that are recorded and replayed: by a recorder that re-runs the call on the CPU, and by CUDA graphs on a GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.inject import captured
from hasten.inject.attach import attach
from hasten.inject.calls import encoder
from hasten.inject.captured import Compute, Graphs, Tensors
from hasten.ops import use
from tests.tiny import TINY, build


class Recorder:
    """Stands in for CUDA: a replay computes into the outputs of the recording, as a graph does, and never raises."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Any, Tensors]] = []
        self.replays = 0

    def __call__(self, compute: Compute, inputs: Tensors, pool: Any) -> tuple[Callable[[], None], Tensors, Any]:
        outputs = compute(*inputs)
        self.recorded.append((pool, inputs))

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():  # a graph writes memory, whatever the tensors over it think
                try:
                    made = compute(*inputs)
                except IndexError:
                    made = (torch.tensor(float("nan")),) * len(outputs)
                for mine, fresh in zip(outputs, made, strict=True):
                    if mine is not None and fresh is not None:
                        mine.copy_(fresh)

        return replay, outputs, "pool"


def double(x: Tensor | None, y: Tensor | None) -> Tensors:
    assert x is not None
    return x * 2, None if y is None else y + x.sum()


# ---- what is recorded, and when


def test_the_second_call_of_a_kind_is_recorded_and_later_ones_replay_it() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for number in range(4):
        x, y = torch.randn(3), torch.randn(2)
        a, b = graphs(double, (x, y))
        assert torch.equal(a, x * 2)  # type: ignore[arg-type]
        assert torch.equal(b, y + x.sum())  # type: ignore[arg-type]
        assert len(recorder.recorded) == (number > 0)
    assert recorder.replays == 3


def test_what_a_caller_holds_does_not_change_with_the_next_call() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    given = [torch.full((2,), float(i)) for i in range(4)]
    answers = [graphs(double, (x, None))[0] for x in given]
    assert [a.tolist() for a in answers] == [[2.0 * i] * 2 for i in range(4)]  # type: ignore[union-attr]
    assert all(x is not mine for x in given for mine in recorder.recorded[0][1])


@pytest.mark.parametrize(
    "other",
    [
        lambda g: g(double, (torch.ones(4), torch.ones(2))),
        lambda g: g(double, (torch.ones(3).double(), torch.ones(2))),
        lambda g: g(double, (torch.ones(3), None)),
        lambda g: g(double, (torch.ones(3), torch.ones(2)), kind="another"),
        lambda g: g(double, (torch.ones(3), torch.ones(2)), lane=7),
    ],
    ids=["shape", "dtype", "absent", "kind", "stream"],
)
def test_another_kind_of_call_has_a_recording_of_its_own(other: Callable[[Graphs], Tensors]) -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for _ in range(2):
        graphs(double, (torch.ones(3), torch.ones(2)))
    other(graphs)
    assert len(recorder.recorded) == 1
    other(graphs)
    assert len(recorder.recorded) == graphs.recorded == 2


def test_a_forced_backend_is_another_kind_of_call() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for _ in range(2):
        graphs(double, (torch.ones(3), None))
    with use("reference"):
        graphs(double, (torch.ones(3), None))
    assert recorder.replays == 1


def test_recordings_of_one_stream_share_a_pool() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for lane, size in ((0, 1), (0, 2), (1, 1)):
        for _ in range(2):
            graphs(double, (torch.ones(size), None), lane=lane)
    assert [pool for pool, _ in recorder.recorded] == [None, "pool", None]


def test_the_least_recently_used_recording_goes_first() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder, limit=2)

    def call(size: int) -> None:
        graphs(double, (torch.ones(size), None))

    for size in (1, 1, 2, 2, 1, 3, 3):  # 2 was used last before 1
        call(size)
    assert graphs.recorded == 2
    call(1)
    call(3)
    assert len(recorder.recorded) == 3
    call(2)
    call(2)
    assert len(recorder.recorded) == 4


def test_a_new_recording_of_a_kind_met_long_ago_is_the_last_to_go() -> None:
    graphs = Graphs(recorder := Recorder(), limit=1)
    for size in (1, 2, 2, 1, 1):
        assert graphs(double, (torch.ones(size), None))[0].tolist() == [2.0] * size  # type: ignore[union-attr]
    assert (len(recorder.recorded), recorder.replays) == (2, 3)


def test_what_cannot_be_recorded_runs_as_it_is_and_says_why() -> None:
    def refuse(compute: Compute, inputs: Tensors, pool: Any) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("the recording is spoilt")

    graphs = Graphs(refuse)
    for _ in range(3):
        assert graphs(double, (torch.ones(2), None))[0].tolist() == [2.0, 2.0]  # type: ignore[union-attr]
    assert graphs.recorded == 0
    assert graphs.refused == ("operation not permitted when stream is capturing",)


def test_a_copy_records_for_itself() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder, limit=3)
    for _ in range(2):
        graphs(double, (torch.ones(2), None))
    assert copy.deepcopy(graphs).recorded == 0
    assert pickle.loads(pickle.dumps(Graphs())).recorded == 0


def test_tensors_made_in_inference_mode_are_fed_to_calls_outside_of_it() -> None:
    graphs = Graphs(Recorder())
    with torch.inference_mode():
        x = torch.ones(2)
        for _ in range(2):
            graphs(double, (x, None))
    with torch.no_grad():
        assert graphs(double, (x * 3, None))[0].tolist() == [6.0, 6.0]  # type: ignore[union-attr]


# ---- which calls may be


def test_a_module_that_somebody_watches_or_trains_is_called_each_time() -> None:
    head = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert captured.held([head]) is None
    with torch.no_grad():
        assert captured.held([head]) is not None
        handle = head[0].register_forward_hook(lambda *a: None)
        assert captured.held([head]) is None
        handle.remove()
        head[0].forward = lambda input: input
        assert captured.held([head]) is None
    assert captured.held([torch.nn.Linear(2, 2).requires_grad_(False)]) is not None


def test_a_module_with_other_tensors_or_in_another_ones_place_is_told_apart() -> None:
    head = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Tanh()).requires_grad_(False)
    known = {captured.held([head])}
    assert captured.held([head]) in known
    head[0].weight.data = head[0].weight.data.clone()
    assert captured.held([head]) not in known, "a parameter"
    known.add(captured.held([head]))
    head[1].running_mean = torch.ones(2)
    assert captured.held([head]) not in known, "a buffer"
    known.add(captured.held([head]))
    head[2] = torch.nn.ReLU()
    assert captured.held([head]) not in known, "a module without tensors"


def test_calls_on_the_cpu_have_no_stream_to_be_recorded_on() -> None:
    assert captured.lane_of((torch.ones(2), None)) is None


# ---- through a model


@contextmanager
def recording(
    name: str, monkeypatch: pytest.MonkeyPatch, skip_padding: bool = False
) -> Iterator[tuple[Any, Any, Recorder]]:
    """A tiny model, its twin under Hasten, and the twin's recorder, for which CPU tensors pass for CUDA's."""
    theirs = build(TINY[name])
    ours, recorder = copy.deepcopy(theirs), Recorder()
    (b,) = attach(ours)
    b.install(skip_padding=skip_padding)
    b.graphs = Graphs(recorder)
    monkeypatch.setattr(captured, "lane_of", lambda inputs: 0)
    with torch.no_grad():
        yield theirs, ours, recorder
    b.remove()


def agree(ours: Any, theirs: Any, where: Tensor | None = None) -> None:
    for name in ("last_hidden_state", "pooler_output"):
        x, y = ours.get(name), theirs.get(name)
        if y is None or (where is not None and name == "pooler_output"):
            continue
        x, y = (x, y) if where is None else (x[where], y[where])
        torch.testing.assert_close(x, y, atol=3e-5, rtol=3e-5)


def test_an_encoders_calls_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        for _ in range(4):
            ids = torch.randint(3, 40, (2, 7))
            agree(ours.base_model(ids), theirs.base_model(ids))
        assert (len(recorder.recorded), recorder.replays) == (1, 3)
        types = torch.randint(0, 2, (2, 7))
        for _ in range(2):
            agree(ours.base_model(ids, token_type_ids=types), theirs.base_model(ids, token_type_ids=types))
        assert len(recorder.recorded) == 2
        ours.base_model(ids, output_hidden_states=True)
        assert recorder.replays == 4, "hidden states are not recorded"


def test_an_images_calls_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("vit", monkeypatch) as (theirs, ours, recorder):
        config = theirs.config
        for _ in range(3):
            pixels = torch.randn(2, config.num_channels, config.image_size, config.image_size)
            agree(ours.base_model(pixels), theirs.base_model(pixels))
        assert (len(recorder.recorded), recorder.replays) == (1, 2)


def test_a_recording_casts_pixels_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("vit", monkeypatch) as (theirs, ours, recorder):
        config = theirs.config
        for model in (ours, theirs):
            model.double()
        for _ in range(3):
            pixels = torch.randn(2, config.num_channels, config.image_size, config.image_size)
            agree(ours.base_model(pixels), theirs.base_model(pixels.double()))
        ((_, (static,)),) = recorder.recorded
        assert static is not None
        assert (static.dtype, recorder.replays) == (torch.float32, 2)


def test_padded_batches_of_the_same_number_of_tokens_share_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch, skip_padding=True) as (theirs, ours, recorder):
        for lengths in ((7, 2), (3, 6), (8, 1)):  # of 9 tokens each
            ids, mask = torch.randint(3, 40, (2, max(lengths))), torch.zeros(2, max(lengths), dtype=torch.long)
            for row, n in enumerate(lengths):
                mask[row, :n] = 1
            x, y = (m.base_model(ids, attention_mask=mask) for m in (ours, theirs))
            agree(x, y, mask.bool())
        assert (len(recorder.recorded), recorder.replays) == (1, 2)


def test_weights_that_move_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert", monkeypatch) as (theirs, ours, recorder):
        graphs = ours.base_model._hasten.graphs
        ids = torch.randint(3, 40, (2, 7))
        for model in (ours, theirs):
            model.double()
        for _ in range(2):
            ours.base_model(ids)
        assert graphs.recorded == 1
        for model in (ours, theirs):
            model.float()
        assert graphs.recorded == 0
        for _ in range(3):
            agree(ours.base_model(ids), theirs.base_model(ids))
        assert len(recorder.recorded) == 2


def test_a_pooler_of_other_memory_is_another_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        ids = torch.randint(3, 40, (2, 7))
        assert ours.base_model(ids).pooler_output is not None
        ours.base_model(ids)
        for model in (ours, theirs):
            weight = model.base_model.pooler.dense.weight
            weight.data = weight.data * 2
        agree(ours.base_model(ids), theirs.base_model(ids))
        assert recorder.replays == 2, "one was begun for nothing"


def test_a_poolers_module_that_is_swapped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        ids = torch.randint(3, 40, (2, 7))
        for _ in range(3):
            ours.base_model(ids)
        for model in (ours, theirs):
            model.base_model.pooler.activation = torch.nn.ReLU()
        for _ in range(3):
            agree(ours.base_model(ids), theirs.base_model(ids))
        assert len(recorder.recorded) == 2


@pytest.mark.parametrize("watch", ["hook", "pre-hook", "forward", "pooler's hook"])
def test_who_looks_on_after_a_recording_is_served(watch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        ids, seen = torch.randint(3, 40, (2, 7)), []
        for _ in range(3):
            ours.base_model(ids)
        twin, before = copy.deepcopy(ours), recorder.replays
        for model in (ours, twin):
            inner, dense = model.encoder.layer[1].output, model.pooler.dense
            own = inner.forward
            match watch:
                case "hook":
                    inner.register_forward_hook(lambda *a: seen.append(1))
                case "pre-hook":
                    inner.register_forward_pre_hook(lambda *a: seen.append(1))
                case "forward":
                    inner.forward = lambda *a, own=own: seen.append(1) or own(*a)
                case _:
                    dense.register_forward_hook(lambda *a: seen.append(1))
            seen.clear()
            for _ in range(3):
                agree(model.base_model(ids), theirs.base_model(ids))
            # what stands in for a device calls the pooler's hook too, in the replay that was begun
            assert len(seen) == 3 + (watch == "pooler's hook" and model is ours)
        assert recorder.replays == before + 1


def test_who_has_stopped_looking_on_is_replayed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        ids = torch.randint(3, 40, (2, 7))
        for _ in range(2):
            ours.base_model(ids)
        handle = ours.encoder.layer[1].register_forward_hook(lambda *a: None)
        for _ in range(2):
            ours.base_model(ids)
        handle.remove()
        before = recorder.replays
        for _ in range(2):
            agree(ours.base_model(ids), theirs.base_model(ids))
        assert recorder.replays == before + 2


# ---- masks

MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda m: None,
    "ones": lambda m: m,
    "bool": lambda m: m.bool(),
    "left": lambda m: m.index_fill(1, torch.arange(3), 0),
    "right": lambda m: m.index_fill(1, torch.arange(15, 18), 0),
    "a row of padding": lambda m: m.index_fill(0, torch.tensor(1), 0),
    "longer": lambda m: torch.cat((m, m), 1),
    "four axes": lambda m: (torch.rand(2, 1, 18, 18) > 0.3).index_fill(3, torch.tensor(0), True),
    "added": lambda m: torch.randn(2, 1, 18, 18),
}


@pytest.mark.parametrize("name", ["bert-pooled", "roberta", "mpnet", "clip_text_model"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_that_nobody_asked_about_gives_the_same(name: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding itself, which transformers computes as it pleases, is compared with ours alone."""
    own = MASKS[mask](torch.ones(2, 18, dtype=torch.long))
    with recording(name, monkeypatch) as (theirs, ours, recorder):
        ids = torch.randint(3, 40, (2, 18))
        asked = ours.base_model(ids, attention_mask=own)
        where = torch.ones(2, 18, dtype=torch.bool) if own is None or own.ndim == 4 else own[:, :18].bool()
        monkeypatch.setattr(encoder, "_same_kernel", lambda *a: True)
        for _ in range(3):
            got = ours.base_model(ids, attention_mask=own)
            agree(got, asked)
            if mask != "longer" and own is not None and own.ndim == 2:
                agree(got, theirs.base_model(ids, attention_mask=own), where)
        assert recorder.replays == 0 if own is not None and own.ndim == 4 else 2 + (own is None)


def test_one_recording_serves_every_padding_where_the_kernel_reads_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_same_kernel", lambda *a: True)
    monkeypatch.setattr(encoder, "hiding", lambda mask: pytest.fail("the device was asked"))
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        for first in (0, 3, 0, 5):
            ids, mask = torch.randint(3, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
            mask[1, :first] = 0
            x, y = (m.base_model(ids, attention_mask=mask) for m in (ours, theirs))
            agree(x, y, mask.bool())
        assert (len(recorder.recorded), recorder.replays) == (1, 3)


def test_rows_of_a_table_that_the_caller_names_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("roberta", monkeypatch) as (theirs, ours, recorder):
        for first in (2, 3, 9):
            ids, rows = torch.randint(3, 40, (2, 7)), torch.arange(first, first + 7)[None]
            agree(ours.base_model(ids, position_ids=rows), theirs.base_model(ids, position_ids=rows))
        assert recorder.replays == 2


def test_the_device_is_asked_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch, skip_padding=True) as (_, ours, _):
        b, ids, mask = ours._hasten, torch.zeros(2, 9).long(), torch.ones(2, 9)
        assert not encoder._reads_masks(b, ids, mask), "torch's kernels for the CPU"
        monkeypatch.setattr(encoder, "_same_kernel", lambda *a: True)
        assert encoder._reads_masks(b, ids, mask)
        assert not encoder._reads_masks(b, ids, None)
        assert not encoder._reads_masks(b, ids, mask.to("meta")), "ones elsewhere are no mask, others an error"
        with use("reference"):
            assert not encoder._reads_masks(b, ids, mask)
        b.transformer.backends[1] = "reference"
        assert not encoder._reads_masks(b, ids, mask), "a block fell back"
        del b.transformer.backends[1]
        asked: list[int] = []
        monkeypatch.setattr(encoder, "hiding", lambda mask: asked.append(1))
        ours.base_model(ids + 3, attention_mask=mask)
        assert asked, "padding that is to be left out is looked for"


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert-pooled", "roberta", "mpnet"])
@pytest.mark.parametrize("mask", ["ones", "left", "right", "a row of padding"])
def test_not_asking_about_a_mask_changes_no_bit(name: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside biases of scores, which MPNet has, ones and no mask are two kernels: roundings of an ulp may differ."""
    import hasten

    ulps = 8 if (name, mask) == ("mpnet", "ones") else 0  # answers of size one to four behind two blocks of four steps
    bound = ulps * torch.finfo(torch.float16).eps

    engine: Any = hasten.init_inference(build(TINY[name]).to("cuda", torch.float16))
    ids, own = torch.randint(3, 64, (2, 18), device="cuda"), MASKS[mask](torch.ones(2, 18, dtype=torch.long))
    assert own is not None
    own = own.cuda()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "_same_kernel", lambda *a: False)
            want = engine(ids, attention_mask=own)[0]
        monkeypatch.setattr(encoder, "hiding", lambda mask: pytest.fail("the device was asked"))
        for _ in range(4):
            torch.testing.assert_close(engine(ids, attention_mask=own)[0], want, rtol=bound, atol=bound)


@pytest.mark.gpu
def test_our_kernel_reads_masks_up_to_512_keys() -> None:
    plain, biased = (frozenset(x.attention for x in attach(build(TINY[n]))[0].tower.blocks) for n in ("bert", "mpnet"))
    where = torch.device("cuda", 0)
    for tokens, of_plain, of_biased in ((9, False, False), (16, True, True), (512, True, True), (513, False, True)):
        assert encoder._same_kernel(plain, tokens, torch.float16, where) == of_plain
        assert encoder._same_kernel(biased, tokens, torch.float16, where) == of_biased
        assert not encoder._same_kernel(plain, tokens, torch.float32, where)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "mpnet", "vit", "dinov2", "beit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_graph_equals_the_call_that_it_records_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    import hasten

    model: Any = build(TINY[name])
    model.to("cuda", dtype)
    engine = hasten.init_inference(model)
    (b,) = engine.backbones
    assert b.graphs is not None
    config = model.config

    def inputs(batch: int) -> Tensor:
        if TINY[name].kind == "encoder":
            return torch.randint(*TINY[name].ids, (batch, 9), device="cuda")
        size = config.image_size
        return torch.randn(batch, config.num_channels, size, size, device="cuda", dtype=dtype)

    with torch.no_grad():
        for batch in (2, 3, 2):
            x = inputs(batch)
            graphs, b.graphs = b.graphs, None
            want = model.base_model(x)
            b.graphs = graphs
            for _ in range(4):
                got = model.base_model(x)
                assert torch.equal(got.last_hidden_state, want.last_hidden_state)
        # BEiT's own code makes its table of distances on the CPU at every call
        waits = name == "beit"
        assert bool(b.graphs.refused) == waits
        assert b.graphs.recorded == (0 if waits else 2)
        moved = model.cpu().cuda()
        assert b.graphs.recorded == 0
        for _ in range(3):
            assert torch.equal(moved.base_model(x).last_hidden_state, want.last_hidden_state)


@pytest.mark.gpu
def test_calls_that_want_gradients_or_autocast_are_not_recorded() -> None:
    import hasten

    model: Any = build(TINY["bert-pooled"])
    engine = hasten.init_inference(model.cuda())
    (b,) = engine.backbones
    assert b.graphs is not None
    ids = torch.randint(*TINY["bert"].ids, (2, 9), device="cuda")
    for _ in range(3):
        model.base_model(ids)
        with torch.no_grad(), torch.autocast("cuda"):
            model.base_model(ids)
    assert b.graphs.recorded == 0
