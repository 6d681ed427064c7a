def test_built_ins_are_found_by_name_and_summarised():
    from fed_dpsat import plugins

    datasets, partitions = plugins.builtin("dataset"), plugins.builtin("partition")
    assert set(datasets) == {
        "cifar10",
        "cifar100",
        "digits",
        "fashion_mnist",
        "images",
        "mnist",
        "svhn",
        "table",
        "text",
    }
    assert {"dirichlet", "iid", "natural", "pathological", "shards", "size-skew"} <= set(partitions)
    assert all(plugins.summary(factory) for factory in (datasets | partitions).values())


def test_build_fills_a_factory_from_settings():
    from fed_dpsat import plugins

    settings = {"data_source": "parquet", "data_path": "", "cache_dir": "", "seed": 0}
    assert plugins.build("dataset", "digits", settings).name == "digits"
