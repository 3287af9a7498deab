"""The table of model families, and what a file is."""
