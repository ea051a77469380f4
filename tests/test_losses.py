"""The chunked cross entropy against torch's over whole logits: values, gradients, ignored targets, z-loss, dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from open_lm_linear.model import create_model
from open_lm_linear.ops import losses, native_losses, products
from open_lm_linear.ops.losses import (
    IGNORE,
    Teaching,
    chunked_cross_entropy,
    chunked_distillation,
    cross_entropy_per_token,
)
from open_lm_linear.ops.native import native_library

TOKENS, DIM, VOCAB = 50, 16, 37


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def form(request, monkeypatch):
    """By torch as with a large vocabulary, a chunk of these sizes in several goes; and by the compiled code."""
    if request.param == "torch":
        monkeypatch.setattr(losses, "CACHED", 4 * VOCAB)
        monkeypatch.setattr(losses, "native_entropy", lambda *_: None)
        monkeypatch.setattr(losses, "native_divergence", lambda *_: None)
    elif native_library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def batch(dtype=torch.float64, ignored=0.3):
    """hidden (50, 16), weight (37, 16) and targets, of which a share is ignored."""
    targets = torch.randint(0, VOCAB, (TOKENS,)).masked_fill(torch.rand(TOKENS) < ignored, IGNORE)
    return torch.randn(TOKENS, DIM, dtype=dtype), torch.randn(VOCAB, DIM, dtype=dtype) / 4, targets


def by_torch(hidden, weight, targets, z_loss, softcap=None):
    """(cross entropy, total) over whole logits; z-loss over the counted tokens only."""
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return entropy, entropy + z_loss * logits.logsumexp(-1)[targets != IGNORE].square().sum()


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_values_and_gradients(dtype, bound, z_loss, chunk):
    hidden, weight, targets = batch()
    exact_leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    entropy, total = by_torch(*exact_leaves, targets, z_loss)
    exact = torch.autograd.grad(3.0 * total, exact_leaves)
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    loss = chunked_cross_entropy(*leaves, targets, z_loss, chunk)
    assert loss.shape == (2,)
    assert loss.dtype == dtype
    assert relative(loss, torch.stack((entropy, total))) < bound
    for ours, theirs in zip(torch.autograd.grad(3.0 * loss[1], leaves), exact, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, theirs) < bound


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradcheck(softcap):
    hidden, weight, targets = (x[:6] for x in batch())
    targets = targets.masked_fill(targets != IGNORE, 3)
    leaves = [hidden.requires_grad_(), weight.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets, 0.1, 4, softcap)[1], leaves)


@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_capped_logits(softcap):
    hidden, weight, targets = batch()
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    twins = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    exact = by_torch(*leaves, targets, 0.1, softcap)[1]
    ours = chunked_cross_entropy(*twins, targets, 0.1, 7, softcap)[1]
    assert relative(ours, exact) < 1e-12
    for one, other in zip(torch.autograd.grad(ours, twins), torch.autograd.grad(exact, leaves), strict=True):
        assert relative(one, other) < 1e-12
    assert relative(by_torch(*leaves, targets, 0.1)[1].detach(), exact.detach()) > 1e-4


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_parts_get_no_gradient(frozen):
    hidden, weight, targets = batch()
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    by_torch(*exact, targets, 0.1)[1].backward()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = chunked_cross_entropy(hidden, weight, targets, 0.1, 7)[1]
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for leaf, reference in zip((hidden, weight), exact, strict=True):
        if leaf.requires_grad:
            assert relative(leaf.grad, reference.grad) < 1e-12
        else:
            assert leaf.grad is None


def test_without_a_graph_the_value_is_the_same():
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    with_graph = chunked_cross_entropy(hidden, weight, targets, 0.1, 7)
    with torch.no_grad():
        without = chunked_cross_entropy(hidden, weight, targets, 0.1, 7)
    assert with_graph.requires_grad and not without.requires_grad
    assert torch.equal(with_graph, without)


def test_ignored_targets_have_no_part():
    """Neither in the entropy nor in z-loss nor in any gradient; where all are ignored, all is zero."""
    hidden, weight, targets = batch()
    leaf = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(leaf, weight, targets, 0.1, 7)
    loss[1].backward()
    assert leaf.grad[targets == IGNORE].abs().max() == 0
    assert leaf.grad[targets != IGNORE].abs().sum(-1).min() > 0
    counted = targets != IGNORE
    assert relative(loss, chunked_cross_entropy(hidden[counted], weight, targets[counted], 0.1)) < 1e-12
    leaf.grad = None
    nothing = chunked_cross_entropy(leaf, weight, torch.full_like(targets, IGNORE), 0.1, 7)
    nothing[1].backward()
    assert nothing.tolist() == [0, 0]
    assert leaf.grad.abs().max() == 0


def test_the_parts_of_a_batch_add_up():
    """The sum over micro-batches is the sum over the batch: what accumulation divides by its true token count."""
    hidden, weight, targets = batch()
    whole = chunked_cross_entropy(hidden, weight, targets, 0.1)
    parts = sum(chunked_cross_entropy(hidden[i::3], weight, targets[i::3], 0.1) for i in range(3))
    assert relative(parts, whole) < 1e-12


def test_bfloat16_autocast():
    """Logits in bfloat16, reductions in float32: the value within 0.5%, gradients within 2%, in the leaves' dtype."""
    hidden, weight, targets = batch(torch.float32)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    entropy, total = by_torch(*exact, targets, 1e-4)
    total.backward()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(*leaves, targets, 1e-4, 7)
    loss[1].backward()
    assert loss.dtype == torch.float32
    assert relative(loss, torch.stack((entropy, total))) < 5e-3
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert relative(ours.grad, theirs.grad) < 2e-2


