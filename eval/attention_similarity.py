"""How alike a student's linear attention is to its teacher's softmax, head by head (Figures 3 and 4 of the paper).

    python eval/attention_similarity.py --student logs/demo
    python eval/attention_similarity.py --student smollm2 --attn-name hedgehog      # swapped, untrained

Writes OUT/similarity.json and OUT/similarity.png: cosine similarity and distance of singular values of the attention
matrices, as they are and over the sums of their rows, layers by heads.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from open_lm_linear.cli import UserError, command, parse


@dataclass(frozen=True)
class Args:
    """Compare the attention matrices of a teacher and a student."""

    student: str
    """A run, checkpoint or anything that --pretrained takes."""
    teacher: str = "smollm2"
    """The model with softmax attention."""
    attn_name: str = ""
    """Attention to swap into the student, where it is not one yet."""
    text: str = ""
    """A UTF-8 file to run on. Empty: a page of the Python documentation."""
    tokens: int = 256
    """Tokens of it."""
    out: str = "attention_similarity"
    """Folder of the results."""


@command
def main() -> None:
    args = parse(Args, prog="python eval/attention_similarity.py", description=Args.__doc__ or "")
    import torch

    from open_lm_linear.data import python_docs
    from open_lm_linear.evaluation.attention_maps import likeness
    from open_lm_linear.pretrained import load_pretrained, load_tokenizer

    if args.tokens < 2:
        raise UserError(f"--tokens must be at least 2, not {args.tokens}.")
    if args.text:
        try:
            text = Path(args.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {args.text} is not a readable UTF-8 file ({error}).") from error
    else:
        text = "".join(content for _, content in python_docs.topics())
    ids = load_tokenizer(args.teacher)(text, add_special_tokens=False)["input_ids"][: args.tokens]
    teacher, student = load_pretrained(args.teacher), load_pretrained(args.student, args.attn_name or None)
    found = likeness(teacher, student, torch.tensor([ids]))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {"teacher": args.teacher, "student": args.student, "attn_name": student.config.attn_name}
    result |= {"tokens": len(ids)} | {name: dataclasses.asdict(value) for name, value in found.items()}
    (out / "similarity.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in found.items():
        for kind, rows in dataclasses.asdict(value).items():
            flat = torch.tensor(rows).flatten()
            print(f"{kind:<9} {name:<7} mean {flat.mean():.3f}  least {flat.min():.3f}  greatest {flat.max():.3f}")
    plot(out / "similarity.png", found)
    print(f"written: {out}/similarity.json, similarity.png")


def plot(path: Path, found: dict) -> None:
    """Four heat maps, layers down and heads across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 5), layout="constrained")
    panels = [(kind, name) for kind in ("cosine", "singular") for name in found]
    for axis, (kind, name) in zip(axes, panels, strict=True):
        limits = (-1, 1) if kind == "cosine" else (0, None)
        image = axis.imshow(getattr(found[name], kind), aspect="auto", vmin=limits[0], vmax=limits[1])
        axis.set(title=f"{kind}, {name}", xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
