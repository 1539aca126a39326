"""Raw text to shards: documents -> token sequences -> masked copies -> one global shuffle -> HDF5 and a manifest."""
