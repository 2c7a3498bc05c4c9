"""Compiles the shipped kernels for real GPUs, on a machine that has none, and reads what the assembler made of them."""
