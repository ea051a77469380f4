"""Task files for lm-evaluation-harness over a language of five words, and models with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<eos>", "a", "b", "c", "d"]
VOCAB = 8


def tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = words or WORDS
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64, initializer_range=0.5)
    return LlamaForCausalLM(config).eval()


def save(folder: Path, model: Any, words: list[str] | None = None) -> str:
    model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return str(folder)


def write_tasks(folder: Path) -> Path:
    """toy_local and other_local (multiple choice, the group both), say_local (generation), gone_local (no data)."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = (3, 9, 1, 14, 6, 2, 11, 4, 8, 5, 7, 13)
    rows = []
    for i, length in enumerate(lengths):
        words = [WORDS[1 + (i * 7 + j * j) % 4] for j in range(length)]
        choices = [" ".join(WORDS[1 + (i + j + k) % 4] for k in range(1 + (i + j) % 3)) for j in range(4)]
        rows.append({"query": " ".join(words), "choices": choices, "gold": i % 4, "answer": words[-1]})
    data = folder / "toy.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    choice = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    say = {
        **choice,
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": 5, "do_sample": False, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    del say["doc_to_choice"]
    gone = {**choice, "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}}
    weighted = [{"metric": "acc", "weight_by_size": True}]
    both = {"group": "both_local", "task": ["toy_local", "other_local"], "aggregate_metric_list": weighted}
    tasks = {"toy_local": choice, "other_local": choice, "say_local": say, "gone_local": gone}
    for name, values in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **values}))
    (folder / "both_local.yaml").write_text(yaml.safe_dump({**both, "metadata": {"version": 1}}))
    return folder


def write_suite(path: Path, *entries: dict[str, Any], **more: Any) -> str:
    path.write_text(yaml.safe_dump({"tasks": list(entries), **more}))
    return str(path)