def test_bfloat16_model():
    hidden, weight, targets = batch(torch.bfloat16)
    exact = by_torch(hidden.double(), weight.double(), targets, 0.0)[0]
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = chunked_cross_entropy(*leaves, targets, 0.0, 7)
    loss[1].backward()
    assert loss.dtype == torch.float32
    assert relative(loss[0], exact) < 5e-3
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow():
    hidden, weight, targets = batch(torch.float32)
    hidden = (hidden * 1e4).requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, targets, 0.0, 7)
    loss[1].backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(hidden.grad).all()
    assert relative(loss[0], by_torch(hidden.double(), weight.double(), targets, 0.0)[0]) < 1e-5


def test_a_second_derivative_is_refused():
    """The gradients are made on the way forward, so that a second derivative would be silently wrong."""
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="differenti"):
        (grad,) = torch.autograd.grad(
            chunked_cross_entropy(hidden, weight, targets)[1].square(), hidden, create_graph=True
        )
        grad.square().sum().backward()


def test_a_target_out_of_range_is_an_error():
    hidden, weight, targets = batch()
    targets[3] = VOCAB
    with pytest.raises((RuntimeError, IndexError)):
        chunked_cross_entropy(hidden, weight, targets)


def test_per_token():
    """The mean over the counted tokens is torch's, and ignored ones are 0."""
    logits, targets = torch.randn(2, 9, VOCAB), torch.randint(0, VOCAB, (2, 9))
    targets[0, :4] = IGNORE
    each = cross_entropy_per_token(logits.bfloat16(), targets)
    assert each.shape == (2, 9)
    assert each.dtype == torch.float32
    assert each[0, :4].abs().max() == 0
    assert relative(each.sum() / 14, F.cross_entropy(logits.bfloat16().float().flatten(0, 1), targets.flatten())) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_s_loss_is_that_of_its_logits(tied):
    """With packed documents, ignored targets and z-loss; a tied output gets both gradients."""
    model = create_model(tiny("linear", weight_tying=tied), dtype=torch.float64)
    ids, targets = torch.randint(0, 61, (2, 20)), torch.randint(0, 61, (2, 20))
    targets[:, 5:9] = IGNORE
    first = torch.zeros(2, 20, dtype=torch.bool)
    first[:, 11] = True
    grads = []
    for whole in (True, False):
        model.zero_grad()
        if whole:
            logits = model(ids, first=first)[0].flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
            loss = loss + 0.01 * logits.logsumexp(-1)[targets.flatten() != IGNORE].square().sum()
        else:
            loss = model.loss(ids, targets, 0.01, first)[1]
        loss.backward()
        grads.append((loss, {k: p.grad.clone() for k, p in model.named_parameters()}))
    assert relative(grads[1][0], grads[0][0]) < 1e-12
    for key, exact in grads[0][1].items():
        assert relative(grads[1][1][key], exact) < 1e-10, key


