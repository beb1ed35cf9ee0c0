import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import questions, tiny_tokenizer

from fedspine_edge.batches import Encoding, collate, prompt_batches, training_batches
from fedspine_edge.data import Example, by_domain, load_examples, partition, split
from fedspine_edge.errors import DataError

ROWS = [Example(*pair) for pair in questions()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def test_trec_has_5381_distinct_questions_of_six_classes():
    examples = load_examples("trec6")
    assert len(examples) == len(set(examples)) == 5381
    assert sum(example.label == "abbreviation" for example in examples) == 86


def test_jsonl_and_csv_give_the_same_rows(tmp_path):
    pairs = [('say "how", he said', "number"), ("who is he ?", "human"), ("how far ?", "number"), ("who ?", "human")]
    csv = tmp_path / "rows.csv"
    csv.write_text("text,label\n" + "".join('"' + t.replace('"', '""') + f'",{label}\n' for t, label in pairs))
    assert load_examples(str(csv)) == load_examples(write_jsonl(tmp_path / "rows.jsonl", pairs))


def test_duplicates_are_dropped_before_anything_else(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", questions() + questions())
    assert len(load_examples(path)) == len(questions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b"', "line 2: expected one JSON object"),
        ('{"text": "a", "label": "x"}\n{"text": "b"}', "line 2: expected the fields text and label"),
        ('{"text": "a", "label": "x"}\n["b", "y"]', "line 2: expected the fields text and label"),
        ('{"text": "", "label": "x"}', "line 1: expected the fields text and label"),
        ("", "expected at least 2 classes in .*, found 0"),
    ],
)
def test_a_malformed_jsonl_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(str(path))


def test_a_malformed_csv_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nwho ?,human\nonly one field\n")
    with pytest.raises(DataError, match="line 3: expected the fields text and label"):
        load_examples(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a data file, found none at"):
        load_examples(str(tmp_path / "none.jsonl"))


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(
        DataError,
        match=r"expected trec6, r8, sentiment, sentiment-domains or a \.jsonl or \.csv file, found 'rows.xml'",
    ):
        load_examples("rows.xml")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(DataError, match=r"cannot read .* as UTF-8 text"):
        load_examples(str(path))


def test_a_class_seen_only_once_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(), ("where is that place ?", "location")])
    with pytest.raises(DataError, match=r"expected at least 2 examples of each class .* found 1 of 'location'"):
        load_examples(path)


def test_a_split_is_disjoint_whole_and_the_same_for_a_seed():
    parts = split(ROWS, held_out=6, validation=2, seed=3)
    assert parts == split(ROWS, held_out=6, validation=2, seed=3)
    everything = [*parts.train, *parts.validation, *parts.held_out]
    assert sorted(e.text for e in everything) == sorted(e.text for e in ROWS)
    assert {e.label for e in parts.train} == {"human", "number"}


