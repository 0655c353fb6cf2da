"""Tools of the workshop: what is run from a checkout, and is no part of the installed package."""
