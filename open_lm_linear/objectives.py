"""What a run minimises, as its flags say it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from open_lm_linear.cli import UserError, did_you_mean

LAYERWISE = ("align", "hidden")
LOSSES = ("ce", "kl", *LAYERWISE)
SHARDS = "shards"


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    loss: tuple[str, ...] = ("ce=1",)
    """What is minimised, NAME=WEIGHT, one or several. ce: cross entropy of the next token. kl: divergence of
    the student's next token from the teacher's, KL(teacher | student), on the same tokens. align: squared error of each
    swapped attention's output on the teacher's residual stream, over the variance of the teacher's; hidden: the same of
    each block's output. Those two train attentions alone, and run the body without gradients."""
    teacher: str = ""
    """The frozen model to learn from: what --pretrained takes. Empty: --pretrained, before its attention is swapped.
    shards: what data.teach wrote beside the tokens of the training data, for kl; no teacher is in memory then."""
    kl_top_k: int = 0
    """kl over this many of the teacher's likeliest tokens and all others together. 0: over the whole vocabulary, or
    with --teacher shards over what they hold."""
    kl_temperature: float = 1.0
    """Logits of both sides are divided by it in kl, which is multiplied by its square."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss.

        Raises:
            UserError: a text that is not NAME=WEIGHT, an unknown name, or one given twice.
        """
        found: dict[str, float] = {}
        for text in self.loss:
            name, equals, value = text.partition("=")
            if name not in LOSSES or not equals:
                raise UserError(
                    f"--loss {text!r} is not NAME=WEIGHT with one of {', '.join(LOSSES)}.{did_you_mean(name, LOSSES)}"
                )
            try:
                weight = float(value)
            except ValueError as error:
                raise UserError(f"--loss {text!r}: the weight must be a number.") from error
            if not 0 < weight < math.inf:
                raise UserError(f"--loss {text!r}: the weight must be above 0; leave out what has none.")
            if name in found:
                raise UserError(f"--loss gives {name} twice: give it once.")
            found[name] = weight
        if not found:
            raise UserError(f"--loss is empty: give NAME=WEIGHT with one of {', '.join(LOSSES)}.")
        return found

    @property
    def layerwise(self) -> bool:
        """Whether layers learn from the teacher's, each by itself."""
        return any(name in LAYERWISE for name in self.weights)

    @property
    def taught(self) -> bool:
        """Whether a teacher is needed."""
        return set(self.weights) != {"ce"}

    @property
    def offline(self) -> bool:
        """Whether the teacher's logits are read with the tokens."""
        return self.teacher == SHARDS

    def taught_by(self, teacher: str) -> ObjectiveConfig:
        """The same with a teacher, where one is needed and none is given."""
        return dataclasses.replace(self, teacher=teacher) if self.taught and not self.teacher else self

    def check(self) -> None:
        """Refuses what means nothing, or does not go together."""
        if self.layerwise and (others := [name for name in self.weights if name not in LAYERWISE]):
            raise UserError(
                f"--loss {self.loss[0]} and the others: align and hidden run the body without gradients, which "
                f"{' and '.join(others)} needs; make them a stage of their own."
            )
        if not 0 < self.kl_temperature < math.inf:
            raise UserError(f"--kl-temperature must be above 0, not {self.kl_temperature}.")
        if self.kl_top_k < 0:
            raise UserError(f"--kl-top-k must be 0 or more, not {self.kl_top_k}.")
        for name in ("kl_temperature", "kl_top_k"):
            if getattr(self, name) != getattr(ObjectiveConfig, name) and "kl" not in self.weights:
                raise UserError(f"--{name.replace('_', '-')} belongs to --loss kl=WEIGHT: give that too.")
        if self.offline and self.layerwise:
            raise UserError("--teacher shards has logits and no layers: align and hidden need a teacher in memory.")
        if self.offline and self.kl_top_k:
            raise UserError("--kl-top-k is what the shards hold with --teacher shards: leave it out.")
        if self.teacher and not self.taught:
            raise UserError(f"--teacher {self.teacher} is asked nothing: --loss is cross entropy alone.")
