"""Examples -> token ids -> padded batches, for encoders and for decoders.

Comes in: examples and a tokenizer. Goes out: `TokenSet`s and `Batch`es of torch tensors. A decoder's row is the prompt
followed by the class as a word and the end-of-sequence token; only those last tokens are learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspine_edge.data import Example
from fedspine_edge.errors import DataError

DEFAULT_PROMPT = "{text}\nLabel:"
MAX_TOKENS = 128
POOL_BATCHES = 8


@dataclass(frozen=True)
class TokenSet:
    """Tokenised examples.

    Attributes:
        rows: Token ids of each example; for a decoder the prompt and the answer.
        answer_lengths: Tokens at the end of each row that are learnt; 0 for an encoder.
        labels: Class number of each example, int64 [N].
    """

    rows: tuple[np.ndarray, ...]
    answer_lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: np.ndarray) -> TokenSet:
        """Returns the given rows."""
        return TokenSet(tuple(self.rows[i] for i in indices), self.answer_lengths[indices], self.labels[indices])

    def prompts(self) -> list[list[int]]:
        """Returns the token ids of each example without its answer."""
        return [row[: len(row) - n].tolist() for row, n in zip(self.rows, self.answer_lengths, strict=True)]


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Attributes:
        input_ids: [B, T] int64, padded on the right.
        valid: [B, T] bool, False at padding.
        labels: [B] int64, class numbers.
        answer_rows: Row of each learnt token, int64 [A] (decoder only, else empty).
        answer_columns: The column whose output predicts it, int64 [A].
        answer_ids: The token to be predicted, int64 [A].
    """

    input_ids: Tensor
    valid: Tensor
    labels: Tensor
    answer_rows: Tensor
    answer_columns: Tensor
    answer_ids: Tensor

    @property
    def num_targets(self) -> int:
        """What the loss is a mean over: learnt tokens, or rows."""
        return len(self.answer_ids) or len(self.labels)

    def parts(self, max_tokens: int) -> list[Batch]:
        """Returns the batch in parts of at most `max_tokens` tokens, padding included, or of one row.

        Rows of like length stay together, and each part is as wide as its own longest row.
        """
        if self.input_ids.numel() <= max_tokens:
            return [self]
        lengths = self.valid.sum(1)
        groups: list[list[int]] = [[]]
        for row in torch.argsort(lengths, stable=True).tolist():
            if groups[-1] and (len(groups[-1]) + 1) * int(lengths[row]) > max_tokens:
                groups.append([])
            groups[-1].append(row)
        return [self._rows(torch.tensor(group)) for group in groups]

    def _rows(self, rows: Tensor) -> Batch:
        width = int(self.valid[rows].sum(1).max())
        position = torch.full((len(self.labels),), -1)
        position[rows] = torch.arange(len(rows))
        answer_rows = position[self.answer_rows]
        mine = answer_rows >= 0
        return Batch(
            input_ids=self.input_ids[rows, :width],
            valid=self.valid[rows, :width],
            labels=self.labels[rows],
            answer_rows=answer_rows[mine],
            answer_columns=self.answer_columns[mine],
            answer_ids=self.answer_ids[mine],
        )


