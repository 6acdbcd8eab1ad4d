"""A replication of HEED: density-weighted residual alignment for distilling vision-language models into hybrids."""
__version__ = "0.1.0"
