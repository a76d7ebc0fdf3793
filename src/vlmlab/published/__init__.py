"""Published vision-language models of transformers, taken apart into a run of the lab's own parts."""
