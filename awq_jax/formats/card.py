"""The model card, README.md: where a quantized model comes from, how, how good it is, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

CARD = "README.md"
HUB_CACHE = re.compile(r"models--(.+?)(?:--(.+))?")
LONGEST_HEADER = 1 << 16
CARD_HEADER = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.S | re.M)
LICENSE = r"\w[\w.+-]*"
CARD_LICENSE = re.compile(rf"^license:[ \t]*([\"']?)({LICENSE})\1[ \t]*(?:#.*)?\r?$", re.M)
"""One line of a header, which is not parsed as a whole: a MB of YAML takes seconds, and many times its memory."""
TEMPLATE = """\
---
{header}
---

# {title}

{base} quantized by awq_jax, activation-aware weight quantization (AWQ) in JAX.

| | |
|---|---|
{figures}

Error: the squared error of a site's output on the calibration text, relative to the output's square. Each site's is in
`quantization_report.json`.

Recipe:

```
{recipe}
```

## Load it

Put the path of this folder, or the name of its repository, in the place of `FOLDER`.
{load}"""
HERE = """
awq_jax:

```
awq-jax generate FOLDER "Why is the sky blue?"
```
"""
MLX = """
mlx-lm, with `pip install mlx-lm`:

```
mlx_lm.generate --model FOLDER --prompt "Why is the sky blue?"
```
"""
SERVERS = """
transformers, with `pip install transformers PACKAGE accelerate`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

vLLM:

```
vllm serve FOLDER
```

SGLang:

```
python -m sglang.launch_server --model-path FOLDER
```
"""
KINDS = {
    "awq": ("AWQ in 4 bits", "transformers", ("awq", "4-bit"), SERVERS.replace("PACKAGE", "gptqmodel")),
    "compressed-tensors": (
        "AWQ in compressed-tensors",
        "transformers",
        ("awq", "compressed-tensors"),
        SERVERS.replace("PACKAGE", "compressed-tensors"),
    ),
    "gptq": ("AWQ in GPTQ's format", "transformers", ("awq", "gptq"), SERVERS.replace("PACKAGE", "gptqmodel")),
    "gptq_v2": ("AWQ in GPTQ's format, v2", "transformers", ("awq", "gptq"), SERVERS.replace("PACKAGE", "gptqmodel")),
    "mlx": ("AWQ for MLX", "mlx", ("awq", "mlx"), MLX),
    "orbax": ("AWQ in awq_jax's own format", "awq_jax", (), ""),
}
"""By format: what it is called, the library that reads it, tags, how that library loads it."""


class Site(Protocol):
    """What became of a param; a SiteReport."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> Any: ...

    @property
    def error(self) -> float: ...


def card(model: Path, format: str, recipe: str, sizes: Mapping[str, str], sites: Sequence[Site]) -> str:
    """The text of README.md; of local paths it has the last component only.

    Args:
      model: the folder or file of what was quantized; in the hub's cache it says the name.
      format: one of KINDS.
      recipe: as text.
      sizes: further rows of the table.
      sites: see SiteReport.
    """
    base, license = hub_id(model), license_of(model)
    name, (kind, library, tags, load) = base or model.resolve().name, KINDS[format]
    header = {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        **({"license": license} if license else {}),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["awq_jax", *tags],
    }
    made = [site for site in sites if site.spec is not None]
    figures = dict(sizes)
    if made:
        worst = max(made, key=lambda site: site.error)
        mean = sum(site.error for site in made) / len(made)
        figures["sites quantized"] = str(len(made))
        figures["error, mean and worst"] = f"{mean:.2%}, {worst.error:.2%} (`{worst.name}`)"
    text = TEMPLATE.format(
        # A JSON value is a YAML value.
        header="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
        title=f"{name}, {kind}",
        base=f"[{base}](https://huggingface.co/{base})" if base else name,
        figures="\n".join(f"| {key} | {value} |" for key, value in figures.items()),
        recipe=recipe,
        load=load + HERE,
    )
    # A folder's name may be other bytes than UTF-8.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def hub_id(path: Path) -> str | None:
    """The name on the Hugging Face hub of a folder in the hub's cache."""
    found = [match for part in path.absolute().parts if (match := HUB_CACHE.fullmatch(part))]
    return "/".join(filter(None, found[-1].groups())) if found else None


def license_of(path: Path) -> str | None:
    """What the card beside the weights says, or a GGUF file's metadata."""
    from awq_jax.files import inside
    from awq_jax.formats.gguf.header import read_header

    try:
        if path.is_file():
            found = read_header(path).metadata.get("general.license")
            return found if isinstance(found, str) and re.fullmatch(LICENSE, found) else None
        if (beside := inside(path, CARD)) is None:
            return None
        with beside.open("rb") as card:
            header = CARD_HEADER.match(card.read(LONGEST_HEADER).decode("utf-8-sig", "replace"))
    # A card is prose: whatever is wrong with it, only the license stays out.
    except Exception:
        return None
    found = header and CARD_LICENSE.search(header[1])
    return found[2] if found else None
