"""The shape of the repository: directions, doors, sizes, forbidden constructs, and documentation that keeps up."""

import ast
import importlib
import importlib.metadata
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App
from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
PACKAGES = ("perception", "indexer", "service", "offline")
COMMANDS = {
    "hardlook": "service.client.cli",
    "hardlook-index": "indexer.cli",
    "hardlook-serve": "service.cli",
    "hardlook-lab": "offline.cli",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_BUNDLED_BYTES = 25 * 2**20
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MACHINE_PATH = re.compile(r"(?<![\w.$~{}/-])/(home|root|work|Users)/")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|npmjs\.(org|com)|deb\.debian\.org")


def tracked_files() -> list[Path]:
    """What git has, or would take with `git add .`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(path for name in set(names) - {""} if (path := ROOT / name).is_file())


FILES = tracked_files()
MODULES = [path for path in FILES if path.suffix == ".py"]
PRODUCT = [path for path in MODULES if path.relative_to(ROOT).parts[0] in PACKAGES]
BUNDLED = ROOT / "perception" / "bundled"


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf8"), label(path))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, where nothing has been imported yet."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_directions() -> None:
    result = run_python("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


# --- doors -----------------------------------------------------------------------------------------------------------


def door(package: str) -> set[str]:
    """Public names that a package's __init__.py defines or imports from itself, lazily (TYPE_CHECKING) or not."""
    names: set[str] = set()
    for node in ast.walk(parse(ROOT / package / "__init__.py")):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == package):
            names |= {alias.asname or alias.name for alias in node.names}
    for node in parse(ROOT / package / "__init__.py").body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_the_sorted_public_door(package: str) -> None:
    module = importlib.import_module(package)
    listed = list(getattr(module, "__all__", []))
    assert listed == sorted(set(listed))
    assert set(listed) == door(package)
    for name in listed:
        assert getattr(module, name) is not None


def test_perception_has_a_door() -> None:
    assert {"load_encoder", "Encoder", "Gallery", "DecisionPolicy", "decode"} <= door("perception")


# --- sizes and names -------------------------------------------------------------------------------------------------


def test_no_file_is_named_after_nothing() -> None:
    assert [label(p) for p in FILES if p.stem.lower() in FORBIDDEN_NAMES] == []


def test_modules_are_short() -> None:
    lengths = {label(p): len(p.read_text("utf8").splitlines()) for p in MODULES}
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in MODULES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{label(path)}:{node.name}"] = lines
    assert long == {}


def test_bundled_weights_are_small() -> None:
    total = sum(path.stat().st_size for path in FILES if path.is_relative_to(BUNDLED))
    assert total <= MAX_BUNDLED_BYTES


# --- forbidden constructs --------------------------------------------------------------------------------------------


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the absolute imports, wherever in the module they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def forbidden_constructs(tree: ast.AST) -> Iterator[str]:
    yield from (f"import {name}" for name in imported_modules(tree) if name in FORBIDDEN_MODULES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
            yield f"line {node.lineno}: {node.func.id}()"
        keywords = {k.arg: k.value for k in node.keywords}
        if "allow_pickle" in keywords:
            yield f"line {node.lineno}: allow_pickle"
        weights_only = keywords.get("weights_only")
        safe = isinstance(weights_only, ast.Constant) and weights_only.value is True
        if ast.unparse(node.func) == "torch.load" and not safe:
            yield f"line {node.lineno}: torch.load without weights_only=True"


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from joblib import load", "eval('1')", "np.load(f, allow_pickle=x)", "torch.load(f)",
     "torch.load(f, weights_only=False)"],
)  # fmt: skip
def test_forbidden_constructs_are_recognised(code: str) -> None:
    assert len(list(forbidden_constructs(ast.parse(code)))) == 1


def test_allowed_constructs_are_not_reported() -> None:
    assert list(forbidden_constructs(ast.parse("model.eval()\ntorch.load(f, weights_only=True)\nimport json"))) == []


def test_nothing_unpickles_or_evaluates() -> None:
    """Tests may: they build the hostile files that the product must refuse."""
    product = [path for path in MODULES if not path.is_relative_to(ROOT / "tests")]
    found = {label(path): list(forbidden_constructs(parse(path))) for path in product}
    assert {name: constructs for name, constructs in found.items() if constructs} == {}


