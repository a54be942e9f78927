"""What runs and sweeps come to: summaries with intervals, differences between methods, what atoms are for."""
