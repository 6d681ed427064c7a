"""Public data sets, decoded once and shared by all processes, and partitions of them among clients.

A built-in data set is a module with a table ``DATASETS``, a built-in partition an entry of ``partition.PARTITIONS``;
``fed_dpsat.plugins`` finds both. Importing this package loads only torch: each function imports torchvision,
``datasets`` or ``flwr_datasets`` when it needs it.
"""

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import DataError

__all__ = ["DataError", "Dataset", "Examples"]
