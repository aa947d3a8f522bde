"""Data sets with labels: columns by any of their names, and one line for what is missing."""

import datasets
import pytest
from _classification import load_splits

from ds_pso.config.load import load_config
from ds_pso.distributed.layout import Layout
from ds_pso.distributed.static_world import unconnected
from ds_pso.errors import ConfigError
from ds_pso.swarm import Swarm


@pytest.fixture
def swarm():
    return Swarm(*load_config({"swarm": {"particles": 1}}), unconnected(Layout(0, 1, 1), 10.0)[0], None)


@pytest.fixture
def serve(monkeypatch):
    """Lets ``load_dataset`` return splits of these columns."""

    def answer(**splits):
        found = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})
        monkeypatch.setattr(datasets, "load_dataset", lambda name, cache_dir: found)

    return answer


ROWS = {"sentence": [f"text {i}" for i in range(60)], "label": [i % 3 for i in range(60)], "idx": list(range(60))}
TEXT = {"text": ("text", "sentence")}


def test_training_data_is_split_and_columns_are_named_alike(swarm, serve):
    serve(train=ROWS, validation=ROWS)
    splits = load_splits(swarm, "somebody/something", TEXT)
    assert (len(splits.train), len(splits.probe), len(splits.test), splits.num_classes) == (54, 6, 60, 3)
    assert splits.test[7] == {"text": "text 7", "labels": 1}
    assert not set(splits.train["text"]) & set(splits.probe["text"])


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ROWS}, r"has the splits \['train'\]"),
        ({"train": {"label": [0]}, "test": ROWS}, r"has columns \['label'\], and none is called text"),
        ({"train": {"text": ["a"]}, "test": ROWS}, "none is called label"),
    ],
)
def test_what_is_missing_is_named(swarm, serve, splits, message):
    serve(**splits)
    with pytest.raises(ConfigError, match=message):
        load_splits(swarm, "somebody/something", TEXT)


def test_a_dataset_that_cannot_be_found_is_named(swarm, monkeypatch):
    def offline(name, cache_dir):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError, match=r"somebody/something.*no network"):
        load_splits(swarm, "somebody/something", TEXT)
