"""How a subject reads: in pieces through its cache, so that no more than a piece's logits are ever in memory.

One way serves all models. With linear attention the cache is a state of fixed size, so that memory does not grow with
the text; with softmax attention a piece is computed in parallel against the keys and values before it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from open_lm_linear.cli import UserError
from open_lm_linear.evaluation.subject import Subject
from open_lm_linear.ops.losses import cross_entropy_per_token

CHUNK = 1024  # tokens in one call: bounds the memory of logits and activations, not the result
PROBE = 64  # tokens after which, and after twice as many, the size of a cache is taken
CACHES = ("past_key_values", "cache_params", "state")  # transformers' names: most models, Mamba's kin, RWKV


class Reader:
    """One sequence on its way through a model: reads on from where it stands."""

    def __init__(self, model: Any, chunk: int = CHUNK) -> None:
        self.model, self.chunk, self.tokens = model, chunk, 0
        self.device = next(model.parameters()).device
        self.cache: dict[str, Any] = {}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def fork(self) -> Reader:
        """A reader that goes on from here without disturbing this one."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def pieces(self, ids: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Reads ids (T,): the logits (n, V) behind each piece's tokens, with the piece's place in ``ids``."""
        for begin in range(0, len(ids), self.chunk):
            span = slice(begin, min(begin + self.chunk, len(ids)))
            yield span, self._call(ids[span], 0)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads ids (T,), T > 0: the logits (V,) behind the last."""
        for part in ids.split(self.chunk):
            logits = self._call(part, 1)
        return logits[-1]

    @torch.no_grad()
    def _call(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits (n, V) behind the last ``keep`` of ids (T,); 0: all."""
        if self.tokens and not self.cache:
            raise UserError(
                f"{type(self.model).__name__} hands on no cache, so it reads no text of more than {self.chunk} tokens."
            )
        options = {"logits_to_keep": keep} if self._keeps else {}
        try:
            output = self.model(input_ids=ids[None].to(self.device), use_cache=True, **self.cache, **options)
        except IndexError as error:  # a table of learned positions has an end
            end = getattr(self.model.config, "max_position_embeddings", None)
            if end is None or self.tokens + len(ids) <= end:
                raise
            raise UserError(
                f"{type(self.model).__name__} has no positions beyond {end} tokens: ask shorter contexts."
            ) from error
        found = {name: getattr(output, name, None) for name in CACHES}
        self.cache = {name: cache for name, cache in found.items() if cache is not None}
        self.tokens += len(ids)
        return output.logits[0, -keep:]


def token_losses(model: Any, ids: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Cross entropy in nats of each of ids (T,) but the first, given those before it: float32 (T - 1,) on the CPU."""
    inputs, targets = ids[:-1], ids[1:]
    losses = [
        cross_entropy_per_token(logits[None], targets[None, span].to(logits.device))[0].cpu()
        for span, logits in Reader(model, chunk).pieces(inputs)
    ]
    return torch.cat(losses)


def greedy(subject: Subject, ids: list[int], max_new_tokens: int) -> str:
    """What the subject writes after a prompt, always the likeliest token, until it ends or ``max_new_tokens``."""
    reader, new = Reader(subject.model), list[int]()
    logits = reader.read(torch.tensor(ids))
    ends = end_tokens(subject)
    while (token := int(logits.argmax())) not in ends:
        new.append(token)
        if len(new) == max_new_tokens:
            break
        logits = reader.read(torch.tensor([token]))
    return subject.tokenizer.decode(new, skip_special_tokens=True)


def end_tokens(subject: Subject) -> set[int]:
    """The ids that end an answer: the tokenizer's and those of the model's generation config."""
    config = getattr(subject.model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    given = [subject.tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    return {token for token in given if token is not None}


def encode(tokenizer: Any, text: str, answer: str = "", *, chat: bool = False) -> list[int]:
    """The ids of a prompt and of the beginning of its answer, by the tokenizer's chat template where ``chat``.

    Raises:
        UserError: ``chat`` with a tokenizer that has no template.
    """
    if not chat:
        return tokenizer(text + answer)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("this model's tokenizer has no chat template: leave the option `chat` out.")
    message = [{"role": "user", "content": text}]
    asked = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(asked + answer.lstrip(), add_special_tokens=False)["input_ids"]


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (most often one token or none): what every text must begin with."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at]


def cache_bytes(reader: Reader) -> int:
    """Bytes that a reader remembers, counted from its tensors."""
    return sum(
        cache.nbytes() if hasattr(cache, "nbytes") else _tensor_bytes(getattr(cache, "layers", cache))
        for cache in reader.cache.values()
    )


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(vars(v) if hasattr(v, "__dict__") and not torch.is_tensor(v) else v) for v in value)
    return 0


def check_memory(subject: Subject, context: int) -> None:
    """Raises UserError where the cache of one text of ``context`` tokens is larger than the memory that is free.

    Its growth is measured on a short text; a cache that stops growing at a window is taken to go on.
    """
    reader = Reader(subject.model)
    sizes = []
    for _ in range(2):
        reader.read(torch.zeros(PROBE, dtype=torch.long))
        sizes.append(cache_bytes(reader))
    need = sizes[1] + (sizes[1] - sizes[0]) * max(0, context - 2 * PROBE) // PROBE
    free = _free_bytes(subject.device)
    if need > free:
        raise UserError(
            f"the cache of {subject.name} takes {need / 1e9:.1f} GB at a context of {context} tokens and only "
            f"{free / 1e9:.1f} GB are free on {subject.device}: leave this context out, or use a larger machine."
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
