"""One module per op, each with a list ENTRIES; the gate takes whatever it finds here."""
