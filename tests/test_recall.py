"""What recall hides is there once, at the depth asked, in a prompt that fills its context; and is scored rightly."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import byte_tokenizer, copying_subject, random_subject

from open_lm_linear.cli import UserError
from open_lm_linear.evaluation import haystacks, reading, recall
from open_lm_linear.evaluation.reading import Reader, cache_bytes, check_memory, greedy
from open_lm_linear.evaluation.recall import Options, associations, prompts
from open_lm_linear.evaluation.recall_tasks import TASKS, Prompt, fitted, read_questions
from open_lm_linear.evaluation.subject import Subject

WITHOUT_FILES = [name for name in TASKS if name != "qa"]


class Words:
    """One token a word, for budgets."""

    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * len(text.split())}


def subject_of_words() -> Subject:
    return Subject("words", torch.nn.Identity(), Words(), 4096)


def drawn(task: str, context: int, samples: int = 3, seed: int = 0, **options: Any) -> list[Prompt]:
    made = prompts(subject_of_words(), Options(task=task, **options), context, samples, seed)
    return [prompt for prompt, _, _ in made]


@pytest.mark.parametrize("task", WITHOUT_FILES)
def test_prompts_fill_their_context_and_depend_on_the_seed_alone(task: str) -> None:
    context = 2000
    made = prompts(subject_of_words(), Options(task=task), context, 2, 5)
    unit = {"needles": 7, "common_words": 6}.get(TASKS[task].filler if task != "common_words" else task, 1)
    slack = 80 if task == "frequent_words" else unit  # one more draw there may change several counts
    for _, ids, depth in made:
        assert context - slack < len(ids) + TASKS[task].new_tokens <= context
        assert depth is None
    assert [p for p, _, _ in made] == drawn(task, context, 2, 5)
    assert made[0][0] != made[1][0]
    assert drawn(task, context, 1, 6)[0] != made[0][0]


@pytest.mark.parametrize("task", [name for name in WITHOUT_FILES if name.startswith(("passkey", "needle", "niah"))])
def test_every_answer_stands_in_the_text_once(task: str) -> None:
    for prompt in drawn(task, 1500):
        assert len(set(prompt.answers)) == len(prompt.answers)
        for answer in prompt.answers:
            assert prompt.text.count(answer) == 1
            assert answer not in prompt.beginning


@pytest.mark.parametrize("task", ["passkey", "needle", "niah_single_3", "niah_multikey_2"])
def test_needles_lie_at_their_depth(task: str) -> None:
    depths = (0.0, 25.0, 50.0, 75.0, 100.0)
    made = prompts(subject_of_words(), Options(task=task, depths=depths), 2500, 5, 0)
    assert tuple(depth for _, _, depth in made) == depths
    for prompt, _, depth in made:
        hidden = prompt.text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        assert depth is not None
        assert 100 * hidden.index(prompt.answers[0]) / len(hidden) == pytest.approx(depth, abs=2)


def test_numbers_of_needles_and_answers() -> None:
    def needles(prompt: Prompt) -> list[tuple[str, str]]:
        return re.findall(r"The secret number of (\S+) is (\d+)\.", prompt.text)

    (keys,) = drawn("niah_multikey_1", 1000, 1)
    assert len(needles(keys)) == len(dict(needles(keys))) == 4
    assert len(keys.answers) == 1
    (values,) = drawn("niah_multivalue", 1000, 1)
    assert len(needles(values)) == 4
    assert len({key for key, _ in needles(values)}) == 1
    assert sorted(values.answers) == sorted(value for _, value in needles(values))
    (queries,) = drawn("niah_multiquery", 1000, 1)
    assert sorted(queries.answers) == sorted(dict(needles(queries)).values())
    assert all(key in queries.beginning for key, _ in needles(queries))
    (only,) = drawn("niah_multikey_2", 1000, 1)
    assert len(needles(only)) > 100  # a haystack of nothing but needles
    assert (only.beginning.split()[-2], only.answers[0]) in needles(only)


def test_variables_form_a_chain_in_order() -> None:
    (prompt,) = drawn("variable_tracking", 1000, 1)
    asked = prompt.text.split("Follow them.")[2]  # behind the example
    steps = re.findall(r"VAR (\w+) = (\w+)\.", asked)
    assert tuple(new for new, _ in steps) == prompt.answers
    number = re.search(r"the value (\d+)", asked)
    assert number is not None
    assert [old for _, old in steps] == [number[1], *prompt.answers[:-1]]


def test_counts_of_words() -> None:
    (prompt,) = drawn("common_words", 3000, 1)
    asked = prompt.text.split("Some words of the list")[2]
    listed = re.findall(r"\d+\. (\S+)", asked)
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, n in counts.items() if n == 30} == set(prompt.answers)
    assert set(counts.values()) == {3, 30}
    (prompt,) = drawn("frequent_words", 3000, 1)
    listed = prompt.text.split("\n\n")[1].split()
    ranked = sorted(set(listed), key=listed.count, reverse=True)
    assert ranked[:4] == ["...", *prompt.answers]
    assert listed.count(ranked[3]) > listed.count(ranked[4])


def test_a_haystack_of_files_and_questions(tmp_path: Path) -> None:
    text = tmp_path / "essay.txt"
    text.write_text("Salt is carried by sea. Ships wait. " * 50)
    (prompt,) = drawn("niah_single_2", 400, 1, haystack=(str(text),))
    assert prompt.text.count("Ships wait.") > 20
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": f"Town {i} lies on hill {i}.",
                        "qas": [{"question": f"Where is town {i}?", "answers": a}],
                    }
                    for i, a in enumerate([[{"text": "hill 0"}], [{"text": "hill 1"}, {"text": "Hill one"}], []])
                ]
            }
        ]
    }
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad))
    assert [q["answers"] for q in read_questions(str(path))] == [["hill 0"], ["hill 1", "Hill one"]]
    first, second = drawn("qa", 300, 2, questions=str(path))
    assert first.answers == ("hill 0",)
    assert "Where is town 1?" in second.text
    assert second.text.count("Town 1 lies on hill 1.") == 1
    assert TASKS["qa"].score(second, "It lies on HILL ONE, they say") == 1.0


def test_scores() -> None:
    prompt = Prompt("", "", ("Alpha", "beta", "77", "x9"))
    assert TASKS["niah_multivalue"].score(prompt, "alpha and 77, so") == 0.5
    assert TASKS["niah_multivalue"].score(prompt, "") == 0.0
    assert TASKS["niah_multivalue"].score(prompt, "x9 77 BETA ALPHA") == 1.0
    assert TASKS["qa"].score(prompt, "maybe beta") == 1.0
    assert TASKS["qa"].score(prompt, "gamma") == 0.0


def test_the_largest_size_that_fits_is_found() -> None:
    def length(prompt: Prompt) -> int:
        return 7 + 3 * len(prompt.text) + len(prompt.text) // 5

    def build(size: int) -> Prompt:
        return Prompt("x" * size, "", ())

    for budget in (7, 9, 10, 100, 12345):
        best = fitted(build, length, budget, "x")
        assert length(best) <= budget < length(Prompt(best.text + "x", "", ()))
    with pytest.raises(UserError, match="takes at least 7 tokens"):
        fitted(build, length, 6, "x")


def test_words_are_hidden_between_sentences() -> None:
    words = ["One", "two.", "Three", "four", "five.", "Six."]
    assert haystacks.hide(words, [(0.0, "A."), (1.0, "Z.")]) == "A. One two. Three four five. Six. Z."
    assert haystacks.hide(words, [(0.6, "M.")]) == "One two. M. Three four five. Six."
    assert haystacks.hide([], [(0.5, "M.")]) == "M."
    names = list(zip(range(20_000), haystacks.names(random.Random(0)), strict=False))
    assert len({name for _, name in names}) == 20_000


@pytest.mark.parametrize("task", ["passkey", "needle", "niah_single_1", "niah_single_3", "niah_multikey_1"])
def test_a_model_that_copies_finds_everything(task: str) -> None:
    rows = recall.run(copying_subject(), {"task": task, "contexts": [900], "samples": 3}, 2, 0)
    assert [(r["value"], r["n"], r["context"], r["chance"]) for r in rows] == [(1.0, 2, 900, 0.0)]


def test_a_random_model_finds_nothing() -> None:
    rows = recall.run(
        random_subject(), {"task": "passkey", "contexts": [300], "samples": 2, "depths": [0, 100]}, None, 0
    )
    assert [(r["value"], r.get("depth")) for r in rows] == [(0.0, None), (0.0, 0.0), (0.0, 100.0)]


def test_associations_by_definition() -> None:
    words, opts = list(range(100, 160)), Options(task="mqar", pairs=5, queries=12)
    made = associations(words, [7], 90, opts, random.Random(0))
    assert len(made.ids) in (89, 90)
    assert made.ids[0] == 7
    keys, values = made.ids[1:11:2], made.ids[2:11:2]
    assert values == made.values
    assert len({*keys, *values}) == 10
    pairs = dict(zip(keys, values, strict=True))
    assert len(made.asked_at) == 12
    for at, answer in zip(made.asked_at, made.answers, strict=True):
        assert at >= 11
        assert pairs[made.ids[at]] == answer == made.ids[at + 1]
    asked = set(made.asked_at)
    between = [t for i, t in enumerate(made.ids) if i >= 11 and i not in asked and i - 1 not in asked]
    assert not {*keys, *values} & set(between)
    with pytest.raises(UserError, match="takes a context of 35, not 34"):
        associations(words, [7], 34, opts, random.Random(0))
    with pytest.raises(UserError, match="more than the 60 words"):
        associations(words, [], 900, Options(task="mqar", pairs=30), random.Random(0))


def test_associations_are_recalled_or_guessed() -> None:
    options = {"task": "mqar", "contexts": [200], "pairs": 16, "queries": 16}
    exact, among = recall.run(copying_subject(), options, 3, 0)
    assert (exact["metric"], exact["value"]) == ("accuracy", 1.0)
    assert (among["metric"], among["value"], among["chance"]) == ("accuracy_among_values", 1.0, 1 / 16)
    exact, among = recall.run(random_subject(), options | {"samples": 40}, None, 0)
    assert abs(among["value"] - 1 / 16) < 4 * among["standard_error"] + 0.02
    assert exact["value"] < 0.1


@pytest.mark.parametrize("attn_name", ["softmax", "linear"])
def test_greedy_equals_recomputing(attn_name: str) -> None:
    subject = random_subject(attn_name)
    ids = torch.randint(256, (40,)).tolist()
    grown = list(ids)
    for _ in range(6):
        with torch.no_grad():
            grown.append(int(subject.model(torch.tensor([grown])).logits[0, -1].argmax()))
    new = grown[len(ids) :]
    end = subject.tokenizer.eos_token_id
    new = new[: new.index(end)] if end in new else new
    assert greedy(subject, ids, 6) == subject.tokenizer.decode(new)


def test_memory_is_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax, linear = random_subject("softmax"), random_subject("linear")
    reader = Reader(softmax.model)
    reader.read(torch.zeros(10, dtype=torch.long))
    assert cache_bytes(reader) == 10 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, hidden, float32
    monkeypatch.setattr(reading, "_free_bytes", lambda device: 1_000_000)
    check_memory(softmax, 900)
    check_memory(linear, 10**9)
    with pytest.raises(UserError, match=r"the cache of random takes 0\.0 GB at a context of 65536 tokens"):
        recall.run(softmax, {"task": "passkey", "contexts": [65536]}, None, 0)


def test_a_foreign_cache_is_counted_and_handed_on() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=257)).eval()
    ids = torch.randint(257, (30,))
    reader = Reader(model, chunk=8)
    logits = reader.read(ids)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids[None]).logits[0, -1], rtol=1e-4, atol=1e-5)
    assert cache_bytes(reader) == 30 * 2 * 2 * 16 * 4
    fork = reader.fork()
    fork.read(ids[:5])
    assert (cache_bytes(reader), fork.tokens) == (30 * 2 * 2 * 16 * 4, 35)


def test_a_table_of_positions_has_an_end() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 257}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    assert Reader(model, chunk=8).read(torch.zeros(16, dtype=torch.long)).shape == (257,)
    with pytest.raises(UserError, match="no positions beyond 16 tokens"):
        Reader(model, chunk=8).read(torch.zeros(17, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "passkeys"}, "no task 'passkeys'. Did you mean 'passkey'"),
        ({"task": "passkey", "depth": 3}, "no option 'depth'. Did you mean 'depths'"),
        ({"task": "passkey", "contexts": [20]}, "passkey takes at least"),
        ({"task": "passkey", "depths": [101]}, "in percent"),
        ({"task": "common_words", "depths": [50]}, "no needle"),
        ({"task": "qa"}, "needs the option questions"),
        ({"task": "passkey", "chat": True, "contexts": [400]}, "no chat template"),
        ({"task": "passkey", "samples": 0}, "must be above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recall.run(random_subject(), options, None, 0)


def test_the_chat_template_holds_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    ids = reading.encode(tokenizer, "What?\n", " It is", chat=True)
    assert tokenizer.decode(ids) == "<u>What?\n</u><a>It is"
