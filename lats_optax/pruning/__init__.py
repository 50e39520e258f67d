"""The life of a sparse run: its phases, its states, its progress and its end."""
