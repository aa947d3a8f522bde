"""From documents to blocks of tokens."""

import json

import numpy as np
import pytest
import torch

from ds_pso.distributed.layout import Layout
from ds_pso.distributed.static_world import unconnected
from ds_pso.errors import ConfigError
from ds_pso.swarm import Swarm
from ds_pso.training import text
from ds_pso.training.text import Blocks, load_corpus, read_documents, tokenize, train_tokenizer

TEXTS = [f"def function_{i}(x):\n    return x + {i}  # naïve ☃\n" for i in range(60)]


@pytest.fixture
def swarm():
    config = {"train_micro_batch_size_per_gpu": 1, "swarm": {"particles": 1}}
    from ds_pso.config.load import load_config

    ds_config, swarm_config = load_config(config)
    return Swarm(ds_config, swarm_config, unconnected(Layout(0, 1, 1), 10.0)[0], None)


@pytest.fixture
def folder_of_texts(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i, document in enumerate(TEXTS):
        (source / f"{i:02d}.py").write_text(document, encoding="utf-8")
    (source / "picture.bin").write_bytes(b"\xff\x00")
    return source


def test_blocks_cut_the_row_of_tokens_and_drop_the_rest():
    blocks = Blocks(np.arange(10, dtype=np.uint16), seq_length=3)
    assert [block.tolist() for block in blocks] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert blocks[0].dtype == torch.int64


def test_tokens_decode_to_the_text_they_came_from():
    tokenizer = train_tokenizer(TEXTS)
    ids = tokenize(tokenizer, TEXTS[:3])
    assert tokenizer.decode(ids.tolist()) == text.END_OF_TEXT.join([*TEXTS[:3], ""])


def test_the_standard_library_is_read_without_its_tests():
    names = [name for name, _ in read_documents("python")]
    assert len(names) > 300
    assert names == sorted(names)
    assert not [name for name in names if "test" in name.split("/")[:-1]]


def test_a_folder_gives_its_text_files(folder_of_texts):
    documents = dict(read_documents(str(folder_of_texts)))
    assert list(documents.values()) == TEXTS


def test_held_out_documents_are_not_trained_on(swarm, folder_of_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_HELD_OUT", 5)
    corpus = load_corpus(swarm, str(folder_of_texts), tmp_path / "data", seq_length=4)

    def words(blocks):
        return corpus.tokenizer.decode(torch.cat(list(blocks)).tolist())

    train = {i for i in range(60) if f"function_{i}(" in words(corpus.train)}
    held_out = {i for i in range(60) if f"function_{i}(" in words(corpus.held_out)}
    assert held_out
    assert not train & held_out
    assert len(train | held_out) >= 58  # the last block of each part may be cut off


def test_one_long_document_is_split_at_its_end(swarm, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("".join(f"line {i}\n" for i in range(4000)))
    corpus = load_corpus(swarm, str(file), tmp_path / "data", seq_length=8)
    assert "line 3990" in corpus.tokenizer.decode(torch.cat(list(corpus.held_out)).tolist())
    assert "line 3990" not in corpus.tokenizer.decode(torch.cat(list(corpus.train)).tolist())


def test_prepared_data_is_used_again_and_never_for_another_dataset(swarm, folder_of_texts, tmp_path):
    data = tmp_path / "data"
    load_corpus(swarm, str(folder_of_texts), data, seq_length=4)
    written = (data / "train.npy").stat().st_mtime_ns
    load_corpus(swarm, str(folder_of_texts), data, seq_length=4)
    assert (data / "train.npy").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="was prepared with dataset"):
        load_corpus(swarm, "python", data, seq_length=4)


def test_too_little_text_is_said_so(swarm, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(ConfigError, match="shorter than one block"):
        load_corpus(swarm, str(file), tmp_path / "data", seq_length=64)


def test_a_dataset_id_goes_through_load_dataset(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert list(read_documents("somebody/something")) == [("0", "one"), ("1", "two")]

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows.rename_column("text", "label"))
    with pytest.raises(ConfigError, match=r"columns \['label'\]"):
        list(read_documents("somebody/something"))


def test_a_dataset_that_cannot_be_found_is_named(monkeypatch):
    import datasets

    def offline(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError, match=r"somebody/something.*no network"):
        list(read_documents("somebody/something"))


def test_source_record_names_dataset_and_tokenizer(swarm, folder_of_texts, tmp_path):
    load_corpus(swarm, str(folder_of_texts), tmp_path / "data", seq_length=4)
    record = json.loads((tmp_path / "data" / "source.json").read_text())
    assert record == {"dataset": str(folder_of_texts), "tokenizer": "BPE 4096"}
