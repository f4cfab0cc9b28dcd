"""Damage to files: at random, reproducible, of bytes and of what JSON holds."""

from __future__ import annotations

import json
import math
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

DEEP: Any = 1
for _ in range(300):
    DEEP = [DEEP]
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 7, 0.5, -0.0, 1e-300, 1e300, math.inf, -math.inf, math.nan),
    *(2**31 - 1, 2**31, 2**32, 2**63, 2**64, 2**80, -(2**63), 10**9, 10**12, 10**400),
    *("", "x", "0", "1", "-1", "\0", "\ud800", "x" * 10_000, "../x", "/dev/zero", "é\u2028", "{{ 1/0 }}", "F32", "I64"),
    *([], {}, [[]], [None], {"": 1}, {"a": {"b": []}}, [1] * 1000, DEEP),
)
"""Put in the place of what JSON holds."""
NUMBERS = tuple(
    value.to_bytes(size, "little")
    for size in (1, 2, 4, 8)
    for value in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
)
"""Put over bytes."""


def damage(file: Path, rng: np.random.Generator) -> str:
    """Changes a file in place; says how."""
    kinds = {"bytes": 4, "json": 8 if is_json(file) else 0, "safetensors header": 8 * (file.suffix == ".safetensors")}
    kinds["kind of file"] = 0.3
    chances = np.array(list(kinds.values()), float)
    kind = str(rng.choice(list(kinds), p=chances / chances.sum()))
    if kind == "json":
        lines = file.read_text("utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
        at = rng.integers(len(lines))
        lines[at] = changed_json(lines[at], rng)
        file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    elif kind == "safetensors header":
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = changed_json(raw[8:end].decode(), rng).encode("utf-8", "surrogatepass")
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    elif kind == "bytes":
        file.write_bytes(changed_bytes(file.read_bytes(), rng))
    else:
        kind = other_kind(file, rng)
    return f"{file.name}: {kind}"


def is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text("utf-8").partition("\n")[0] if file.suffix == ".jsonl" else file.read_text("utf-8"))
    except ValueError:
        return False
    return True


def changed_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    """Bits turned, parts cut out, doubled, moved, overwritten with numbers; mostly near the beginning."""
    data = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        near = int(min(len(data), 10 ** rng.uniform(0, 7)))
        a, n = int(rng.integers(near + 1)), int(10 ** rng.uniform(0, 3))
        match rng.integers(7):
            case 0 if a < len(data):
                data[a] ^= 1 << int(rng.integers(8))
            case 1:
                del data[a:]
            case 2:
                del data[a : a + n]
            case 3:
                data[a:a] = data[a : a + n]
            case 4:
                b = int(rng.integers(len(data) + 1))
                data[a : a + n] = data[b : b + n]
            case 5:
                number = NUMBERS[rng.integers(len(NUMBERS))]
                data[a : a + len(number)] = number
            case _:
                data[a : a + n] = rng.bytes(n)
    return bytes(data)


def changed_json(text: str, rng: np.random.Generator) -> str:
    """Values replaced by others, keys dropped, renamed or doubled, items repeated."""
    found = [json.loads(text)]
    for _ in range(rng.integers(1, 4)):
        places = containers(found)
        node = places[rng.integers(len(places))]
        key = list(node)[rng.integers(len(node))] if isinstance(node, dict) else int(rng.integers(len(node)))
        match rng.integers(6):
            case 0 if node is not found:
                del node[key]
            case 1 if isinstance(node, dict):
                node[str(VALUES[rng.integers(len(VALUES))])[:99]] = node.pop(key)
            case 2 if isinstance(node, list):
                node[key:key] = [deepcopy(node[key]) for _ in range(int(10 ** rng.uniform(0, 2)))]
            case 3:
                node[key] = deepcopy(places[rng.integers(len(places))])
            case _:
                node[key] = deepcopy(VALUES[rng.integers(len(VALUES))])
    return json.dumps(found[0], ensure_ascii=bool(rng.integers(2)))


def containers(found: Any) -> list[Any]:
    """Lists and objects that hold something, at any depth."""
    places, nodes = [], [found]
    while nodes and len(places) < 10_000:
        node = nodes.pop()
        if isinstance(node, dict | list) and node:
            places.append(node)
            nodes += list(node.values() if isinstance(node, dict) else node)[:200]
    return places


def other_kind(file: Path, rng: np.random.Generator) -> str:
    """Nothing, an empty file, a folder, a pipe or a link in the place of a file."""
    file.unlink()
    kind = ("gone", "empty", "folder", "pipe", "link to a device", "link to itself", "link out")[rng.integers(7)]
    match kind:
        case "empty":
            file.touch()
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "link to a device":
            file.symlink_to("/dev/zero")
        case "link to itself":
            file.symlink_to(file.name)
        case "link out":
            file.symlink_to(shutil.which("sh") or "/bin/sh")
    return kind
