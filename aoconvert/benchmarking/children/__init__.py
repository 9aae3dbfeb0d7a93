"""Programs for fresh interpreters. They import nothing of aoconvert: they see what a user's machine would see."""
