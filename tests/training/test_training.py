"""A run that is killed goes on as if it had not been, and growth changes nothing at first."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from training import tokenizer
from training.corpus import Corpus
from training.model import build, depth, grow
from training.muon import orthogonalise
from training.plan import Plan, rate
from training.train import Run

TEXTS = [
    f"The king of {land} said to the old wizard, Do not wait for the ship. " * 5 for land in ("Wesmere", "Elensefar")
]
PLAN = Plan(
    minutes=math.inf,
    tokens=10 * 2 * 32,
    length=32,
    batch=2,
    seed=3,
    matrix_rate=0.02,
    vector_rate=3e-3,
    weight_decay=0.05,
    dropout=0.1,
    evaluate_every=4,
    validation_rows=40,
    save_every=math.inf,
    width=64,
    layers=1,
    grown=2,
    grow_at=0.35,
)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with two documents and a tokenizer; training sees what it is watched by, to test that it learns."""
    tokenizer.save(tokenizer.train(iter(TEXTS), 300), tmp_path / "tokenizer")
    records = [json.dumps({"source": "test", "weight": 1.5, "text": text}) for text in TEXTS]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(records) + "\n")
        read(tmp_path, split).save(tmp_path / f"{split}.npz")
    return tmp_path


def read(work: Path, split: str) -> Corpus:
    return Corpus.read(work / f"{split}.jsonl", AutoTokenizer.from_pretrained(work / "tokenizer"))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("killed_after", [3, 7])  # before and after the model has grown
def test_a_killed_run_goes_on_bit_for_bit(work: Path, killed_after: int) -> None:
    whole = Run(PLAN, work, "cpu", compiled=False)
    whole.go()
    (work / "checkpoint.pt").unlink()

    class Killed(Exception):
        pass

    first = Run(replace(PLAN, save_every=0), work, "cpu", compiled=False)
    step, done = first.step, []

    def dies(tokens: torch.Tensor, part: float) -> torch.Tensor:
        if len(done) == killed_after:
            raise Killed
        done.append(part)
        return step(tokens, part)

    first.step = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.go()
    second = Run(PLAN, work, "cpu", compiled=False)
    assert second.progress.step == killed_after
    second.go()
    assert second.progress.step == whole.progress.step == 10
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_a_run_whose_budget_is_spent_stays_as_it_is(work: Path) -> None:
    run = Run(PLAN, work, "cpu", compiled=False)
    run.go()
    again = Run(PLAN, work, "cpu", compiled=False)
    again.go()
    assert again.progress == run.progress


def test_training_lowers_the_validation_loss(work: Path) -> None:
    run = Run(replace(PLAN, tokens=60 * 2 * 32), work, "cpu", compiled=False)
    run.go()
    losses = [entry["validation"] for entry in run.progress.log]
    assert losses[-1] < 0.6 * losses[0]
    assert depth(run.model.state_dict()) == PLAN.grown


def test_the_weights_kept_are_those_that_predicted_the_validation_rows_best(work: Path) -> None:
    run = Run(PLAN, work, "cpu", compiled=False)
    losses = iter([3.0, 2.0, 2.5])
    run.validate = lambda: next(losses)  # type: ignore[method-assign]
    states = []
    note = run.note
    run.note = lambda loss: states.append(weights(run)) or note(loss)  # type: ignore[method-assign]
    run.go()
    kept = load_file(work / "best.safetensors")
    assert [entry["validation"] for entry in json.loads((work / "log.json").read_text())["log"]] == [3.0, 2.0, 2.5]
    assert states[1].keys() - kept.keys() == {"lm_head.weight"}
    for name, tensor in kept.items():
        assert torch.equal(tensor, states[1][name].bfloat16()), name
    assert not torch.equal(kept["model.norm.weight"], states[2]["model.norm.weight"].bfloat16())


def test_dropout_is_there_in_training_only() -> None:
    model = build(replace(PLAN, dropout=0.5), 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(31)[None]
    plain = build(replace(PLAN, dropout=0.0), 2)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    assert torch.equal(model.eval()(tokens).logits, plain.eval()(tokens).logits)


def test_a_grown_model_computes_what_the_shallow_one_did() -> None:
    shallow = build(replace(PLAN, layers=2, grown=6, dropout=0.0), 2)
    for parameter in shallow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    deep = grow(shallow, replace(PLAN, grown=6, dropout=0.0))
    tokens = torch.arange(31)[None]
    assert len(deep.model.layers) == 6
    torch.testing.assert_close(deep(tokens).logits, shallow(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 40, 5), (1, 7, 7)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    assert result.shape == shape
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    between = u.mT @ result.double() @ v.mT  # diagonal, if the vectors are kept
    values = between.diagonal(dim1=-2, dim2=-1)
    assert (values > 0.5).all() and (values < 1.3).all()
    torch.testing.assert_close(between, torch.diag_embed(values), rtol=0, atol=1e-4)


def test_every_pass_shows_documents_by_weight_in_an_order_of_its_own(work: Path) -> None:
    corpus = read(work, "train")
    passes = [corpus.shuffled(8, 0, number) for number in range(40)]
    mean = sum(rows.numel() for rows in passes) / len(passes)
    total = sum(map(len, corpus.documents))
    assert abs(mean / total - 1.5) < 0.15
    assert not torch.equal(passes[0][:4], passes[1][:4])
    assert torch.equal(passes[2], corpus.shuffled(8, 0, 2))


def test_a_saved_corpus_is_the_same_corpus(work: Path) -> None:
    corpus, loaded = read(work, "train"), Corpus.load(work / "train.npz")
    assert loaded.weights == corpus.weights
    assert [d.tolist() for d in loaded.documents] == [d.tolist() for d in corpus.documents]


@pytest.mark.parametrize("skip", [0, 1, 5, 23])
def test_skipped_batches_are_the_first_ones(work: Path, skip: int) -> None:
    corpus = read(work, "train")
    every, later = (corpus.batches(16, 3, seed=1, skip=count) for count in (0, skip))
    expected = [next(every) for _ in range(skip + 3)][skip:]
    assert all(torch.equal(next(later), rows) for rows in expected)


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [rate(fraction / 100) for fraction in range(101)]
    assert rates[0] < 0.01 and rates[30] == 1.0 and rates[75] == 0.5 and rates[100] == 0.0
    assert rates[2:] == sorted(rates[2:], reverse=True)
