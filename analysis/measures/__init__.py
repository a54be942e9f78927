"""Measures as pure functions of arrays: forgetting, routing, hierarchies of intervals, clusters, fronts."""
