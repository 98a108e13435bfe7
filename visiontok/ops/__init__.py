"""Pure functions on tensors: matching, merging, scoring. No modules, no state, no backbone."""
