"""The layers of DESIGN.md: who may import whom, and what stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lowres_ft"
FILES = {path.relative_to(PACKAGE.parent).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
MODULES = {".".join(name.parts).removesuffix(".__init__"): path for name, path in FILES.items()}
LAYERS = (
    "errors spec yaml12 files foreign harmless libraries deferred events sizes stopping",
    "registry tasks methods clean calibration minimum",
    "recipe parts changes allocator outside limits forked overrides assets gguf starters verdict tables catalogue",
    "device dropout fused storage factorize linear embedding attach attention timings behaviour quantize reading"
    " recompute weights model data batches packing plan bases readers formats profiles guess splits ledger"
    " arrow simulate memory speed pace budget headers least mapped streaming folders shortage tokenizing",
    "train optimizers evaluate significance bundle border probes card merging prediction generation contrast comparison"
    " attempt checks checking powerlaw checkpoint saving course expectation trial passport",
    "report exhibits page fitting pipeline preparing resuming runs curve plotting forecast doctor",
    "cli __main__",
)
LIGHT = 2
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "numpy",
    "peft",
    "pyarrow",
    "sklearn",
    "tokenizers",
    "torch",
    "transformers",
}


def layer(module: str) -> int:
    """The layer of a module, by its first name below the package."""
    name = module.split(".")[1]
    found = [number for number, names in enumerate(LAYERS) if name in names.split()]
    assert len(found) == 1, f"{module} needs a place in one of LAYERS"
    return found[0]


def imports(module: str, *, top: bool) -> Iterator[str]:
    """The modules that a module imports, at run time; `top` leaves out imports inside functions."""
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def reached(module: str, seen: set[str]) -> set[str]:
    """All that importing a module imports, of ours and of others."""
    for name in imports(module, top=True):
        if name not in seen:
            seen.add(name)
            if name in MODULES:
                reached(name, seen)
    return seen


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lowres_ft"}))
def test_imports_go_to_the_same_layer_or_lower(module):
    above = [
        name
        for name in imports(module, top=False)
        if name in MODULES and name != "lowres_ft" and layer(name) > layer(module)
    ]
    assert not above, f"{module} (L{layer(module)}) imports {above}"


def test_the_package_itself_imports_light_layers_only():
    assert {layer(name) for name in imports("lowres_ft", top=True) if name in MODULES} <= set(range(LIGHT + 1))


def test_light_layers_and_commands_reach_nothing_heavy():
    light = [name for name in MODULES if name == "lowres_ft" or layer(name) <= LIGHT or layer(name) == len(LAYERS) - 1]
    heavy = {name: {found.split(".")[0] for found in reached(name, set())} & HEAVY for name in light}
    assert {name: found for name, found in heavy.items() if found} == {}
    assert len(light) >= 24


def test_every_file_has_a_layer_and_every_name_of_a_layer_is_a_file():
    assert {name.split(".")[1] for name in MODULES if name != "lowres_ft"} == set(" ".join(LAYERS).split())


def test_foreign_code_that_would_go_online_is_kept_out(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    (tmp_path / "bitsandbytes.py").write_text(
        "try:\n    import kernels\nexcept ImportError:\n    found = False\nelse:\n    found = True\n"
    )
    code = (
        "import sys; from lowres_ft import libraries; library = libraries.bitsandbytes();"
        "assert library.__file__.startswith(sys.argv[1]), library; print(library.found, 'kernels' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("False False\n", "")
