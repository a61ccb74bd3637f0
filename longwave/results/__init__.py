"""What runs come to: grids of them, pages and tables of their numbers."""
