"""What a recipe needs before it runs, and what helps where it does not fit. Importing this loads no torch."""
