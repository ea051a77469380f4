"""The same questions by likelihood and by writing: sums of logs, parsed answers, and the gap between them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import copying_subject, random_subject

from open_lm_linear.cli import UserError
from open_lm_linear.evaluation import generation
from open_lm_linear.evaluation.generation import Answers, Question, choice_nats, parse, question_of, read_questions

CITIES = ("Paris", "London", "Hot air", "air")
NAMED = [
    ("B", 1),
    (" (C)", 2),
    ("D.", 3),
    ("B. Paris is wrong", 1),
    ("A, of course", 0),
    ("A\nThe next one", 0),
    ("The answer is (B).", 1),
    ("I think that the answer is: D", 3),
    ("It must be London!", 1),
    ("london", 1),
    ("It is hot air", 2),
    ("A cat sat on a mat", None),  # an article
    ("E", None),  # no such choice
    ("Paris or London", None),
    ("Londoner", None),
    ("I do not know", None),
    ("", None),
    ("\nQuestion: What is B?\nAnswer: B", None),  # the next question, which nobody asked
    ("C\n\nQuestion: What is B?\nAnswer: B", 2),
]


def write(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, entries)))
    return str(path)


@pytest.mark.parametrize(("output", "index"), NAMED)
def test_answers_are_parsed(output: str, index: int | None) -> None:
    assert parse(output, CITIES) == index


@pytest.mark.parametrize("attn_name", ["softmax", "linear"])
@pytest.mark.parametrize("bos", [False, True])
def test_likelihood_is_the_sum_over_the_choice(attn_name: str, bos: bool) -> None:
    subject = random_subject(attn_name, bos)
    prompt, choices = "Question: Where?\nAnswer:", ("Paris", "Pari", "London town", "P")
    for choice, nats in zip(choices, choice_nats(subject, prompt, choices), strict=True):
        ids = subject.tokenizer(f"{prompt} {choice}")["input_ids"]
        with torch.no_grad():
            logs = subject.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        new = len(choice) + 1  # a token a byte, and the space
        plain = -sum(float(logs[i - 1, ids[i]]) for i in range(len(ids) - new, len(ids)))
        assert nats == pytest.approx(plain, rel=1e-5)


def test_a_prompt_too_long_is_cut_from_the_left() -> None:
    subject = dataclasses.replace(random_subject(), max_length=30)
    short = choice_nats(subject, "z" * 27, ("ab", "cd"))
    assert choice_nats(subject, "y" * 50 + "z" * 27, ("ab", "cd")) == pytest.approx(short)
    with pytest.raises(UserError, match="no room for the question"):
        generation.answer(subject, Question("?", ("a", "b"), 0), [], generation.Options(max_new_tokens=30))


def test_rows_and_gaps() -> None:
    questions = [Question("?", ("x", "y"), 0), Question("?", ("x", "y", "z", "u"), 1), Question("?", ("x", "y"), 1)]
    answers = [Answers(0, 0, 0, None), Answers(1, 0, 1, 0), Answers(1, 1, 0, 1)]
    rows = generation._rows("t", questions, answers)
    values = {r["metric"]: r["value"] for r in rows}
    assert values == {
        "likelihood_text": 1.0,
        "likelihood_text_per_byte": pytest.approx(2 / 3),
        "likelihood_letter": pytest.approx(2 / 3),
        "generation": pytest.approx(1 / 3),
        "gap_text": pytest.approx(2 / 3),
        "gap_letter": pytest.approx(1 / 3),
        "unparsable": pytest.approx(1 / 3),
        "answers_a_letter": pytest.approx(2 / 3),
        "answers_a_generation": pytest.approx(1 / 3),
    }
    chances = {r["metric"]: r["chance"] for r in rows}
    assert chances["generation"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
    assert chances["answers_a_letter"] == pytest.approx(1 / 3)
    errors = {r["metric"]: r["standard_error"] for r in rows}
    assert errors["gap_letter"] == pytest.approx((4 / 3) ** 0.5 / 3**0.5)  # of 1, 1, -1
    assert {r["n"] for r in rows} == {3}


def test_a_model_that_copies_its_shots(tmp_path: Path) -> None:
    """The shot has the question's own words, so that copying answers it in every way of asking."""
    entry = {"question": "Where does the river end?", "choices": ["at sea", "on a hill", "in town"], "answer": "B"}
    data = write(tmp_path / "rivers.jsonl", [entry] * 3)
    options = {"data": data, "examples": data, "shots": 1, "max_new_tokens": 2}
    values = {r["metric"]: (r["value"], r["n"]) for r in generation.run(copying_subject(), options, 2, 0)}
    assert values["likelihood_text"] == values["likelihood_letter"] == values["generation"] == (1.0, 2)
    assert values["gap_text"] == values["unparsable"] == values["answers_a_generation"] == (0.0, 2)
    others = [entry | {"question": f"Where does river {i} end?"} for i in range(3)]
    rows = generation.run(copying_subject(), {"data": write(tmp_path / "ends.jsonl", others), "shots": 1}, None, 0)
    assert {(r["task"], r["n"]) for r in rows} == {("ends", 2)}  # the shot itself is not asked


