"""The Triton kernels of linear attention: by Triton's interpreter where there is no GPU, small sizes.

Errors against the definition in float64 are those of `ops.check`. All memory that torch hands out is NaN at first, so
an element that no kernel wrote shows.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative, tiny

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from open_lm_linear.model import create_model  # noqa: E402
from open_lm_linear.ops import backends, check  # noqa: E402
from open_lm_linear.ops.check import Case  # noqa: E402
from open_lm_linear.ops.linear_attention import chunked, naive  # noqa: E402
from open_lm_linear.ops.triton_decoding import step_in_one_launch  # noqa: E402
from open_lm_linear.ops.triton_linear import triton_attention, triton_forward, triton_step  # noqa: E402

CASES = [
    Case("nothing but tokens", "float32", (2, 35, 2, 2, 16, 16)),
    Case("shared keys", "float32", (1, 33, 4, 2, 16, 24), state=True),
    Case("everything", "float32", (2, 40, 2, 1, 20, 40), state=True, first=True, keep=True, segment=32),
    Case("segments", "float32", (1, 49, 2, 2, 16, 16), segment=16),
    Case("decays that underflow", "float32", (1, 40, 2, 1, 16, 16), 1e4, state=True, segment=32),
    Case("almost no decay", "float32", (1, 40, 2, 1, 80, 16), 1e-5, state=True),
    Case("widest", "float32", (1, 17, 1, 1, 256, 17), state=True),
    Case("one token", "float32", (2, 1, 2, 1, 16, 16), state=True, first=True),
    Case("half precision", "bfloat16", (1, 40, 2, 1, 32, 16), state=True, segment=32),
    Case("half precision, packed and padded", "bfloat16", (1, 40, 2, 2, 16, 20), first=True, keep=True),
]


@pytest.fixture
def poisoned():
    """Memory begins as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_backend():
    backends.use_backend("triton")
    yield
    backends.use_backend("")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_outputs_states_and_gradients_are_the_definitions(case, poisoned):
    (finding,) = check.check_cases(("triton",), torch.device(DEVICE), (case,))
    assert not finding.skipped and finding.right, check.line_of(finding)
    assert set(finding.errors) == set(check.PARTS) - (set() if case.state else {"dstate"})


def test_what_rounds_on_the_way_to_a_gradient_is_kept_in_two_numbers():
    """dk of shared keys is summed in float32, so that the interpreter's coarse rounding does not hide the kernel's."""
    case = Case("", "bfloat16", (1, 40, 2, 1, 16, 16), state=True)
    (finding,) = check.check_cases(("triton",), torch.device(DEVICE), (case,))
    assert max(finding.errors[part] for part in ("dk", "dv", "dstate")) < 1e-4


def test_inputs_may_be_strided_views():
    """q, k and v as slices of one projection, and a state and an output's gradient that are expanded."""
    torch.manual_seed(1)
    wide = torch.randn(2, 20, 2, 48, device=DEVICE, requires_grad=True)
    state = torch.randn(1, 1, 16, 16, device=DEVICE).expand(2, 2, 16, 16)
    decay = -torch.rand(2, device=DEVICE)
    grads = []
    for form in (triton_attention, chunked):
        out, last = form(*wide.split(16, 3), decay, state)
        grads.append(torch.autograd.grad(out.sum() + last.sum(), wide)[0])
    assert relative(*grads) < 1e-5


