from fed_dpsat.data.cifar100 import SOURCE, cifar100


def test_there_are_100_fine_classes_in_alphabetical_order():
    assert len(set(SOURCE.class_names)) == 100
    assert list(SOURCE.class_names) == sorted(SOURCE.class_names)


def test_parquet_and_torchvision_hold_the_fine_labels(tmp_path, write_parquet, write_cifar, assert_holds):
    arrays = write_parquet(SOURCE, tmp_path / "parquet")
    dataset = cifar100("parquet", str(tmp_path / "parquet"), str(tmp_path / "cache"))
    assert_holds(dataset, arrays)
    assert dataset.num_classes == 100
    arrays = write_cifar(SOURCE, tmp_path / "torchvision")
    assert_holds(cifar100("torchvision", str(tmp_path / "torchvision"), str(tmp_path / "cache")), arrays)
