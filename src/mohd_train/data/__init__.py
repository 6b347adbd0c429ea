"""Raw text -> prepared shards (`prepare`, `verify`) -> the batches of a run (`streaming`)."""
