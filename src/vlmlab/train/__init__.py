"""How a run trains: stages through Lightning, checkpoints, resuming, proofs, cost. Importing this loads no torch."""
