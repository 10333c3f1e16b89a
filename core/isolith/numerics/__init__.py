"""Mathematics that several operators' references share: number formats, paged pools, ragged batches, tables."""
