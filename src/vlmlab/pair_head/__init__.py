"""What compares the two towers of a pair, where that is not their pooled outputs; one file a choice."""
