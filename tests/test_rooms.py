"""The house: a room's files import what lies in their own room and in rooms below it, nothing above."""

import ast
import tomllib
from pathlib import Path

import awq_jax
import awq_jax.kernels

ROOMS = (
    "commands",
    "pipeline",
    "records",
    "formats",
    "models",
    "torch_bridge",
    "transforms",
    "tracing",
    "search",
    "weights",
    "kernels",
)
"""From the top to the floor; below them is the ground, files that lie in no room."""
TOP = Path(awq_jax.__file__).parent
KERNELS = Path(awq_jax.kernels.__file__).parent
FILES = {"awq_jax/" + p.relative_to(TOP).as_posix(): p for p in TOP.rglob("*.py")} | {
    "awq_jax/kernels/" + p.relative_to(KERNELS).as_posix(): p for p in KERNELS.rglob("*.py")
}


def imported(tree: ast.Module) -> set[str]:
    """Names of this package's modules, and of what is taken from them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports do not tell the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("awq_jax.")}


def floor(name: str) -> int:
    """The number of rooms below."""
    room = name.replace("/", ".").split(".")[1]
    return len(ROOMS) - ROOMS.index(room) if room in ROOMS else 0


def test_imports_go_down():
    """From the ground, which is below all rooms, none is imported; `awq_jax` itself imports from every one."""
    files = {
        name: imported(ast.parse(file.read_text())) for name, file in FILES.items() if name != "awq_jax/__init__.py"
    }
    upwards = {name: {o for o in others if floor(o) > floor(name)} for name, others in files.items()}
    assert not {name: others for name, others in upwards.items() if others}


def test_every_folder_is_packaged():
    listed = tomllib.loads((TOP.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {name.rsplit("/", 1)[0].replace("/", ".") for name in FILES}
