"""Export: a student becomes a folder that plain diffusers loads."""
