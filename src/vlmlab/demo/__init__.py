"""``vlmlab demo``: one or two finished runs in a browser, side by side."""
