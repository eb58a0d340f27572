"""The tokenizer of a bundle: sentencepiece, trained on the texts that the exporter has.

Rules: id 0 is padding, 1 an unknown piece; there are no sentence marks, for texts are pooled. The same
texts give the same bytes. Letter case is folded away.

Kudo, arXiv 1804.10959 (unigram model). Next: `inputs/text.py`, which encodes with it on the device.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import sentencepiece

from wire.errors import UserError

PAD_ID, UNKNOWN_ID, ABSENT = 0, 1, -1


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> bytes:
    """A sentencepiece model of at most `vocabulary` pieces, fewer where the texts do not give as many.

    Raises `UserError` without any text, or where the texts have more characters than `vocabulary`.
    """
    lines = [line for text in texts if (line := " ".join(text.split()))]
    if not lines:
        raise UserError("no texts to train a tokenizer on", "give a data set whose text column is filled")
    file = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="unigram",
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD_ID,
            unk_id=UNKNOWN_ID,
            bos_id=ABSENT,
            eos_id=ABSENT,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot train a tokenizer of {vocabulary} pieces: {reason}", "choose a larger vocabulary"
        ) from error
    return file.getvalue()
