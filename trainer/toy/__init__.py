"""Small problems to look at and to measure, in the plane and on a line."""
