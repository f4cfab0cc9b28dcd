"""Metadata of GGUF files with small vocabularies."""

from tokenizers.pre_tokenizers import ByteLevel

TEXT = "Hello, wörld! It's  12 345\n\n  a7\tb <|im_start|>user\nhi<think>1<|im_end|> 日本 🙂 "
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ALPHABET = sorted(ByteLevel.alphabet())


def byte_level(pre="smollm", **changes):
    """Metadata of a byte-level vocabulary: two special tokens, an added one, the bytes and a few merges."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ a", "1 2", "Ġ 1", "Ġ Ġ"]
    tokens = ["<|im_start|>", "<|im_end|>", "<think>", *ALPHABET, *(m.replace(" ", "") for m in merges), "world"]
    kinds = [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 3)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    } | changes


def sentencepiece(**changes):
    """Metadata of a SentencePiece vocabulary: three special tokens, all bytes, letters and some words."""
    words = ["▁", *"abcdehilnortw1", "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁a", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words)
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes
