"""A client of a run: the objects of its configuration, its assignment and its round, and its trial before the run."""
