"""Makes the text encoder's tokenizer: CLIP's lower-casing byte-pair encoding, learnt from the captions."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# Rare words that mean nothing, for customization attacks to bind a subject to. Each is one token.
IDENTIFIERS = ("sks", "zwx", "ktn", "olis")
# CLIP's splitting cuts this one into t, @ and t, so it is recognised before the splitting.
ADDED = ("t@t",)
_WORD_END = "</w>"
# Normalized: recognised in any case, as every other word is.
_ADDED_FLAGS = {"single_word": True, "normalized": True, "lstrip": False, "rstrip": False, "special": False}


def build_tokenizer(captions: Iterable[str], *, vocabulary: int, length: int) -> Any:
    """Returns a CLIPTokenizer of at most `vocabulary` tokens whose prompts are `length` tokens long.

    All 256 bytes are tokens, inside and at the end of a word, so that any text can be written. Start and end
    are the last two tokens, as in CLIP, whose text encoder once found the end by the largest number.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = len(alphabet) * 2 + len(ADDED) + 2
    room = vocabulary - fixed - 3 * len(IDENTIFIERS)  # an identifier takes at most three merges
    merges = _learn_merges(captions, alphabet, room)
    for word in IDENTIFIERS:
        _add_word(merges, word)
    words = dict.fromkeys([*alphabet, *(letter + _WORD_END for letter in alphabet), *map("".join, merges)])
    tokens = [*words, *ADDED, START, END]
    tokenizer: Any = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=length,
    )
    tokenizer.add_tokens([AddedToken(word, **_ADDED_FLAGS) for word in ADDED])
    return tokenizer


def save_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Completes a saved tokenizer with the files that transformers before 5 reads and newer ones no longer write.

    These are `vocab.json`, `merges.txt` and, in `tokenizer_config.json`, the list of added tokens.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    special = {**_ADDED_FLAGS, "single_word": False, "special": True}
    flags = dict.fromkeys(ADDED, _ADDED_FLAGS) | {START: special, END: special}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(model["vocab"][word]): {"content": word, **flags[word]} for word in (*ADDED, START, END)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _learn_merges(captions: Iterable[str], alphabet: list[str], room: int) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    # The trainer counts its alphabet into the size; letters at word ends come on top, so ask for more and cut.
    trainer = trainers.BpeTrainer(
        vocab_size=room + 2 * len(alphabet),
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(pair[0], pair[1]) for pair in merges][: max(0, room)]


def _add_word(merges: list[tuple[str, str]], word: str) -> None:
    """Appends the merges that make one token of `word` after all present merges have been applied."""
    pieces = [*word[:-1], word[-1] + _WORD_END]
    for left, right in merges:
        at = 0
        while at < len(pieces) - 1:
            if pieces[at] == left and pieces[at + 1] == right:
                pieces[at : at + 2] = [left + right]
            at += 1
    while len(pieces) > 1:
        merges.append((pieces[0], pieces[1]))
        pieces[:2] = [pieces[0] + pieces[1]]
