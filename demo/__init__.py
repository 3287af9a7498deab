"""The pack's own tiny trained model in the real file formats, and what the `demo` command makes with it."""
