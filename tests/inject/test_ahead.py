"""Token ids are checked by the recording of a recorded call, and before any other work."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hasten
from hasten.errors import RequestError
from hasten.inject import ahead, captured
from hasten.inject.calls.decoder import KEPT
from hasten.inject.captured import Graphs
from hasten.ops import use
from tests.inject.test_captured import Recorder, agree
from tests.tiny import TINY, build

BAD = torch.tensor([[5, 6, 67], [4, 3, 2]])
SAYS = r"input_ids\[0, 2\] is 67; the vocabulary has ids 0 to 66"


@contextmanager
def serving(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, Recorder]]:
    """A tiny model, an engine of its twin, and the recorder of that, for which CPU tensors pass for CUDA's."""
    theirs = build(TINY[name])
    engine, recorder = hasten.init_inference(copy.deepcopy(theirs)), Recorder()
    engine.backbones[0].graphs = Graphs(recorder)
    monkeypatch.setattr(captured, "lane_of", lambda inputs: 0)
    with torch.no_grad():
        yield theirs, engine, recorder


class Watched(ahead.Extremes):
    """Says for each question whether a recording asks it, and at each answer how many replays there were."""

    recorder: Recorder
    asked: list[bool]
    found: list[int]
    answered: list[int]

    def __init__(self, x: Tensor, recorded: bool = False) -> None:
        self.asked.append(recorded)
        super().__init__(x, recorded)

    def find(self) -> None:
        self.found.append(self.recorder.replays)
        super().find()

    def read(self) -> list[int]:
        self.answered.append(self.recorder.replays)
        return super().read()


