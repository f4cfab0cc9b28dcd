"""The tokenizer that a GGUF file's metadata describes, as transformers' tokenizer.

Built with `tokenizers` alone: transformers' own conversion imports torch, changes place between releases and does not
split as some vocabularies were learned (SmolLM2's digits, Llama 3's whole words before merges). Splits are those of
llama.cpp, src/llama-vocab.cpp, by the name in tokenizer.ggml.pre.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from awq_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
SPACE = "\u2581"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "tekken"}
"""Splits whose tokenizers take a word that is in the vocabulary as it is, before any merge."""

BOS_BY_DEFAULT = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"}
DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
REGEX_SPLITS = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "dbrx", "smaug-bpe"), (LLAMA3,)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (QWEN2,)),
    "tekken": (TEKKEN,),
    "default": DEFAULT,
}
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
GPT2_SPLITS = {"gpt-2", "olmo", "mpt"}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and chat template; `save_pretrained` stores it.

    Raises:
      InputError: the file has no vocabulary, or one of a kind or split that is not built here.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": byte_level, "llama": sentencepiece}
    if kind not in builders or "tokenizer.ggml.tokens" not in metadata:
        raise InputError(
            f"The GGUF file's tokenizer.ggml.model is {kind!r} and only {sorted(builders)} are read: take a folder "
            "that holds the model's tokenizer.json."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = builders[kind](metadata)
    types = metadata.get("tokenizer.ggml.token_type", [])
    marked = [(t, k) for t, k in zip(tokens, types, strict=False) if k in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, special=k == CONTROL, normalized=False) for t, k in marked])

    def token(name: str) -> str | None:
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[i] if i is not None and 0 <= i < len(tokens) else None

    bos, eos = token("bos"), token("eos")
    pre = metadata.get("tokenizer.ggml.pre")
    bos_default = kind == "llama" or pre in BOS_BY_DEFAULT
    first = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", bos_default) else []
    last = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if first or last:
        tokenizer.post_processor = framed(tokenizer, first, last)
    names = {"bos_token": bos, "eos_token": eos, "unk_token": token("unknown"), "pad_token": token("padding")}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get("llama.context_length", int(1e30)),
        **{name: value for name, value in names.items() if value is not None},
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        raise InputError(
            "The GGUF file does not say how text is split (tokenizer.ggml.pre), so its tokens would be wrong: add "
            "the name (gguf-new-metadata --pre-tokenizer llama-bpe OLD NEW, say), or convert it with a newer llama.cpp."
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise InputError("The GGUF file has no tokenizer.ggml.merges, so its tokens would be wrong: download it again.")
    tokenizer = Tokenizer(
        BPE(
            vocab={t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])},
            merges=[pair(m) for m in metadata["tokenizer.ggml.merges"]],
            ignore_merges=pre in WHOLE_WORDS_FIRST,
        )
    )
    tokenizer.pre_tokenizer = splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before the merges apply."""
    if pre in GPT2_SPLITS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in DIGIT_SPLITS:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre in REGEX_SPLITS:
        cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in REGEX_SPLITS[pre]]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise InputError(
        f"The GGUF file's tokenizer.ggml.pre is {pre!r}; known are "
        f"{sorted(GPT2_SPLITS | DIGIT_SPLITS | REGEX_SPLITS.keys())}: take a folder that holds the model's "
        "tokenizer.json."
    )


def sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE with bytes for what it lacks, as Llama 2's.

    A space is prepended whatever the text starts with, as SentencePiece, llama.cpp and Llama 2's tokenizer.json do.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    if "tokenizer.ggml.merges" in metadata:
        merges = [pair(m) for m in metadata["tokenizer.ggml.merges"]]
    elif "tokenizer.ggml.scores" in metadata:
        merges = merges_of(tokens, metadata["tokenizer.ggml.scores"])
    else:
        raise InputError(
            "The GGUF file has neither tokenizer.ggml.scores nor tokenizer.ggml.merges: download it again."
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges,
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: every way to make a token of two others, best token first."""
    ids = {t: i for i, t in enumerate(tokens)}
    found = [
        (-scores[i], ids[t[:cut]], ids[t[cut:]], t, cut)
        for t, i in ids.items()
        for cut in range(1, len(t))
        if t[:cut] in ids and t[cut:] in ids
    ]
    return [(t[:cut], t[cut:]) for *_, t, cut in sorted(found)]


def pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def framed(tokenizer: Tokenizer, first: Sequence[str], last: Sequence[str]) -> processors.PostProcessor:
    """Puts the `first` and `last` special tokens around each text."""
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*first, *last}],
    )
