"""A client of a run: the objects of its configuration, what it is asked in a round, and its trial before the run."""
