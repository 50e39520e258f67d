"""Checks of what users give: each error names the argument, the value and what is allowed."""
