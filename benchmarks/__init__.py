"""What fastft costs, and what it saves: see README.md in this folder."""
