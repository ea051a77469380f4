"""Small subjects for the tests of evaluation: a tokenizer of bytes, random models, and one that copies what it read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from conftest import tiny
from torch import nn
from transformers import PreTrainedTokenizerFast

from open_lm_linear.evaluation.subject import Subject
from open_lm_linear.hf.wrap import wrap
from open_lm_linear.model import create_model

VOCAB = 257


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and <end>; which stands before every text where ``bos``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", VOCAB - 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def random_subject(attn_name: str = "linear", bos: bool = False) -> Subject:
    """A two-layer model with random weights."""
    torch.manual_seed(0)
    model = wrap(create_model(tiny(attn_name, vocab_size=VOCAB, seq_len=256)), tokenizer=byte_tokenizer())
    with torch.no_grad():
        model.model.head_weight().mul_(4)  # far enough from uniform that an error shows
    return Subject("random", model, byte_tokenizer(bos), 256)


class Copier(nn.Module):
    """Predicts what followed the longest earlier occurrence of the text's end; in doubt the latest one's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: list[int] | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Any:
        before = past_key_values or []
        ids = [*before, *input_ids[0].tolist()]
        text = "".join(map(chr, ids))
        kept = logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(1, kept, VOCAB)
        for i, end in enumerate(range(len(ids) - kept + 1, len(ids) + 1)):
            logits[0, i, self.following(text[:end])] = 10.0
        return SimpleNamespace(logits=logits, past_key_values=ids)

    @staticmethod
    def following(text: str) -> int:
        best = ord(text[-1])
        for length in range(1, len(text)):
            found = text.rfind(text[-length:], 0, len(text) - 1)
            if found < 0:
                break
            best = ord(text[found + length])
        return best


def copying_subject() -> Subject:
    return Subject("copier", Copier(), byte_tokenizer(), 4096)
