"""Benchmarks of mlx_adadelta beside what it replaces: ``python -m bench --help``."""

import os

# NumPy asks for huge pages, MLX does not. The limit and all contenders must be measured
# on the same kind of memory.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
# torch.compile must compile in each run: its time is measured, too.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
