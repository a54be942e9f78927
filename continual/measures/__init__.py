"""Pure functions of arrays that a run and its report both need; numpy alone."""
