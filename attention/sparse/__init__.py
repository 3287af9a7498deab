"""Sparse attention: the order of tokens, when and how much is left out, and the error that the run itself measures."""
