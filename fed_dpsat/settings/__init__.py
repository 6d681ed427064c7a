"""The settings of a run: each with its bounds, and the combinations that are refused."""
