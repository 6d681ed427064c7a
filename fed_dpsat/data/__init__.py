"""Public data sets, decoded once and shared by all processes, and their division among clients.

A built-in data set is one module with a table ``DATASETS``, a built-in partition an entry of
``partition.PARTITIONS``; ``fed_dpsat.plugins`` finds both. Importing this package loads torch alone:
torchvision, ``datasets`` and ``flwr_datasets`` are imported by the call that needs them.
"""

from fed_dpsat.data.dataset import DataError, Dataset, Examples

__all__ = ["DataError", "Dataset", "Examples"]
