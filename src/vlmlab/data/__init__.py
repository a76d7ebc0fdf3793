"""Where samples come from and how they become batches: the embedded world, readers of real files, chat, collation."""