@pytest.mark.parametrize("shape", [(2, 4, 2, 16, 16), (3, 3, 1, 20, 40), (1, 2, 2, 200, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_token_in_one_launch(shape, dtype, poisoned):
    """Against the torch form and torch's norm: with and without a state, a document's beginning, padding."""
    batch, heads, kv_heads, dim_k, dim_v = shape
    torch.manual_seed(1)
    # Slices of a longer sequence: the rows of a token lie apart.
    q = torch.randn(batch, 3, heads, dim_k, device=DEVICE).to(dtype)[:, :1]
    k = torch.randn(batch, 3, kv_heads, dim_k, device=DEVICE).to(dtype)[:, 1:2]
    v = torch.randn(batch, 3, kv_heads, dim_v, device=DEVICE).to(dtype)[:, 2:]
    decay, state = -torch.rand(heads, device=DEVICE), torch.randn(batch, heads, dim_k, dim_v, device=DEVICE)
    first = (torch.arange(batch, device=DEVICE) % 2 == 1)[:, None]
    for given, begins, keep in ((state, None, None), (None, None, None), (state, first, None), (state, None, ~first)):
        for g in (decay, None):
            per_token = g if keep is None or g is None else g * keep[:, :, None]
            exact, exact_state = naive(q, k, v, per_token, given, begins)
            normed = F.layer_norm(exact, (dim_v,), eps=1e-5)
            for eps, wanted, kind in ((1e-5, normed, torch.float32), (None, exact, dtype)):
                out, new = triton_step(q, k, v, g, given, begins, keep, eps)
                assert (out.dtype, new.dtype) == (kind, torch.float32)
                assert relative(out, wanted) < (1e-5 if kind == torch.float32 else 1e-2)
                assert relative(new, exact_state) < 1e-5


def test_a_state_from_inference_may_go_on_to_a_gradient():
    q, k, v = (torch.randn(1, 4, 1, 16, device=DEVICE) for _ in range(3))
    with torch.inference_mode():
        _, state = triton_attention(q, k, v)
    q.requires_grad_()
    triton_attention(q, k, v, None, state)[0].sum().backward()
    assert relative(q.grad[0, 0, 0], state[0, 0].sum(1) + k[0, 0, 0] * v[0, 0].sum()) < 1e-5


def test_they_refuse_what_they_cannot_do():
    q, k = torch.zeros(1, 4, 2, 16, device=DEVICE), torch.zeros(1, 4, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        triton_attention(q.double(), k.double(), k.double())
    with pytest.raises(ValueError, match="one decay a head"):
        triton_attention(q, k, k, torch.zeros(1, 4, 2, device=DEVICE))
    with pytest.raises(ValueError, match="cannot share"):
        triton_attention(torch.cat((q, q[:, :, :1]), 2), torch.cat((k, k), 2), torch.cat((k, k), 2))


def test_a_compiled_block_has_no_break_and_the_same_values(triton_backend):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 20, heads, 16, device=DEVICE, requires_grad=True) for heads in (2, 1, 1))
    decay = (-torch.rand(2, device=DEVICE)).requires_grad_()
    state = torch.randn(1, 2, 16, 16, device=DEVICE, requires_grad=True)
    first = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE)
    first[0, 7] = True
    torch.library.opcheck(triton_forward, (q, k, v, decay, state, first, ~first, 16))
    one = [x[:, :1].detach() for x in (q, k, v)]
    torch.library.opcheck(step_in_one_launch, (*one, decay.detach(), state.detach(), first[:, :1], None, 1e-5))

    def block(q, k, v, decay, state):
        out, last = backends.linear_operator(F.relu(q), F.relu(k), v, decay, state, first, ~first)
        return F.layer_norm(out, (16,)).sum(2), last

    results = []
    for run in (block, torch.compile(block, fullgraph=True)):
        leaves = q, k, v, decay, state
        both = run(*leaves)
        results.append((*both, *torch.autograd.grad(sum(x.square().sum() for x in both), leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) < 1e-5


@pytest.mark.parametrize("options", [{}, {"attn_name": "hedgehog_decay"}], ids=["supra", "trained decays"])
def test_a_model_is_the_same_by_triton_and_by_torch(options):
    """Packed documents and padding through the whole model, then one token more."""
    torch.manual_seed(0)
    model = create_model(tiny(n_heads_kv=2, qk_head_dim=16, **options)).to(DEVICE)
    ids, mask, first = torch.randint(0, 61, (2, 24)), torch.ones(2, 24), torch.rand(2, 24) < 0.1
    mask[1, :9] = 0
    ids, mask, first = (x.to(DEVICE) for x in (ids, mask, first))
    results = []
    for name in ("triton", "torch"):
        backends.use_backend(name)
        try:
            logits, _, past = model(ids, attention_mask=mask, first=first, use_cache=True)
            with torch.no_grad():
                more = model(ids[:, :1], past_key_values=past)[0]
            gradients = torch.autograd.grad(logits[mask.bool()].square().sum(), list(model.parameters()))
        finally:
            backends.use_backend("")
        results.append((logits[mask.bool()], more, *gradients))
    for ours, torchs in zip(*results, strict=True):
        assert relative(ours, torchs) < 1e-4


def test_the_check_command_tells_right_from_wrong(monkeypatch, capsys):
    case = Case("small", "float32", (1, 9, 2, 1, 16, 16), state=True)
    monkeypatch.setattr(check, "CASES", (case,))
    monkeypatch.setattr(sys, "argv", ["check", "--device", DEVICE])
    check.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("small")]
    assert [line.split()[-1] for line in lines] == ["right"] * len(lines) and len(lines) >= 2

    def wrong(q, k, v, *rest, **options):
        out, last = triton_attention(q, k, v, *rest, **options)
        return out + 0.01 * v.sum(), last  # as exact as float32 in the state, and in no gradient but v's

    monkeypatch.setattr(sys.modules["open_lm_linear.ops.triton_linear"], "triton_attention", wrong)
    with pytest.raises(SystemExit) as stop:
        check.main()
    said = capsys.readouterr()
    assert stop.value.code == 1 and "wrong" in said.err
    assert ["triton" in line for line in said.out.splitlines() if line.endswith("WRONG")] == [True]


def test_training_starts_with_torch_where_a_kernel_is_wrong(monkeypatch):
    """What `check_at_start` does on a GPU, with the device's comparison made up."""
    case = check.CASES[0]
    monkeypatch.setattr(backends, "missing", lambda name, gpu: "")
    findings = [check.Finding("triton", case, {"dq": 1e-5}, "", True, 0.0)]
    monkeypatch.setattr(check, "check_cases", lambda names, device, cases: findings)
    said: list[str] = []
    try:
        check.check_at_start(torch.device("cuda"), said.append)
        assert not said and backends.chosen_backend() == "auto"
        findings[0] = findings[0]._replace(errors={"dq": 0.5}, right=False)
        check.check_at_start(torch.device("cpu"), said.append)
        assert not said and backends.chosen_backend() == "auto"
        check.check_at_start(torch.device("cuda"), said.append)
        assert len(said) == 1 and "dq 5.0e-01" in said[0] and backends.chosen_backend() == "torch"
    finally:
        backends.use_backend("")


def test_triton_is_imported_only_when_asked_for():
    code = (
        "import sys, torch, open_lm_linear as oll\nfrom open_lm_linear.architecture import ModelConfig\n"
        "oll.create_model(ModelConfig(32, 1, 4, 61))(torch.zeros(1, 3, dtype=torch.long))\n"
        "print('open_lm_linear.ops.triton_linear' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
