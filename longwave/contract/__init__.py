"""What every task and every mixer keeps, as functions that anyone can run on an own class: `longwave check`."""
