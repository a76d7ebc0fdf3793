"""The vision-language model, put together from its parts. Importing this folder alone loads no torch."""