def test_a_random_model_guesses(tmp_path: Path) -> None:
    entries = [{"question": f"What is {i}?", "choices": [f"{i}x", f"{i}y"], "answer": i % 2} for i in range(40)]
    options = {"data": write(tmp_path / "q.jsonl", entries), "max_new_tokens": 4}
    rows = {r["metric"]: r for r in generation.run(random_subject(), options, None, 0)}
    assert abs(rows["likelihood_text"]["value"] - 0.5) < 4 * 0.08
    assert rows["unparsable"]["value"] > 0.9
    assert rows["gap_text"]["value"] == rows["likelihood_text"]["value"] - rows["generation"]["value"]


@pytest.mark.parametrize(
    "entry",
    [
        {"question": "Who?", "choices": ["me", "you"], "answer": 1},
        {"question": "Who?", "choices": ["me", "you"], "answer": "B"},
        {"question": "Who?", "choices": ["me", "you"], "answer": "you"},
        {"query": "Question: Who?\n", "choices": ["me", "you"], "gold": 1},
        {"question": "Who?", "choices": {"text": ["me", "you"], "label": ["1", "2"]}, "answerKey": "2"},
        {
            "question": {"stem": "Who?", "choices": [{"text": "me", "label": "A"}, {"text": "you", "label": "B"}]},
            "answerKey": "B",
        },
        {"goal": "Who?", "sol1": "me", "sol2": "you", "label": 1},
    ],
)
def test_the_usual_forms_of_questions(entry: dict[str, Any]) -> None:
    assert question_of(entry) == Question("Who?", ("me", "you"), 1)


def test_bad_questions_and_options_are_refused(tmp_path: Path) -> None:
    good = {"question": "Who?", "choices": ["me", "you"], "answer": 1}
    for wrong in ({"question": "Who?"}, good | {"answer": 7}, good | {"choices": ["me"]}, {"context": "x"}):
        with pytest.raises(UserError, match=r"entry 2 of .*q\.jsonl is no multiple-choice question"):
            read_questions(write(tmp_path / "q.jsonl", [good, wrong]))
    data = write(tmp_path / "q.jsonl", [good])
    for options, message in [
        ({}, "give its option `data`"),
        ({"data": data, "shot": 1}, "no option 'shot'. Did you mean 'shots'"),
        ({"data": data, "shots": 1}, "too few questions for 1 shots"),
        ({"data": data, "chat": True}, "no chat template"),
        ({"data": str(tmp_path / "none.jsonl")}, "no input file"),
        ({"data": data, "max_new_tokens": 0}, "max_new_tokens below 1"),
    ]:
        with pytest.raises(UserError, match=message):
            generation.run(random_subject(), options, None, 0)
    (tmp_path / "broken.jsonl").write_text(json.dumps(good) + "\n[]\n")
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_questions(str(tmp_path / "broken.jsonl"))
    (tmp_path / "whole.json").write_text(json.dumps([good, good], indent=1))
    assert len(read_questions(str(tmp_path / "whole.json"))) == 2
