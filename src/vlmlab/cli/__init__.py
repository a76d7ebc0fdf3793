"""The commands: composition, rules, one-sentence errors. Imports torch only when there is something to train."""
