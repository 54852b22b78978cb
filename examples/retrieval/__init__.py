"""Train, look at, search and export embeddings for retrieval: an application of pml_pnp."""
