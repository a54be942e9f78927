"""What lies on disk: folders written whole, the tables and the manifest of a run."""
