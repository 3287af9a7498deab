"""Step caches: which passes of a run may add again what the blocks added before."""
