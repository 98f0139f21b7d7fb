"""What the operation is: the primitive, its rules, its definition and its public functions."""
