"""The Transformer as a transformers model: config, cache, `forward` and `generate()`.

`bundle.py` copies this module, and what it needs of the package, into the one file that an export carries.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Tensor, truncated_normal
from open_lm_linear.cli import UserError
from open_lm_linear.hf.cache import OpenLMLinearCache
from open_lm_linear.model import Transformer


class OpenLMLinearConfig(PretrainedConfig):
    """The keys of OpenLM's model JSON, flat, the chosen attention's options among them, beside transformers' own.

    transformers' names (``hidden_size``, ``num_hidden_layers``, ...) read and write the same values.

    Raises:
        UserError: a key that is missing or holds what no model can have.
    """

    model_type = "open_lm_linear"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "seq_len",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = {self.attribute_map.get(key, key): value for key, value in kwargs.items()}
        name = kwargs.get("attn_name", "auto")
        given = {key: kwargs.pop(key) for key in _architecture_keys(name) if key in kwargs}
        config = attention.resolve(name).complete(ModelConfig.from_json(given, source="config.json"))
        super().__init__(**kwargs)
        for key, value in config.to_json().items():
            setattr(self, key, value)
        self.use_cache, self.bos_token_id = use_cache, bos_token_id
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id

    def to_model_config(self) -> ModelConfig:
        """The architecture alone."""
        keys = _architecture_keys(self.attn_name)
        return ModelConfig.from_json({key: getattr(self, key) for key in keys}, source="config.json")

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> OpenLMLinearConfig:
        """The config of an architecture; ``kwargs`` are transformers' own fields, such as ``eos_token_id``."""
        return cls(**config.to_json(), **kwargs)


def _architecture_keys(attn_name: str) -> list[str]:
    """The flat keys of a model with this attention."""
    own = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "attn_options"]
    return own + [field.name for field in dataclasses.fields(attention.resolve(attn_name).Config)]


