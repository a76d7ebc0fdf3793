"""What trains, how fast, on which data: stages in order, and the LightningModules that run them.

``vlmlab.recipe.stage`` never imports torch, so that a wrong recipe is refused in an instant.
"""
