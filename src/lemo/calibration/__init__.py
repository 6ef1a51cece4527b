"""`lemo calibrate`: from a model and a sample of data to what `forward` mode needs. Imports no torch by itself."""
