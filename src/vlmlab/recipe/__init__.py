"""What a recipe says: what trains, how fast, on which data, in stages in order.

Never imports torch, so that a wrong recipe is refused in an instant.
"""
