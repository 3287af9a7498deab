"""UMT5, Wan's text encoder: its tokenizer, its layers, its files."""
