"""Tables, number formats and pictures. Knows no record."""
