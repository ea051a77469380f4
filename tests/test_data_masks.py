"""Masked targets and packed documents: what is read, what is predicted, and that the loss follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative, tiny

from open_lm_linear.cli import UserError
from open_lm_linear.data.interval import GROUPS, bootstrap
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.masks import inputs_and_targets, resolved
from open_lm_linear.data.shards import write_shard
from open_lm_linear.data.stream import DataConfig
from open_lm_linear.model import create_model

X = -100
LEFT, SINGLE, END = 42, 7, 9


def split(rows: list[list[int]], **settings: object) -> tuple[list[list[int]], list[list[int]], list | None]:
    inputs, targets, first = inputs_and_targets(torch.tensor(rows), DataConfig(**settings))  # type: ignore[arg-type]
    return inputs.tolist(), targets.tolist(), None if first is None else first.tolist()


def test_without_flags_each_token_is_predicted_from_those_before() -> None:
    assert split([[1, 2, 3, 4], [5, -100, 7, -100]]) == ([[1, 2, 3], [5, 0, 7]], [[2, 3, 4], [X, 7, X]], None)


@pytest.mark.parametrize(
    ("row", "targets"),
    [
        ([1, 2, 3, 4], [2, 3, 4]),
        ([42, 1, 2, 3], [1, 2, 3]),
        ([1, 42, 2, 3], [X, 2, 3]),
        ([1, 2, 42, 3], [X, X, 3]),
        ([1, 2, 3, 42], [X, X, X]),
        ([42, 1, 42, 3], [X, X, 3]),
        ([42, 42, 42, 42], [X, X, X]),
        ([1, 7, 42, 7], [X, X, X]),
        ([42, 7, 1, 7], [X, 1, X]),
    ],
)
def test_masks_leave_the_inputs_alone(row: list[int], targets: list[int]) -> None:
    assert split([row], target_mask_left=LEFT, target_mask_individual=SINGLE) == ([row[:-1]], [targets], None)


@pytest.mark.parametrize(
    ("row", "inputs", "targets"),
    [
        ([1, 2, 3, 4], [1, 2, 3], [2, 3, 4]),
        ([1, 42, 2, 3], [1, 2, 3], [2, 3, X]),
        ([1, 2, 42, 3], [1, 2, 3], [X, 3, X]),
        ([1, 2, 3, 42], [1, 2, 3], [X, X, X]),
        ([42, 1, 2, 3], [1, 2, 3], [2, 3, X]),  # in OpenLM 1, 2, X: each input its own target
        ([42, 1, 42, 3], [1, 3, 7], [3, X, X]),
        ([42, 42, 42, 42], [7, 7, 7], [X, X, X]),
        ([1, 42, 7, 3], [1, 7, 3], [X, 3, X]),
    ],
)
def test_a_squashed_marker_leaves_inputs_and_targets_aligned(
    row: list[int], inputs: list[int], targets: list[int]
) -> None:
    settings = {"target_mask_left": LEFT, "target_mask_individual": SINGLE, "squash_mask_left": True}
    assert split([row], **settings) == ([inputs], [targets], None)
    alone = split([[1, 42, 42, 3]], target_mask_left=LEFT, squash_mask_left=True)
    assert alone == ([[1, 3, 0]], [[3, X, X]], None)


def test_a_document_begins_after_each_separator() -> None:
    inputs, targets, first = split(
        [[1, 9, 2, 9, 3], [9, 9, 1, 2, 9]], reset_state_at_document=True, document_separator=9
    )
    assert inputs == [[1, 9, 2, 9], [9, 9, 1, 2]] and targets == [[9, 2, 9, 3], [9, 1, 2, 9]]
    assert first == [[True, False, True, False], [True, True, True, False]]


@pytest.mark.parametrize("attn_name", ["linear", "softmax"])
def test_packed_documents_have_the_loss_of_lone_ones(attn_name: str) -> None:
    model = create_model(tiny(attn_name)).double()
    documents = [torch.randint(10, 61, (n,)) for n in (5, 9, 4)]
    row = torch.cat([torch.cat([d, torch.tensor([END])]) for d in documents])[None]
    cfg = DataConfig(reset_state_at_document=True, document_separator=END, target_mask_individual=row[0, 5].item())
    inputs, targets, first = inputs_and_targets(row, cfg)
    assert targets[0, 4] == X  # the separator is no target here, and so documents join nowhere else
    packed = model.loss(inputs, targets, first=first)[0]
    # After a separator the first token of the next document is predicted by the separator alone, in its own document.
    lone = torch.zeros((), dtype=torch.float64)
    for n, document in enumerate(documents):
        after = documents[n + 1][:1] if n + 1 < len(documents) else torch.tensor([X])
        ids = torch.cat([document, torch.tensor([END])])[None]
        goal = torch.cat([document[1:], torch.tensor([X]), after])[None]
        lone = (
            lone
            + model.loss(
                ids[:, :-1] if n + 1 == len(documents) else ids, goal[:, : ids.shape[1] - (n + 1 == len(documents))]
            )[0]
        )
    assert relative(packed, lone) < 1e-5
    unreset = model.loss(inputs, targets)[0]
    assert relative(unreset, lone) > 1e-4


def make(folder: Path, **card: object) -> str:
    folder.mkdir()
    write_shard(folder / "a.tar", np.arange(10).reshape(2, 5))
    write_manifest(folder / "manifest.jsonl", [Shard(str(folder / "a.tar"), 2)], card)
    return str(folder)


def test_the_separator_is_the_one_on_the_card(tmp_path: Path) -> None:
    a, b, none = make(tmp_path / "a", eod_token_id=3), make(tmp_path / "b", eod_token_id=4), make(tmp_path / "c")
    assert resolved(DataConfig(train_data=(a,)), 50) == DataConfig(train_data=(a,))
    assert resolved(DataConfig(train_data=(a, none), reset_state_at_document=True), 50).document_separator == 3
    given = DataConfig(train_data=(a, b), reset_state_at_document=True, document_separator=5)
    assert resolved(given, 50) == given
    for sources, count in (((a, b), "2"), ((none,), "no")):
        with pytest.raises(UserError, match=f"name {count} end-of-document tokens: give --document-separator"):
            resolved(DataConfig(train_data=sources, reset_state_at_document=True), 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"squash_mask_left": True}, "--squash-mask-left takes out the token that --target-mask-left names"),
        ({"target_mask_left": 1, "target_mask_individual": 1}, "are both 1: give two tokens"),
        ({"document_separator": 1}, "--document-separator is used by --reset-state-at-document alone"),
        ({"target_mask_left": 50}, "--target-mask-left 50 is outside the model's vocabulary of 50"),
        ({"target_mask_individual": -1}, "--target-mask-individual -1 is outside"),
    ],
)
def test_masks_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(DataConfig(**settings), 50)  # type: ignore[arg-type]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        counts = rng.integers(5, 20, 60)
        low, high = bootstrap(rng.normal(2.0, 0.5, 60) * counts, counts, 200, seed=trial)
        hits += low < 2.0 < high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_interval_is_deterministic_and_bounded() -> None:
    sums, counts = np.linspace(1, 3, 40), np.ones(40)
    assert bootstrap(sums, counts, 50, seed=1) == bootstrap(sums, counts, 50, seed=1) != bootstrap(sums, counts, 50)
    assert bootstrap(sums[:1], counts[:1], 50) is None and bootstrap(sums, counts, 0) is None
    assert bootstrap(np.full(40, 2.0), counts, 20) == (2.0, 2.0)
    rng = np.random.default_rng(0)
    many = rng.normal(0, 1, 3 * GROUPS)
    low, high = bootstrap(many, np.ones(len(many)), 100)
    assert (high - low) / 2 == pytest.approx(1.96 / np.sqrt(len(many)), rel=0.3)
