"""How samples become batches: the embedded world, readers of real files, mixing, order, chat, collation."""
