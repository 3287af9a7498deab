"""A tiny trained model in the real file formats, its trainer and its judge."""
