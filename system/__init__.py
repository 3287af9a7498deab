"""What the platform lacks or does in its own way: whole files, direct reads, host memory, kernels that may not run."""
