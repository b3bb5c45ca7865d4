"""Benchmarks of mlx_adadelta beside what it replaces: ``python -m bench --help``."""

import os

# NumPy asks for huge pages, MLX does not: the limit and everybody else are to be
# measured on memory of one kind.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
# Compiled anew each time: how long that takes is measured, too.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
