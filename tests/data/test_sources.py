import gzip
import hashlib
import http.server
import os
import shutil
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fed_dpsat.data import DataError, cifar10, mnist, sources, svhn
from fed_dpsat.data._torchvision import torchvision_datasets
from fed_dpsat.data.sources import load


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache in a folder of this test, and no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def forbidden(*args, **kwargs):
    raise AssertionError("decoded a second time")


@pytest.mark.parametrize("below", [".", "plain_text", "a/b"])
def test_parquet_is_found_anywhere_below_the_folder(tmp_path, write_parquet, assert_holds, below):
    arrays = write_parquet(cifar10.SOURCE, tmp_path / "d" / below)
    dataset = load(cifar10.SOURCE, "parquet", str(tmp_path / "d"), str(tmp_path / "cache"))
    assert_holds(dataset, arrays)


def test_a_second_load_reads_the_cache_and_not_the_images(tmp_path, write_parquet, assert_holds, monkeypatch):
    arrays = write_parquet(mnist.SOURCE, tmp_path / "d")
    ask = partial(load, mnist.SOURCE, "parquet", str(tmp_path / "d"), str(tmp_path / "cache"))
    ask()
    monkeypatch.setattr(sources, "decode_images", forbidden)
    assert_holds(ask(), arrays)
    os.utime(tmp_path / "d" / "test-00000-of-00001.parquet", (1, 1))
    with pytest.raises(AssertionError, match="a second time"):
        ask()


def test_another_column_shape_or_class_of_a_source_is_another_cache(tmp_path, encode):
    folder = tmp_path / "d"
    folder.mkdir()
    images = [{"bytes": encode(np.full(mnist.SOURCE.shape, 9, dtype=np.uint8)), "path": None}] * 3
    column = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for split in ("train", "test"):
        table = pa.table({"image": column, "label": [0, 0, 0], "fine": [1, 2, 3]})
        pq.write_table(table, folder / f"{split}-0.parquet")

    def labels(source):
        return load(source, "parquet", str(folder), str(tmp_path / "cache")).train.labels.tolist()

    assert labels(mnist.SOURCE) == [0, 0, 0]
    assert labels(replace(mnist.SOURCE, label_column="fine")) == [1, 2, 3]
    with pytest.raises(DataError, match="not in"):
        labels(replace(mnist.SOURCE, label_column="fine", class_names=("0", "1")))


