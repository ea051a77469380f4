"""Imports inside the package point one way, and its source keeps the rules of the house."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import open_lm_linear

PACKAGE = Path(open_lm_linear.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From low to high. A module imports from lower layers, from its own folder, and from its own line here.
LAYERS = [
    ["cli", "cache", "heap", "retired", "stages"],
    ["architecture"],
    ["norms", "rotary", "feature_maps", "ops"],
    ["attention"],
    ["model"],
    [
        *("pretrained", "data", "optim", "groups", "averaging", "parallel", "checkpoint", "saver", "remote_copy"),
        *("faults", "metrics", "generate", "fit", "decoding", "gauges", "profiling", "objectives", "native_model"),
    ],
    ["config", "hf"],
    ["evaluation"],
    ["evaluate", "report", "parity", "serve", "vllm"],
    ["train", "convert", "export", "plan", "run_folder", "validation", "distillation"],
    ["study"],
    ["main"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imported(tree: ast.AST) -> Iterator[str]:
    """The package's own modules that a source imports, at the top or inside functions, but for type checking alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(ast.Module(node.orelse, []))
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module == "open_lm_linear":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("open_lm_linear."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("open_lm_linear."))
        yield from imported(node)


def test_imports_point_one_way():
    wrong = []
    for path in SOURCES:
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        found = set(imported(ast.parse(path.read_text())))
        if name == "__init__":  # the package itself: nothing is loaded before it is asked for
            wrong += [f"open_lm_linear/__init__.py imports {other} at once" for other in found]
        elif name not in HEIGHT:
            wrong.append(f"{name} has no layer yet: give it one in LAYERS of tests/test_layers.py")
        else:
            known = {other for other in found if other == name or HEIGHT.get(other, 99) <= HEIGHT[name]}
            wrong += [f"{path.relative_to(PACKAGE)} may not import {other}" for other in sorted(found - known)]
    assert not wrong, "\n".join(wrong)


def test_the_layer_test_sees_what_it_should():
    """A source with every kind of import, so that the test above cannot pass by blindness."""
    source = """
import open_lm_linear.model
import open_lm_linear
from open_lm_linear import attention, __version__
if TYPE_CHECKING:
    from open_lm_linear.train import train
else:
    from open_lm_linear.rotary import Rotary
def f():
    from open_lm_linear.ops.losses import IGNORE
    try:
        from .cli import parse
    finally:
        pass
"""
    assert sorted(imported(ast.parse(source))) == ["a relative import", "attention", "model", "ops", "rotary"]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_fast_and_loads_no_torch():
    seconds, heavy = run(
        "import sys, time; begin = time.perf_counter(); import open_lm_linear;"
        "print(time.perf_counter() - begin, [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    ).split(" ", 1)
    assert float(seconds) < 3
    assert heavy == "[]"


def test_reading_a_config_loads_no_torch():
    code = "import sys, open_lm_linear.architecture, open_lm_linear.cli; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_the_model_needs_no_optional_package():
    optional = ("triton", "xformers", "fla", "wandb", "transformers", "lm_eval", "lightning_attn", "gguf", "mamba_ssm")
    code = (
        f"import sys\nfor name in {optional}: sys.modules[name] = None\n"
        "import open_lm_linear as oll, torch\nfrom open_lm_linear.architecture import ModelConfig\n"
        "for name in ('linear', 'mamba', 'softmax'):\n"
        "    model = oll.create_model(ModelConfig(32, 1, 4, 61, attn_name=name))\n"
        "    print(*model(torch.zeros(1, 3, dtype=torch.long))[0].shape)\n"
    )
    assert run(code).splitlines() == ["1 3 61"] * 3


def test_the_model_runs_without_the_compiler():
    """Which takes as long to import as torch: nothing but training and torch.compile should wait for it."""
    code = (
        "import sys, open_lm_linear as oll, torch\nfrom open_lm_linear.architecture import ModelConfig\n"
        "from open_lm_linear import generate, native_model\n"
        "for name in ('softmax', 'linear', 'hedgehog', 'hedgehog_decay', 'lolcats', 'gated_linear', 'gated_delta'):\n"
        "    model = generate.lay_out(oll.create_model(ModelConfig(32, 1, 4, 61, attn_name=name)).eval())\n"
        "    out = generate.generate(model, torch.zeros(1, 3, dtype=torch.long), max_new_tokens=2)\n"
        "    print(*out.shape, *[name] * ('torch._dynamo' in sys.modules))\n"
    )
    assert run(code).splitlines() == ["1 5"] * 7


def test_no_unsafe_or_lenient_loading():
    """No strict=False, no pickle, no torch.load that could unpickle."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                if any(re.match(r"(c|cloud)?pickle\b|dill\b|joblib\b", m) for m in modules):
                    wrong.append(f"{where} imports pickle")
            if not isinstance(node, ast.Call):
                continue
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if keywords.get("strict") == "False" and ast.unparse(node.func) != "zip":
                wrong.append(f"{where} has strict=False")
            if ast.unparse(node.func).endswith("torch.load") and keywords.get("weights_only") != "True":
                wrong.append(f"{where} calls torch.load without weights_only=True")
            if keywords.get("allow_pickle") == "True" or keywords.get("weights_only") == "False":
                wrong.append(f"{where} allows pickle")
    assert not wrong, "\n".join(wrong)


def test_no_long_functions_and_files():
    """80 lines a function, of which the train loop alone may have 150; 500 lines a file."""
    wrong = []
    for path in SOURCES:
        text, name = path.read_text(), path.relative_to(PACKAGE)
        if len(text.splitlines()) > 500:
            wrong.append(f"{name} has {len(text.splitlines())} lines")
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        lengths = sorted((f.end_lineno - f.lineno + 1, f.name) for f in functions)
        if str(name) == "train.py" and lengths[-1][0] <= 150:
            lengths.pop()
        wrong += [f"{name}: {function} has {n} lines" for n, function in lengths if n > 80]
    assert not wrong, "\n".join(wrong)
