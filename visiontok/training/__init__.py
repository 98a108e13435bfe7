"""Training with a reduction in place: the loop, its data, distillation and training-time masking."""
