"""Parts of `benchmarks/gpu.py`; only `cells` and `table` are imported where there is no PyTorch."""
