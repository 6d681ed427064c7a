from fed_dpsat.data.mnist import SOURCE, mnist


def test_parquet_and_torchvision_hold_what_was_written(tmp_path, write_parquet, write_idx, assert_holds):
    arrays = write_parquet(SOURCE, tmp_path / "parquet")
    dataset = mnist("parquet", str(tmp_path / "parquet"), str(tmp_path / "cache"))
    assert_holds(dataset, arrays)
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.num_classes == 10
    arrays = write_idx(SOURCE, tmp_path / "torchvision")
    assert_holds(mnist("torchvision", str(tmp_path / "torchvision"), str(tmp_path / "cache")), arrays)
