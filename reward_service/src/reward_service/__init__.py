"""Private HTTP shell around `regime_w`: keys, limits, strict parsing, micro-batches, constant errors."""