def watch(counted: Recorder, monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    class Here(Watched):
        recorder = counted
        asked, found, answered = [], [], []

    for module in (ahead, captured):
        monkeypatch.setattr(module, "Extremes", Here)
    return Here


def test_a_recording_finds_what_its_check_wants_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("bert-pooled", monkeypatch) as (_, engine, recorder):
        seen = watch(recorder, monkeypatch)
        for _ in range(4):
            engine(torch.randint(3, 40, (2, 3)))
        assert seen.asked == [False, False, True], "a replay asks for nothing"
        assert seen.answered == [0, 0, 1, 2, 3], "a first call and a recording wait, the others do behind their replay"


@pytest.mark.parametrize("name", ["bert-pooled", "gpt2"])
def test_only_calls_that_can_be_recorded_put_their_question_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen, asked = hasten.init_inference(build(TINY[name])), watch(Recorder(), monkeypatch), []
    engine.module.register_forward_pre_hook(lambda *a: asked.append(len(seen.found)))
    with torch.no_grad():
        engine(BAD % 60)
    assert (asked, len(seen.found)) == ([int(name == "gpt2")], 1)


@pytest.mark.parametrize("why", ["strides", "events"])
def test_what_a_recording_cannot_find_is_asked_before_the_replay(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("bert-pooled", monkeypatch) as (theirs, engine, recorder):
        good, bad = BAD % 60, BAD
        if why == "strides":
            good, bad = (x.repeat_interleave(2, 1)[:, ::2] for x in (good, bad))
        else:
            monkeypatch.setattr(captured, "asked", lambda x: False)
        seen = watch(recorder, monkeypatch)
        for _ in range(4):
            agree(engine(good), theirs(good))
        assert (seen.asked, seen.found, seen.answered) == ([False] * 4, [0, 0, 1, 2], [0, 0, 2, 3])
        with pytest.raises(RequestError, match=SAYS):
            engine(bad)
        assert recorder.replays == 4


def test_calls_of_the_model_itself_are_not_checked_and_change_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("bert-pooled", monkeypatch) as (theirs, engine, recorder):
        for _ in range(3):
            agree(engine(BAD % 60), theirs(BAD % 60))
            agree(engine.module(BAD % 60), theirs(BAD % 60))
        seen = watch(recorder, monkeypatch)
        engine.module(BAD)
        assert not seen.asked
        agree(engine(BAD % 60), theirs(BAD % 60))
        with pytest.raises(RequestError, match=SAYS):
            engine(BAD)
        assert len(recorder.recorded) == 2


def test_a_check_knows_its_ids_in_any_shape() -> None:
    ids = torch.arange(24).view(2, 3, 4)
    check = ahead.Range(ids, lambda low, high: None)
    assert check.about(ids) and check.about(ids.view(-1, 4)) and check.about(ids.view(8, 3))
    for other in (ids.clone(), ids[:1], ids.transpose(0, 1), ids.int(), ids[1:], ids.view(torch.float64)):
        assert not check.about(other)
    assert not ahead.Range(ids.transpose(0, 1), lambda low, high: None).about(ids), "none of them is contiguous"


def test_ids_without_a_row_raise_behind_a_replay_and_harm_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("bert-pooled", monkeypatch) as (theirs, engine, recorder):
        seen: list[Any] = []
        engine.module.register_forward_hook(lambda *a: seen.append(a[-1]))
        for _ in range(2):
            engine(BAD % 60)
        for bad in (BAD, -BAD):
            before = len(seen), recorder.replays
            with pytest.raises(RequestError, match=SAYS if bad is BAD else r"input_ids\[0, 2\] is -67"):
                engine(bad)
            assert (len(seen), recorder.replays) == (before[0], before[1] + 1), "replayed, and seen by nobody"
            agree(engine(BAD % 60), theirs(BAD % 60))
        assert len(recorder.recorded) == 1


@pytest.mark.parametrize("times", [0, 1])
def test_ids_without_a_row_raise_before_anything_that_is_no_replay(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("bert-pooled", monkeypatch) as (theirs, engine, recorder):
        (b,) = engine.backbones
        for _ in range(times):
            engine(BAD % 60)
        monkeypatch.setattr(b.transformer, "embed", lambda *a: pytest.fail("it ran"))
        monkeypatch.setattr(b, "theirs", lambda *a, **k: pytest.fail("the model's own ran"))
        for how in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
            with pytest.raises(RequestError, match=SAYS) as caught:
                engine(BAD, **how)
            assert caught.value.__context__ is None
        b.graphs, graphs = None, b.graphs
        with pytest.raises(RequestError, match=SAYS) as caught:
            engine(BAD)
        assert caught.value.__context__ is None, "it ran"
        b.graphs = graphs
        monkeypatch.undo()
        monkeypatch.setattr(captured, "lane_of", lambda inputs: 0)
        for _ in range(3):
            agree(engine(BAD % 60), theirs(BAD % 60))


def test_ids_without_a_row_leave_a_cache_as_it_was() -> None:
    engine, cache = hasten.init_inference(build(TINY["llama"])), DynamicCache()
    with torch.no_grad():
        engine(torch.tensor([[5, 6]]), **{KEPT: cache})
        with pytest.raises(RequestError, match=r"\[0, 1\] is 67") as caught:
            engine(torch.tensor([[5, 67]]), **{KEPT: cache})
    assert caught.value.__context__ is None, "it ran"
    assert cache.get_seq_length() == 2


def test_ids_are_checked_where_no_backbone_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = hasten.init_inference(build(TINY["bert-pooled"]))
    monkeypatch.setattr(engine.module, "forward", lambda input_ids: input_ids)
    with pytest.raises(RequestError, match=SAYS):
        engine(BAD)


def test_an_error_that_wrong_ids_cause_is_told_as_wrong_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = hasten.init_inference(build(TINY["bert-pooled"]))

    def fail(input_ids: Tensor) -> None:
        raise IndexError("something about ids")

    monkeypatch.setattr(engine.module, "forward", fail)
    with pytest.raises(RequestError, match=SAYS):
        engine(BAD)
    with pytest.raises(IndexError, match="something about ids"):
        engine(BAD % 60)


def test_of_two_errors_the_first_is_told() -> None:
    def checks() -> Iterator[ahead.Check]:
        yield lambda: (_ for _ in ()).throw(RequestError("an id"))
        raise RequestError("a shape")

    with pytest.raises(RequestError, match="an id"), ahead.checked(checks()):
        pytest.fail("it ran")
    engine = hasten.init_inference(build(TINY["gpt2"]))
    with pytest.raises(RequestError, match="is 67"):
        engine(torch.full((1, 65), 67))


def test_checks_belong_to_one_call() -> None:
    settled: list[str] = []
    with ahead.checked([lambda: settled.append("outer")]):
        with ahead.checked([lambda: settled.append("inner")]):
            ahead.settle()
            ahead.settle()
        assert settled == ["inner"]
        ahead.settle()
        assert settled == ["inner", "outer"]
    ahead.settle()
    assert settled == ["inner", "outer"]


def test_threads_settle_their_own_checks_and_get_their_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("bert-pooled", monkeypatch) as (theirs, engine, _):
        good = [torch.randint(3, 40, (2, 3)) for _ in range(8)]
        for ids in good[:2]:
            engine(ids)
        wrong: list[str] = []
        read = ahead.Extremes.read
        monkeypatch.setattr(ahead.Extremes, "read", lambda self: time.sleep(0.002) or read(self))

        def serve(number: int) -> None:
            with torch.no_grad():
                for ids in good[number::2] * 4:
                    try:
                        agree(engine(ids), theirs(ids))
                        if number:
                            with pytest.raises(RequestError, match=SAYS):
                                engine(BAD)
                    except BaseException as error:
                        wrong.append(repr(error))

        threads = [threading.Thread(target=serve, args=(n,)) for n in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong


# ---- CUDA


@pytest.fixture
def on_gpu() -> Any:
    """An engine of a tiny BERT on the GPU."""
    return hasten.init_inference(build(TINY["bert-pooled"]).to("cuda", torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "reference"])
def test_ids_without_a_row_do_no_harm_to_the_device(backend: str | None, on_gpu: Any) -> None:
    engine, good, bad = on_gpu, (BAD % 60).cuda(), BAD.cuda()
    with torch.no_grad(), use(backend):
        for _ in range(2):
            with pytest.raises(RequestError, match=SAYS):
                engine(bad)
        want = engine(good).last_hidden_state
        for _ in range(3):
            with pytest.raises(RequestError, match=SAYS):
                engine(bad)
            with pytest.raises(RequestError, match=r"\[0, 2\] is -67"):
                engine(-bad)
            assert torch.equal(engine(good).last_hidden_state, want)
    torch.cuda.synchronize()
    assert engine.backbones[0].graphs.recorded == 1


@contextmanager
def nothing_read() -> Iterator[None]:
    """Reading a tensor of the device is an error inside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_replayed_call_reads_nothing_but_its_check(on_gpu: Any) -> None:
    ids = torch.randint(3, 40, (2, 18), device="cuda")
    more = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        for _ in range(3):
            want = on_gpu(ids, **more).last_hidden_state
        with nothing_read():
            got = on_gpu(ids, **more).last_hidden_state
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_a_replayed_call_does_not_wait_for_its_replay(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ahead._external():
        pytest.skip("this release of torch has no events that a host can wait for inside a graph")
    (b,) = on_gpu.backbones
    finish = b.transformer.finish
    monkeypatch.setattr(b.transformer, "finish", lambda x: torch.cuda._sleep(400_000_000) or finish(x))  # 0.2 s
    ids = torch.randint(3, 40, (2, 18), device="cuda")
    with torch.no_grad():
        want = on_gpu(ids).last_hidden_state
        for _ in range(3):
            torch.cuda.synchronize()
            got = on_gpu(ids).last_hidden_state
            assert not torch.cuda.current_stream().query(), "it waited for the replay"
            assert torch.equal(got, want)
    assert b.graphs.recorded == 1


@pytest.mark.gpu
def test_a_replayed_call_waits_for_its_own_check_and_not_for_an_earlier_one(on_gpu: Any) -> None:
    good, bad = (BAD % 60).cuda(), BAD.cuda()
    with torch.no_grad():
        for _ in range(3):
            want = on_gpu(good).last_hidden_state
        for _ in range(3):
            torch.cuda.synchronize()  # what the last replay found is there
            torch.cuda._sleep(100_000_000)  # what the next one finds is not, for 50 ms
            with pytest.raises(RequestError, match=SAYS):
                on_gpu(bad)
            torch.cuda.synchronize()
            torch.cuda._sleep(100_000_000)
            assert torch.equal(on_gpu(good).last_hidden_state, want)


@pytest.mark.gpu
def test_calls_on_several_streams_check_and_answer_for_themselves(on_gpu: Any) -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    ids = [torch.randint(3, 40, (2, 18), device="cuda") for _ in range(6)]
    bad = ids[0].index_fill(1, torch.tensor(17, device="cuda"), 67)
    with torch.no_grad():
        graphs, on_gpu.backbones[0].graphs = on_gpu.backbones[0].graphs, None
        want = [on_gpu(x).last_hidden_state for x in ids]
        on_gpu.backbones[0].graphs = graphs
        torch.cuda.synchronize()
        wrong: list[str] = []

        def serve(stream: torch.cuda.Stream) -> None:
            try:
                with torch.no_grad(), torch.cuda.stream(stream):
                    for _ in range(5):
                        for x, y in zip(ids, want, strict=True):
                            assert torch.equal(on_gpu(x).last_hidden_state, y)
                        with pytest.raises(RequestError, match=r"is 67; the vocabulary"):
                            on_gpu(bad)
            except BaseException as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=serve, args=(s,)) for s in streams]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    torch.cuda.synchronize()
    assert not wrong
    assert graphs.recorded == 2
