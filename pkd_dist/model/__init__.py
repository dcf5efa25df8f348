"""Layer maps, the forward pass that distillation needs, and how a student comes into being."""
