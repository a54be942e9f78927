"""What a sweep is made of: the file (plan, checks), the directory (loop), and the processes that run it (cells)."""
