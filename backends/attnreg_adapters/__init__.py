"""Other libraries' kernels for fused attention, brought to attnreg's contract: thin adapters, one file each."""
