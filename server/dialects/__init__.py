"""The servers whose clients this server answers, with one module each. resolve.py chooses among them."""
