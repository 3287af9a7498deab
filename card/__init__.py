"""The user's card measured: products, attention, copies, disk, and what a step of each model takes by them."""
