"""The servers whose clients are answered: one module each. resolve.py tells them apart."""
