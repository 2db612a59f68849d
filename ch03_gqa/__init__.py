"""Chapter 3: the cache, heads that share it, and windows."""