# ---------------------------------------------------------------- beside a teacher


def teacher(dtype=torch.float64, **fields):
    """A teacher of another width that knows what it says, and the same vocabulary."""
    return Teaching(torch.randn(TOKENS, 9, dtype=dtype), torch.randn(VOCAB, 9, dtype=dtype), **fields)


def by_definition(hidden, weight, targets, teaching, z_loss=0.0, softcap=None):
    """(cross entropy, divergence, total) over whole logits, a token and a word at a time."""

    def logits_of(h, w, cap):
        logits = h @ w.T
        return logits if cap is None else cap * torch.tanh(logits / cap)

    counted = targets != IGNORE
    t = teaching.temperature
    p = (logits_of(teaching.hidden, teaching.weight, teaching.softcap) / t).softmax(-1)
    q = (logits_of(hidden, weight, softcap) / t).softmax(-1)
    divergence = t**2 * (p * (p / q).log())[counted].sum()
    entropy, total = by_torch(hidden, weight, targets, z_loss, softcap)
    return torch.stack((entropy, divergence, teaching.ce * total + teaching.kl * divergence))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1024])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize(
    ("fields", "softcap"),
    [
        ({}, None),
        ({"ce": 0.3, "kl": 2.0}, None),
        ({"temperature": 3.0}, None),
        ({"ce": 1.0, "kl": 0.5, "temperature": 0.5, "softcap": 2.0}, 0.7),
    ],
)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_distillation_is_its_definition(z_loss, fields, softcap, dtype, bound, chunk):
    hidden, weight, targets = batch()
    taught = teacher(**fields)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = by_definition(*leaves, targets, taught, z_loss, softcap)
    exact = torch.autograd.grad(3.0 * expected[2], leaves)
    twins = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    narrow = Teaching(taught.hidden.to(dtype), taught.weight.to(dtype).requires_grad_(), **fields)
    found = chunked_distillation(*twins, targets, narrow, z_loss, chunk, softcap)
    assert found.dtype == dtype and relative(found, expected) < bound
    for one, other in zip(torch.autograd.grad(3.0 * found[2], twins), exact, strict=True):
        assert one.dtype == dtype and relative(one, other) < bound
    assert found[1] > 0 and narrow.weight.grad is None
    with torch.no_grad():
        assert torch.equal(chunked_distillation(*twins, targets, narrow, z_loss, chunk, softcap), found)


def test_distillation_passes_gradcheck():
    hidden, weight, targets = (x[:6] for x in batch())
    taught = teacher(ce=0.4, kl=0.7, temperature=2.0)
    taught = Teaching(taught.hidden[:6], taught.weight[:6], ce=0.4, kl=0.7, temperature=2.0)
    targets = targets.masked_fill(targets != IGNORE, 3)
    leaves = [hidden.requires_grad_(), weight.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda h, w: chunked_distillation(h, w, targets, taught, 0.1, 4)[2], leaves)


def test_a_mixture_is_the_sum_of_its_parts():
    hidden, weight, targets = batch()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    taught = teacher()

    def gradients(ce, kl):
        mixed = Teaching(taught.hidden, taught.weight, ce=ce, kl=kl)
        return torch.autograd.grad(chunked_distillation(*leaves, targets, mixed, 0.1, 7)[2], leaves)

    alone = torch.autograd.grad(chunked_cross_entropy(*leaves, targets, 0.1, 7)[1], leaves)
    for entropy, divergence, both, reference in zip(
        gradients(1, 0), gradients(0, 1), gradients(0.3, 2), alone, strict=True
    ):
        assert relative(entropy, reference) < 1e-12
        assert relative(both, 0.3 * entropy + 2 * divergence) < 1e-12


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn():
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    found = chunked_distillation(hidden, weight, targets, Teaching(hidden, weight, temperature=2.0), chunk=7)
    found[2].backward()
    assert found[1].abs() < 1e-12 and hidden.grad.abs().max() < 1e-12
    ignored = torch.full_like(targets, IGNORE)
    assert chunked_distillation(hidden, weight, ignored, teacher(ce=1.0), chunk=7).tolist() == [0, 0, 0]


