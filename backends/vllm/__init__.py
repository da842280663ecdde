"""vLLM in this process: its paged cache, batching and kernels behind our seam."""