def text_files() -> Iterator[tuple[str, str]]:
    for path in FILES:
        try:
            yield label(path), path.read_text("utf8")
        except UnicodeDecodeError:
            continue  # weights and pictures


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine paths", "registry addresses"])
def test_files_speak_of_no_particular_machine(pattern: re.Pattern[str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_machine_paths_are_recognised() -> None:
    person = "/" + "home/ann/x"
    assert MACHINE_PATH.search(f'open("{person}")')
    assert not MACHINE_PATH.search(f"example.org{person}")


def test_tests_have_no_network() -> None:
    with pytest.raises(OSError, match="no network but loopback"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


# --- what an import costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["perception", "perception.image", "perception.preprocess", "perception.errors", *COMMANDS.values()]
)
def test_import_is_light(module: str) -> None:
    """Decoding workers need no torch, and `--help` answers at once."""
    heavy = ("torch", "torchvision", "timm", "open_clip", "sklearn", "skimage")
    result = run_python(f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# --- dependencies ----------------------------------------------------------------------------------------------------


def requirement_name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0]).lower()


def declared(*extras: str) -> set[str]:
    """Distributions that the base and some extras ask for, own extras followed."""
    names = {requirement_name(line) for line in PROJECT["dependencies"]}
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            nested = re.match(r"hardlook\[(\w+)\]", line)
            names |= declared(nested[1]) if nested else {requirement_name(line)}
    return names


def test_constraints_are_sorted_versions_of_all_that_is_declared() -> None:
    lines = [x for x in (ROOT / "constraints.txt").read_text("utf8").splitlines() if not x.startswith("#")]
    pinned = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line) for line in lines]
    assert [line for line, match in zip(lines, pinned, strict=True) if match is None] == []
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names), key=requirement_name)  # pip's order
    missing = declared("service", "offline", "demo", "pretrain", "dev") - {requirement_name(name) for name in names}
    assert missing == set()


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("perception", ()),
        ("indexer", ("indexer", "milvus", "postgres")),
        ("service", ("service", "demo")),
        ("offline", ("offline", "pretrain")),
    ],
)
def test_what_is_imported_is_declared(package: str, extras: tuple[str, ...]) -> None:
    owners = importlib.metadata.packages_distributions()
    allowed = declared(*extras)
    undeclared = {
        (label(path), module)
        for path in PRODUCT
        if path.relative_to(ROOT).parts[0] == package
        for module in imported_modules(parse(path))
        if module not in sys.stdlib_module_names
        and module not in PACKAGES
        # What an extra brings need not be installed here: its module is then looked for under its own name.
        and not {requirement_name(owner) for owner in owners.get(module, [module])} & allowed
    }
    assert undeclared == set()


# --- documentation ---------------------------------------------------------------------------------------------------


def documentation() -> str:
    pages = [ROOT / "README.md", *(p for p in FILES if p.suffix == ".md" and p.is_relative_to(ROOT / "docs"))]
    return "\n".join(page.read_text("utf8") for page in pages)


def setting_names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Names of environment variables, nested models included."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}__")
        else:
            yield f"{prefix}{name}".upper()


def test_every_setting_is_documented() -> None:
    from service.settings import Settings

    names = list(setting_names(Settings, "HARDLOOK_"))
    assert names
    text = documentation()
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_every_route_is_documented() -> None:
    from service.app import create_app
    from service.settings import Settings

    paths = create_app(Settings()).openapi()["paths"]
    assert {"/classify", "/similar", "/healthz"} <= set(paths)
    text = documentation()
    assert [path for path in paths if path not in text] == []


def command_lines(app: App, line: str) -> Iterator[str]:
    """`hardlook-lab benchmark two-afc` and the like; a group of commands is not itself one."""
    names = [name for name in app if not name.startswith("-")]
    if not names:
        yield line
    for name in names:
        yield from command_lines(app[name], f"{line} {name}")


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_is_documented(script: str) -> None:
    module = importlib.import_module(COMMANDS[script])
    app = module.app if hasattr(module, "app") else module._app()
    lines = list(command_lines(app, script))
    text = documentation()
    assert [line for line in lines if line not in text] == []


def test_scripts_exist() -> None:
    for script, target in PROJECT["scripts"].items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), script
