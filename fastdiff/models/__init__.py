"""What is trained: denoisers, the families they come from, teachers, and the roles of a method."""
