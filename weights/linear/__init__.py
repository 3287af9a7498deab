"""Linear layers over weights as they are stored: formats, unpacking, products, conversion."""
