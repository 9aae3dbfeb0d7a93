"""A Hugging Face Hub on loopback, its stores for LFS and Xet, a client for them, and their own tests."""
