"""Small helpers that know nothing of swarms: files, threads, chunks of tensors, checksums, timing."""
