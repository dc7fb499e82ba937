"""activation(gate) * up."""
