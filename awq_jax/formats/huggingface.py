"""Folders of Hugging Face models: where to get one, its config.json, its tokenizer."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from awq_jax.errors import InputError, one_line, reading
from awq_jax.files import LARGEST, inside, read_json, regular
from awq_jax.formats.scratch import scratch_folder
from awq_jax.text import check_growth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OF_TOKENIZERS = ("model_type", "tokenizer_class", "transformers_version")
"""Fields of config.json that transformers looks at for a tokenizer."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_CONFIG = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What generation_config.json says of tokens, under the names that config.json has for them."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Source(Protocol):
    """What a model that is written takes over from the one that was read; a Checkpoint is one.

    config: the content of config.json. companions: files that go along, such as the tokenizer's.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def companions(self) -> Sequence[Path]: ...


def download(model: str, hint: str = "") -> Path:
    """The folder of a model of the Hugging Face hub in the user's cache, fetched if it is not there yet.

    Only safetensors, JSON and the tokenizer are fetched, and only from the top folder. Errors add `hint` to the name.

    Raises:
      InputError: no such model, no connection, or no right to read it.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model, allow_patterns=["*.safetensors", "*.json", "README.md", *TOKENIZER_FILES], ignore_patterns=["*/*"]
        )
    # Releases of huggingface_hub let the errors of three HTTP libraries through, without a common class.
    except Exception as e:
        raise InputError(
            f"{model} is no folder or file here{hint}, and fetching it from the Hugging Face hub failed "
            f"({one_line(e, 160)}): check the name and the connection, or give a local folder or a .gguf file."
        ) from e
    return Path(found)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json."""
    if file := inside(folder, "config.json"):
        return read_json(file)
    if ggufs := sorted(folder / name for name in os.listdir(folder) if name.endswith(".gguf")):
        hint = f"give the file {ggufs[0]} itself"
    elif below := sorted(str(file.parent) for file in folder.glob("*/config.json")):
        hint = f"its models lie below, give {' or '.join(below[:4])}"
    else:
        hint = "give the folder of a Hugging Face model, or a .gguf file"
    raise InputError(f"{folder} has no config.json: {hint}.")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    # A lone surrogate, which UTF-8 does not have, stays the escape that it was.
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8", errors="backslashreplace")


def write_about(folder: Path, source: Source, **changes: Any) -> None:
    """Writes the companions of `source`, and its config.json with `changes`."""
    for file in source.companions:
        copy_unmarked(file, folder)
    write_json(folder / "config.json", {**with_older_rope(source.config), **changes})


def copy_unmarked(file: Path, folder: Path) -> None:
    """Copies a file into a folder, without a byte order mark, over which its readers stumble."""
    (folder / file.name).write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))


def with_older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with rope_theta and rope_scaling beside rope_parameters, for readers of transformers 4."""
    rope, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if not isinstance(rope, Mapping) or not rope:
        return dict(config)
    # As models read them: theta beside rope_scaling goes before that of rope_parameters.
    places = (config, rope) if scaling else (rope, config)
    theta = [{"rope_theta": place["rope_theta"]} for place in places if place.get("rope_theta") is not None]
    if not scaling and rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**config, **(theta[0] if theta else {}), "rope_scaling": scaling or None}


def stops(where: Path, found: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text by a config.json or generation_config.json, which has one, several or none.

    Raises:
      InputError: something else than tokens stands there.
    """
    ids = found.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if odd := [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0]:
        raise InputError(f"{where}: eos_token_id holds {odd[0]!r}: expected the number of a token, or several.")
    return ids


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that its tokenizer is made of."""
    found = [inside(folder, name) for name in TOKENIZER_FILES]
    return [regular(file, LARGEST) for file in found if file is not None]


def advice(*, has_code: bool) -> str:
    """What to do about a tokenizer that transformers cannot read."""
    if not has_code:
        return "copy a tokenizer.json of the model into it"
    return (
        'its tokenizer_config.json names code of its own ("auto_map"), which is never run: where you trust the code, '
        "save what it makes as a tokenizer.json, and remove auto_map and tokenizer_class"
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, with its chat template if there is one; code in the folder is not run.

    Raises:
      InputError: the folder holds no tokenizer, or one that transformers cannot read without the folder's own code.
    """
    from transformers import AutoTokenizer

    if not (files := tokenizer_files(folder)):
        raise InputError(f"{folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json into it.")
    with scratch_folder() as scratch:
        # All that transformers gets to see: it follows links and waits for pipes.
        for file in files:
            copy_unmarked(file, scratch)
        # Read here, that one that is damaged is named.
        code = {file.name: read_json(file).get("auto_map") for file in files if file.suffix == ".json"}
        # Without the fields of the model, which are no matter of its tokenizer.
        if (config := inside(folder, "config.json")) is not None:
            write_json(scratch / config.name, {k: v for k, v in read_json(config).items() if k in OF_TOKENIZERS})
        remedy = advice(has_code=bool(code.get("tokenizer_config.json")))
        with reading(f"{folder}: transformers cannot read the tokenizer", remedy):
            tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
            check_growth(tokenizer)
            return tokenizer
