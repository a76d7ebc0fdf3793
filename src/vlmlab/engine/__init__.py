"""How a stage is run: its modules, optimizer, layers, shards, precision, proof and staged weights, and what they cost.

Planning, inspecting, exporting and loading build on this, never on the training run. Importing this loads no torch.
"""
