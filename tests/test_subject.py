"""Whatever a command line names becomes one interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_tasks import VOCAB, WORDS, llama, save
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from open_lm_linear.cli import UserError
from open_lm_linear.evaluation.subject import load_subject


def test_ours_and_foreign_models_answer_alike(tmp_path: Path) -> None:
    theirs = llama()
    read = load_subject(save(tmp_path / "llama", theirs))
    assert (read.name, read.max_length, type(read.model).__name__) == ("llama", 64, "OpenLMLinearForCausalLM")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(read.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=VOCAB))
    foreign = load_subject(save(tmp_path / "neox", neox), name="m", max_length=32)
    assert (foreign.name, foreign.max_length, type(foreign.model).__name__) == ("m", 32, "GPTNeoXForCausalLM")
    assert foreign.model(ids).logits.shape == (1, 4, 8)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama", llama(), [*WORDS, *"efghij"])
    with pytest.raises(UserError, match="11 tokens and the model only 8"):
        load_subject(folder)
