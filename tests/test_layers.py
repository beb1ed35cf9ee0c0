"""The import order of the house, function bodies included: a module imports only what stands above it. And its size."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# One line a layer; the modules of a line may not import each other. docs/architecture.md says what each is for.
EDGE_ORDER = [
    ["errors", "dtypes", "dropout"],
    ["atomic", "protocol", "rollout_gate", "hardware", "config", "progress", "systemd"],
    ["wire_format", "reference", "sources", "backends", "quantized"],
    ["tensor_checks", "recomputed"],
    ["gather", "elementwise", "attention"],
    ["kernels", "cross_entropy"],
    ["lora", "structure", "data"],
    ["embeddings"],
    ["importance", "masks", "compensation", "batches"],
    ["shrink", "fused_layers", "activations"],
    ["fused"],
    ["base_model", "tuning"],
    ["update", "workbench", "memory_plan"],
    ["head_statistics"],
    ["device", "solo", "hf"],
    ["checkpoint"],
    ["export"],
    ["profiling"],
    ["agent"],
    ["flower_client"],
    ["appliance"],
    ["images"],
    ["report"],
    ["live"],
    ["commands"],
    ["cli_model", "cli_profile", "cli_link", "cli_flower", "cli_image"],
    ["cli_page", "cli_rollout"],
    ["cli"],
]
SERVER_MAY_IMPORT = {
    f"fedspine_edge.{name}" for name in ("protocol", "wire_format", "errors", "dtypes", "quantized", "rollout_gate")
}
MAY_REACH_BOTH = {"commands", "cli"}
MOST_LINES = 300
TORCH = {"torch", "transformers", "peft", "accelerate"}


def imports_of(path: Path) -> set[str]:
    """Dotted names of every module a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def place_of(path: Path) -> str:
    """First part of a module's path in its package: `export` for export/gguf.py."""
    return path.relative_to(ROOT / "python" / "fedspine_edge").parts[0].removesuffix(".py")


EDGE_FILES = [p for p in sorted((ROOT / "python" / "fedspine_edge").rglob("*.py")) if p.name != "__init__.py"]
SERVER_FILES = sorted((ROOT / "server" / "fedspine_server").rglob("*.py"))


@pytest.mark.parametrize("path", EDGE_FILES, ids=lambda path: path.stem)
def test_a_device_module_imports_only_what_stands_above_it(path):
    order = {name: level for level, names in enumerate(EDGE_ORDER) for name in names}
    own = place_of(path)
    assert own in order, f"{own} has no place in the import order: give it one here and in docs/architecture.md"
    for name in imports_of(path):
        if not name.startswith("fedspine_edge.") or name.startswith("fedspine_edge._native"):
            continue
        other = name.split(".")[1]
        assert other in order, f"{own} imports {other}, which has no place in the import order"
        assert order[other] < order[own] or other == own, f"{own} imports {other}, which does not stand above it"


@pytest.mark.parametrize("path", EDGE_FILES, ids=lambda path: path.stem)
def test_only_the_commands_reach_the_server(path):
    if place_of(path) not in MAY_REACH_BOTH:
        assert not [name for name in imports_of(path) if name.startswith("fedspine_server")]


@pytest.mark.parametrize("path", SERVER_FILES, ids=lambda path: path.stem)
def test_the_server_imports_six_modules_of_the_device_and_never_torch(path):
    names = imports_of(path)
    assert not {name.split(".")[0] for name in names} & TORCH
    modules = {".".join(name.split(".")[:2]) for name in names if name.startswith("fedspine_edge")}
    assert modules <= SERVER_MAY_IMPORT | {"fedspine_edge"}
    assert not modules - SERVER_MAY_IMPORT, f"{path.name} imports {modules}"


def test_no_module_is_longer_than_the_house_allows():
    lines = {path: len(path.read_text().splitlines()) for path in EDGE_FILES + SERVER_FILES}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MOST_LINES}


def test_every_place_in_the_order_exists():
    found = {place_of(path) for path in EDGE_FILES}
    assert {name for names in EDGE_ORDER for name in names} == found
