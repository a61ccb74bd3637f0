"""What official code computes and longwave would not: mistakes, circles, cuts. Their weights ask for the same."""