@dataclass(frozen=True)
class Encoding:
    """How examples become tokens; the same on every device of a run.

    Attributes:
        classes: Names of the classes, in the order of their numbers.
        prompt: Template with `{text}` for a decoder; None for an encoder.
        max_tokens: Texts are cut to fit.
    """

    tokenizer: Any
    classes: tuple[str, ...]
    prompt: str | None
    max_tokens: int = MAX_TOKENS

    def encode(self, examples: Sequence[Example]) -> TokenSet:
        """Returns the tokenised examples; texts are cut to fit `max_tokens`."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        labels = np.asarray([numbers[example.label] for example in examples], dtype=np.int64)
        if self.prompt is None:
            rows = [
                np.asarray(self.tokenizer(e.text, truncation=True, max_length=self.max_tokens)["input_ids"])
                for e in examples
            ]
            return TokenSet(tuple(rows), np.zeros(len(rows), dtype=np.int64), labels)
        answers = [self._answer(name) for name in self.classes]
        rows = [np.asarray(self._prompt_ids(e.text) + answers[numbers[e.label]]) for e in examples]
        return TokenSet(tuple(rows), np.asarray([len(answers[n]) for n in labels], dtype=np.int64), labels)

    def choice_tokens(self) -> list[int]:
        """Returns the first token of each class's word.

        Raises:
            DataError: Two words begin with the same token.
        """
        tokens = [self._answer(name)[0] for name in self.classes]
        for index, token in enumerate(tokens):
            if token in tokens[:index]:
                first = self.classes[tokens.index(token)]
                raise DataError(
                    f"expected class words with distinct first tokens, found {first!r} and {self.classes[index]!r}",
                    hint="rename one of the classes",
                )
        return tokens

    def _answer(self, name: str) -> list[int]:
        ids = list(self.tokenizer(" " + name, add_special_tokens=False)["input_ids"])
        return [*ids, self.tokenizer.eos_token_id]

    def _prompt_ids(self, text: str) -> list[int]:
        assert self.prompt is not None
        before, after = self.prompt.split("{text}")
        tail = list(self.tokenizer(after, add_special_tokens=False)["input_ids"])
        head = list(self.tokenizer(before + text)["input_ids"])
        return head[: self.max_tokens - len(tail)] + tail


def collate(tokens: TokenSet, indices: np.ndarray) -> Batch:
    """Returns the given rows as one batch, padded on the right to the longest.

    The last token of a decoder's row is only ever predicted, so it is not in the input.
    """
    answers = tokens.answer_lengths[indices]
    rows = [tokens.rows[i] for i in indices]
    input_ids, valid = _padded([row[:-1] if n else row for row, n in zip(rows, answers, strict=True)])
    return Batch(
        input_ids=input_ids,
        valid=valid,
        labels=torch.from_numpy(tokens.labels[indices]),
        answer_rows=torch.from_numpy(np.repeat(np.arange(len(rows)), answers)),
        answer_columns=torch.from_numpy(
            np.concatenate([np.arange(len(row) - n, len(row)) - 1 for row, n in zip(rows, answers, strict=True)])
        ),
        answer_ids=torch.from_numpy(
            np.concatenate([row[len(row) - n :] for row, n in zip(rows, answers, strict=True)])
        ),
    )


def _padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Returns the rows side by side, int64 [B, T], and which entries are theirs, bool [B, T]."""
    lengths = np.asarray([len(row) for row in rows])
    input_ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
    return torch.from_numpy(input_ids), torch.from_numpy(np.arange(input_ids.shape[1])[None, :] < lengths[:, None])


def training_batches(tokens: TokenSet, *, batch_size: int, num_batches: int, seed: int) -> Iterator[Batch]:
    """Yields batches drawn without replacement, epoch after epoch; smaller than asked where the data are fewer.

    Rows of like length go together (drawn a pool of some batches at a time), which spares a third of the padding.
    """
    rng = np.random.default_rng(seed)
    lengths = np.asarray([len(row) for row in tokens.rows])
    size = min(batch_size, len(tokens))
    order = np.zeros(0, dtype=np.int64)
    while num_batches > 0:
        pool = min(num_batches, POOL_BATCHES)
        while len(order) < pool * size:
            order = np.concatenate([order, rng.permutation(len(tokens))])
        drawn, order = order[: pool * size], order[pool * size :]
        alike = drawn[np.argsort(lengths[drawn], kind="stable")].reshape(pool, size)
        for index in rng.permutation(pool):
            yield collate(tokens, alike[index])
        num_batches -= pool


def prompt_batches(tokens: TokenSet, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Yields every row once without its answer, rows of like length together.

    Yields:
        The indices of the rows; their tokens, int64 [B, T]; which of these are not padding, bool [B, T].
    """
    prompts = [np.asarray(prompt) for prompt in tokens.prompts()]
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, *_padded([prompts[i] for i in indices])
