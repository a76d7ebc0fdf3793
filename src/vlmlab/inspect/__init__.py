"""What a stage's model will see of its data, and what is wrong with the data. Importing this loads no torch."""
