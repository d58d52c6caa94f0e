"""Tests see no hub, few threads and warnings of transformers' own future as errors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# workers of xdist share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
