"""The house rules that a program can check: import direction, file sizes, forbidden calls, public names."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_ebm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_ebm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
# Loaded when used, so that `import pyro_ebm` stays cheap.
HEAVY = {"arviz", "arviz_base", "arviz_plots", "arviz_stats", "matplotlib"}
HEAVY |= {"pandas", "sklearn", "torchvision", "xarray"}
FORBIDDEN = {
    *("clear_param_store", "set_rng_seed", "enable_validation", "random.seed", "manual_seed_all"),
    *("set_default_dtype", "set_default_tensor_type", "set_default_device"),
    *("use_deterministic_algorithms", "os.chdir", "os.putenv"),
    *("matplotlib.use", "mpl.use", "plt.switch_backend", "style.use", "plt.show"),
}
BUILTINS = {"print", "exec", "eval"}  # module.eval() is torch's
# Allowed inside a `with` or a function of this name only.
SCOPED = {
    "torch.manual_seed": "fork_rng",
    "torch.cuda.manual_seed_all": "fork_rng",
    "torch.set_num_threads": "def one_thread",
    "warnings.simplefilter": "catch_warnings",
    "warnings.filterwarnings": "catch_warnings",
}
GLOBAL_TABLES = ("os.environ", "rcParams")


def module_name(path: Path) -> str:
    """`pyro_ebm/inference/draws.py` -> `inference.draws`; a folder's `__init__.py` -> the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def reading_order() -> list[str]:
    """Entries of the map in CONTRIBUTING.md, in its order: `energies`, `inference.draws`, `inference`, ..."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```text\npyro_ebm/\n(.*?)```", text, flags=re.DOTALL)
    assert block, "CONTRIBUTING.md has no map: a ```text block whose first line is pyro_ebm/"
    entries = [line.split()[0] for line in block.group(1).splitlines() if re.match(r"  \S", line)]
    return [entry.removesuffix(".py").strip("/").replace("/", ".") for entry in entries]


ORDER = reading_order()


def rank(module: str) -> int:
    """Place of a module in the reading order; the longest entry that covers it counts."""
    covering = [entry for entry in ORDER if module == entry or module.startswith(entry + ".")]
    if not covering:
        raise LookupError(f"pyro_ebm.{module} is not in the map of CONTRIBUTING.md")
    return ORDER.index(max(covering, key=len))


def typing_only(tree: ast.AST) -> set[int]:
    """Ids of the nodes under `if TYPE_CHECKING:`, which never run."""
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    blocks = [node for node in conditions if "TYPE_CHECKING" in ast.unparse(node.test)]
    return {id(node) for block in blocks for statement in block.body for node in ast.walk(statement)}


def internal_imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, imported module) for what a module of the package imports from the package, lazily or not."""
    tree = ast.parse(source)
    skipped = typing_only(tree)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "pyro_ebm"]
            yield from ((node.lineno, name.partition(".")[2]) for name in names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                is_package = MODULES.get(module, Path()).name == "__init__.py"
                parents = f"pyro_ebm.{module}".split(".")
                parents = parents[: len(parents) - node.level + is_package]
                origin = ".".join([*parents, *([origin] if origin else [])])
            if origin.split(".")[0] == "pyro_ebm":
                base = origin.partition(".")[2]
                for alias in node.names:
                    yield node.lineno, _owner(base, alias.name)


def _owner(base: str, name: str) -> str:
    """The module that `from pyro_ebm.<base> import <name>` takes its name from."""
    candidate = f"{base}.{name}" if base else name
    if candidate in MODULES:
        return candidate
    return base or pyro_ebm._MODULE_OF.get(name, "")


def downward_imports(module: str, source: str) -> list[str]:
    """Imports that point down in the reading order."""
    return [
        f"line {line}: pyro_ebm.{module} imports pyro_ebm.{target}, which comes later in the map"
        for line, target in internal_imports(module, source)
        if target and rank(target) > rank(module)
    ]


def forbidden_uses(source: str, *, may_print: bool = False) -> list[str]:
    """Calls and assignments that change what does not belong to the package."""
    found: list[str] = []

    def visit(node: ast.AST, scopes: tuple[str, ...]) -> None:
        if isinstance(node, ast.With):
            scopes += tuple(ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            scopes = (f"def {node.name}",)  # runs later, when the block around its definition is over
        fault = _call_fault(node, scopes) if isinstance(node, ast.Call) else _write_fault(node)
        if fault and not (may_print and fault == "print()"):
            found.append(f"line {node.lineno}: {fault}")
        for child in ast.iter_child_nodes(node):
            visit(child, scopes)

    visit(ast.parse(source), ())
    return found


def _call_fault(call: ast.Call, scopes: tuple[str, ...]) -> str:
    name = ast.unparse(call.func).replace("torch.random.", "torch.")
    if name in SCOPED:
        inside = any(SCOPED[name] in scope for scope in scopes)
        return "" if inside else f"{name}() outside `with {SCOPED[name]}(...)`"
    writes_table = re.search(r"(rcParams|environ)\.(update|setdefault|pop|clear)$", name)
    listed = any(name == bad or name.endswith("." + bad) for bad in FORBIDDEN)
    return f"{name}()" if writes_table or listed or name in BUILTINS else ""


def _write_fault(node: ast.AST) -> str:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    tables = [t for t in targets if isinstance(t, ast.Subscript)]
    written = [ast.unparse(t) for t in tables if ast.unparse(t.value).endswith(GLOBAL_TABLES)]
    return f"writes {', '.join(written)}" if written else ""


def heavy_imports(source: str) -> list[str]:
    """Heavy libraries that load together with the module."""
    tree = ast.parse(source)
    skipped = typing_only(tree)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    for node in ast.walk(tree):
        if isinstance(node, functions):
            skipped |= {id(inner) for inner in ast.walk(node)}
    names = []
    for node in ast.walk(tree):
        if id(node) not in skipped:
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names += [node.module or ""]
    return [name for name in names if name.split(".")[0] in HEAVY]


@pytest.fixture(params=MODULES, ids=lambda module: module or "pyro_ebm")
def module(request: pytest.FixtureRequest) -> str:
    return request.param


def test_imports_point_upward(module):
    if module:
        assert downward_imports(module, MODULES[module].read_text()) == []


def test_recipes_import_each_other_in_one_order():
    """Here, where files are many and call each other, there are no circles."""
    waiting = {name: {target for _, target in internal_imports(name, MODULES[name].read_text()) if target in names}
               for names in [{name for name in MODULES if name.startswith("recipes.")}] for name in names}  # fmt: skip
    while free := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in free}
    assert not waiting, f"a circle among {sorted(waiting)}"


def test_file_size(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES


def test_no_global_side_effects(module):
    assert forbidden_uses(MODULES[module].read_text(), may_print=module == "cli") == []


def test_heavy_libraries_load_when_used(module):
    assert heavy_imports(MODULES[module].read_text()) == []


def test_module_says_what_it_holds(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text())), "a module starts with a docstring"
    assert not re.search(r"(^|\.)(utils?|helpers?|misc|common)$", module), "name a module after its idea"


@pytest.mark.parametrize("entry", ORDER)
def test_map_lists_what_exists(entry):
    assert entry in MODULES


def test_map_lists_each_once():
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", pyro_ebm.__all__)
def test_public_name_is_importable_and_documented(name):
    value = getattr(pyro_ebm, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(pyro_ebm)


def test_public_table_agrees_with_the_modules():
    for module, names in pyro_ebm._EXPORTS.items():
        exported = getattr(importlib.import_module(f"pyro_ebm.{module}"), "__all__", names)
        assert set(names) <= set(exported), f"pyro_ebm.{module}.__all__ lacks {set(names) - set(exported)}"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tild'"):
        pyro_ebm.tild  # noqa: B018


# The checks must be able to fail.


@pytest.mark.parametrize(
    "module, source",
    [
        ("errors", "from pyro_ebm.energies import Energy"),
        ("energies", "def f():\n    from pyro_ebm import tilt"),
        ("training.fit", "from ..inference.importance import importance"),
        ("models.vae", "from ..cli import main"),
        ("tilts.tilt", "import pyro_ebm.training"),
        ("energies", "from pyro_ebm import models"),
    ],
)
def test_a_downward_import_is_found(module, source):
    assert len(downward_imports(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("cli", "from pyro_ebm.recipes.debias import debias"),
        ("inference.importance", "from pyro_ebm.inference.draws import Draws"),
        ("energies", "if TYPE_CHECKING:\n    from pyro_ebm.cli import main"),
        ("energies", "from pyro_ebm import __version__"),
    ],
)
def test_an_upward_import_is_allowed(module, source):
    assert downward_imports(module, source) == []


def test_a_module_missing_from_the_map_is_found():
    with pytest.raises(LookupError, match="not in the map"):
        rank("no_such_module")


@pytest.mark.parametrize(
    "source",
    [
        "pyro.clear_param_store()",
        "torch.set_default_dtype(torch.float64)",
        "torch.manual_seed(0)",
        "with fork_rng():\n    def later():\n        torch.manual_seed(0)",
        "np.random.seed(0)",
        "pyro.set_rng_seed(0)",
        "plt.rcParams['figure.dpi'] = 100",
        "matplotlib.rcParams.update({})",
        "os.environ['A'] = '1'",
        "warnings.simplefilter('ignore')",
        "print('done')",
        "eval('1')",
    ],
)
def test_a_forbidden_call_is_found(source):
    assert len(forbidden_uses(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.Generator().manual_seed(0)",
        "with torch.random.fork_rng():\n    torch.manual_seed(0)",
        "with warnings.catch_warnings():\n    warnings.simplefilter('ignore')",
        "module.eval()",
        "with mpl.rc_context({'a': 1}):\n    pass",
        "dpi = plt.rcParams['figure.dpi']",
    ],
)
def test_a_harmless_call_is_allowed(source):
    assert forbidden_uses(source) == []


def test_a_heavy_import_is_found():
    source = "import arviz as az\nfrom sklearn.datasets import load_digits"
    assert heavy_imports(source) == ["arviz", "sklearn.datasets"]
    assert heavy_imports("def f():\n    import arviz") == []
