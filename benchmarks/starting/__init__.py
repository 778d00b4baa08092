"""What `benchmarks/starts.py` is made of: sources, arms, units and the report."""
