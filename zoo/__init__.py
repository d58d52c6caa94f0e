"""Transformer Zoo: one recipe, one command, a model directory that any Hugging Face tool opens."""
