"""Data sets of your own files that a configuration describes: a table, texts, or images.

======== ===========================================================================================
module   has
======== ===========================================================================================
place    where the examples are, and the rule of the public test split
find     the files of a data set, each with its split and a reader
readers  files as chunks of rows
splits   chunks with their split
chunks   the values of a column, with file and row for errors
columns  declared numbers and categories
labels   the labels of a task
load     one pass over all chunks into the cache
======== ===========================================================================================

Nothing is computed from private rows: constants, categories, classes and lengths are declared.
"""

from fed_dpsat.data.described.images import images
from fed_dpsat.data.described.table import table
from fed_dpsat.data.described.text import text

DATASETS = {"images": images, "table": table, "text": text}