@settings(max_examples=60, deadline=None)
@given(
    devices=st.integers(1, 80),
    alpha=st.sampled_from([0.01, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 50),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
)
def test_a_partition_gives_every_row_to_one_device_and_every_device_a_row(devices, alpha, seed, sizes):
    labels = [str(index) for index, size in enumerate(sizes) for _ in range(size)]
    devices = min(devices, len(labels))
    shards = partition(labels, num_devices=devices, alpha=alpha, seed=seed)
    assert len(shards) == devices
    assert all(len(shard) >= 1 for shard in shards)
    assert sorted(np.concatenate(shards)) == list(range(len(labels)))


def test_a_small_alpha_makes_the_shards_unlike():
    labels = ["a"] * 500 + ["b"] * 500
    alike, unlike = (partition(labels, num_devices=10, alpha=alpha, seed=0) for alpha in (1000.0, 0.05))

    def spread(shards):
        shares = [np.mean([labels[i] == "a" for i in shard]) for shard in shards]
        return np.std(shares)

    assert spread(alike) < 0.1 < spread(unlike)


def test_more_devices_than_rows_are_refused():
    with pytest.raises(DataError, match="found 2 for 3 devices"):
        partition(["a", "b"], num_devices=3, alpha=1.0, seed=0)


def encoded(decoder=True):
    encoding = Encoding(tiny_tokenizer(decoder=decoder), ("human", "number"), "{text} Label:" if decoder else None)
    return encoding, encoding.encode(ROWS)


def test_a_decoder_learns_the_class_word_and_the_end_alone():
    _, tokens = encoded()
    batch = collate(tokens, np.array([0, 13]))
    # each answer is one word and the end of sequence, predicted from the token before
    assert batch.answer_ids.view(2, 2)[:, 1].tolist() == [2, 2]
    for row, column, target in zip(batch.answer_rows, batch.answer_columns, batch.answer_ids, strict=True):
        assert tokens.rows[(0, 13)[row]][column + 1] == target
    # the end of sequence is predicted and never shown
    shown = [batch.input_ids[row][batch.valid[row]].tolist() for row in (0, 1)]
    assert shown == [tokens.rows[i][:-1].tolist() for i in (0, 13)]


def test_prompts_do_not_hold_the_answer():
    _, tokens = encoded()
    assert all(prompt == row[:-2].tolist() for prompt, row in zip(tokens.prompts(), tokens.rows, strict=True))


def test_class_words_that_begin_alike_are_refused():
    encoding = Encoding(tiny_tokenizer(decoder=True), ("human", "human number"), "{text} Label:")
    with pytest.raises(DataError, match="distinct first tokens, found 'human' and 'human number'"):
        encoding.choice_tokens()


def test_an_epoch_shows_every_row_once():
    _, tokens = encoded()
    batches = list(training_batches(tokens, batch_size=4, num_batches=6, seed=0))
    shown = sorted(batch.input_ids[i][batch.valid[i]].tolist() for batch in batches for i in range(4))
    assert shown == sorted(row[:-1].tolist() for row in tokens.rows)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_parts_of_a_batch_are_its_rows_within_the_limit(decoder):
    _, tokens = encoded(decoder)
    batch = collate(tokens, np.array([5, 0, 13, 2, 9]))
    parts = batch.parts(14)
    assert len(parts) > 1
    assert all(part.input_ids.numel() <= 14 or len(part.labels) == 1 for part in parts)
    assert sum(part.num_targets for part in parts) == batch.num_targets
    assert sorted(rows_of(batch)) == sorted(row for part in parts for row in rows_of(part))
    assert batch.parts(10_000) == [batch]


def rows_of(batch):
    """Each row's tokens, class, and what is predicted where."""
    for row in range(len(batch.labels)):
        mine = batch.answer_rows == row
        answers = list(zip(batch.answer_columns[mine].tolist(), batch.answer_ids[mine].tolist(), strict=True))
        yield batch.input_ids[row][batch.valid[row]].tolist(), int(batch.labels[row]), answers


def test_a_device_with_one_example_trains_on_it():
    _, tokens = encoded()
    batches = list(training_batches(tokens.take(np.array([3])), batch_size=8, num_batches=3, seed=0))
    assert [batch.input_ids.shape[0] for batch in batches] == [1, 1, 1]


@pytest.mark.parametrize("decoder", [False, True])
def test_prompt_batches_show_every_prompt_once(decoder):
    _, tokens = encoded(decoder)
    shown = {
        int(index): input_ids[row][valid[row]].tolist()
        for indices, input_ids, valid in prompt_batches(tokens, 5)
        for row, index in enumerate(indices)
    }
    assert shown == dict(enumerate(tokens.prompts()))


def test_devices_by_domain_have_one_domain_each_in_its_share_of_them():
    domains = ["a"] * 60 + ["b"] * 30 + ["c"] * 3
    shards = by_domain(domains, num_devices=8, seed=0)
    assert sorted(row for shard in shards for row in shard) == list(range(93))
    assert all(len({domains[row] for row in shard}) == 1 for shard in shards)
    assert [sum(domains[shard[0]] == name for shard in shards) for name in "abc"] == [5, 2, 1]


@pytest.mark.parametrize(
    ("domains", "count", "message"),
    [
        (["a", "b"], 1, "expected at least one device a domain, found 1 for 2 domains"),
        (["a"], 2, "expected at least one example a device, found 1 for 2 devices"),
    ],
)
def test_domains_that_cannot_be_dealt_are_refused(domains, count, message):
    with pytest.raises(DataError, match=message):
        by_domain(domains, num_devices=count, seed=0)


def test_sentiment_is_in_two_classes_and_knows_its_domain():
    movies = load_examples("sentiment")
    assert {example.label for example in movies} == {"positive", "negative"}
    assert {example.domain for example in movies} == {"movie"}
    assert len(movies) == 10566
