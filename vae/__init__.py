"""What both families' video autoencoders share: opening and building one, tiles, and what follows an out-of-memory.

A family gives a `VaeFormat` (how its files and their tensors are known) and a network with a configuration, `encode`
and `decode_pieces`; everything else is here.
"""
