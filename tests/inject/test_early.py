"""Replays that are begun before their call has been looked at: when, and that no answer depends on it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import RequestError
from hasten.inject import captured, engine
from hasten.inject.backbone import Backbone
from hasten.inject.captured import Graphs
from hasten.inject.early import Guess
from tests.inject.test_captured import Recorder, agree, recording
from tests.inject.test_captured import double as twice
from tests.tiny import TINY, build


def begun_at(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replays there were when each call's arguments came to be looked at."""
    seen, unfit = [], Backbone.unfit

    def look(self: Backbone, *arguments: Any) -> str | None:
        seen.append(recorder.replays)
        return unfit(self, *arguments)

    monkeypatch.setattr(Backbone, "unfit", look)
    return seen


def ids(tokens: int = 7) -> Tensor:
    return torch.randint(3, 40, (2, tokens))


def test_a_call_like_one_before_is_begun_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        seen = begun_at(recorder, monkeypatch)
        for tokens in (7, 7, 5, 5, 7, 5, 7):  # both lengths are recorded at their second call, and noted
            x = ids(tokens)
            agree(ours.base_model(x), theirs.base_model(x))
        assert recorder.replays == 5
        assert seen == [0, 0, 1, 1, 3, 4, 5]


def test_arguments_may_stand_in_any_order_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        seen = begun_at(recorder, monkeypatch)
        for number in range(4):
            x, types = ids(), torch.randint(2, (2, 7))
            given = (x, None, types) if number % 2 else ()
            named = {} if number % 2 else {"token_type_ids": types, "input_ids": x}
            agree(ours.base_model(*given, **named), theirs.base_model(*given, **named))
        assert (seen, recorder.replays) == ([0, 0, 1, 3], 3), "each way of asking is noted by itself"


def hide(model: Any, x: Tensor) -> Any:
    return model.base_model(x, attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))


def states(model: Any, x: Tensor) -> Any:
    model.base_model.config.output_hidden_states = True
    return model.base_model(x)


def double(model: Any, x: Tensor) -> Any:
    weight = model.base_model.pooler.dense.weight
    weight.data = weight.data * 2
    return model.base_model(x)


def train(model: Any, x: Tensor) -> Any:
    model.base_model.train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return model.base_model(x)


@pytest.mark.parametrize("other", [hide, states, double, train], ids=lambda f: f.__name__)
def test_a_wrong_guess_changes_no_answer_and_is_not_made_again(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        for _ in range(3):
            ours.base_model(ids())
        x = ids()
        agree(other(ours, x), other(theirs, x))
        before, y = recorder.replays, ids()
        assert before == 2 + (other is not hide), "a mask looks different"
        agree(ours.base_model(y), theirs.base_model(y))
        assert recorder.replays == before + (other in (hide, double))  # other memory has been recorded now


def test_an_input_that_two_arguments_share_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        seen = begun_at(recorder, monkeypatch)
        for _ in range(3):
            x = torch.ones(2, 7, dtype=torch.long)
            agree(ours.base_model(x, token_type_ids=x), theirs.base_model(x, token_type_ids=x))
        x, types = ids(), torch.zeros(2, 7, dtype=torch.long)
        agree(ours.base_model(x, token_type_ids=types), theirs.base_model(x, token_type_ids=types))
        assert seen == [0, 0, 1, 2]


def test_an_answer_is_that_of_the_inputs_and_not_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "lane_of", lambda inputs: 0)
    graphs = Graphs(recorder := Recorder())
    for _ in range(3):
        x = torch.randn(3)
        with torch.no_grad(), Guess(graphs, {"x": x}, False):
            graphs(twice, (x, None))
    assert recorder.replays == 2 and graphs.notes
    y = torch.randn(3)
    with torch.no_grad(), Guess(graphs, {"x": x}, False):
        (answer, _) = graphs(twice, (y, None))
    assert answer is not None and answer.equal(y * 2)
    assert recorder.replays == 4


def test_what_a_note_would_read_stays_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (_, ours, _):
        at = ours.base_model.pooler.dense.weight.data_ptr()
        for _ in range(3):
            ours.base_model(ids())
        (note,) = ours.base_model._hasten.graphs.notes.values()
        ours.base_model.pooler.dense.weight.data = torch.zeros(())
        assert at in [t.data_ptr() for t in note.kept]


def test_weights_that_move_forget_every_note(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, recorder):
        for _ in range(3):
            ours.base_model(ids())
        ours.double()
        theirs.double()
        before, x = recorder.replays, ids()
        agree(ours.base_model(x), theirs.base_model(x))
        assert recorder.replays == before and not ours.base_model._hasten.graphs.notes


def test_gradients_are_not_guessed_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (_, ours, recorder):
        x = torch.randn(2, 7, ours.config.hidden_size, requires_grad=True)
        for _ in range(3):
            ours.base_model(inputs_embeds=x)
        with torch.enable_grad():
            ours.base_model(inputs_embeds=x).last_hidden_state.sum().backward()
        assert x.grad is not None and not any(t.requires_grad for t in recorder.recorded[0][1] if t is not None)


def test_nobody_is_locked_out_behind_a_guess_that_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, _):
        for _ in range(3):
            ours.base_model(ids())
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(Backbone, "unfit", lambda *a: 1 / 0)
            ours.base_model(ids())
        x, answers = ids(), []
        with torch.no_grad():
            other = threading.Thread(target=lambda: answers.append(torch.no_grad()(ours.base_model)(x)), daemon=True)
            other.start()
            other.join(10)
        agree(answers[0], theirs.base_model(x))


@pytest.mark.parametrize("name", ["bert-pooled", "vit"])
def test_an_engine_begins_before_it_makes_its_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "lane_of", lambda inputs: 0)
    theirs = build(TINY[name])
    e = hasten.init_inference(copy.deepcopy(theirs).base_model)
    e.backbones[0].graphs, seen = Graphs(recorder := Recorder()), []
    begin = engine.begin_checks
    monkeypatch.setattr(engine, "begin_checks", lambda *a: seen.append(recorder.replays) or begin(*a))
    with torch.no_grad():
        for _ in range(4):
            c = theirs.config
            x = torch.randn(2, c.num_channels, c.image_size, c.image_size) if name == "vit" else ids()
            agree(e(x), theirs.base_model(x))
        assert (seen, recorder.replays) == ([0, 0, 2, 3], 3)
        if name != "vit":
            with pytest.raises(RequestError, match="vocabulary"):
                e(torch.full((2, 7), -1))


def test_nobody_is_locked_out_behind_a_replay_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording("bert-pooled", monkeypatch) as (theirs, ours, _):
        for _ in range(3):
            ours.base_model(ids())
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(captured.Recording, "begin", lambda *a: 1 / 0)
            ours.base_model(ids())
        (lane,) = ours.base_model._hasten.graphs._lanes.values()
        free: list[bool] = []
        other = threading.Thread(target=lambda: free.append(lane.lock.acquire(blocking=False)))
        other.start()
        other.join(10)
        assert free == [True]
