"""KV compression, indexing, sparse and latent attention, caches."""
