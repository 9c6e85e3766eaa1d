"""Other libraries' models on attnreg. Each module is one library, which is imported where its module is."""
