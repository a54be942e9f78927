"""The growing bank: slices of atoms, the gate that chooses one for each row, and its folder on disk."""
