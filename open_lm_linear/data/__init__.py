"""Token data: text -> shards (``prepare``) -> an exactly resumable stream of batches (``stream``)."""
