"""One model on one device and one run of it, the same for the command line and the nodes."""