def test_paths_may_be_relative_or_begin_with_a_tilde(tmp_path, write_parquet, monkeypatch):
    write_parquet(mnist.SOURCE, tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    load(mnist.SOURCE, "parquet", "d", "cache")
    load(mnist.SOURCE, "parquet", "~/d", "~/cache")
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_an_unknown_source_is_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(DataError, match=r"data_source='s3' is not one of parquet, torchvision, download, hub"):
        load(mnist.SOURCE, "s3", str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("data_source", ["parquet", "torchvision", "download"])
def test_an_empty_path_is_an_error_and_not_the_working_folder(tmp_path, data_source):
    with pytest.raises(DataError, match="data_path='' is empty"):
        load(mnist.SOURCE, data_source, "", str(tmp_path))


def test_a_missing_data_set_is_an_error_with_the_commands_that_fetch_it(tmp_path):
    command = f"hf download uoft-cs/cifar10 --repo-type dataset --local-dir {tmp_path}/none"
    with pytest.raises(DataError, match=f"no train-.*parquet of cifar10.*{command}, or --set data_source=down"):
        load(cifar10.SOURCE, "parquet", str(tmp_path / "none"), str(tmp_path))
    with pytest.raises(DataError, match=r"no cifar-10-batches-py/data_batch_1.*--set data_source=download"):
        load(cifar10.SOURCE, "torchvision", str(tmp_path), str(tmp_path))


def test_hidden_folders_are_not_searched(tmp_path, write_parquet):
    write_parquet(mnist.SOURCE, tmp_path / ".cache" / "huggingface")
    with pytest.raises(DataError, match="no train-"):
        load(mnist.SOURCE, "parquet", str(tmp_path), str(tmp_path / "cache"))


def test_two_data_sets_below_one_folder_are_an_error(tmp_path, write_parquet):
    for name in ("a", "b"):
        write_parquet(mnist.SOURCE, tmp_path / name)
    with pytest.raises(DataError, match=r"in more than one folder .*/a, .*/b\); --set data_path"):
        load(mnist.SOURCE, "parquet", str(tmp_path), str(tmp_path / "cache"))


def test_the_folder_of_the_hubs_configuration_is_preferred(tmp_path, write_parquet, assert_holds):
    write_parquet(mnist.SOURCE, tmp_path / "full_numbers")
    arrays = write_parquet(svhn.SOURCE, tmp_path / "cropped_digits")
    assert_holds(load(svhn.SOURCE, "parquet", str(tmp_path), str(tmp_path / "cache")), arrays)


def test_a_damaged_parquet_file_is_an_error_with_its_name(tmp_path, write_parquet):
    write_parquet(mnist.SOURCE, tmp_path / "d")
    os.truncate(tmp_path / "d" / "train-00001-of-00002.parquet", 100)
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: not a readable Parquet file"):
        load(mnist.SOURCE, "parquet", str(tmp_path / "d"), str(tmp_path / "cache"))


def test_another_data_sets_files_are_an_error_with_the_column(tmp_path, write_parquet):
    write_parquet(mnist.SOURCE, tmp_path / "d")
    with pytest.raises(DataError, match=r"train-00000-of-00002.parquet: no column 'img', only image, label"):
        load(cifar10.SOURCE, "parquet", str(tmp_path / "d"), str(tmp_path / "cache"))


def test_the_hub_gives_the_same_arrays(tmp_path, write_parquet, assert_holds, monkeypatch, hub):
    arrays = write_parquet(cifar10.SOURCE, tmp_path / "d")
    source = replace(cifar10.SOURCE, hub_repo=str(tmp_path / "d"))
    ask = partial(load, source, "hub", "", str(tmp_path / "cache"))
    assert_holds(ask(), arrays)
    monkeypatch.setattr(sources, "decode_images", forbidden)
    assert_holds(ask(), arrays)


def test_the_hubs_configuration_is_asked_for(tmp_path, write_parquet, assert_holds, hub):
    write_parquet(mnist.SOURCE, tmp_path / "d" / "full_numbers")
    arrays = write_parquet(svhn.SOURCE, tmp_path / "d" / "cropped_digits")
    (tmp_path / "d" / "README.md").write_text("""---
configs:
- config_name: full_numbers
  data_files: [{split: train, path: full_numbers/train-*}, {split: test, path: full_numbers/test-*}]
- config_name: cropped_digits
  data_files: [{split: train, path: cropped_digits/train-*}, {split: test, path: cropped_digits/test-*}]
---
""")
    source = replace(svhn.SOURCE, hub_repo=str(tmp_path / "d"))
    assert_holds(load(source, "hub", "", str(tmp_path / "cache")), arrays)


def test_a_hub_that_cannot_be_reached_is_an_error_with_the_way_round(tmp_path, monkeypatch, hub):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot load ylecun/mnist \(no route\).*hf download ylecun/mnist"):
        load(mnist.SOURCE, "hub", "", str(tmp_path))


def test_download_fetches_what_is_missing_and_then_nothing(tmp_path, write_idx, assert_holds, monkeypatch):
    arrays = write_idx(mnist.SOURCE, tmp_path / "web")
    raw, resources = tmp_path / "web" / "MNIST" / "raw", []
    for file in sorted(raw.iterdir()):
        packed = gzip.compress(file.read_bytes())
        (raw / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(raw))
    handler.func.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mnist_class = torchvision_datasets().MNIST
    monkeypatch.setattr(mnist_class, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(mnist_class, "resources", resources)
    ask = partial(load, mnist.SOURCE, data_path=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    try:
        assert_holds(ask(data_source="download"), arrays)
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(sources, "read_split", forbidden)
    assert_holds(ask(data_source="download"), arrays)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(AssertionError, match="a second time"):
        ask(data_source="download")


def test_a_torchvision_root_of_another_shape_is_an_error(tmp_path, write_idx):
    write_idx(replace(mnist.SOURCE, shape=(1, 4, 4)), tmp_path)
    with pytest.raises(DataError, match=r"MNIST holds uint8 \(1, 4, 4\), not uint8 \(1, 28, 28\)"):
        load(mnist.SOURCE, "torchvision", str(tmp_path), str(tmp_path / "cache"))
