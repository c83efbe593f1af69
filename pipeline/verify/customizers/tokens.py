"""One new word for a pipeline: its row of the token embedding is trained, all other rows stay bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import TrainableTokensConfig, get_peft_model


def add_token(pipeline: Any, word: str, like: str) -> int:
    """Adds `word` to the tokenizer and a row for it to the text encoder's embedding; returns the row's number.

    Args:
        pipeline: changed in place, see `own_copy`.
        word: lower case, new to the tokenizer.
        like: the row starts as that of the first token of this.

    Raises:
        ValueError: the tokenizer has the word already, or finds no token in `like`.
    """
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    start = tokenizer(like, add_special_tokens=False).input_ids
    if not start:
        raise ValueError(f"{like!r} gives no token to start {word!r} from; name a word")
    known = len(tokenizer)
    tokenizer.add_tokens([word])
    if len(tokenizer) == known:
        raise ValueError(f"the model's tokenizer knows {word!r} already; choose another word for the subject")
    # mean_resizing would draw the row from torch's global generator.
    embedding = text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    number = int(tokenizer.convert_tokens_to_ids(word))
    with torch.no_grad():
        embedding.weight[number] = embedding.weight[start[0]]
    return number


@contextmanager
def trainable_row(text_encoder: Any, number: int) -> Iterator[None]:
    """Within it one row of the token embedding requires gradients; afterwards it is written into the table."""
    wrapped = get_peft_model(
        text_encoder, TrainableTokensConfig(token_indices=[number], target_modules=["token_embedding"])
    )
    yield
    wrapped.merge_and_unload()  # in place: `text_encoder` is its plain self again
