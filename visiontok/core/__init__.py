"""The contract: maps, state, signals, reducers, plans, patching. Knows no method and no model family."""
