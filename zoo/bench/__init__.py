"""Benchmarks: the native classes against the official ones, interleaved in one process, by median ratios."""
