"""Test rows to answers, scores and routes; and what makes that fast: shared passes and the answer cache."""
