"""GGUF metadata to ``tokenizer.json`` and ``tokenizer_config.json``.

Two kinds of vocabulary occur in the supported architectures. ``gpt2`` is byte-level BPE: the file
lists tokens and merges, and names (``tokenizer.ggml.pre``) the rule that splits text beforehand.
``llama`` is SentencePiece BPE: the file lists tokens and scores, and the merges follow from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from workbench.models.store.errors import BrokenModelError, UnsupportedModelError
from workbench.models.store.gguf_file import GgufFile

#: Values of ``tokenizer.ggml.token_type``.
UNKNOWN_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN = 2, 3, 4

SPACE_MARK = "\u2581"

# Split rules are facts of the models' published tokenizers (tokenizer.json), named as in GGUF.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2_split() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2_split() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2_split,
    "smollm": _digits_then_gpt2_split,
    "qwen2": lambda: _split_then_bytes(_QWEN2_SPLIT),
    "deepseek-r1-qwen": lambda: _split_then_bytes(_QWEN2_SPLIT),
    "llama-bpe": lambda: _split_then_bytes(_LLAMA3_SPLIT),
    "llama3": lambda: _split_then_bytes(_LLAMA3_SPLIT),
    "llama-v3": lambda: _split_then_bytes(_LLAMA3_SPLIT),
    "tekken": lambda: _split_then_bytes(_TEKKEN_SPLIT),
}
#: A word that is in the vocabulary is one token there, whatever its merges say.
_IGNORE_MERGES = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
#: Text is put into Unicode normal form C first.
_NFC = frozenset({"qwen2"})


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that the metadata of `file` describes.

    Raises
    ------
    UnsupportedModelError
        If the vocabulary kind or its split rule is not known; names the known ones.
    """
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    kind = file.require("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(file, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(file, tokens)
    else:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer kind {kind!r} is not supported; supported: gpt2, llama"
        )
    _add_special_tokens(tokenizer, file, tokens)
    _set_post_processor(tokenizer, file, tokens)
    if tokenizer.get_vocab_size() != len(tokens):
        raise BrokenModelError(
            f"{file.path}: {len(tokens)} tokens are listed, but only "
            f"{tokenizer.get_vocab_size()} are distinct"
        )
    return tokenizer


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", "unnamed")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{file.path}: text split rule {pre!r} (tokenizer.ggml.pre) is not supported; "
            f"supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    merges: list[tuple[str, str]] = []
    for merge in file.require("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in _IGNORE_MERGES,
        )
    )
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    is_gemma = file.architecture == "gemma3"
    if is_gemma:
        # Runs of spaces are one token each in Gemma; the file spells them as real spaces.
        tokens = [SPACE_MARK * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Gemma's merge order is the order of its tokens; elsewhere the scores give it.
    scores = None if is_gemma else file.require("tokenizer.ggml.scores")
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=sentencepiece_merges(vocab, scores),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_text: list[Any] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    add_prefix_space = file.get("tokenizer.ggml.add_space_prefix", not is_gemma)
    if is_gemma:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARK)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE_MARK,
            prepend_scheme="first" if add_prefix_space else "never",
            split=False,
        )
    if add_prefix_space:
        to_text.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def sentencepiece_merges(
    vocab: dict[str, int], scores: list[float] | None
) -> list[tuple[str, str]]:
    """Merges that rebuild a SentencePiece BPE vocabulary, best first.

    Every way to cut a token into two tokens is a merge; its rank is the token's.

    Parameters
    ----------
    vocab
        Token to id.
    scores
        Score by id, higher merges first; `None` to rank by id, lower first.
    """
    ranked: list[tuple[float, int, int, int, int, str, str]] = []
    for token, index in vocab.items():
        rank = float(index) if scores is None else -scores[index]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                # Ties: the longer left part first, then the tokens' own order.
                ranked.append((rank, -cut, -len(right), vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(entry[-2], entry[-1]) for entry in ranked]


def _add_special_tokens(tokenizer: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Control tokens are special and matched whole; user-defined ones are matched whole only."""
    types: list[int] = file.get("tokenizer.ggml.token_type") or []
    special_ids = {i for i, kind in enumerate(types) if kind == CONTROL_TOKEN}
    special_ids |= {i for i in _special_ids(file).values() if i < len(tokens)}
    # Old files call unused placeholders control tokens too; they are in the vocabulary anyway.
    tokenizer.add_special_tokens(
        [AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special_ids)]
    )
    vocab = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [
            AddedToken(tokens[i], normalized=False, special=False)
            for i, kind in enumerate(types)
            if kind == USER_DEFINED_TOKEN and i not in special_ids and tokens[i] in vocab
        ]
    )


def _set_post_processor(tokenizer: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Put BOS and EOS around text where the file asks for it."""
    add_bos, add_eos = _adds_bos(file), bool(file.get("tokenizer.ggml.add_eos_token", False))
    ids = _special_ids(file)
    template, used = ["$A"], []
    if add_bos and "bos_token" in ids:
        template.insert(0, tokens[ids["bos_token"]])
        used.append("bos_token")
    if add_eos and "eos_token" in ids:
        template.append(tokens[ids["eos_token"]])
        used.append("eos_token")
    byte_level = file.get("tokenizer.ggml.model") == "gpt2"
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if used:
        steps.append(
            processors.TemplateProcessing(
                single=template,
                pair=[*template, *(f"{part}:1" if part != "$A" else "$B:1" for part in template)],
                special_tokens=[(tokens[ids[name]], ids[name]) for name in used],
            )
        )
    if steps:
        tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)


def _adds_bos(file: GgufFile) -> bool:
    """Whether text starts with BOS. Files without the flag: SentencePiece ones do."""
    default = file.get("tokenizer.ggml.model") == "llama"
    return bool(file.get("tokenizer.ggml.add_bos_token", default))


def _special_ids(file: GgufFile) -> dict[str, int]:
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: file.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: index for name, index in ids.items() if index is not None}


def save_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and, if any, ``chat_template.jinja``."""
    build_tokenizer(file).save(str(folder / "tokenizer.json"))
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.arch_get("context_length"),
        "add_bos_token": _adds_bos(file),
        **{name: tokens[index] for name, index in _special_ids(file).items()},
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    template = file.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
