"""LoRAs: their files, their names, beside the weights or merged into them."""
