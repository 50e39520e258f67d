"""Everything that draws. It takes plain values, and imports matplotlib within its functions."""
