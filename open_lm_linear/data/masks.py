"""What of a sample is read and what is predicted: masked targets and packed documents."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from open_lm_linear.cli import UserError
from open_lm_linear.data.stream import DataConfig, separator_of
from open_lm_linear.ops.losses import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

FLAGS = ("target_mask_left", "target_mask_individual", "document_separator")


def resolved(cfg: DataConfig, vocab_size: int) -> DataConfig:
    """``cfg`` with the document separator filled in from the data's card where it is needed and not given.

    Raises:
        UserError: flags that need one another are not all given, contradict one another or name no token, or the
            separator is nowhere said.
    """
    if cfg.squash_mask_left and cfg.target_mask_left is None:
        raise UserError("--squash-mask-left takes out the token that --target-mask-left names: give that too.")
    if cfg.target_mask_left is not None and cfg.target_mask_left == cfg.target_mask_individual:
        raise UserError(
            f"--target-mask-left and --target-mask-individual are both {cfg.target_mask_left}: give two tokens, or one "
            "of the flags."
        )
    if cfg.document_separator is not None and not cfg.reset_state_at_document:
        raise UserError("--document-separator is used by --reset-state-at-document alone: give that too.")
    if cfg.reset_state_at_document and cfg.document_separator is None:
        cfg = dataclasses.replace(cfg, document_separator=separator_of(cfg))
    for name in FLAGS:
        token = getattr(cfg, name)
        if token is not None and not 0 <= token < vocab_size:
            raise UserError(f"--{name.replace('_', '-')} {token} is outside the model's vocabulary of {vocab_size}.")
    return cfg


def inputs_and_targets(tokens: Tensor, cfg: DataConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the model reads and what it is to predict at each place.

    - ``target_mask_left``: everything up to and including the last such token of a sample is no target; a sample
      without it is all target.
    - ``target_mask_individual``: such a token is never a target, and is read as it is.
    - ``squash_mask_left``: every ``target_mask_left`` token is taken out and what is right of it moves up. The places
      that fall free at the end hold ``target_mask_individual`` (token 0 without it) and are no targets.
    - ``reset_state_at_document``: a document begins at a sample's first token and after each separator.

    As in OpenLM, but that it squashes inputs and targets each on their own: where a marker is the sample's first token
    they slip by one there, and every input has itself as its target. Here the row is squashed before it is split.

    Args:
        tokens: (B, T + 1) ids; one that is negative already is no target.

    Returns:
        inputs (B, T), targets (B, T) with -100 where there is nothing to predict, first (B, T) bool or None.
    """
    masked = tokens < 0
    if cfg.target_mask_left is not None:
        marker = tokens == cfg.target_mask_left
        masked = masked | marker.flip(1).int().cumsum(1).flip(1).bool()  # a marker is here or further right
        if cfg.squash_mask_left:
            tokens, masked = _without(tokens, masked, marker, cfg.target_mask_individual or 0)
    if cfg.target_mask_individual is not None:
        masked = masked | (tokens == cfg.target_mask_individual)
    inputs = tokens[:, :-1].clamp(min=0)
    targets = tokens[:, 1:].masked_fill(masked[:, 1:], IGNORE)
    return inputs, targets, _first(inputs, cfg)


def _without(tokens: Tensor, masked: Tensor, marker: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Takes the markers out of each row; what falls free at its end is ``pad`` and masked."""
    order = marker.int().argsort(dim=1, stable=True)  # what is kept first, in its order
    free = marker.gather(1, order)
    return tokens.gather(1, order).masked_fill(free, pad), masked.gather(1, order) | free


def _first(inputs: Tensor, cfg: DataConfig) -> Tensor | None:
    if not cfg.reset_state_at_document:
        return None
    first = torch.ones_like(inputs, dtype=torch.bool)
    first[:, 1:] = inputs[:, :-1] == cfg.document_separator
    return first
