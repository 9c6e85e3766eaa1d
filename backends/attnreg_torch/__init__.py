"""Two backends in PyTorch alone: `torch`, the readable reference, and `torch_block`, blocks of queries by matrix products."""
