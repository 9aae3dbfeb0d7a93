"""``--scheme auto``: measure what each candidate does to each weight, and choose by what the user wants to spend."""