class Shapes(TorchDispatchMode):
    """The greatest number of elements of any result."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_no_logits_of_all_tokens_are_ever_made():
    tokens, vocab = 400, 300
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    taught = Teaching(torch.randn(tokens, 3), torch.randn(vocab, 3), ce=1.0)
    with Shapes() as shapes:
        chunked_distillation(hidden, weight, torch.arange(tokens) % vocab, taught, chunk=20)[2].backward()
    assert shapes.largest == 20 * vocab


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 5, 16, 33, 2000])
def test_the_compiled_code_at_every_size(vocab, dtype, threads, form, monkeypatch):
    if form == "torch":
        pytest.skip("of the compiled code")
    monkeypatch.setattr(native_losses, "native_threads", lambda elements: threads)
    logits, theirs = ((20 * torch.randn(9, vocab)).to(dtype) for _ in range(2))
    targets = torch.randint(vocab, (9,)).masked_fill(torch.arange(9) == 4, IGNORE)
    x, y = (z.double() for z in (logits, theirs))
    x.requires_grad_()
    entropy = F.cross_entropy(x, targets, ignore_index=IGNORE, reduction="sum")
    square = x.logsumexp(-1)[targets != IGNORE].square().sum()
    apart = F.kl_div(x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    divergence = apart[targets != IGNORE].sum()
    totals = entropy + 0.1 * square, 0.3 * entropy + 2 * divergence
    found = [logits.clone(), logits.clone()]
    sums = [
        native_losses.native_entropy(found[0], targets, 0.1, True),
        native_losses.native_divergence(found[1], theirs, targets, 0.3, 2.0, True),
    ]
    for each, exact in zip(sums, ((entropy, totals[0]), (entropy, divergence, totals[1])), strict=True):
        torch.testing.assert_close(each.double(), torch.stack(exact).detach(), rtol=2e-6, atol=2e-4)
    for gradient, total in zip(found, totals, strict=True):
        (exact,) = torch.autograd.grad(total, x, retain_graph=True)
        bound = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(gradient.double(), exact, rtol=bound, atol=1e-5)
    kept = logits.clone()
    assert torch.equal(native_losses.native_entropy(kept, targets, 0.1, False), sums[0])
    assert torch.equal(native_losses.native_divergence(kept, theirs, targets, 0.3, 2.0, False), sums[1])
    assert torch.equal(kept, logits)


def test_losses_that_are_no_numbers_stay_so(form):
    hidden, weight, targets = batch(torch.float32, ignored=0)
    hidden[3] = float("nan")
    hidden[5] = float("inf")
    assert chunked_cross_entropy(hidden, weight, targets).isnan().all()
    taught = Teaching(torch.randn(TOKENS, 3), torch.randn(VOCAB, 3))
    assert chunked_distillation(hidden, weight, targets, taught).isnan().all()


def test_float32_logits_are_of_a_few_rows_alone(form, monkeypatch):
    if form == "compiled":
        pytest.skip("which makes none")
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BFLOAT16", True)  # else products are float32, and so their logits
    hidden, weight = torch.randn(40, 4, requires_grad=True), torch.randn(VOCAB, 4, requires_grad=True)
    wide = []

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.shape[-1:] == (VOCAB,):
                wide.append(out.shape[0])
            return out

    with Wide(), torch.autocast("cpu", torch.bfloat16):
        chunked_cross_entropy(hidden, weight, torch.arange(40) % VOCAB, chunk=20)[1].backward()
    assert max(wide) == 4


def test_distillation_in_bfloat16():
    hidden, weight, targets = batch(torch.float32)
    taught = teacher(torch.float32, ce=0.5)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    wide = Teaching(taught.hidden.double(), taught.weight.double(), ce=0.5)
    expected = by_definition(*exact, targets, wide)
    expected[2].backward()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_distillation(*leaves, targets, taught, chunk=7)
    found[2].backward()
    assert found.dtype == torch.float32 and relative(found, expected) < 1e-2
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad.dtype == torch.float32 and relative(ours.grad, theirs.grad) < 3e-2
