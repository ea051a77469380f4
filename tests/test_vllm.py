"""The vLLM plug-in: sequences in slots equal the sequences alone; and vLLM itself, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative, tiny

from open_lm_linear.model import Transformer, create_model
from open_lm_linear.vllm.slots import StateLayout, advance, layouts

PROMPTS = ([5, 17, 3, 42, 8, 29, 11], [7], [60, 1, 1, 2])  # one of a single token, which engines take for a decode


def build(**options: Any) -> Transformer:
    return create_model(tiny("linear", options)).eval()


def allocate(states: list[StateLayout], slots: int) -> list[list[torch.Tensor]]:
    """Memory as an engine hands it over: full of what was there before."""
    return [
        [
            torch.full((slots, *shape), float("nan"), dtype=dtype)
            for shape, dtype in zip(s.shapes, s.dtypes, strict=True)
        ]
        for s in states
    ]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"normaliser": "sum"}], ids=["group_norm", "sum"])
def test_sequences_in_slots_equal_the_sequences_alone(options: dict[str, Any]) -> None:
    """Each prompt in pieces into a slot of its own, then all as one batch, a token each."""
    model = build(**options)
    states = layouts(model)
    memory, slots = allocate(states, 5), torch.tensor([4, 0, 2])
    for prompt, slot in zip(PROMPTS, slots, strict=True):
        for begin in range(0, len(prompt), 3):
            ids, at = torch.tensor([prompt[begin : begin + 3]]), torch.tensor([begin])
            advance(model, states, memory, ids, at, slot[None])
    positions = torch.tensor([len(prompt) for prompt in PROMPTS])
    together = advance(model, states, memory, torch.tensor([[9], [10], [12]]), positions, slots)
    for row, (prompt, token) in enumerate(zip(PROMPTS, (9, 10, 12), strict=True)):
        alone = model.hidden(torch.tensor([[*prompt, token]]))[0][0, -1]
        assert relative(together[row, -1], alone) < 1e-5
    assert torch.isnan(memory[0][0][1]).all()  # nobody's slot is left as it was


@torch.no_grad()
def test_a_new_sequence_among_others_forgets_what_its_slot_held() -> None:
    model = build()
    states = layouts(model)
    memory = allocate(states, 2)
    advance(model, states, memory, torch.tensor([[5, 17]]), torch.tensor([0]), torch.tensor([0]))
    advance(model, states, memory, torch.tensor([[8, 8]]), torch.tensor([0]), torch.tensor([1]))
    both = advance(model, states, memory, torch.tensor([[3], [7]]), torch.tensor([2, 0]), torch.tensor([0, 1]))
    assert relative(both[0, 0], model.hidden(torch.tensor([[5, 17, 3]]))[0][0, -1]) < 1e-5
    assert relative(both[1, 0], model.hidden(torch.tensor([[7]]))[0][0, -1]) < 1e-5


def test_a_growing_state_has_no_slot() -> None:
    with pytest.raises(ValueError, match=r"layer 0 \(softmax\) keeps a state that grows"):
        layouts(create_model(tiny("softmax")))


# ---- vLLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """Two sequences at a time and pieces of 16 tokens, so that eight prompts wait, mix and reuse slots."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    from test_serve import export
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        folder = export(tmp_path_factory.mktemp("vllm") / "tiny")
        sizes = {"max_model_len": 64, "max_num_seqs": 3, "max_num_batched_tokens": 16}
        yield folder, LLM(str(folder), dtype="float32", enforce_eager=True, **sizes)


def test_vllm_answers_each_prompt_as_transformers_does(engine: tuple[Path, Any]) -> None:
    from test_serve import ANSWER, PROMPTS, generated
    from vllm import SamplingParams

    folder, llm = engine
    answers = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=ANSWER))
    assert [a.outputs[0].text for a in answers] == [generated(folder, prompt) for prompt in PROMPTS]