class OpenLMLinearForCausalLM(PreTrainedModel, GenerationMixin):
    """open_lm_linear's Transformer (``self.model``) with transformers' interface.

    Positions follow from ``attention_mask`` and the cache, so left- and right-padded rows equal the row alone.
    """

    config_class = OpenLMLinearConfig
    config: OpenLMLinearConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # a state cannot be cut back to fewer tokens, as assisted generation would ask

    def __init__(self, config: OpenLMLinearConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.to_model_config())
        self.post_init()

    # ---- weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws, by the Transformer's own rules, every parameter that no checkpoint gave."""
        loaded = [
            (module, name, parameter)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and getattr(parameter, "_is_hf_initialized", False)
        ]
        if len(loaded) == len(list(self.model.parameters())):
            return
        # Loaded parameters stand aside while the rest is drawn: what is drawn for them has no memory.
        for module, name, parameter in loaded:
            module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="meta"))
        try:
            self.model.init_weights()
        finally:
            for module, name, parameter in loaded:
                module._parameters[name] = parameter

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A single new part, as resize_token_embeddings makes one."""
        if isinstance(module, (nn.Embedding, nn.Linear)) and not getattr(module.weight, "_is_hf_initialized", False):
            truncated_normal(module.weight, 1.0 / math.sqrt(self.config.hidden_dim))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.tok_embeddings = value
        self.model.config = dataclasses.replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        """The output matrix, or None where the input's serves as both."""
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        assert isinstance(new_embeddings, nn.Linear)
        self.model.output = new_embeddings

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers' activation checkpointing reads and sets."""
        return self.model.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.grad_checkpointing = enable

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: OpenLMLinearCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass over T tokens a row.

        Args:
            input_ids: (B, T); or ``inputs_embeds`` (B, T, hidden_dim).
            attention_mask: (B, T) or (B, past + T), 0 at padding on either side.
            position_ids: (B, T). Where nothing is masked and nothing came before, a 0 begins a document (or is padding
                before one); otherwise mask and cache say where a token stands, and these say nothing new.
            past_key_values: the cache of an earlier call, renewed in place.
            labels: (B, T), -100 where there is nothing to predict; shifted inside.
            use_cache: whether to return the cache (default: the config's, not while training).
            output_hidden_states: whether to return the input of every block and the output of the final norm.
            logits_to_keep: how many last tokens to compute logits for, or their indices; 0: all.
            kwargs: ``num_items_in_batch`` divides the summed loss in place of the number of targets.

        Returns:
            loss, logits (B, kept, vocab_size) in float32, past_key_values, hidden_states.
        """
        self._refuse(attention_mask, past_key_values, kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if cache is None or not isinstance(cache, OpenLMLinearCache):
            cache = OpenLMLinearCache() if use_cache else None
        past, given = None, input_ids if inputs_embeds is None else inputs_embeds
        if cache is not None and given is not None:
            cache.check(given.shape[0], self.model.config)
            past = cache.past
        first = _first_tokens(position_ids, attention_mask) if past is None else None
        states: list[Tensor] | None = [] if self._asked("output_hidden_states", output_hidden_states) else None
        hidden, past = self.model.hidden(input_ids, inputs_embeds, past, attention_mask, first, states)
        if cache is not None:
            cache.renew(past, hidden.shape[1], self.model.config)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept] if labels is None else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,  # type: ignore[arg-type]
            hidden_states=None if states is None else (*states, hidden),
        )
        return output if self._asked("return_dict", return_dict) else output.to_tuple()

    def _asked(self, name: str, value: bool | None) -> bool | None:
        return getattr(self.config, name) if value is None else value

    @staticmethod
    def _refuse(attention_mask: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_attentions"):
            raise ValueError("this model returns no attention weights: drop output_attentions.")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), not of shape {tuple(attention_mask.shape)}.")
        # An empty cache of another kind is what some callers begin with; it says no more than None.
        if cache is not None and not isinstance(cache, OpenLMLinearCache) and cache.get_seq_length() > 0:
            raise ValueError(f"past_key_values must be a cache that this model returned, not a {type(cache).__name__}.")

    def load_cache(self, path: str | os.PathLike[str]) -> OpenLMLinearCache:
        """A cache from a file that its ``save(path)`` wrote; what was read before need not be read again.

        Raises:
            UserError: not such a file, or one of a model of another architecture. Weights are not compared.
        """
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            kind = self(token, use_cache=True).past_key_values.past
        return OpenLMLinearCache.load(path, self.model.config, kind)

    # ---- generate ----------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, *_: Any, **__: Any
    ) -> None:
        """Begins `generate()` with a cache of ours, unless the caller gave one or wants none."""
        kind, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        if given is not None:
            if kind is not None:
                raise ValueError("give either past_key_values or cache_implementation: a cache can fork(static=True).")
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            if copies > 1 and getattr(given, "rows", None) == batch_size:  # read once, and now beams or several answers
                given.batch_repeat_interleave(copies)
            return
        if generation_config.use_cache is False:
            return
        static = kind == "static" and self._state_is_constant()
        if kind not in (None, "dynamic") and not static:
            why = "its keys and values grow with the text" if kind == "static" else "this model has its own cache"
            warnings.warn(f"cache_implementation={kind!r} is ignored: {why}.", stacklevel=2)
        model_kwargs["past_key_values"] = OpenLMLinearCache(static=static)

    def _state_is_constant(self) -> bool:
        return self.model.state_bytes(1, 1) == self.model.state_bytes(1, 2**20)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of one call of `generate()`; those of a decode step have one shape from step to step."""
        if is_first_iteration and next_sequence_length is not None and next_sequence_length < 1:
            read = past_key_values.get_seq_length()
            given = read + next_sequence_length
            raise UserError(
                f"the cache holds {read} tokens and the input {given}: give generate() the whole text, of which at "
                f"least one token is new, or new tokens alone with an attention_mask (rows, {read} + new tokens)."
            )
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and next_sequence_length == 1 and past_key_values is not None:
            # The token that was drawn last: never padding, at the place that the cache knows.
            inputs.pop("attention_mask", None)
            inputs.pop("position_ids", None)
        return inputs


def _first_tokens(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """(B or 1, T) bool, True where packed documents begin, or None for a single document a row."""
    if position_ids is None or position_ids.dim() != 2:
        return None
    if torch.compiler.is_compiling():  # a graph cannot ask what the values are
        return position_ids == 0 if attention_mask is None else None
    single = not bool((position_ids[:, 1:] == 0).any())
    masked = attention_mask is not None and not bool(attention_mask.all())
    return None if single or masked else position_ids == 0
